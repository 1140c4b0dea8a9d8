//! Tests of mount options: the options of the specification, the options of overlays, and
//! `remount`. Some tests cover the mounts of a container that shares a namespace with the host.

use std::fs;

use serde_json::{Value, json};

use crate::support::bundle::Bundle;
use crate::support::machine::{Directory, Result, command, wait_for};
use crate::support::mountinfo::{line, options};
use crate::support::needs::{Need, Test};
use crate::{ensure, ensure_eq, test};

pub(crate) const TESTS: &[Test] = &[
    test!(every_option_of_the_specification_is_accepted),
    test!(several_mount_options_in_one_string_are_accepted),
    test!(a_remount_changes_an_existing_mount),
    test!(a_remount_of_a_bind_mount_changes_only_that_mount),
    test!(
        a_remount_of_the_hosts_file_systems_does_not_change_the_hosts_mounts,
        Need::Rrun
    ),
    test!(a_remount_of_a_missing_mount_is_refused),
    test!(an_overlay_is_mounted),
    test!(an_overlay_of_many_layers_is_mounted),
    test!(more_options_than_the_kernel_accepts_are_refused, Need::Rrun),
    test!(
        a_container_in_a_user_namespace_sees_the_sysfs_of_the_hosts_network_namespace,
        Need::Rrun
    ),
    test!(
        a_container_in_a_user_namespace_sees_the_message_queues_of_the_hosts_ipc_namespace,
        Need::File("/dev/mqueue"),
        Need::Rrun
    ),
    test!(a_container_in_a_user_namespace_sees_its_own_cgroup_in_the_hosts_cgroup_namespace),
    test!(a_container_sees_the_message_queues_of_a_joined_ipc_namespace),
    test!(
        the_runtime_never_writes_sysctls_to_mounts_in_proc,
        Need::Rrun,
        Need::Program("unshare")
    ),
];

fn add(bundle: &mut Bundle, destination: &str, kind: &str, source: &str, options: &[&str]) {
    bundle.add(
        "/mounts",
        json!({ "destination": destination, "type": kind, "source": source, "options": options }),
    );
}

/// Checks whether `all` contains `option`. If `expected` is true, `all` must contain `option`. If
/// `expected` is false, `all` must not contain `option`.
fn has(all: &[String], option: &str, expected: bool) -> Result {
    ensure_eq!(
        all.iter().any(|set| set == option),
        expected,
        "whether the option {option} is set (the mount's options: {all:?})"
    );
    Ok(())
}

fn every_option_of_the_specification_is_accepted() -> Result {
    let source = Directory::new("source")?;
    let plain = [
        "async",
        "atime",
        "defaults",
        "dev",
        "diratime",
        "dirsync",
        "exec",
        "iversion",
        "lazytime",
        "loud",
        "mand",
        "noatime",
        "nodev",
        "nodiratime",
        "noexec",
        "noiversion",
        "nolazytime",
        "nomand",
        "norelatime",
        "nostrictatime",
        "nosuid",
        "nosymfollow",
        "private",
        "ratime",
        "rdev",
        "rdiratime",
        "relatime",
        "rexec",
        "rnoatime",
        "rnodev",
        "rnodiratime",
        "rnoexec",
        "rnorelatime",
        "rnostrictatime",
        "rnosuid",
        "rnosymfollow",
        "ro",
        "rprivate",
        "rrelatime",
        "rro",
        "rrw",
        "rshared",
        "rslave",
        "rstrictatime",
        "rsuid",
        "rsymfollow",
        "runbindable",
        "rw",
        "shared",
        "silent",
        "slave",
        "strictatime",
        "suid",
        "symfollow",
        "sync",
        "unbindable",
    ];
    let mut bundle = Bundle::new(&["exit", "0"])?;
    for option in plain {
        for (typ, bind) in [("tmpfs", None), ("bind", Some("rbind"))] {
            let options: Vec<&str> = bind.into_iter().chain([option]).collect();
            let mount = json!({
                "destination": "/data", "type": typ, "source": source.path(), "options": options,
            });
            if let Some(Value::Array(all)) = bundle.config.pointer_mut("/mounts") {
                all.truncate(7);
            }
            bundle.add("/mounts", mount);
            let output = bundle.call(&["run"])?.end()?;
            ensure_eq!(
                output.code,
                0,
                "the exit code of `run` with a {typ} mount and the option {option} ({})",
                output.told()
            );
        }
    }
    Ok(())
}

