//! Tests of images that the server imports from archives in the directory `preload` of its root
//! directory. The tests create the archives with skopeo.

use std::fs;
use std::path::PathBuf;

use nix::sys::signal::Signal;
use serde_json::json;

use crate::support::machine::{Result, command, wait_for};
use crate::support::needs::{Need, Test};
use crate::support::node::{A_NODE, Node, WEB, on_a_node};
use crate::{ensure, ensure_eq, test};

const SKOPEO: Need = Need::Program("skopeo");

pub(crate) const TESTS: &[Test] = &[
    test!(
        the_server_imports_images_from_archives_at_start_and_keeps_their_names,
        A_NODE,
        SKOPEO,
        Need::RrunCri
    ),
    test!(
        the_server_imports_each_archive_once_and_imports_new_archives_on_sighup,
        A_NODE,
        SKOPEO,
        Need::RrunCri
    ),
];

/// Uses skopeo to write the image `WEB` to the archive `file` in the server's directory `preload`.
/// The image has the name `name` in the archive. Returns the archive's path.
fn archive(node: &Node, kind: &str, file: &str, name: &str) -> Result<PathBuf> {
    let dir = node.join("root/preload");
    fs::create_dir_all(&dir)?;
    let path = dir.join(file);
    command(
        "skopeo",
        [
            "copy",
            "--quiet",
            "--insecure-policy",
            "--src-tls-verify=false",
        ],
    )
    .arg(format!("docker://{WEB}"))
    .arg(format!("{kind}:{}:{name}", path.display()))
    .ok()?;
    // In this directory, skopeo has recorded the registries of each blob. The test must not leave
    // the directory behind.
    let _ = fs::remove_dir_all("/var/lib/containers/cache");
    Ok(path)
}

fn restart(node: &mut Node) -> Result {
    node.terminate_server()?;
    node.start_server()
}

fn is_here(node: &Node, name: &str) -> Result {
    wait_for(&format!("the image {name} to be imported"), || {
        let list = node.json(&["images"])?;
        let images = list["images"].as_array().cloned().unwrap_or_default();
        let mut tags = images
            .iter()
            .filter_map(|image| image["repoTags"].as_array());
        Ok(tags.any(|tags| tags.contains(&json!(name))).then_some(()))
    })
}

fn the_server_imports_images_from_archives_at_start_and_keeps_their_names() -> Result {
    on_a_node(|node| {
        archive(node, "docker-archive", "1.tar", "127.0.0.1:5000/docker:1")?;
        archive(node, "oci-archive", "2.tar", "127.0.0.1:5000/oci:1")?;
        let gzip = archive(node, "docker-archive", "3.tar", "127.0.0.1:5000/gzip:1")?;
        command("gzip", ["-1"]).arg(&gzip).ok()?;
        let zstd = archive(node, "oci-archive", "4.tar", "127.0.0.1:5000/zstd:1")?;
        command("zstd", ["-q", "--rm"]).arg(&zstd).ok()?;
        let dir = node.join("root/preload");
        fs::write(dir.join("0-broken.tar"), "this is not an archive")?;
        let whole = fs::read(dir.join("2.tar"))?;
        fs::write(dir.join("5-cut.tar"), &whole[..whole.len() / 2])?;
        fs::write(dir.join("notes.txt"), "this is not an archive either")?;
        restart(node)?;
        for name in ["docker", "oci", "gzip", "zstd"] {
            is_here(node, &format!("127.0.0.1:5000/{name}:1"))?;
        }
        wait_for("the server to log the name of the last archive", || {
            Ok(node.log().contains("5-cut.tar").then_some(()))
        })?;
        let log = node.log();
        for name in ["0-broken.tar", "5-cut.tar"] {
            let lines: Vec<&str> = log.lines().filter(|line| line.contains(name)).collect();
            ensure_eq!(
                lines.len(),
                1,
                "number of lines in the server's log about the archive {name} (lines: {lines:?})"
            );
        }
        ensure!(
            !log.contains("notes.txt"),
            "the server's log names notes.txt, although notes.txt does not have the extension of an archive"
        );
        // The server creates a container from the imported image, although no registry has the
        // image.
        let pod = node.pod("preloaded");
        let pod_id = node.runp(&pod)?;
        let mut container = node.container("preloaded", &["cat", "/www/index.html"]);
        container["image"]["image"] = json!("127.0.0.1:5000/zstd:1");
        let id = node.run(&pod_id, &pod, &container)?;
        node.exited(&id)?;
        let wrote = node.log_of("preloaded", "preloaded")?;
        ensure!(
            wrote.contains("hello from rrun"),
            "the container's log lacks the text of the image's page: {wrote}"
        );
        Ok(())
    })
}

/// Returns how many imports of the archive `file` the log reports.
fn imports(node: &mut Node, file: &str) -> usize {
    let log = node.log();
    let line = format!("{file}: image ");
    log.lines().filter(|logged| logged.contains(&line)).count()
}

fn the_server_imports_each_archive_once_and_imports_new_archives_on_sighup() -> Result {
    on_a_node(|node| {
        archive(node, "oci-archive", "1.tar", "127.0.0.1:5000/one:1")?;
        restart(node)?;
        is_here(node, "127.0.0.1:5000/one:1")?;
        wait_for("the server to log the import", || {
            Ok((imports(node, "1.tar") == 1).then_some(()))
        })?;
        restart(node)?;
        archive(node, "docker-archive", "2.tar", "127.0.0.1:5000/two:1")?;
        node.signal_server(Signal::SIGHUP);
        is_here(node, "127.0.0.1:5000/two:1")?;
        ensure_eq!(
            imports(node, "1.tar"),
            1,
            "number of imports of the archive 1.tar"
        );
        // At the next SIGHUP, the server imports a removed image again.
        node.asks(&["rmi", "127.0.0.1:5000/one:1"])?;
        node.signal_server(Signal::SIGHUP);
        is_here(node, "127.0.0.1:5000/one:1")?;
        Ok(())
    })
}
