//! Tests with registries that break off connections, send wrong data, refuse requests, or are
//! unreachable.

use std::path::PathBuf;
use std::process::Command;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::Duration;

use libtest_mimic::Trial;
use rrun_images::{Auth, ImageError, ImageSettings, Kind};
use serde_json::json;

use crate::build::{Archive, Compression, Failure, ITEM, Image, Item, digest, image};
use crate::node::{Dir, Node, free_port, open};
use crate::server::{Answer, Server};
use crate::trial;

pub(crate) fn trials() -> Vec<Trial> {
    vec![
        trial("a_fetch_continues_where_the_connection_broke", breaks_off),
        trial(
            "a_blob_from_a_registry_without_range_requests_is_fetched",
            no_ranges,
        ),
        trial("a_blob_that_is_never_complete_fails_the_pull", never_whole),
        trial(
            "wrong_digests_fail_the_pull_and_leave_no_files",
            wrong_digests,
        ),
        trial(
            "each_http_error_status_has_its_error_kind_and_message",
            refusals,
        ),
        trial("an_unreachable_registry_is_reported_as_unavailable", dead),
        trial("requests_to_a_busy_registry_are_repeated", busy),
        trial("too_large_documents_are_refused", documents),
        trial(
            "bearer_tokens_are_fetched_and_invalid_tokens_are_refused",
            bearer,
        ),
        trial(
            "a_password_is_sent_when_the_registry_requests_it_and_is_never_in_an_error",
            basic,
        ),
        trial("mirrors_are_tried_in_order", mirrors),
        trial("a_shared_layer_is_fetched_once", shared),
        trial("a_pull_continues_after_its_caller_disconnects", abandoned),
        trial(
            "a_call_with_other_credentials_starts_its_own_pull",
            other_credentials,
        ),
        trial("an_index_yields_the_image_for_this_machine", index),
        trial(
            "a_configuration_with_too_many_bytes_is_refused_and_labels_occupy_no_memory",
            configurations,
        ),
        trial("a_decompression_bomb_is_stopped_at_the_limit", bomb),
        trial(
            "an_unlisted_directory_has_the_metadata_of_the_layer_below",
            implied,
        ),
        trial("a_slow_response_head_times_out", dripping_head),
        trial(
            "redirected_layers_count_towards_the_limit_of_their_new_host",
            sent_on,
        ),
        trial(
            "an_image_gets_a_layer_of_the_node_only_with_the_layers_blob",
            only_with_the_blob,
        ),
        trial(
            "a_layer_with_an_impossible_size_is_refused_before_its_download",
            impossible_size,
        ),
        trial(
            "a_large_configuration_is_on_the_disk_and_its_size_is_reported",
            large_configuration,
        ),
        trial("a_restart_removes_the_remains_of_a_killed_pull", killed),
        trial(
            "the_fetch_of_a_large_blob_continues_after_a_restart",
            resumed,
        ),
        trial("the_kept_bytes_of_broken_transfers_have_a_limit", limited),
        trial("a_corrupt_partial_blob_is_fetched_again", spoilt),
    ]
}

/// Returns bytes that can't be compressed. A blob with these bytes is large, so a test can break
/// off its transfer in the middle.
fn noise(length: usize) -> Vec<u8> {
    let mut state = 0x2545_f491_4f6c_dd1d_u64;
    (0..length)
        .map(|_| {
            state ^= state << 13;
            state ^= state >> 7;
            state ^= state << 17;
            (state >> 24) as u8
        })
        .collect()
}

fn noisy(name: &str, length: usize) -> (Vec<u8>, Compression) {
    let archive = Archive::new().item(&Item {
        path: name.as_bytes(),
        content: &noise(length),
        ..ITEM
    });
    (archive.end(), Compression::Gzip)
}

pub(crate) fn simple() -> Image {
    image(&[noisy("a", 300_000), noisy("b", 200_000)], json!({}))
}

pub(crate) async fn failure(node: &Node, reference: &str) -> Result<ImageError, Failure> {
    let Err(error) = node.images.pull(reference, None).await else {
        return Err("the pull succeeded, although it must fail".into());
    };
    node.becomes_clean().await?;
    assert!(node.images.list().is_empty());
    assert!(error.to_string().contains(reference), "{error}");
    Ok(error)
}

