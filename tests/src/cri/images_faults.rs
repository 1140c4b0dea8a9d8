//! Registries that lie, stall and refuse: the right status, a sentence, and nothing left.

use std::fs;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::Duration;

use serde_json::json;
use tonic::Code;

use crate::support::calls::Calls;
use crate::support::images::build::{Archive, Compression, ITEM, Image, Item, image};
use crate::support::images::pull;
use crate::support::images::server::{Answer, Request, Server};
use crate::support::machine::{Result, wait_for};
use crate::support::needs::{Need, Test};
use crate::support::node::{A_NODE, BUSYBOX, Node, is_rrun, on_a_node};
use crate::{ensure, ensure_eq, test};

pub(crate) const TESTS: &[Test] = &[
    test!(a_registry_that_lies_is_found_out, A_NODE),
    test!(a_hostile_layer_is_refused, A_NODE, Need::RrunCri),
    test!(a_stalled_registry_stalls_nobody_else, A_NODE, Need::RrunCri),
    test!(
        a_pull_goes_on_after_the_server_was_killed,
        A_NODE,
        Need::RrunCri
    ),
];

fn serve(
    images: &[(&str, &Image)],
    answer: impl Fn(&Request) -> Option<Answer> + Send + Sync + 'static,
) -> Result<Server> {
    Server::start(images, answer).map_err(|error| error.to_string().into())
}

fn one_layer(archive: Archive) -> Image {
    image(&[(archive.end(), Compression::Gzip)], json!({}))
}

/// An image with a layer of about this many bytes, compressed or not.
fn noisy(length: usize) -> Image {
    let mut state = 1_u64;
    let noise: Vec<u8> = std::iter::repeat_with(|| {
        state = state
            .wrapping_mul(6_364_136_223_846_793_005)
            .wrapping_add(1);
        (state >> 56) as u8
    })
    .take(length)
    .collect();
    one_layer(Archive::new().item(&Item {
        path: b"noise",
        content: &noise,
        ..ITEM
    }))
}

/// Neither layers nor what was under way is left, and no image is listed.
fn is_clean(node: &Node) -> Result {
    ensure_eq!(node.asks(&["images", "--quiet"])?, "", "images");
    for (dir, most) in [("root/layers", 1), ("root/ingest", 0)] {
        wait_for(&format!("{dir} to be empty"), || {
            Ok((fs::read_dir(node.join(dir))?.count() <= most).then_some(()))
        })?;
    }
    Ok(())
}

/// The pull of `name` fails with this code and these words.
fn fails(node: &Node, calls: &Calls, name: &str, code: Code, words: &str) -> Result {
    let status = pull(calls, name, None)?
        .err()
        .ok_or_else(|| format!("{name} was pulled"))?;
    if is_rrun() {
        ensure_eq!(status.code(), code, "{name}: {status:?}");
        let told = status.message();
        ensure!(
            told.contains(words) && told.contains(name),
            "{name}: {told:?} does not speak of {words:?}"
        );
        is_clean(node)?;
    }
    Ok(())
}

/// An answer by the repository's name: what is asked for there, and what comes.
fn lie(request: &Request) -> Option<Answer> {
    let manifest = request.path.contains("/manifests/");
    let layer = request.path.contains("/blobs/");
    let name = request.path.split('/').nth(2)?;
    match name {
        "broken500" => Some(Answer::new(500, "<html>oops</html>")),
        "busy429" => Some(Answer::new(429, "").header("Retry-After", "0")),
        "html" if manifest => {
            let page = "<!DOCTYPE html><html>Please log in</html>";
            Some(Answer::new(200, page).header("Content-Type", "text/html"))
        }
        "huge" if manifest => Some(Answer::new(200, vec![b' '; 9 << 20])),
        "half" if layer => {
            let mut answer = Answer::new(200, vec![0x1f; 100_000]);
            answer.cut = Some(0);
            Some(answer)
        }
        "other" if layer => Some(Answer::new(200, "something else")),
        "both" if manifest => Some(Answer::new(
            200,
            r#"{"schemaVersion":2,"manifests":[],"layers":[],"config":{"digest":"","size":0}}"#,
        )),
        _ => None,
    }
}

fn a_registry_that_lies_is_found_out() -> Result {
    on_a_node(|node| {
        let calls = Calls::new(node)?;
        let good = one_layer(Archive::new().file("file", "content"));
        let server = serve(&[("half", &good), ("other", &good), ("good", &good)], lie)?;
        let name = |name: &str| format!("{}/{name}:1", server.host());
        for (what, code, words) in [
            ("broken500", Code::Unavailable, "500"),
            ("busy429", Code::Unavailable, "429"),
            ("html", Code::DataLoss, "the manifest can't be read"),
            ("huge", Code::DataLoss, "longer than"),
            ("half", Code::Unavailable, "registry"),
            ("other", Code::DataLoss, "digest"),
            ("both", Code::DataLoss, "both"),
            ("nowhere", Code::NotFound, "manifest unknown"),
        ] {
            fails(node, &calls, &name(what), code, words)?;
        }
        ensure!(server.count("/busy429/") < 10, "asked without end");
        pull(&calls, &name("good"), None)??;
        Ok(())
    })
}

