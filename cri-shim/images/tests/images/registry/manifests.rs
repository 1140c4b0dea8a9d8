//! Tests with manifests, indexes and configurations that are large, or contain wrong data.

use libtest_mimic::Trial;
use rrun_images::{ImageError, ImageSettings, Kind};
use serde_json::json;

use super::{failure, noisy, simple};
use crate::build::{Failure, digest, image};
use crate::node::Node;
use crate::server::{Answer, Server};
use crate::trial;

pub(crate) fn trials() -> Vec<Trial> {
    vec![
        trial(
            "wrong_digests_fail_the_pull_and_leave_no_files",
            wrong_digests,
        ),
        trial("too_large_documents_are_refused", documents),
        trial("an_index_yields_the_image_for_this_machine", index),
        trial(
            "a_layer_with_an_impossible_size_is_refused_before_its_download",
            impossible_size,
        ),
        trial(
            "a_configuration_with_too_many_bytes_is_refused_and_labels_occupy_no_memory",
            configurations,
        ),
        trial(
            "an_image_with_too_many_layers_is_refused_before_their_download",
            too_many_layers,
        ),
        trial(
            "a_large_configuration_is_on_the_disk_and_its_size_is_reported",
            large_configuration,
        ),
    ]
}

async fn wrong_digests() -> Result<(), Failure> {
    let node = Node::new()?;
    // The registry sends the second layer with one changed bit.
    let built = simple();
    let layer = built.layers[1].clone();
    let mut other = built.blobs[1].clone();
    let middle = other.len() / 2;
    other[middle] ^= 1;
    let server = Server::start(&[("app", &built)], move |request| {
        let hit = request.path.ends_with(&layer);
        hit.then(|| Answer::new(200, other.clone()).ranged(request))
    })?;
    let error = failure(&node, &format!("{}/app:1", server.host())).await?;
    assert_eq!(error.kind(), Kind::DataLoss, "{error}");
    assert!(error.to_string().contains("digest"), "{error}");
    // The image's configuration contains a wrong diff ID.
    let mut lying = simple();
    let config = lying.blobs.len() - 2;
    let text = String::from_utf8(lying.blobs[config].clone())?;
    let text = text.replace(&digest(&noisy("a", 300_000).0), &digest(b"else"));
    let manifest = String::from_utf8(lying.blobs[config + 1].clone())?
        .replace(&lying.id, &digest(text.as_bytes()));
    lying.blobs[config] = text.into_bytes();
    lying.manifest = digest(manifest.as_bytes());
    lying.blobs[config + 1] = manifest.into_bytes();
    let server = Server::start(&[("app", &lying)], |_| None)?;
    let error = failure(&node, &format!("{}/app:1", server.host())).await?;
    assert_eq!(error.kind(), Kind::DataLoss, "{error}");
    // The reference names the manifest's digest, but the registry sends another manifest.
    let server = Server::start(&[("app", &built)], |request| {
        let hit = request.path.contains("manifests");
        hit.then(|| Answer::new(200, "{}"))
    })?;
    let reference = format!("{}/app@{}", server.host(), built.manifest);
    let error = failure(&node, &reference).await?;
    assert_eq!(error.kind(), Kind::DataLoss, "{error}");
    Ok(())
}

async fn documents() -> Result<(), Failure> {
    let node = Node::new()?;
    let server = Server::start(&[], |_| Some(Answer::new(200, vec![b' '; 9 << 20])))?;
    let error = failure(&node, &format!("{}/app:1", server.host())).await?;
    assert!(error.to_string().contains("longer than"), "{error}");
    // The configuration that the registry sends is larger than its descriptor allows.
    let built = simple();
    let id = built.id.clone();
    let server = Server::start(&[("app", &built)], move |request| {
        let hit = request.path.ends_with(&id);
        hit.then(|| Answer::new(200, vec![b' '; 1 << 20]))
    })?;
    let error = failure(&node, &format!("{}/app:1", server.host())).await?;
    assert_eq!(error.kind(), Kind::DataLoss, "{error}");
    for nonsense in ["", "[]", "{}", "\u{0}", r#"{"schemaVersion":1}"#] {
        let server = Server::start(&[], move |_| Some(Answer::new(200, nonsense)))?;
        failure(&node, &format!("{}/app:1", server.host())).await?;
    }
    Ok(())
}

async fn index() -> Result<(), Failure> {
    let built = simple();
    let architecture = match std::env::consts::ARCH {
        "x86_64" => "amd64",
        _ => "arm64",
    };
    let entry = |os: &str, architecture: &str, digest: &str| {
        json!({"mediaType": "application/vnd.oci.image.manifest.v1+json", "size": 1,
               "digest": digest, "platform": {"os": os, "architecture": architecture}})
    };
    let list = json!({"schemaVersion": 2, "manifests": [
        entry("unknown", "unknown", &digest(b"attestation")),
        entry("linux", "s390x", &digest(b"another machine")),
        entry("linux", architecture, &built.manifest),
    ]})
    .to_string();
    let name = digest(list.as_bytes());
    let server = Server::start(&[("app", &built)], move |request| {
        let hit = request.path.ends_with("manifests/many");
        hit.then(|| Answer::new(200, list.clone()))
    })?;
    let node = Node::new()?;
    let host = server.host();
    let image = node.images.pull(&format!("{host}/app:many"), None).await?;
    assert_eq!(image.id, built.id);
    assert_eq!(image.repo_digests, [format!("{host}/app@{name}")]);
    Ok(())
}