async fn breaks_off() -> Result<(), Failure> {
    let built = simple();
    let layer = built.layers[0].clone();
    let whole = built.blobs[0].clone();
    let server = Server::start(&[("app", &built)], move |request| {
        if !request.path.ends_with(&layer) || request.range.unwrap_or(0) > 200_000 {
            return None;
        }
        let mut answer = Answer::new(200, whole.clone()).ranged(request);
        answer.cut = Some(90_000);
        Some(answer)
    })?;
    let node = Node::new()?;
    let reference = format!("{}/app:1", server.host());
    node.images.pull(&reference, None).await?;
    let ranges: Vec<_> = server.seen().into_iter().filter_map(|r| r.range).collect();
    assert_eq!(ranges, [90_000, 180_000, 270_000]);
    Ok(())
}

async fn no_ranges() -> Result<(), Failure> {
    let built = simple();
    let layer = built.layers[0].clone();
    let whole = built.blobs[0].clone();
    let tries = AtomicUsize::new(0);
    let server = Server::start(&[("app", &built)], move |request| {
        if !request.path.ends_with(&layer) {
            return None;
        }
        let mut answer = Answer::new(200, whole.clone());
        match tries.fetch_add(1, Ordering::Relaxed) {
            0 => answer.cut = Some(100_000),
            1 => answer.cut = Some(200_000),
            _ => {}
        }
        Some(answer)
    })?;
    let node = Node::new()?;
    node.images
        .pull(&format!("{}/app:1", server.host()), None)
        .await?;
    assert_eq!(node.leavings()?.len(), 2);
    Ok(())
}

