//! Tests with registries that send wrong data, stall, or refuse requests. A pull from such a
//! registry fails with the right gRPC code and a clear message, and leaves no files behind.

use std::fs;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::Duration;

use serde_json::json;
use tonic::Code;

use crate::support::calls::Calls;
use crate::support::images::build::{Archive, Compression, ITEM, Image, Item, digest, image};
use crate::support::images::pull;
use crate::support::images::server::{Answer, Request, Server};
use crate::support::machine::{Result, wait_for};
use crate::support::needs::{Need, Test};
use crate::support::node::{A_NODE, BUSYBOX, Node, is_rrun, on_a_node};
use crate::{ensure, ensure_eq, test};

pub(crate) const TESTS: &[Test] = &[
    test!(a_pull_fails_if_the_registry_sends_a_wrong_answer, A_NODE),
    test!(
        the_server_refuses_a_hostile_image_layer,
        A_NODE,
        Need::RrunCri
    ),
    test!(
        a_stalled_registry_delays_no_other_pull,
        A_NODE,
        Need::RrunCri
    ),
    test!(
        a_pull_resumes_after_the_server_was_killed,
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

/// Returns an image whose only layer contains `length` random bytes. Compression does not shrink
/// random bytes, so the compressed layer has about the same length.
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

/// Checks that the server lists no image. Waits until no layer (except the empty layer) and no
/// partial download is left.
fn is_clean(node: &Node) -> Result {
    ensure_eq!(
        node.asks(&["images", "--quiet"])?,
        "",
        "ids of the images after the failed pull"
    );
    for (dir, most) in [("root/layers", 1), ("root/ingest", 0)] {
        wait_for(
            &format!("the server's directory {dir} to have at most {most} entries"),
            || Ok((fs::read_dir(node.join(dir))?.count() <= most).then_some(())),
        )?;
    }
    Ok(())
}

/// Checks that the pull of `name` fails with the gRPC code `code`, and that the message contains
/// `words`.
fn fails(node: &Node, calls: &Calls, name: &str, code: Code, words: &str) -> Result {
    let status = pull(calls, name, None)?
        .err()
        .ok_or_else(|| format!("the pull of the image {name} succeeded, but must fail"))?;
    if is_rrun() {
        ensure_eq!(
            status.code(),
            code,
            "gRPC code of the failed pull of the image {name} (gRPC status: {status:?})"
        );
        let message = status.message();
        ensure!(
            message.contains(words) && message.contains(name),
            "the error message about the image {name} does not contain both the image's name and {words:?}: {message:?}"
        );
        is_clean(node)?;
    }
    Ok(())
}

/// Returns a wrong answer to the request, or `None` if the registry must send the right answer. The
/// repository's name selects the kind of wrong answer.
fn wrong_answer(request: &Request) -> Option<Answer> {
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

fn a_pull_fails_if_the_registry_sends_a_wrong_answer() -> Result {
    on_a_node(|node| {
        let calls = Calls::new(node)?;
        let good = one_layer(Archive::new().file("file", "content"));
        let server = serve(
            &[("half", &good), ("other", &good), ("good", &good)],
            wrong_answer,
        )?;
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
        ensure!(
            server.count("/busy429/") < 10,
            "the server sent more than nine requests to the busy registry"
        );
        pull(&calls, &name("good"), None)??;
        Ok(())
    })
}

fn the_server_refuses_a_hostile_image_layer() -> Result {
    on_a_node(|node| {
        let drop_ins = node.join("config.d");
        fs::create_dir_all(&drop_ins)?;
        let limits = "[image]\nlayer_bytes = 1048576\nlayer_files = 100\n";
        fs::write(drop_ins.join("bounds.toml"), limits)?;
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
                "does not contain",
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
        ensure_eq!(
            fs::read_to_string(&victim)?,
            "untouched",
            "content of a file outside the image's layers"
        );
        // If a file's path is absolute or contains a link, the server creates the file inside the
        // layer.
        let inside = Archive::new()
            .file(&format!("/{outside}"), "x")
            .dir("real/", 0o755)
            .symlink("link", "/real")
            .file("link/file", "x");
        let built = one_layer(inside);
        let server = serve(&[("inside", &built)], |_| None)?;
        pull(&calls, &format!("{}/inside:1", server.host()), None)??;
        ensure_eq!(
            fs::read_to_string(&victim)?,
            "untouched",
            "content of a file outside the image's layers"
        );
        Ok(())
    })
}

fn a_stalled_registry_delays_no_other_pull() -> Result {
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
        let requested = layer.clone();
        let server = serve(&[("app", &built)], move |request| {
            let mut answer = Answer::new(200, whole.clone());
            answer.slow = Duration::from_secs(60);
            request.path.ends_with(&layer).then_some(answer)
        })?;
        let stalled = format!("{}/app:1", server.host());
        let hanging = node.crictl(&["pull", &stalled]).start()?;
        wait_for("the stalled registry to receive a request", || {
            Ok((server.count(&requested) > 0).then_some(()))
        })?;
        node.pull(BUSYBOX)?;
        node.asks(&["rmi", BUSYBOX])?;
        let output = hanging.end()?;
        ensure!(
            output.code != 0,
            "the pull from the stalled registry succeeded:\n{}",
            output.told()
        );
        ensure!(
            output.stderr.contains("no data arrived for 2 s"),
            "the error of crictl pull does not report that the registry sent no data: {}",
            output.told()
        );
        is_clean(node)
    })
}

fn a_pull_resumes_after_the_server_was_killed() -> Result {
    on_a_node(|node| {
        let built = noisy(9 << 20);
        let (layer, whole) = (built.layers[0].clone(), built.blobs[0].clone());
        let requests = AtomicUsize::new(0);
        let server = serve(&[("app", &built)], move |request| {
            if !request.path.ends_with(&layer) {
                return None;
            }
            let mut answer = Answer::new(200, whole.clone()).ranged(request);
            if requests.fetch_add(1, Ordering::Relaxed) == 0 {
                answer.slow = Duration::from_millis(5);
            }
            Some(answer)
        })?;
        let reference = format!("{}/app:1", server.host());
        let pulling = node.crictl(&["pull", &reference]).start()?;
        let hex = built.layers[0].trim_start_matches("sha256:");
        let registry = digest(server.host().as_bytes());
        let name = format!("{hex}-{}.partial", &registry[7..23]);
        let partial = node.join("root/ingest").join(name);
        wait_for("a part of the layer to be stored on disk", || {
            let length = fs::metadata(&partial).map_or(0, |metadata| metadata.len());
            Ok((length > 1 << 20).then_some(()))
        })?;
        node.kill_server()?;
        drop(pulling);
        node.start_server()?;
        let entries: Vec<_> = fs::read_dir(node.join("root/ingest"))?.flatten().collect();
        ensure_eq!(
            entries.len(),
            1,
            "number of partial downloads after the restart (entries of the directory: {entries:?})"
        );
        node.pull(&reference)?;
        let last = server
            .seen()
            .into_iter()
            .filter_map(|r| r.range)
            .next_back();
        ensure!(
            last.is_some_and(|from| from > 1 << 20),
            "the pull resumed at byte {last:?}, not at the byte at which it was interrupted"
        );
        ensure!(
            !partial.exists(),
            "the file of the partial download still exists"
        );
        Ok(())
    })
}