async fn impossible_size() -> Result<(), Failure> {
    let mut lying = image(&[noisy("a", 1000)], json!({}));
    let manifest = lying.blobs.pop().ok_or("no manifest")?;
    let mut manifest: serde_json::Value = serde_json::from_slice(&manifest)?;
    manifest["layers"][0]["size"] = json!(1u64 << 62);
    lying.blobs.push(manifest.to_string().into_bytes());
    lying.manifest = digest(&lying.blobs[2]);
    let good = image(&[noisy("a", 1000)], json!({ "Cmd": ["good"] }));
    let server = Server::start(&[("lying", &lying), ("good", &good)], |_| None)?;
    let node = Node::new()?;
    // The layer is already on the node.
    let name = |name: &str| format!("{}/{name}:1", server.host());
    node.images.pull(&name("good"), None).await?;
    let error = node.images.pull(&name("lying"), None).await.err();
    let kind = error.as_ref().map(ImageError::kind);
    assert_eq!(kind, Some(Kind::ResourceExhausted), "{error:?}");
    Ok(())
}

async fn configurations() -> Result<(), Failure> {
    let layers = [noisy("a", 1000)];
    let labels: serde_json::Map<_, _> = (0..60_000)
        .map(|number| (format!("label-{number}"), json!("value")))
        .collect();
    let labelled = image(&layers, json!({ "Labels": labels }));
    let long = image(&layers, json!({ "Env": ["A=1".repeat(400)] }));
    let short = image(&layers, json!({ "Cmd": vec!["a"; 100] }));
    let images = [("labelled", &labelled), ("long", &long), ("short", &short)];
    let server = Server::start(&images, |_| None)?;
    let node = Node::with(ImageSettings {
        configuration_bytes: 1000,
        ..ImageSettings::default()
    })?;
    for name in ["long", "short"] {
        let error = failure(&node, &format!("{}/{name}:1", server.host())).await?;
        assert_eq!(error.kind(), Kind::ResourceExhausted, "{error}");
        assert!(error.to_string().contains("image.configuration_bytes"));
        assert_eq!(server.count(&long.layers[0]), 0);
    }
    let pulled = node
        .images
        .pull(&format!("{}/labelled:1", server.host()), None)
        .await?;
    let record = serde_json::to_string(&*pulled)?;
    assert!(record.len() < 10_000, "{} bytes", record.len());
    let whole = node.images.configuration(&pulled.id)?;
    assert!(whole.is_some_and(|whole| whole.get().contains("label-59999")));
    Ok(())
}

async fn too_many_layers() -> Result<(), Failure> {
    let layers = ["a", "b", "c"].map(|name| noisy(name, 1000));
    let (fits, large) = (image(&layers[..2], json!({})), image(&layers, json!({})));
    let server = Server::start(&[("fits", &fits), ("large", &large)], |_| None)?;
    let node = Node::with(ImageSettings {
        layers: 2,
        ..ImageSettings::default()
    })?;
    let error = failure(&node, &format!("{}/large:1", server.host())).await?;
    assert_eq!(error.kind(), Kind::ResourceExhausted, "{error}");
    let words = "the image has 3 layers, and the limit is 2 layers (image.layers)";
    assert!(error.to_string().contains(words), "{error}");
    assert_eq!(server.count(&large.layers[0]), 0);
    node.images
        .pull(&format!("{}/fits:1", server.host()), None)
        .await?;
    Ok(())
}

async fn large_configuration() -> Result<(), Failure> {
    let env: Vec<_> = (0..15_000).map(|number| format!("A{number}=1")).collect();
    let config = json!({ "Env": env, "User": "7", "Cmd": ["x"], "StopSignal": "SIGINT" });
    let large = image(&[], config);
    // Empty strings occupy memory, too.
    let empty = image(&[], json!({ "Env": vec![""; 15_000] }));
    let server = Server::start(&[("large", &large), ("empty", &empty)], |_| None)?;
    let node = Node::new()?;
    let before = node.images.fs_usage()?.bytes;
    for name in ["large", "empty"] {
        let name = format!("{}/{name}:1", server.host());
        node.images.pull(&name, None).await?;
    }
    let documents = (large.blobs[0].len() + large.blobs[1].len()) as u64;
    assert!(node.images.fs_usage()?.bytes >= before + documents);
    let node = node.restart()?;
    let found = |id: &str| node.images.find(id).ok_or("the image does not exist");
    let (large, empty) = (found(&large.id)?, found(&empty.id)?);
    assert!(large.config.env.is_empty() && large.config.user == "7");
    assert!(empty.config.env.is_empty());
    assert_eq!(node.images.bytes_of(&large), documents);
    let whole = node.images.complete(large)?;
    assert_eq!(whole.config.env, env);
    assert_eq!(whole.config.cmd, ["x"]);
    assert_eq!(whole.config.stop_signal.as_deref(), Some("SIGINT"));
    assert_eq!(node.images.complete(empty)?.config.env.len(), 15_000);
    Ok(())
}