fn several_mount_options_in_one_string_are_accepted() -> Result {
    let mut bundle = Bundle::new(&["stat", "/data"])?;
    add(
        &mut bundle,
        "/data",
        "tmpfs",
        "tmpfs",
        &["size=1m,mode=1750"],
    );
    ensure_eq!(
        bundle.run()?.json()?["mode"],
        "1750",
        "the mode of the tmpfs"
    );
    Ok(())
}

fn a_remount_changes_an_existing_mount() -> Result {
    let mut bundle = Bundle::new(&[])?;
    add(
        &mut bundle,
        "/data",
        "tmpfs",
        "t",
        &["size=1m", "nosuid", "mode=755"],
    );
    add(
        &mut bundle,
        "/data",
        "tmpfs",
        "t",
        &["remount", "ro", "noexec", "size=2m"],
    );
    let report = bundle.report()?;
    let own = options(&report, "/data")?;
    for (option, expected) in [("ro", true), ("noexec", true), ("nosuid", false)] {
        has(&own, option, expected)?;
    }
    let line = line(&report, "/data")?;
    ensure!(
        line.contains("size=2048k"),
        "the size of the remounted tmpfs is not 2048k; its line in mountinfo: {line}"
    );
    Ok(())
}

fn a_remount_of_a_bind_mount_changes_only_that_mount() -> Result {
    let source = Directory::new("source")?;
    let path = source.path().to_string_lossy().into_owned();
    let mut bundle = Bundle::new(&[])?;
    fs::create_dir(bundle.join("rootfs/data/other"))?;
    add(&mut bundle, "/data", "bind", &path, &["bind", "nosuid"]);
    add(&mut bundle, "/tmp", "bind", &path, &["bind"]);
    add(
        &mut bundle,
        "/data",
        "bind",
        &path,
        &["bind", "remount", "ro"],
    );
    let report = bundle.report()?;
    has(&options(&report, "/data")?, "ro", true)?;
    has(&options(&report, "/data")?, "nosuid", false)?;
    has(&options(&report, "/tmp")?, "ro", false)?;
    fs::write(source.join("file"), "the host still writes")?;
    Ok(())
}

fn a_remount_of_the_hosts_file_systems_does_not_change_the_hosts_mounts() -> Result {
    let before = fs::read_to_string("/proc/self/mountinfo")?;
    let mut bundle = Bundle::new(&[])?;
    bundle.without_namespace("network");
    add(&mut bundle, "/sys", "sysfs", "sysfs", &["remount", "ro"]);
    add(
        &mut bundle,
        "/sys/fs/cgroup",
        "cgroup",
        "cgroup",
        &["remount", "rw"],
    );
    let report = bundle.report()?;
    has(&options(&report, "/sys")?, "ro", true)?;
    has(&options(&report, "/sys/fs/cgroup")?, "ro", false)?;
    ensure_eq!(
        fs::read_to_string("/proc/self/mountinfo")?,
        before,
        "the host's mounts after the remounts in the container"
    );
    Ok(())
}

fn a_remount_of_a_missing_mount_is_refused() -> Result {
    let mut bundle = Bundle::new(&["exit", "0"])?;
    add(&mut bundle, "/data", "tmpfs", "t", &["remount", "ro"]);
    let output = bundle.call(&["run"])?.exits(1)?;
    ensure!(
        output.stderr.contains("/data"),
        "the error of `run` does not name the mount point:\n{}",
        output.told()
    );
    Ok(())
}

/// The directories of an overlay: its lower layers, and its upper and work directories.
struct Layers {
    _directory: Directory,
    lower: String,
    rest: [String; 2],
}

