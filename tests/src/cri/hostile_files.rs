//! Tests of the files of an image or a pod that the server reads or writes, for example /etc/passwd
//! and the container's log. Each test replaces one of these files with a device, a FIFO or a link.
//! The server must never open a device, because the open calls the device's driver.

use std::fs;
use std::path::Path;

use nix::sys::signal::Signal;
use nix::sys::stat::{Mode, SFlag, mknod};
use serde_json::{Value, json};

use crate::support::images::build::{Archive, ITEM, Image, Item};
use crate::support::images::{pull_built, with_one_layer};
use crate::support::machine::{Result, command, only_looked_up, strace_opens, wait_for};
use crate::support::needs::{Need, Test};
use crate::support::node::{A_NODE, BUSYBOX, Node, on_a_node};
use crate::{ensure, ensure_eq, test};

pub(crate) const TESTS: &[Test] = &[
    test!(
        a_container_is_refused_if_its_passwd_or_group_file_is_not_a_regular_file,
        A_NODE,
        Need::RrunCri
    ),
    test!(
        a_container_is_refused_if_no_user_can_have_its_ids,
        A_NODE,
        Need::RrunCri
    ),
    test!(
        the_server_opens_no_device_node_in_an_image,
        A_NODE,
        Need::RrunCri,
        Need::Program("strace")
    ),
    test!(
        the_server_does_not_start_a_watchdog_whose_device_replaces_etc_passwd,
        A_NODE,
        Need::RrunCri,
        Need::Works(
            "watchdog driver softdog",
            "modprobe softdog soft_noboot=1 && test -e /sys/class/watchdog/watchdog0/state"
        )
    ),
    test!(
        a_container_is_refused_if_its_log_is_not_a_regular_file,
        A_NODE,
        Need::RrunCri
    ),
    test!(
        reopening_a_log_opens_no_fifo_or_device_or_link,
        A_NODE,
        Need::RrunCri
    ),
    test!(
        a_seccomp_profile_that_is_not_a_regular_file_is_refused,
        A_NODE,
        Need::RrunCri
    ),
];

const TUN: (u32, u32) = (10, 200);

/// The device number of /dev/zero, which can always be opened.
const ZERO: (u32, u32) = (1, 5);

fn device(archive: Archive, path: &str, number: (u32, u32)) -> Archive {
    special(archive, path, b'3', number)
}

fn special(archive: Archive, path: &str, kind: u8, device: (u32, u32)) -> Archive {
    archive.item(&Item {
        path: path.as_bytes(),
        kind,
        device,
        ..ITEM
    })
}

fn built(archive: Archive, user: &str) -> Image {
    with_one_layer(archive, json!({ "User": user, "Cmd": ["/inside"] }))
}

/// Starts a registry with the image and pulls the image from the registry. Returns the
/// configuration of a container with this image.
fn container_of(node: &Node, name: &str, image: &Image) -> Result<Value> {
    let reference = pull_built(node, name, image)?;
    let mut container = node.container(name, &["/inside", "exit", "0"]);
    container["image"]["image"] = json!(reference);
    Ok(container)
}

/// Checks that the server refuses the container, and that the error contains `words`. Also checks
/// that the server still answers.
fn is_refused(
    node: &Node,
    (pod_id, pod): (&str, &Value),
    container: &Value,
    words: &str,
) -> Result {
    let name = &container["metadata"]["name"];
    let output = node.try_create(pod_id, pod, container)?;
    ensure!(
        output.code != 0,
        "the server created the container {name}, but must refuse it"
    );
    ensure!(
        output.stderr.contains(words),
        "the error about the refused container {name} does not contain {words:?}: {}",
        output.told()
    );
    ensure_eq!(
        node.asks(&["ps", "--all", "--quiet"])?,
        "",
        "ids of the containers after the server refused a container"
    );
    Ok(())
}