fn a_hostile_layer_is_refused() -> Result {
    on_a_node(|node| {
        let drop_ins = node.join("config.d");
        fs::create_dir_all(&drop_ins)?;
        let bounds = "[image]\nlayer_bytes = 1048576\nlayer_files = 100\n";
        fs::write(drop_ins.join("bounds.toml"), bounds)?;
        node.terminate_server()?;
        node.start_server()?;
        let calls = Calls::new(node)?;
        let victim = node.join("victim");
        fs::write(&victim, "untouched")?;
        let outside = victim.display().to_string();
        let zeros = vec![0; 8 << 20];
        let bomb = Archive::new().item(&Item {
            path: b"zeros",
            content: &zeros,
            ..ITEM
        });
        let many = (0..200).fold(Archive::new(), |archive, n| {
            archive.file(&format!("file-{n}"), "")
        });
        let layers = [
            (
                "upwards",
                Archive::new().file("../victim", "x"),
                Code::DataLoss,
                "upwards",
            ),
            (
                "linked",
                Archive::new().symlink("out", &outside).file("out/x", "x"),
                Code::DataLoss,
                "symbolic link",
            ),
            (
                "hard",
                Archive::new().hard_link("mine", "../../../../etc/passwd"),
                Code::DataLoss,
                "upwards",
            ),
            (
                "hard-absolute",
                Archive::new().hard_link("mine", &outside),
                Code::DataLoss,
                "does not hold",
            ),
            ("bomb", bomb, Code::ResourceExhausted, "1048576 bytes"),
            ("many", many, Code::ResourceExhausted, "100 files"),
        ];
        for (name, archive, code, words) in layers {
            let built = one_layer(archive);
            let server = serve(&[(name, &built)], |_| None)?;
            let reference = format!("{}/{name}:1", server.host());
            fails(node, &calls, &reference, code, words)?;
        }
        ensure_eq!(fs::read_to_string(&victim)?, "untouched", "a file outside");
        // A name from the root, and one through a link, land inside.
        let inside = Archive::new()
            .file(&format!("/{outside}"), "x")
            .dir("real/", 0o755)
            .symlink("link", "/real")
            .file("link/file", "x");
        let built = one_layer(inside);
        let server = serve(&[("inside", &built)], |_| None)?;
        pull(&calls, &format!("{}/inside:1", server.host()), None)??;
        ensure_eq!(fs::read_to_string(&victim)?, "untouched", "a file outside");
        Ok(())
    })
}

fn a_stalled_registry_stalls_nobody_else() -> Result {
    on_a_node(|node| {
        let drop_ins = node.join("config.d");
        fs::create_dir_all(&drop_ins)?;
        fs::write(
            drop_ins.join("patience.toml"),
            "[image]\nsilence_seconds = 2\n",
        )?;
        node.terminate_server()?;
        node.start_server()?;
        let built = noisy(100 << 10);
        let (layer, whole) = (built.layers[0].clone(), built.blobs[0].clone());
        let asked = layer.clone();
        let server = serve(&[("app", &built)], move |request| {
            let mut answer = Answer::new(200, whole.clone());
            answer.slow = Duration::from_secs(60);
            request.path.ends_with(&layer).then_some(answer)
        })?;
        let stalled = format!("{}/app:1", server.host());
        let hanging = node.crictl(&["pull", &stalled]).start()?;
        wait_for("the stalled registry to be asked", || {
            Ok((server.count(&asked) > 0).then_some(()))
        })?;
        node.pull(BUSYBOX)?;
        node.asks(&["rmi", BUSYBOX])?;
        let output = hanging.end()?;
        ensure!(output.code != 0, "pulled:\n{}", output.told());
        ensure!(
            output.stderr.contains("nothing came for 2 s"),
            "{}",
            output.told()
        );
        is_clean(node)
    })
}

fn a_pull_goes_on_after_the_server_was_killed() -> Result {
    on_a_node(|node| {
        let built = noisy(9 << 20);
        let (layer, whole) = (built.layers[0].clone(), built.blobs[0].clone());
        let asked = AtomicUsize::new(0);
        let server = serve(&[("app", &built)], move |request| {
            if !request.path.ends_with(&layer) {
                return None;
            }
            let mut answer = Answer::new(200, whole.clone()).ranged(request);
            if asked.fetch_add(1, Ordering::Relaxed) == 0 {
                answer.slow = Duration::from_millis(5);
            }
            Some(answer)
        })?;
        let reference = format!("{}/app:1", server.host());
        let pulling = node.crictl(&["pull", &reference]).start()?;
        let hex = built.layers[0].trim_start_matches("sha256:");
        let partial = node.join("root/ingest").join(format!("{hex}.partial"));
        wait_for("some of the layer to be here", || {
            let length = fs::metadata(&partial).map_or(0, |metadata| metadata.len());
            Ok((length > 1 << 20).then_some(()))
        })?;
        node.kill_server()?;
        drop(pulling);
        node.start_server()?;
        let entries: Vec<_> = fs::read_dir(node.join("root/ingest"))?.flatten().collect();
        ensure_eq!(entries.len(), 1, "what is left in ingest: {entries:?}");
        node.pull(&reference)?;
        let last = server
            .seen()
            .into_iter()
            .filter_map(|r| r.range)
            .next_back();
        ensure!(
            last.is_some_and(|from| from > 1 << 20),
            "began at {last:?} and not where it was"
        );
        ensure!(!partial.exists(), "the partial blob is still there");
        Ok(())
    })
}
