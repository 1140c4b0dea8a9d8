//! Tests of the access that users of the node have to the server's files. Some of these files
//! contain secrets, for example the environment of containers.

use std::fs;
use std::os::unix::fs::{FileTypeExt, PermissionsExt};
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::Command;

use nix::sys::stat::{Mode, umask};
use serde_json::json;

use crate::support::machine::Result;
use crate::support::needs::{Need, Test};
use crate::support::node::{A_NODE, BUSYBOX, Node, on_a_node};
use crate::support::user_namespace;
use crate::{ensure, ensure_eq, test};

pub(crate) const TESTS: &[Test] = &[
    test!(
        no_user_of_the_node_reads_the_secrets_of_containers,
        A_NODE,
        Need::RrunCri
    ),
    test!(
        the_server_removes_the_access_of_other_users_at_its_start,
        A_NODE,
        Need::RrunCri
    ),
    test!(
        every_user_in_a_container_reads_the_files_of_the_pod_in_etc,
        A_NODE,
        Need::RrunCri
    ),
];

const SECRET: &str = "hunter2-in-a-container";

/// The user and the group nobody.
const NOBODY: u32 = 65534;

/// Directories that contain the files of images and containers. The server does not choose the
/// modes of these files.
const OF_CONTAINERS: [&str; 8] = [
    "fs", "upper", "work", "volumes", "rootfs", "shm", "images", "netns",
];

fn restart_with_umask(node: &mut Node, mask: u32) -> Result {
    node.terminate_server()?;
    let before = umask(Mode::from_bits_truncate(mask));
    let started = node.start_server();
    umask(before);
    started
}

/// Runs a container whose environment contains the secret, in a pod that contains the secret, too.
/// Returns the container's id.
fn run_with_secret(node: &Node, name: &str, with_user_namespace: bool) -> Result<String> {
    let (mut pod, mut container) = if with_user_namespace {
        let command = ["sleep", "600"];
        (
            user_namespace::pod(node, name, 1),
            user_namespace::container(node, "main", 1, &command),
        )
    } else {
        (node.pod(name), node.container("main", &["sleep", "600"]))
    };
    pod["annotations"] = json!({ "secret": SECRET });
    container["envs"] = json!([{ "key": "SECRET", "value": SECRET }]);
    container["annotations"] = json!({ "secret": SECRET });
    let pod_id = node.runp(&pod)?;
    node.run(&pod_id, &pod, &container)
}

/// Returns the files and sockets below `dir` that the server has created, and all directories.
fn entries(dir: &Path, found: &mut Vec<(PathBuf, fs::Metadata)>) -> Result {
    found.push((dir.to_owned(), fs::symlink_metadata(dir)?));
    for entry in fs::read_dir(dir)? {
        let path = entry?.path();
        let name = path.file_name().unwrap_or_default().to_string_lossy();
        let metadata = fs::symlink_metadata(&path)?;
        if metadata.is_file() || metadata.file_type().is_socket() {
            found.push((path, metadata));
        } else if metadata.is_dir() && !OF_CONTAINERS.contains(&&*name) {
            entries(&path, found)?;
        }
    }
    Ok(())
}

/// Checks that only root can change the server's files, and that only root can read files that
/// contain the secret.
fn check_modes(node: &Node) -> Result {
    let mut found = Vec::new();
    for dir in ["root", "state"] {
        entries(&node.join(dir), &mut found)?;
    }
    let hexadecimal: String = SECRET.bytes().map(|byte| format!("{byte:02x}")).collect();
    let mut with_secret = Vec::new();
    for (path, metadata) in found {
        let (mode, shown) = (metadata.permissions().mode() & 0o7777, path.display());
        ensure!(
            mode & 0o022 == 0,
            "other users than root can write to {shown}: its mode is {mode:o}"
        );
        if metadata.file_type().is_socket() {
            ensure_eq!(mode, 0o600, "mode of the socket {shown}");
        }
        if !metadata.is_file() {
            continue;
        }
        let bytes = fs::read(&path)?;
        let contains = |text: &str| {
            bytes
                .windows(text.len())
                .any(|part| part == text.as_bytes())
        };
        if contains(SECRET) || contains(&hexadecimal) {
            ensure_eq!(mode, 0o600, "mode of {shown}, which contains a secret");
            let name = path.file_name().unwrap_or_default();
            with_secret.push(name.to_string_lossy().into_owned());
        }
    }
    for name in ["meta.redb", "pod.json", "container.json", "config.json"] {
        ensure!(
            with_secret.iter().any(|found| found == name),
            "no file {name} contains the secret; the files with the secret are {with_secret:?}"
        );
    }
    Ok(())
}