fn a_container_is_refused_if_its_passwd_or_group_file_is_not_a_regular_file() -> Result {
    on_a_node(|node| {
        let pod = node.pod("hostile");
        let pod_id = node.runp(&pod)?;
        let new = Archive::new;
        let large = "x".repeat(5 << 20);
        let cases = [
            (
                "character",
                "root",
                device(new(), "etc/passwd", TUN),
                "etc/passwd",
                "a character device",
            ),
            (
                "by-number",
                "0",
                device(new(), "etc/passwd", TUN),
                "etc/passwd",
                "a character device",
            ),
            (
                "group",
                "0:0",
                device(new(), "etc/group", TUN),
                "etc/group",
                "a character device",
            ),
            (
                "block",
                "",
                special(new(), "etc/passwd", b'4', (7, 0)),
                "etc/passwd",
                "a block device",
            ),
            (
                "fifo",
                "",
                special(new(), "etc/group", b'6', (0, 0)),
                "etc/group",
                "a FIFO",
            ),
            (
                "directory",
                "",
                new().dir("etc/passwd", 0o755),
                "etc/passwd",
                "a directory",
            ),
            (
                "link",
                "web",
                device(new().symlink("etc/passwd", "/data/node"), "data/node", TUN),
                "etc/passwd",
                "a character device",
            ),
            (
                "relative",
                "web",
                device(
                    new().symlink("etc/group", "../../../data/node"),
                    "data/node",
                    TUN,
                ),
                "etc/group",
                "a character device",
            ),
        ];
        for (name, user, archive, file, kind) in cases {
            let container = container_of(node, name, &built(archive, user))?;
            let words =
                format!("{file} in the image's root file system is {kind}, not a regular file");
            is_refused(node, (&pod_id, &pod), &container, &words)?;
        }
        for (name, archive, words) in [
            ("loop", new().symlink("etc/passwd", "passwd"), "(ELOOP)"),
            (
                "large",
                new().file("etc/group", &large),
                "is larger than 4096 kB",
            ),
        ] {
            let container = container_of(node, name, &built(archive, ""))?;
            is_refused(node, (&pod_id, &pod), &container, words)?;
        }
        // The server resolves a link to a regular file inside the image, even if the link's target
        // contains `..`.
        let archive = new()
            .symlink("etc/passwd", "/../../real/passwd")
            .file("real/passwd", "web:x:33:34::/:/bin/sh\n")
            .file("etc/group", "more:x:35:web\n");
        let mut container = container_of(node, "good", &built(archive, "web"))?;
        container["command"] = json!(["/inside", "report"]);
        let report = node.report(&pod_id, &pod, &container)?;
        ensure_eq!(report["uid"], 33, "user id of the container ({report})");
        ensure_eq!(report["gid"], 34, "group id of the container ({report})");
        Ok(())
    })
}

/// The kernel interprets the id 4294967295 as "do not change". If a program truncates 4294967296 to
/// 32 bits, the result is root's id 0.
fn a_container_is_refused_if_no_user_can_have_its_ids() -> Result {
    const PASSWD: &str = "4294967296:x:0:0::/:/bin/sh\n-0:x:0:0::/:/bin/sh\n+7:x:0:0::/:/bin/sh\n\
                          evil:x:4294967295:0::/:/bin/sh\nweb:x:33:34::/:/bin/sh\n";
    on_a_node(|node| {
        let pod = node.pod("ids");
        let pod_id = node.runp(&pod)?;
        let archive = || {
            let group = "0:x:0:\nnone:x:4294967295:\n4294967296:x:0:\n";
            Archive::new()
                .file("etc/passwd", PASSWD)
                .file("etc/group", group)
        };
        for (name, user, words) in [
            ("largest", "4294967295", "the user 4294967295 is a number"),
            ("truncated", "4294967296", "the user 4294967296 is a number"),
            ("negative", "-0", "the user -0 is a number"),
            ("positive", "+7", "the user +7 is a number"),
            (
                "passwd",
                "evil",
                "the id 4294967295, which is not a valid id",
            ),
            ("group", "33:4294967296", "the group 4294967296 is a number"),
            (
                "group-file",
                "33:none",
                "the id 4294967295, which is not a valid id",
            ),
        ] {
            let container = container_of(node, name, &built(archive(), user))?;
            is_refused(node, (&pod_id, &pod), &container, words)?;
            // Kubelet accepts a container with `runAsNonRoot` only if the image has a uid other
            // than 0.
            let image = container["image"]["image"].as_str().unwrap_or_default();
            let status = node.json(&["inspecti", image])?["status"].clone();
            let uid = status.pointer("/uid/value").cloned();
            let known = user.starts_with("33").then_some(json!("33"));
            ensure_eq!(
                uid,
                known,
                "the uid of the image with the user {user} ({status})"
            );
        }
        let container = container_of(node, "web", &built(archive(), "web"))?;
        for (field, value, words) in [
            (
                "run_as_username",
                json!("4294967296"),
                "the user 4294967296 is a number",
            ),
            (
                "run_as_user",
                json!({ "value": 4_294_967_296_i64 }),
                "run_as_user is 4294967296",
            ),
            ("run_as_user", json!({ "value": -1 }), "run_as_user is -1"),
            (
                "supplemental_groups",
                json!([4_294_967_295_i64]),
                "supplemental_groups is 4294967295",
            ),
        ] {
            let mut container = container.clone();
            container["linux"]["security_context"][field] = value.clone();
            is_refused(node, (&pod_id, &pod), &container, words)?;
            if field == "run_as_username" {
                continue;
            }
            let mut pod = node.pod("refused");
            pod["linux"]["security_context"][field] = value;
            let failed = node.runp(&pod).err().ok_or("the server created the pod")?;
            let message = failed.message().unwrap_or_default();
            ensure!(
                message.contains(words),
                "the error about the refused pod does not contain {words:?}: {message}"
            );
        }
        Ok(())
    })
}

