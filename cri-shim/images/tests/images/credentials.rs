//! Tests that only the permitted servers receive credentials.

use libtest_mimic::Trial;
use rrun_images::{Auth, Kind};

use crate::build::Failure;
use crate::lies::{failure, simple};
use crate::node::Node;
use crate::server::{Answer, Server};
use crate::trial;

pub(crate) fn trials() -> Vec<Trial> {
    vec![
        trial(
            "a_redirected_request_sends_no_credentials_to_another_host",
            redirected,
        ),
        trial(
            "an_identity_token_is_sent_only_to_the_token_server",
            identity,
        ),
        trial("credentials_for_another_server_are_not_sent", for_another),
    ]
}

async fn redirected() -> Result<(), Failure> {
    let built = simple();
    let store = Server::start(&[("app", &built)], |_| None)?;
    let elsewhere = store.host();
    let server = Server::start(&[("app", &built)], move |request| {
        if request.authorization.is_none() {
            return Some(Answer::new(401, "").header("WWW-Authenticate", "Basic realm=\"r\""));
        }
        let to = format!("http://{elsewhere}{}", request.path);
        let hit = request.path.contains("/blobs/");
        hit.then(|| Answer::new(307, "").header("Location", to))
    })?;
    let node = Node::new()?;
    node.hosts(
        &server.host(),
        &format!(
            "server = \"http://{}\"\n[header]\nx-secret = \"sesame\"\n",
            server.host()
        ),
    )?;
    let auth = Auth::from_cri("me", "sesame", "", "", "", "")?;
    let reference = format!("{}/app:1", server.host());
    node.images.pull(&reference, auth).await?;
    assert!(server.seen().iter().all(|request| {
        let secret = ("x-secret".to_owned(), "sesame".to_owned());
        request.headers.contains(&secret)
    }));
    assert_eq!(store.count("/blobs/"), 3);
    for request in store.seen() {
        assert_eq!(request.authorization, None);
        let leaked = request.headers.iter().any(|(name, _)| name == "x-secret");
        assert!(!leaked, "{:?}", request.headers);
    }
    // The registry redirects the request to itself again and again, or to an address that must be
    // refused.
    for to in ["/v2/app/manifests/1", "file:///etc/passwd", "http://[", ""] {
        let server = Server::start(&[], move |_| {
            Some(Answer::new(302, "").header("Location", to))
        })?;
        let node = Node::new()?;
        let error = failure(&node, &format!("{}/app:1", server.host())).await?;
        assert_eq!(error.kind(), Kind::Unavailable, "{error}");
        assert!(
            error
                .to_string()
                .contains("the server redirects the request"),
            "{error}"
        );
    }
    Ok(())
}

async fn identity() -> Result<(), Failure> {
    let built = simple();
    let token_server = Server::start(&[], |request| {
        let form = &request.body;
        let good = form.contains("grant_type=refresh_token")
            && form.contains("refresh_token=se%2Bsame")
            && form.contains("service=here")
            && form.contains("scope=repository%3Aapp%3Apull");
        Some(if good {
            Answer::new(200, r#"{"access_token":"good"}"#)
        } else {
            Answer::new(400, "")
        })
    })?;
    let realm = format!("http://{}/token", token_server.host());
    let server = Server::start(&[("app", &built)], move |request| {
        if request.authorization.as_deref() == Some("Bearer good") {
            return None;
        }
        let challenge = format!("Bearer realm=\"{realm}\",service=\"here\"");
        Some(Answer::new(401, "").header("WWW-Authenticate", challenge))
    })?;
    let node = Node::new()?;
    let auth = Auth::from_cri("", "", "", "se+same", "", "")?;
    let reference = format!("{}/app:1", server.host());
    node.images.pull(&reference, auth).await?;
    assert!(
        server
            .seen()
            .iter()
            .all(|r| !r.headers.iter().any(|(_, value)| value.contains("same")))
    );
    assert!(token_server.seen().iter().all(|r| !r.path.contains("same")));
    Ok(())
}

async fn for_another() -> Result<(), Failure> {
    let built = simple();
    let server = Server::start(&[("app", &built)], |request| match request.authorization {
        Some(_) => None,
        None => Some(Answer::new(401, "").header("WWW-Authenticate", "Basic")),
    })?;
    let reference = format!("{}/app:1", server.host());
    let node = Node::new()?;
    let auth = |server: &str| Auth::from_cri("me", "sesame", "", "", "", server);
    let pulled = node.images.pull(&reference, auth("other.example")?).await;
    assert!(pulled.is_err_and(|error| error.kind() == Kind::Unauthenticated));
    assert!(server.seen().iter().all(|r| r.authorization.is_none()));
    let address = format!("http://{}/v2/", server.host());
    node.images.pull(&reference, auth(&address)?).await?;
    Ok(())
}