fn layers(count: usize) -> Result<Layers> {
    let directory = Directory::new("layers")?;
    let mut lower = Vec::new();
    for number in 0..count {
        let layer = directory.join(&format!("layer-{number}-{}", "x".repeat(30)));
        fs::create_dir(&layer)?;
        fs::write(layer.join(format!("file-{number}")), "of a layer")?;
        lower.push(layer.to_string_lossy().into_owned());
    }
    let mut rest = [String::new(), String::new()];
    for (option, name) in rest.iter_mut().zip(["upperdir", "workdir"]) {
        let path = directory.join(name);
        fs::create_dir(&path)?;
        *option = format!("{name}={}", path.display());
    }
    Ok(Layers {
        _directory: directory,
        lower: format!("lowerdir={}", lower.join(":")),
        rest,
    })
}

fn overlay(count: usize) -> Result {
    let layers = layers(count)?;
    let mut bundle = Bundle::new(&["ls", "/data"])?;
    let [upper, work] = &layers.rest;
    add(
        &mut bundle,
        "/data",
        "overlay",
        "overlay",
        &[&layers.lower, upper, work, "nodev", "noexec"],
    );
    ensure_eq!(
        bundle.run()?.stdout.lines().count(),
        count,
        "the number of files in the overlay"
    );
    let report = bundle.report()?;
    for option in ["nodev", "noexec"] {
        has(&options(&report, "/data")?, option, true)?;
    }
    bundle.args(&["write", "/data/new", "text"]).run()?;
    Ok(())
}

fn an_overlay_is_mounted() -> Result {
    overlay(2)
}

/// With 20 layers, the option `lowerdir` is too long for fsconfig(2). Therefore, the runtime must
/// use mount(2).
fn an_overlay_of_many_layers_is_mounted() -> Result {
    overlay(20)
}

fn more_options_than_the_kernel_accepts_are_refused() -> Result {
    let mut bundle = Bundle::new(&["exit", "0"])?;
    let lower = format!("lowerdir={}", vec!["/nowhere/at/all"; 400].join(":"));
    add(&mut bundle, "/data", "overlay", "overlay", &[&lower]);
    let output = bundle.call(&["run"])?.exits(1)?;
    ensure!(
        output.stderr.contains("mounts[7].options") && output.stderr.contains("4095"),
        "the error of `run` does not name the field and the kernel's limit:\n{}",
        output.told()
    );
    Ok(())
}

/// Returns a bundle whose container has a separate user namespace, but no separate namespace of the
/// type `without`. The container and the runtime share the namespace of this type.
fn in_user_namespace(without: &str) -> Result<Bundle> {
    let mut bundle = Bundle::new(&[])?;
    let ids = json!([{ "containerID": 0, "hostID": 100_000, "size": 65_536 }]);
    bundle
        .without_namespace(without)
        .add("/linux/namespaces", json!({ "type": "user" }))
        .set("/linux/uidMappings", ids.clone())
        .set("/linux/gidMappings", ids);
    Ok(bundle)
}

fn a_container_in_a_user_namespace_sees_the_sysfs_of_the_hosts_network_namespace() -> Result {
    let mut bundle = in_user_namespace("network")?;
    let report = bundle.report()?;
    ensure!(
        line(&report, "/sys")?.contains("sysfs"),
        "the file system on /sys is not a sysfs; the container's report: {report:#}"
    );
    for option in ["ro", "nosuid", "nodev", "noexec"] {
        has(&options(&report, "/sys")?, option, true)?;
    }
    // Below /sys, the container sees the mount of the container's cgroup and the host's other
    // mounts. All these mounts must be read-only.
    let below: Vec<&str> = report["mounts"]
        .as_array()
        .into_iter()
        .flatten()
        .filter_map(Value::as_str)
        .filter(|line| {
            line.split(' ')
                .nth(4)
                .is_some_and(|it| it.starts_with("/sys/"))
        })
        .filter(|line| {
            !line
                .split(' ')
                .nth(5)
                .is_some_and(|it| it.starts_with("ro"))
        })
        .collect();
    ensure!(
        below.is_empty(),
        "mounts below /sys are writable; the writable mounts: {below:#?}"
    );
    bundle.args(&["ls", "/sys/class/net"]).run()?;
    Ok(())
}