async fn never_whole() -> Result<(), Failure> {
    let built = simple();
    let layer = built.layers[0].clone();
    let whole = built.blobs[0].clone();
    let server = Server::start(&[("app", &built)], move |request| {
        if !request.path.ends_with(&layer) {
            return None;
        }
        // The server always sends only the beginning of the blob, even if the client requests
        // another range.
        let mut answer = Answer::new(200, whole.clone());
        answer.cut = Some(100_000);
        Some(answer)
    })?;
    let node = Node::new()?;
    let error = failure(&node, &format!("{}/app:1", server.host())).await?;
    assert_eq!(error.kind(), Kind::Unavailable, "{error}");
    Ok(())
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

async fn bearer() -> Result<(), Failure> {
    let built = simple();
    let token_server = Server::start(&[], |request| {
        let query = request.path.split('?').nth(1).unwrap_or_default();
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
    let server = Server::start(&[("app", &built), ("evil", &built)], move |request| {
        if request.authorization.as_deref() == Some("Bearer good") {
            return None;
        }
        let challenge = format!("Bearer realm=\"{realm}\",service=\"here\"");
        Some(Answer::new(401, "").header("WWW-Authenticate", challenge))
    })?;
    let node = Node::new()?;
    // A token that is not a valid header value must cause an error and not a panic.
    let error = failure(&node, &format!("{}/evil:1", server.host())).await?;
    assert!(error.to_string().contains("token"), "{error}");
    node.images
        .pull(&format!("{}/app:1", server.host()), None)
        .await?;
    assert_eq!(token_server.seen().len(), 2);
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
        assert!(futures_util::poll!(&mut pull).is_pending());
    }
    while node.images.find(&reference).is_none() {
        tokio::time::sleep(Duration::from_millis(10)).await;
    }
    assert_eq!(server.count("manifests"), 1);
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

async fn bomb() -> Result<(), Failure> {
    let archive = Archive::new().item(&Item {
        path: b"zeros",
        content: &vec![0; 16 << 20],
        ..ITEM
    });
    let built = image(&[(archive.end(), Compression::Gzip)], json!({}));
    let server = Server::start(&[("app", &built)], |_| None)?;
    let node = Node::with(ImageSettings {
        layer_bytes: 1 << 20,
        ..ImageSettings::default()
    })?;
    let error = failure(&node, &format!("{}/app:1", server.host())).await?;
    assert_eq!(error.kind(), Kind::ResourceExhausted, "{error}");
    Ok(())
}

async fn configurations() -> Result<(), Failure> {
    let layers = [noisy("a", 1000)];
    let labels: serde_json::Map<_, _> = (0..60_000)
        .map(|number| (format!("label-{number}"), json!("value")))
        .collect();
    let labelled = image(&layers, json!({ "Labels": labels }));
    let long = image(&layers, json!({ "Env": ["A=1".repeat(400)] }));
    let server = Server::start(&[("labelled", &labelled), ("long", &long)], |_| None)?;
    let node = Node::with(ImageSettings {
        configuration_bytes: 1000,
        ..ImageSettings::default()
    })?;
    let error = failure(&node, &format!("{}/long:1", server.host())).await?;
    assert_eq!(error.kind(), Kind::ResourceExhausted, "{error}");
    assert!(error.to_string().contains("image.configuration_bytes"));
    assert_eq!(server.count(&long.layers[0]), 0);
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

async fn large_configuration() -> Result<(), Failure> {
    let env: Vec<_> = (0..20_000).map(|number| format!("A{number}=1")).collect();
    let config = json!({ "Env": env, "User": "7", "Cmd": ["x"], "StopSignal": "SIGINT" });
    let large = image(&[], config);
    // Empty strings occupy memory, too.
    let empty = image(&[], json!({ "Env": vec![""; 20_000] }));
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
    assert_eq!(node.images.complete(empty)?.config.env.len(), 20_000);
    Ok(())
}

async fn sent_on() -> Result<(), Failure> {
    let layers: Vec<_> = (0..6).map(|n| noisy(&n.to_string(), 1000)).collect();
    let built = image(&layers, json!({}));
    let blobs: Vec<_> = built
        .layers
        .iter()
        .cloned()
        .zip(built.blobs.clone())
        .collect();
    let now = AtomicUsize::new(0);
    let most = Arc::new(AtomicUsize::new(0));
    let seen = Arc::clone(&most);
    let elsewhere = Server::start(&[], move |request| {
        let (_, blob) = blobs
            .iter()
            .find(|(name, _)| request.path.ends_with(name))?;
        seen.fetch_max(now.fetch_add(1, Ordering::SeqCst) + 1, Ordering::SeqCst);
        std::thread::sleep(Duration::from_millis(50));
        now.fetch_sub(1, Ordering::SeqCst);
        Some(Answer::new(200, blob.clone()))
    })?;
    let host = elsewhere.host();
    let names = built.layers.clone();
    let server = Server::start(&[("app", &built)], move |request| {
        let name = names.iter().find(|name| request.path.ends_with(*name))?;
        let there = format!("http://{host}/{name}");
        Some(Answer::new(307, "").header("Location", there))
    })?;
    let node = Node::with(ImageSettings {
        parallel_layers: 4,
        parallel_layers_per_host: Some(1),
        ..ImageSettings::default()
    })?;
    node.images
        .pull(&format!("{}/app:1", server.host()), None)
        .await?;
    assert_eq!(most.load(Ordering::SeqCst), 1);
    Ok(())
}

async fn dripping_head() -> Result<(), Failure> {
    let built = simple();
    let server = Server::start(&[("app", &built)], |request| {
        let mut answer = Answer::new(200, "").dripping(Duration::from_millis(200));
        answer.slow_head = true;
        request.path.contains("/blobs/").then_some(answer)
    })?;
    let node = Node::with(ImageSettings {
        silence_seconds: 1,
        ..ImageSettings::default()
    })?;
    let error = failure(&node, &format!("{}/app:1", server.host())).await?;
    assert_eq!(error.kind(), Kind::Unavailable, "{error}");
    assert!(
        error.to_string().contains("no answer within 1 s"),
        "{error}"
    );
    Ok(())
}

async fn implied() -> Result<(), Failure> {
    use std::os::unix::fs::MetadataExt as _;
    let gzip = |archive: Archive| (archive.end(), Compression::Gzip);
    let base = Archive::new().item(&Item {
        path: b"tmp/",
        kind: b'5',
        mode: 0o1777,
        uid: 3,
        gid: 4,
        mtime: 77,
        ..ITEM
    });
    let above = Archive::new().file("tmp/file", "");
    let built = image(&[gzip(base), gzip(above)], json!({}));
    let server = Server::start(&[("app", &built)], |_| None)?;
    let node = Node::new()?;
    let image = node
        .images
        .pull(&format!("{}/app:1", server.host()), None)
        .await?;
    let lowers = node.images.lease("c", &image.id).await?;
    let tmp = std::fs::metadata(lowers[0].join("tmp"))?;
    assert_eq!((tmp.mode() & 0o7777, tmp.uid(), tmp.gid()), (0o1777, 3, 4));
    assert_eq!(tmp.mtime(), 77);
    Ok(())
}

/// Returns an image with one layer. The layer is larger than 4 MiB, so its received bytes are kept
/// for a later pull.
fn large() -> Image {
    image(&[noisy("large", 9 << 20)], json!({}))
}

/// Returns the path of the file that keeps the beginning of the blob with the digest `blob` from the
/// registry `host`.
fn partial(dir: &Dir, host: &str, blob: &str) -> PathBuf {
    let hex = blob.trim_start_matches("sha256:");
    let registry = digest(host.as_bytes());
    let name = format!("{hex}-{}.partial", &registry[7..23]);
    dir.0.join("ingest").join(name)
}

async fn resumed() -> Result<(), Failure> {
    let built = large();
    let (layer, whole) = (built.layers[0].clone(), built.blobs[0].clone());
    let calls = Arc::new(AtomicUsize::new(0));
    let counted = Arc::clone(&calls);
    let server = Server::start(&[("app", &built)], move |request| {
        if !request.path.ends_with(&layer) {
            return None;
        }
        // The first answer breaks off after 5 MiB. The client then requests the rest of the layer.
        // The second answer contains no byte, so the first pull fails. All later answers are
        // complete.
        let mut answer = Answer::new(200, whole.clone()).ranged(request);
        match counted.fetch_add(1, Ordering::Relaxed) {
            0 => answer.cut = Some(5 << 20),
            1 => answer.cut = Some(0),
            _ => {}
        }
        Some(answer)
    })?;
    let reference = format!("{}/app:1", server.host());
    let node = Node::new()?;
    assert!(node.images.pull(&reference, None).await.is_err());
    let kept = partial(&node.dir, &server.host(), &built.layers[0]);
    assert_eq!(std::fs::metadata(&kept)?.len(), 5 << 20);
    let node = node.restart()?;
    assert!(node.images.list().is_empty());
    node.images.pull(&reference, None).await?;
    let ranges: Vec<_> = server.seen().into_iter().filter_map(|r| r.range).collect();
    assert_eq!(ranges.last(), Some(&(5 << 20)));
    assert!(!kept.exists());
    assert_eq!(node.leavings()?.len(), 1);
    Ok(())
}

/// Each layer breaks off after 5 MiB in the first pull, and is complete in the second pull.
async fn limited() -> Result<(), Failure> {
    let images = ["a", "b"].map(|name| image(&[noisy(name, 9 << 20)], json!({})));
    for (limit, kept_bytes) in [(0, 0), (3 << 20, 2 << 20), (8 << 20, 5 << 20)] {
        let answers: Vec<_> = images
            .iter()
            .map(|built| {
                let (layer, whole) = (built.layers[0].clone(), built.blobs[0].clone());
                (layer, whole, AtomicUsize::new(0))
            })
            .collect();
        let named = [("a", &images[0]), ("b", &images[1])];
        let server = Server::start(&named, move |request| {
            let named = |layer: &str| request.path.ends_with(layer);
            let (_, whole, calls) = answers.iter().find(|(layer, ..)| named(layer))?;
            let mut answer = Answer::new(200, whole.clone()).ranged(request);
            match calls.fetch_add(1, Ordering::Relaxed) {
                0 => answer.cut = Some(5 << 20),
                1 => answer.cut = Some(0),
                _ => {}
            }
            Some(answer)
        })?;
        let node = Node::with(ImageSettings {
            partial_bytes: limit,
            ..ImageSettings::default()
        })?;
        let before = node.images.fs_usage()?.bytes;
        for (name, built) in named {
            let reference = format!("{}/{name}:1", server.host());
            assert!(node.images.pull(&reference, None).await.is_err());
            let kept = partial(&node.dir, &server.host(), &built.layers[0]);
            let length = std::fs::metadata(&kept).map_or(0, |kept| kept.len());
            assert!(
                length <= kept_bytes && length + (1 << 20) > kept_bytes,
                "{length} bytes"
            );
            // The bytes of the other image are removed, because the registry gets three quarters
            // of the limit.
            node.comes_down_to(usize::from(kept_bytes > 0)).await?;
            assert!(node.images.fs_usage()?.bytes >= before + length);
        }
        let reference = format!("{}/b:1", server.host());
        node.images.pull(&reference, None).await?;
        let last = server
            .seen()
            .into_iter()
            .rfind(|r| r.path.contains("/blobs/"));
        let from = last.and_then(|last| last.range).unwrap_or_default();
        assert!(
            from <= kept_bytes && from + (1 << 20) > kept_bytes,
            "from byte {from}"
        );
        assert_eq!(node.leavings()?.len(), 1);
    }
    Ok(())
}

async fn spoilt() -> Result<(), Failure> {
    let built = large();
    let server = Server::start(&[("app", &built)], |_| None)?;
    let reference = format!("{}/app:1", server.host());
    for length in [1 << 20, built.blobs[0].len(), built.blobs[0].len() + 1] {
        let node = Node::new()?;
        std::fs::write(
            partial(&node.dir, &server.host(), &built.layers[0]),
            vec![7; length],
        )?;
        let image = node.images.pull(&reference, None).await?;
        assert_eq!(image.id, built.id);
        assert_eq!(node.leavings()?.len(), 1);
    }
    Ok(())
}

const CHILD: &str = "RRUN_TEST_PULL";

/// Pulls an image and exits, if this process is the child of the test. The test kills this child
/// during the pull. In the child, the variable `RRUN_TEST_PULL` contains the directory and the
/// reference for the pull.
pub(crate) fn be_the_child() {
    let Ok(what) = std::env::var(CHILD) else {
        return;
    };
    let pull = || -> Result<(), Failure> {
        let (dir, reference) = what
            .split_once(' ')
            .ok_or("RRUN_TEST_PULL contains no reference")?;
        let runtime = tokio::runtime::Runtime::new()?;
        runtime.block_on(async {
            let images = open(dir.as_ref(), ImageSettings::default())?;
            images.pull(reference, None).await?;
            Ok(())
        })
    };
    std::process::exit(i32::from(pull().is_err()));
}

async fn killed() -> Result<(), Failure> {
    let built = simple();
    let slow = built.layers[0].clone();
    let whole = built.blobs[0].clone();
    let server = Server::start(&[("app", &built)], move |request| {
        let mut answer = Answer::new(200, whole.clone());
        answer.slow = Duration::from_secs(5);
        request.path.ends_with(&slow).then_some(answer)
    })?;
    let dir = Dir::new()?;
    let reference = format!("{}/app:1", server.host());
    let mut child = Command::new(std::env::current_exe()?)
        .env(CHILD, format!("{} {reference}", dir.0.display()))
        .spawn()?;
    // Wait until one layer is complete while the other layer is still being fetched.
    while !(dir.0.join("layers/1").exists() || dir.0.join("layers/2").exists()) {
        if child.try_wait()?.is_some() {
            return Err("the child process exited before its first layer was complete".into());
        }
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
    child.kill()?;
    child.wait()?;
    let images = open(&dir.0, ImageSettings::default())?;
    let node = Node { images, dir };
    node.becomes_clean().await?;
    assert!(node.images.list().is_empty());
    let good = Server::start(&[("app", &built)], |_| None)?;
    node.images
        .pull(&format!("{}/app:1", good.host()), None)
        .await?;
    Ok(())
}