/// Checks that the user nobody finds no readable file in the server's directories.
fn check_as_nobody(node: &Node) -> Result {
    for dir in ["root", "state"] {
        let output = Command::new("find")
            .arg(node.join(dir))
            // The pins of network namespaces contain no data.
            .args(["-name", "netns", "-prune", "-o"])
            .args(["-type", "f", "-readable", "-print"])
            .uid(NOBODY)
            .gid(NOBODY)
            .output()?;
        let found = String::from_utf8_lossy(&output.stdout).into_owned();
        ensure!(
            found.is_empty(),
            "the user nobody can read these files of the server:\n{found}"
        );
    }
    Ok(())
}

fn no_user_of_the_node_reads_the_secrets_of_containers() -> Result {
    on_a_node(|node| {
        node.pull(BUSYBOX)?;
        for mask in [0o000, 0o077] {
            restart_with_umask(node, mask)?;
            run_with_secret(node, &format!("plain-{mask}"), false)?;
            run_with_secret(node, &format!("mapped-{mask}"), true)?;
            check_modes(node)?;
            check_as_nobody(node)?;
        }
        Ok(())
    })
}

/// An administrator creates ROOT with the mode 0755 when he creates ROOT/preload. Earlier versions
/// of the server created meta.redb with the mode 0644.
fn the_server_removes_the_access_of_other_users_at_its_start() -> Result {
    on_a_node(|node| {
        node.pull(BUSYBOX)?;
        run_with_secret(node, "upgraded", false)?;
        node.terminate_server()?;
        let set_mode = |name: &str, mode| {
            fs::set_permissions(node.join(name), PermissionsExt::from_mode(mode))
        };
        fs::create_dir(node.join("root/preload"))?;
        for dir in [
            "root",
            "root/containers",
            "root/layers",
            "state",
            "state/pods",
        ] {
            set_mode(dir, 0o755)?;
        }
        set_mode("root/meta.redb", 0o644)?;
        node.start_server()?;
        check_modes(node)?;
        let mode = |name: &str| -> Result<u32> {
            Ok(fs::metadata(node.join(name))?.permissions().mode() & 0o7777)
        };
        ensure_eq!(mode("root")?, 0o700, "mode of ROOT");
        ensure_eq!(mode("root/meta.redb")?, 0o600, "mode of meta.redb");
        check_as_nobody(node)?;

        // The mode of a directory that other programs use does not change, but its files with
        // secrets are protected.
        node.terminate_server()?;
        let set_mode = |name: &str, mode| {
            fs::set_permissions(node.join(name), PermissionsExt::from_mode(mode))
        };
        fs::write(node.join("root/of-another-program"), "")?;
        set_mode("root", 0o755)?;
        set_mode("root/meta.redb", 0o644)?;
        node.start_server()?;
        let mode = fs::metadata(node.join("root"))?.permissions().mode() & 0o7777;
        ensure_eq!(mode, 0o755, "mode of a directory that is not only ROOT");
        check_modes(node)?;
        fs::remove_file(node.join("root/of-another-program"))?;
        Ok(())
    })
}

fn every_user_in_a_container_reads_the_files_of_the_pod_in_etc() -> Result {
    on_a_node(|node| {
        node.pull(BUSYBOX)?;
        restart_with_umask(node, 0o077)?;
        let pod = node.pod("readers");
        let pod_id = node.runp(&pod)?;
        let script =
            "cd /etc && cat hostname hosts resolv.conf >/dev/null && ls /made && echo read";
        let mut container = node.container("reader", &["sh", "-c", script]);
        container["working_dir"] = json!("/made/by/the/server");
        container["linux"]["security_context"]["run_as_user"] = json!({ "value": 1000 });
        let id = node.run(&pod_id, &pod, &container)?;
        let status = node.exited(&id)?;
        let log = node.log_of("readers", "reader")?;
        ensure!(
            status["exitCode"] == 0 && log.contains("read"),
            "a user in a container cannot read the files of the pod in /etc: {log}"
        );
        Ok(())
    })
}
