//! Tests with registries that request a token or a password.

use std::time::Duration;

use libtest_mimic::Trial;
use rrun_images::{Auth, Kind};

use super::{failure, simple};
use crate::build::Failure;
use crate::node::Node;
use crate::server::{Answer, Server};
use crate::trial;

pub(crate) fn trials() -> Vec<Trial> {
    vec![
        trial(
            "bearer_tokens_are_fetched_and_invalid_tokens_are_refused",
            bearer,
        ),
        trial(
            "a_password_is_sent_when_the_registry_requests_it_and_is_never_in_an_error",
            basic,
        ),
        trial(
            "a_call_with_other_credentials_starts_its_own_pull",
            other_credentials,
        ),
    ]
}

async fn bearer() -> Result<(), Failure> {
    let built = simple();
    let token_server = Server::start(&[], |request| {
        let query = request.path.split('?').nth(1).unwrap_or_default();
        if query.contains("repository%3Along") {
            let token = "x".repeat(64 << 10);
            return Some(Answer::new(200, format!("{{\"token\":\"{token}\"}}")));
        }
        let token = if query.contains("repository%3Aapp%3Apull") && query.contains("service=here") {
            "good"
        } else {
            "bad\\nX-Evil: 1"
        };
        Some(Answer::new(
            200,
            format!("{{\"token\":\"{token}\",\"expires_in\":300}}"),
        ))
    })?;
    let realm = format!("http://{}/token", token_server.host());
    let server = Server::start(
        &[("app", &built), ("evil", &built), ("long", &built)],
        move |request| {
            if request.authorization.as_deref() == Some("Bearer good") {
                return None;
            }
            let challenge = format!("Bearer realm=\"{realm}\",service=\"here\"");
            Some(Answer::new(401, "").header("WWW-Authenticate", challenge))
        },
    )?;
    let node = Node::new()?;
    // A token that is not a valid header value must cause an error and not a panic.
    let error = failure(&node, &format!("{}/evil:1", server.host())).await?;
    assert!(error.to_string().contains("token"), "{error}");
    // The pull would keep a long token in memory.
    let error = failure(&node, &format!("{}/long:1", server.host())).await?;
    assert!(
        error.to_string().contains("limit of 65536 bytes"),
        "{error}"
    );
    node.images
        .pull(&format!("{}/app:1", server.host()), None)
        .await?;
    assert_eq!(token_server.seen().len(), 3);
    // A bearer token from the caller is sent to the registry unchanged.
    let node = Node::new()?;
    let auth = Some(Auth::bearer("good"));
    node.images
        .pull(&format!("{}/app:1", server.host()), auth)
        .await?;
    Ok(())
}

async fn basic() -> Result<(), Failure> {
    let built = simple();
    let server = Server::start(&[("app", &built)], |request| {
        match request.authorization.as_deref() {
            // `bWU6c2VzYW1l` is the base64 form of `me:sesame`.
            Some("Basic bWU6c2VzYW1l") => None,
            _ => Some(Answer::new(401, "").header("WWW-Authenticate", "Basic realm=\"r\"")),
        }
    })?;
    let reference = format!("{}/app:1", server.host());
    let node = Node::new()?;
    let with = |password: &str| Auth::from_cri("me", password, "", "", "", "");
    let error = failure(&node, &reference).await?;
    assert_eq!(error.kind(), Kind::Unauthenticated, "{error}");
    let Err(error) = node.images.pull(&reference, with("wrong-word")?).await else {
        return Err("the registry accepted a wrong password".into());
    };
    assert_eq!(error.kind(), Kind::Unauthenticated, "{error}");
    assert!(!error.to_string().contains("wrong-word"));
    node.images.pull(&reference, with("sesame")?).await?;
    Ok(())
}

async fn other_credentials() -> Result<(), Failure> {
    let built = simple();
    let server = Server::start(&[("app", &built)], |request| {
        std::thread::sleep(Duration::from_millis(30));
        match request.authorization {
            Some(_) => None,
            None => Some(Answer::new(401, "").header("WWW-Authenticate", "Basic")),
        }
    })?;
    let reference = format!("{}/app:1", server.host());
    let node = Node::new()?;
    let known = node
        .images
        .pull(&reference, Auth::from_cri("me", "x", "", "", "", "")?);
    let stranger = node.images.pull(&reference, None);
    let (known, stranger) = tokio::join!(known, stranger);
    known?;
    assert!(stranger.is_err());
    Ok(())
}
