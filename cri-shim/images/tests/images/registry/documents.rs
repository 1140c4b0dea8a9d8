//! Tests with the memory and the time for the documents of several pulls.

use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::Duration;

use futures_util::FutureExt;
use futures_util::future::select_all;
use libtest_mimic::Trial;
use rrun_images::{ImageSettings, Kind};
use serde_json::json;

use super::{failure, noisy, simple};
use crate::build::{Failure, Image, image};
use crate::node::Node;
use crate::server::{Answer, Server};
use crate::trial;

pub(crate) fn trials() -> Vec<Trial> {
    vec![
        trial(
            "the_documents_of_all_pulls_have_a_common_limit",
            common_limit,
        ),
        trial(
            "an_index_occupies_no_memory_after_the_manifest_was_chosen",
            index_is_dropped,
        ),
        trial(
            "a_pull_without_a_caller_ends_before_its_layers_are_known",
            without_a_caller,
        ),
        trial("a_document_that_arrives_too_late_fails_the_pull", too_late),
    ]
}

const MIB: usize = 1 << 20;

/// Returns a node on which all documents together have 8 MiB.
fn small_node() -> Result<Node, Failure> {
    Node::with(ImageSettings {
        document_bytes: 8 << 20,
        ..ImageSettings::default()
    })
}

/// Returns an answer of which only the first `length` bytes arrive during the test.
fn stalls_after(length: usize) -> Answer {
    let mut answer = Answer::new(200, vec![b' '; 8 * MIB]);
    (answer.piece, answer.slow) = (length, Duration::from_secs(600));
    answer
}

/// Returns an image whose configuration has more than `length` bytes.
fn large(length: usize) -> Image {
    let labels = json!({ "Labels": { "long": "x".repeat(length) } });
    image(&[noisy("a", 1000)], labels)
}

async fn common_limit() -> Result<(), Failure> {
    let hostile = Server::start(&[], |_| Some(stalls_after(4 * MIB)))?;
    let built = large(3 * MIB);
    let good = Server::start(&[("app", &built)], |_| None)?;
    let node = small_node()?;
    let names: Vec<_> = (0..3)
        .map(|number| format!("{}/app{number}:1", hostile.host()))
        .collect();
    let pulls = names
        .iter()
        .map(|name| node.images.pull(name, None).boxed());
    let (first, _, others) = select_all(pulls).await;
    let error = first
        .err()
        .ok_or("the pull succeeded, although it must fail")?;
    assert_eq!(error.kind(), Kind::ResourceExhausted, "{error}");
    assert!(
        error.to_string().contains("image.document_bytes"),
        "{error}"
    );
    // The documents of the hostile registry give way to a document of another registry.
    node.images
        .pull(&format!("{}/app:1", good.host()), None)
        .await?;
    drop(others);
    Ok(())
}

async fn index_is_dropped() -> Result<(), Failure> {
    let built = large(5 * MIB);
    let architecture = match std::env::consts::ARCH {
        "x86_64" => "amd64",
        _ => "arm64",
    };
    let index = json!({"schemaVersion": 2, "padding": "x".repeat(5 * MIB), "manifests": [
        {"digest": built.manifest, "size": 1,
         "platform": {"os": "linux", "architecture": architecture}},
    ]});
    let index = index.to_string();
    let server = Server::start(&[("app", &built)], move |request| {
        let hit = request.path.ends_with("manifests/many");
        hit.then(|| Answer::new(200, index.clone()))
    })?;
    let node = small_node()?;
    let name = format!("{}/app:many", server.host());
    assert_eq!(node.images.pull(&name, None).await?.id, built.id);
    Ok(())
}

async fn without_a_caller() -> Result<(), Failure> {
    static ENDED: AtomicUsize = AtomicUsize::new(0);
    let built = simple();
    let node = Node::new()?;
    node.images.on_pull_end(|_| {
        ENDED.fetch_add(1, Ordering::SeqCst);
    });
    for (round, slow) in ["/manifests/".to_owned(), built.id.clone()]
        .iter()
        .enumerate()
    {
        let part = slow.clone();
        let server = Server::start(&[("app", &built)], move |request| {
            request.path.contains(&part).then(|| stalls_after(1))
        })?;
        let name = format!("{}/app:1", server.host());
        let mut pull = node.images.pull(&name, None).boxed();
        while server.count(slow) == 0 {
            assert!((&mut pull).now_or_never().is_none());
            tokio::time::sleep(Duration::from_millis(10)).await;
        }
        assert_eq!(ENDED.load(Ordering::SeqCst), round);
        drop(pull);
        while ENDED.load(Ordering::SeqCst) == round {
            tokio::time::sleep(Duration::from_millis(10)).await;
        }
    }
    Ok(())
}

async fn too_late() -> Result<(), Failure> {
    let built = simple();
    let server = Server::start(&[("app", &built)], |_| {
        Some(Answer::new(200, vec![b' '; MIB]).dripping(Duration::from_millis(20)))
    })?;
    let node = Node::with(ImageSettings {
        document_seconds: 1,
        ..ImageSettings::default()
    })?;
    let error = failure(&node, &format!("{}/app:1", server.host())).await?;
    assert_eq!(error.kind(), Kind::Unavailable, "{error}");
    assert!(
        error.to_string().contains("image.document_seconds"),
        "{error}"
    );
    assert!(error.to_string().contains(&server.host()), "{error}");
    assert_eq!(server.count("manifests"), 1);
    Ok(())
}
