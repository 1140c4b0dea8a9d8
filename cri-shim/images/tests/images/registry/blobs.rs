//! Tests of the transfer of blobs: range requests, transfers that break off, and the bytes that are
//! kept of them.

use std::path::PathBuf;
use std::pin::pin;
use std::process::Command;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::Duration;

use libtest_mimic::Trial;
use rrun_images::{ImageSettings, Kind};
use serde_json::json;
use tokio::sync::oneshot;

use super::{failure, noisy, simple};
use crate::build::{Failure, Image, digest, image};
use crate::node::{Dir, Node, open};
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
        trial("a_slow_response_head_times_out", dripping_head),
        trial(
            "response_heads_without_end_do_not_occupy_the_runtime",
            endless_heads,
        ),
        trial(
            "redirected_layers_count_towards_the_limit_of_their_new_host",
            sent_on,
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

/// The registry answers the requests for both layers with informational heads without end. Each of
/// the two connections could occupy a thread of this test's runtime, which has two threads.
async fn endless_heads() -> Result<(), Failure> {
    let built = simple();
    let layers = built.layers.clone();
    let server = Arc::new(Server::start(&[("app", &built)], move |request| {
        let mut answer = Answer::new(200, "");
        answer.endless_heads = true;
        let is_layer = layers.iter().any(|layer| request.path.ends_with(layer));
        is_layer.then_some(answer)
    })?);
    let node = Node::with(ImageSettings {
        silence_seconds: 2,
        ..ImageSettings::default()
    })?;
    let ticks = Arc::new(AtomicUsize::new(0));
    let ticking = tokio::spawn({
        let ticks = Arc::clone(&ticks);
        async move {
            loop {
                tokio::time::sleep(Duration::from_millis(10)).await;
                ticks.fetch_add(1, Ordering::Relaxed);
            }
        }
    });
    // A thread checks the task, because no timer of the runtime would run during a successful attack.
    let (reports, runs) = oneshot::channel();
    let watched = Arc::clone(&server);
    std::thread::spawn(move || {
        let soon = |condition: &dyn Fn() -> bool| {
            (0..3000).any(|_| {
                std::thread::sleep(Duration::from_millis(10));
                condition()
            })
        };
        let under_attack = soon(&|| watched.open() >= 2);
        let before = ticks.load(Ordering::Relaxed);
        let runs = soon(&|| ticks.load(Ordering::Relaxed) >= before + 20);
        let _ = reports.send((under_attack, runs));
    });
    let reference = format!("{}/app:1", server.host());
    let mut pull = pin!(failure(&node, &reference));
    tokio::select! {
        result = &mut pull => return Err(format!("the pull ended early: {result:?}").into()),
        report = runs => assert_eq!(report?, (true, true)),
    }
    let error = pull.await?;
    ticking.abort();
    assert_eq!(error.kind(), Kind::Unavailable, "{error}");
    assert!(
        error.to_string().contains("no answer within 2 s"),
        "{error}"
    );
    for _ in 0..3000 {
        if server.open() == 0 {
            return Ok(());
        }
        tokio::time::sleep(Duration::from_millis(10)).await;
    }
    Err("connections of the failed pull are still open".into())
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
