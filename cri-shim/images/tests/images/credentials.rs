//! Tests that only the permitted servers receive credentials.

use libtest_mimic::Trial;
use rrun_images::{Auth, ImageSettings, Kind};

use crate::build::Failure;
use crate::node::Node;
use crate::registry::{failure, simple};
use crate::server::{Answer, Request, Server};
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
        trial(
            "credentials_are_not_sent_without_tls_to_another_host",
            without_tls,
        ),
        trial(
            "a_mirror_gets_only_its_own_headers_and_credentials_that_it_requests",
            mirror,
        ),
        trial("an_error_contains_no_answer_of_another_host", quoted),
        trial(
            "a_registry_leads_to_no_metadata_service_or_link_local_address",
            led,
        ),
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

async fn without_tls() -> Result<(), Failure> {
    let server = Server::start(&[], |_| {
        let challenge = "Bearer realm=\"http://auth.invalid/token\"";
        Some(Answer::new(401, "").header("WWW-Authenticate", challenge))
    })?;
    let reference = format!("{}/app:1", server.host());
    for auth in [
        Auth::from_cri("me", "sesame", "", "", "", "")?,
        Auth::from_cri("", "", "", "sesame", "", "")?,
    ] {
        let node = Node::new()?;
        let Err(error) = node.images.pull(&reference, auth.clone()).await else {
            return Err("the pull succeeded".into());
        };
        let text = error.to_string();
        assert!(
            text.contains("image.plain_token_servers is not set"),
            "{text}"
        );
        // With this setting, or without credentials, the server tries to resolve the name.
        let settings = ImageSettings {
            plain_token_servers: true,
            ..ImageSettings::default()
        };
        let allowed = Node::with(settings)?.images.pull(&reference, auth).await;
        for pulled in [allowed, node.images.pull(&reference, None).await] {
            let text = pulled.err().map(|error| error.to_string());
            assert!(
                text.as_ref()
                    .is_some_and(|text| text.contains("auth.invalid: connect")),
                "{text:?}"
            );
        }
    }
    Ok(())
}

async fn mirror() -> Result<(), Failure> {
    let built = simple();
    let store = Server::start(&[("app", &built)], |_| None)?;
    let elsewhere = store.host();
    let mirror = Server::start(&[("app", &built)], move |request| {
        if request.authorization.is_none() {
            return Some(Answer::new(401, "").header("WWW-Authenticate", "Basic"));
        }
        let to = format!("http://{elsewhere}{}", request.path);
        let hit = request.path.contains("/blobs/");
        hit.then(|| Answer::new(307, "").header("Location", to))
    })?;
    let open = Server::start(&[], |_| None)?;
    let server = Server::start(&[("app", &built)], |_| None)?;
    let node = Node::new()?;
    node.hosts(
        "r.example",
        &format!(
            "server = \"http://{}\"\n[header]\nx-secret = \"server\"\n\
             [host.\"http://{}\"]\n[host.\"http://{}\".header]\nx-secret = \"mirror\"\n",
            server.host(),
            open.host(),
            mirror.host()
        ),
    )?;
    // As in containerd, a mirror gets the credentials of the registry, but only if it requests them.
    let auth = Auth::from_cri("me", "sesame", "", "", "", "")?;
    node.images.pull("r.example/app:1", auth.clone()).await?;
    let secrets = |server: &Server| {
        let all = server.seen().into_iter().flat_map(|r| r.headers);
        let mut all: Vec<String> = all
            .filter(|(name, _)| name == "x-secret" || name == "authorization")
            .map(|(_, value)| value)
            .collect();
        all.dedup();
        all
    };
    assert_eq!(secrets(&mirror)[..2], ["mirror", "Basic bWU6c2VzYW1l"]);
    assert!(!open.seen().is_empty() && secrets(&open).is_empty());
    assert_eq!(store.count("/blobs/"), 3);
    assert!(secrets(&store).is_empty(), "{:?}", secrets(&store));
    assert!(server.seen().is_empty());
    // Credentials for another mirror are not sent.
    let auth = Auth::from_cri("me", "sesame", "", "", "", "m.example")?;
    node.images.pull("r.example/app:1", auth).await?;
    assert!(secrets(&server).iter().all(|secret| secret == "server"));
    Ok(())
}

/// Returns the error of a pull from `server` without credentials.
async fn message(server: &Server) -> Result<String, Failure> {
    let node = Node::new()?;
    let error = failure(&node, &format!("{}/app:1", server.host())).await?;
    Ok(error.to_string())
}

async fn quoted() -> Result<(), Failure> {
    let built = simple();
    let body = |status| {
        let text = r#"{"schemaVersion":"hunter2","errors":[{"message":"hunter2"}]}"#;
        Answer::new(status, text)
    };
    let refusing = Server::start(&[], move |_| Some(body(403)))?;
    let other = Server::start(&[], move |_| Some(body(200)))?;
    let challenge = |host: String| {
        move |_: &Request| {
            let challenge = format!("Bearer realm=\"http://{host}/token\"");
            Some(Answer::new(401, "").header("WWW-Authenticate", challenge))
        }
    };
    let redirect = |host: String, part: &'static str| {
        move |request: &Request| {
            let to = format!("http://{host}/internal-admin");
            let hit = request.path.contains(part);
            hit.then(|| Answer::new(307, "").header("Location", to))
        }
    };
    let app = [("app", &built)];
    for (server, expected) in [
        (
            Server::start(&app, redirect(refusing.host(), "/blobs/"))?,
            "403 Forbidden",
        ),
        (
            Server::start(&app, redirect(refusing.host(), "/manifests/"))?,
            "403 Forbidden",
        ),
        (
            Server::start(&app, redirect(other.host(), "/manifests/"))?,
            "the manifest can't be read: invalid type at line 1",
        ),
        (
            Server::start(&app, challenge(refusing.host()))?,
            "403 Forbidden",
        ),
        (
            Server::start(&app, challenge(other.host()))?,
            "without a valid token",
        ),
    ] {
        let text = message(&server).await?;
        assert!(text.contains(expected), "{text}");
        assert!(!text.contains("hunter2"), "{text}");
    }
    assert!(refusing.count("/internal-admin") > 0);
    // The registry's own explanation is in the error.
    let text = message(&refusing).await?;
    assert!(text.contains("403 Forbidden: hunter2"), "{text}");
    Ok(())
}

async fn led() -> Result<(), Failure> {
    for host in [
        "169.254.169.254",
        "2852039166",
        "[fe80::1]",
        "[::ffff:a9fe:a9fe]",
        "[fd00:ec2::254]",
    ] {
        let redirecting = Server::start(&[], move |_| {
            let to = format!("http://{host}/latest/meta-data/");
            Some(Answer::new(302, "").header("Location", to))
        })?;
        let challenging = Server::start(&[], move |_| {
            let challenge = format!("Bearer realm=\"http://{host}/latest/api/token\"");
            Some(Answer::new(401, "").header("WWW-Authenticate", challenge))
        })?;
        for server in [redirecting, challenging] {
            let text = message(&server).await?;
            assert!(
                text.contains("metadata service, and image.local_redirects is not set"),
                "{text}"
            );
            assert_eq!(server.seen().len(), 1);
        }
    }
    Ok(())
}