fn a_container_in_a_user_namespace_sees_the_message_queues_of_the_hosts_ipc_namespace() -> Result {
    let mut bundle = in_user_namespace("ipc")?;
    line(&bundle.report()?, "/dev/mqueue")?;
    Ok(())
}

fn a_container_in_a_user_namespace_sees_its_own_cgroup_in_the_hosts_cgroup_namespace() -> Result {
    let mut bundle = in_user_namespace("cgroup")?;
    let report = bundle.report()?;
    line(&report, "/sys/fs/cgroup")?;
    Ok(())
}

fn a_container_sees_the_message_queues_of_a_joined_ipc_namespace() -> Result {
    let mut first = Bundle::new(&["sleep", "600"])?;
    let writable = json!({
        "destination": "/dev/mqueue", "type": "mqueue", "source": "mqueue", "options": ["nosuid"],
    });
    first.set("/mounts/4", writable).start()?;
    first.exec(&[], &["write", "/dev/mqueue/queue", ""]).ok()?;
    let mut second = Bundle::new(&["ls", "/dev/mqueue"])?;
    second.without_namespace("ipc").add(
        "/linux/namespaces",
        json!({ "type": "ipc", "path": format!("/proc/{}/ns/ipc", first.pid()?) }),
    );
    ensure_eq!(
        second.run()?.text(),
        "queue",
        "the message queues in the joined IPC namespace"
    );
    first.end()?;
    Ok(())
}

/// In CVE-2025-52881, another program prepares the mount namespace with false mounts. A path in
/// /proc then leads to a different file than without the false mounts.
fn the_runtime_never_writes_sysctls_to_mounts_in_proc() -> Result {
    const INTENDED: &str = "/proc/sys/net/ipv4/ip_default_ttl";
    const OTHER: &str = "/proc/sys/kernel/msgmni";
    let ready = Directory::new("ready")?;
    for trap in [
        format!("mount -n --bind {OTHER} {INTENDED}"),
        "mount -n -t tmpfs none /proc && mkdir -p /proc/sys/net/ipv4 && echo 1 >/proc/sys/net/ipv4/ip_default_ttl".to_owned(),
        "mount -n --bind /proc/sys /proc".to_owned(),
    ] {
        let mark = ready.join("mark");
        let script = format!("{trap} && touch {} && exec sleep 600", mark.display());
        let mut other = command("unshare", ["--mount", "--net", "sh", "-c", &script]).start()?;
        wait_for("the other program to create the false mounts", || {
            ensure!(other.lives(), "the program that creates the false mounts exited; its standard error: {}", other.stderr());
            Ok(mark.exists().then_some(()))
        })?;
        fs::remove_file(&mark)?;
        let before = fs::read_to_string(OTHER)?;
        let mut bundle = Bundle::new(&["exit", "0"])?;
        bundle
            .without_namespace("mount")
            .without_namespace("network")
            .add(
                "/linux/namespaces",
                json!({ "type": "network", "path": format!("/proc/{}/ns/net", other.pid()) }),
            )
            .add(
                "/linux/namespaces",
                json!({ "type": "mount", "path": format!("/proc/{}/ns/mnt", other.pid()) }),
            )
            .set("/linux/sysctl", json!({ "net.ipv4.ip_default_ttl": "77" }));
        let output = bundle.call(&["run"])?.exits(1)?;
        ensure!(
            output.stderr.contains("ip_default_ttl") || output.stderr.contains("/proc"),
            "the error of `run` names neither the sysctl nor /proc:\n{}",
            output.told()
        );
        ensure_eq!(fs::read_to_string(OTHER)?, before, "the content of {OTHER}, which `run` must not change (the test prepared the mount namespace with the command `{trap}`)");
    }
    Ok(())
}
