//! Tests with registries that answer with an error status or are unreachable, and of the mirrors that
//! are tried instead.

use std::sync::atomic::{AtomicUsize, Ordering};

use libtest_mimic::Trial;
use rrun_images::Kind;

use super::{failure, simple};
use crate::build::Failure;
use crate::node::{Node, free_port};
use crate::server::{Answer, Server};
use crate::trial;

pub(crate) fn trials() -> Vec<Trial> {
    vec![
        trial(
            "each_http_error_status_has_its_error_kind_and_message",
            refusals,
        ),
        trial("an_unreachable_registry_is_reported_as_unavailable", dead),
        trial("requests_to_a_busy_registry_are_repeated", busy),
        trial("mirrors_are_tried_in_order", mirrors),
    ]
}

async fn refusals() -> Result<(), Failure> {
    let node = Node::new()?;
    let built = simple();
    let server = Server::start(&[("app", &built)], |request| {
        let status = request
            .path
            .split("/status")
            .nth(1)?
            .get(..3)?
            .parse()
            .ok()?;
        Some(Answer::new(
            status,
            r#"{"errors":[{"code":"DENIED","message":"not\nfor you"}]}"#,
        ))
    })?;
    let host = server.host();
    for (status, kind) in [
        (401, Kind::Unauthenticated),
        (403, Kind::PermissionDenied),
        (404, Kind::NotFound),
    ] {
        let error = failure(&node, &format!("{host}/status{status}:1")).await?;
        assert_eq!(error.kind(), kind, "{error}");
        let text = error.to_string();
        assert!(
            text.contains("not for you") && text.contains(&host),
            "{text}"
        );
        assert!(text.contains(&status.to_string()), "{text}");
    }
    let error = failure(&node, &format!("{host}/app:2")).await?;
    assert_eq!(error.kind(), Kind::NotFound);
    assert!(error.to_string().contains("manifest unknown"), "{error}");
    let error = node.images.pull("Not A Name", None).await;
    assert!(error.is_err_and(|e| e.kind() == Kind::InvalidArgument));
    Ok(())
}

async fn dead() -> Result<(), Failure> {
    let node = Node::new()?;
    let error = failure(&node, &format!("127.0.0.1:{}/app:1", free_port()?)).await?;
    assert_eq!(error.kind(), Kind::Unavailable, "{error}");
    assert!(error.to_string().contains("refused"), "{error}");
    Ok(())
}

async fn busy() -> Result<(), Failure> {
    let built = simple();
    let tries = AtomicUsize::new(0);
    let server = Server::start(&[("app", &built)], move |_| {
        match tries.fetch_add(1, Ordering::Relaxed) {
            0 => Some(Answer::new(429, "").header("Retry-After", "1")),
            1 => Some(Answer::new(503, "<html>busy</html>")),
            _ => None,
        }
    })?;
    let node = Node::new()?;
    node.images
        .pull(&format!("{}/app:1", server.host()), None)
        .await?;
    // This server answers every request with an error status.
    let server = Server::start(&[], |_| Some(Answer::new(500, "")))?;
    let node = Node::new()?;
    let error = failure(&node, &format!("{}/app:1", server.host())).await?;
    assert_eq!(error.kind(), Kind::Unavailable, "{error}");
    assert!(server.seen().len() < 10);
    Ok(())
}

async fn mirrors() -> Result<(), Failure> {
    let built = simple();
    let empty = Server::start(&[], |_| None)?;
    let server = Server::start(&[("library/app", &built)], |_| None)?;
    let node = Node::new()?;
    node.hosts(
        "docker.io",
        &format!(
            "server = \"http://127.0.0.1:{}\"\n[host.\"http://127.0.0.1:{}\"]\n[host.\"http://{}\"]\n[host.\"http://{}\"]\ncapabilities = [\"pull\", \"resolve\"]\n",
            free_port()?,
            free_port()?,
            empty.host(),
            server.host()
        ),
    )?;
    let image = node.images.pull("app:1", None).await?;
    assert_eq!(image.repo_tags, ["docker.io/library/app:1"]);
    assert!(
        server
            .seen()
            .iter()
            .all(|r| r.path.ends_with("?ns=docker.io"))
    );
    assert!(!empty.seen().is_empty());
    node.hosts("bad.example", "server = 7")?;
    let error = node.images.pull("bad.example/app", None).await;
    let message = error
        .err()
        .ok_or("an invalid hosts.toml was accepted")?
        .to_string();
    assert!(
        message.contains("bad.example/hosts.toml") && message.contains("line 1, server"),
        "{message}"
    );
    Ok(())
}
