//! Tests of what pulls share: a pull in progress, and the layers of the node.

use std::time::Duration;

use libtest_mimic::Trial;
use serde_json::json;

use super::{noise, noisy, simple};
use crate::build::{Archive, Compression, Failure, image};
use crate::node::Node;
use crate::server::{Answer, Server};
use crate::trial;

pub(crate) fn trials() -> Vec<Trial> {
    vec![
        trial("a_shared_layer_is_fetched_once", shared),
        trial("a_pull_continues_after_its_caller_disconnects", abandoned),
        trial(
            "an_image_gets_a_layer_of_the_node_only_with_the_layers_blob",
            only_with_the_blob,
        ),
    ]
}

async fn shared() -> Result<(), Failure> {
    let one = image(&[noisy("base", 400_000), noisy("one", 1000)], json!({}));
    let two = image(&[noisy("base", 400_000), noisy("two", 1000)], json!({}));
    let layer = one.layers[0].clone();
    let whole = one.blobs[0].clone();
    let server = Server::start(&[("one", &one), ("two", &two)], move |request| {
        let mut answer = Answer::new(200, whole.clone());
        answer.slow = Duration::from_millis(10);
        request.path.ends_with(&layer).then_some(answer)
    })?;
    let node = Node::new()?;
    let (names, host) = (["one", "two"], server.host());
    let references = names.map(|name| format!("{host}/{name}:1"));
    let pulls = references.iter().map(|name| node.images.pull(name, None));
    for pulled in futures_util::future::join_all(pulls).await {
        pulled?;
    }
    assert_eq!(server.count(&one.layers[0]), 1);
    assert_eq!(node.leavings()?.len(), 3);
    node.images.remove(&references[0]).await?;
    node.comes_down_to(2).await
}

async fn abandoned() -> Result<(), Failure> {
    let built = simple();
    let server = Server::start(&[("app", &built)], |_| {
        std::thread::sleep(Duration::from_millis(50));
        None
    })?;
    let reference = format!("{}/app:1", server.host());
    let node = Node::new()?;
    {
        let mut pull = Box::pin(node.images.pull(&reference, None));
        while server.count(&built.layers[0]) == 0 {
            assert!(futures_util::poll!(&mut pull).is_pending());
            tokio::time::sleep(Duration::from_millis(1)).await;
        }
    }
    while node.images.find(&reference).is_none() {
        tokio::time::sleep(Duration::from_millis(10)).await;
    }
    assert_eq!(server.count("manifests"), 1);
    Ok(())
}

/// The images have the same layer, and their manifests name different blobs for it.
async fn only_with_the_blob() -> Result<(), Failure> {
    let archive = || Archive::new().file("secret", "content").end();
    let private = image(
        &[(archive(), Compression::Gzip)],
        json!({ "Cmd": ["private"] }),
    );
    let thief = image(
        &[(archive(), Compression::None)],
        json!({ "Cmd": ["thief"] }),
    );
    let same = image(
        &[(archive(), Compression::None)],
        json!({ "Cmd": ["same"] }),
    );
    let owner = Server::start(&[("private", &private)], |_| None)?;
    let (layer, length) = (thief.layers[0].clone(), archive().len());
    let evil = Server::start(&[("thief", &thief)], move |request| {
        // This answer is slow, because the owner's pull must not end this fetch, either.
        let mut answer = Answer::new(200, noise(length));
        (answer.slow, answer.piece) = (Duration::from_millis(100), length / 20);
        request.path.ends_with(&layer).then_some(answer)
    })?;
    let node = Node::new()?;
    let (images, stolen) = (node.images.clone(), format!("{}/thief:1", evil.host()));
    let name = stolen.clone();
    let during = tokio::spawn(async move { images.pull(&name, None).await.is_err() });
    while evil.count(&thief.layers[0]) == 0 {
        tokio::time::sleep(Duration::from_millis(10)).await;
    }
    let name = format!("{}/private:1", owner.host());
    node.images.pull(&name, None).await?;
    assert!(during.await?, "a pull got the layer during another pull");
    assert!(node.images.pull(&stolen, None).await.is_err());
    assert_eq!(node.images.list().len(), 1);
    // The layer is shared after the other blob was received, also after a restart.
    let images = [("thief", &thief), ("same", &same)];
    let good = Server::start(&images, |_| None)?;
    let pull = |name: &str| format!("{}/{name}:1", good.host());
    node.images.pull(&pull("thief"), None).await?;
    let node = node.restart()?;
    node.images.pull(&pull("same"), None).await?;
    assert_eq!(good.count(&thief.layers[0]), 1);
    node.images.pull(&name, None).await?;
    assert_eq!(owner.count(&private.layers[0]), 1);
    node.comes_down_to(1).await
}