fn the_server_opens_no_device_node_in_an_image() -> Result {
    on_a_node(|node| {
        let pod = node.pod("traced");
        let pod_id = node.runp(&pod)?;
        let mut containers = Vec::new();
        for file in ["etc/passwd", "etc/group"] {
            let name = file.replace('/', "-");
            let archive = device(Archive::new(), file, ZERO);
            containers.push(container_of(node, &name, &built(archive, "root"))?);
        }
        let traces = node.join("traces");
        let pid = node.server_pid()?.to_string();
        let mut strace = strace_opens(&traces)?.args(["-p", &pid]).start()?;
        wait_for("strace to attach", || {
            Ok(strace.stderr().contains("attached").then_some(()))
        })?;
        for container in &containers {
            let output = node.try_create(&pod_id, &pod, container)?;
            ensure!(
                output.code != 0,
                "the server created a container although its passwd or group file is a device: {}",
                output.told()
            );
        }
        strace.signal(Signal::SIGINT);
        strace.end()?;
        for file in ["etc/passwd", "etc/group"] {
            ensure!(
                only_looked_up(&traces, file)?,
                "strace's output contains no lookup of the file {file}"
            );
        }
        Ok(())
    })
}

fn the_server_does_not_start_a_watchdog_whose_device_replaces_etc_passwd() -> Result {
    const STATE: &str = "/sys/class/watchdog/watchdog0/state";
    let tested = on_a_node(|node| {
        let number = fs::read_to_string("/sys/class/watchdog/watchdog0/dev")?;
        let (major, minor) = number
            .trim()
            .split_once(':')
            .ok_or("the watchdog has no device number in sysfs")?;
        let number = (major.parse()?, minor.parse()?);
        ensure_eq!(
            fs::read_to_string(STATE)?.trim(),
            "inactive",
            "state of the watchdog before the test"
        );
        let pod = node.pod("watchdog");
        let pod_id = node.runp(&pod)?;
        for file in ["etc/passwd", "etc/group"] {
            let archive = device(Archive::new(), file, number);
            let container = container_of(node, &file.replace('/', "-"), &built(archive, ""))?;
            let output = node.try_create(&pod_id, &pod, &container)?;
            ensure!(
                output.code != 0,
                "the server created a container although its passwd or group file is a device: {}",
                output.told()
            );
        }
        ensure_eq!(
            fs::read_to_string(STATE)?.trim(),
            "inactive",
            "state of the watchdog device after the server refused the containers"
        );
        Ok(())
    });
    let _ = command("rmmod", ["softdog"]).end();
    tested
}

/// Creates a FIFO, a device or a link to `other` at `path`. The number `kind` selects one of these
/// kinds of files. Returns the name of the selected kind, or `None` if no kind has this number.
fn place(path: &Path, kind: usize, other: &Path) -> Result<Option<&'static str>> {
    let _ = fs::remove_file(path);
    let mode = Mode::S_IRUSR | Mode::S_IWUSR;
    Ok(match kind {
        0 => {
            nix::unistd::mkfifo(path, mode)?;
            Some("a FIFO")
        }
        1 => {
            let number = nix::sys::stat::makedev(TUN.0.into(), TUN.1.into());
            mknod(path, SFlag::S_IFCHR, mode, number)?;
            Some("a character device")
        }
        2 => {
            std::os::unix::fs::symlink(other, path)?;
            Some("a symbolic link")
        }
        _ => None,
    })
}

fn a_container_is_refused_if_its_log_is_not_a_regular_file() -> Result {
    on_a_node(|node| {
        node.pull(BUSYBOX)?;
        let pod = node.pod("logs");
        let pod_id = node.runp(&pod)?;
        let log = node.join("logs/logs/told.log");
        let other = node.join("other");
        fs::write(&other, "untouched")?;
        for kind in 0.. {
            let Some(what) = place(&log, kind, &other)? else {
                break;
            };
            let container = node.container("told", &["/inside", "echo", "told"]);
            let words = format!("it is {what}, not a regular file");
            is_refused(node, (&pod_id, &pod), &container, &words)?;
        }
        ensure_eq!(
            fs::read_to_string(&other)?,
            "untouched",
            "content of the file to which the link points"
        );
        // If the log file already exists and is a regular file, the container's output is appended
        // to the file.
        fs::write(&log, "before\n")?;
        let id = node.run(
            &pod_id,
            &pod,
            &node.container("told", &["/inside", "echo", "told"]),
        )?;
        node.exited(&id)?;
        let text = fs::read_to_string(&log)?;
        ensure!(
            text.starts_with("before\n") && text.ends_with(" told\n"),
            "the container's output was not appended to the existing log file: {text:?}"
        );
        Ok(())
    })
}

fn reopening_a_log_opens_no_fifo_or_device_or_link() -> Result {
    on_a_node(|node| {
        node.pull(BUSYBOX)?;
        let pod = node.pod("again");
        let pod_id = node.runp(&pod)?;
        let counts = node.container("counts", &["/inside", "count", "10"]);
        let id = node.run(&pod_id, &pod, &counts)?;
        let log = node.join("logs/again/counts.log");
        let rotated = node.join("logs/again/counts.log.1");
        let other = node.join("other");
        fs::write(&other, "untouched")?;
        wait_for("the first line to appear in the container's log", || {
            Ok((fs::metadata(&log)?.len() > 0).then_some(()))
        })?;
        fs::rename(&log, &rotated)?;
        for kind in 0.. {
            let Some(what) = place(&log, kind, &other)? else {
                break;
            };
            let output = node.crictl(&["logs", "--reopen", &id]).end()?;
            let words = format!("it is {what}, not a regular file");
            ensure!(
                output.code != 0 && output.stderr.contains(&words),
                "the error does not contain {words:?}: {}",
                output.told()
            );
            // The monitor still writes the container's output to the old log file.
            let length = fs::metadata(&rotated)?.len();
            wait_for("more lines to appear in the old log file", || {
                Ok((fs::metadata(&rotated)?.len() > length).then_some(()))
            })?;
        }
        ensure_eq!(
            fs::read_to_string(&other)?,
            "untouched",
            "content of the file to which the link points"
        );
        fs::remove_file(&log).or_else(|error| match error.kind() {
            std::io::ErrorKind::NotFound => Ok(()),
            _ => Err(error),
        })?;
        node.start_reopen(&id)?.end()?;
        wait_for("the first line to appear in the new log file", || {
            Ok((fs::metadata(&log)?.len() > 0).then_some(()))
        })
    })
}

fn a_seccomp_profile_that_is_not_a_regular_file_is_refused() -> Result {
    on_a_node(|node| {
        node.pull(BUSYBOX)?;
        let pod = node.pod("profiles");
        let pod_id = node.runp(&pod)?;
        let profile = node.join("profile.json");
        let other = node.join("other");
        for kind in [0, 1] {
            let what = place(&profile, kind, &other)?.unwrap_or_default();
            let mut container = node.container("confined", &["true"]);
            container["linux"]["security_context"]["seccomp"] =
                json!({ "profile_type": 2, "localhost_ref": profile });
            let words = format!("it is {what}, not a regular file");
            is_refused(node, (&pod_id, &pod), &container, &words)?;
        }
        Ok(())
    })
}
