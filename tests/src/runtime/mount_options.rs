//! Options of mounts: those of the specification, of overlays, and what `remount` changes; and
//! what is mounted where a namespace is not the container's own.

use std::fs;

use serde_json::{Value, json};

use crate::support::bundle::Bundle;
use crate::support::machine::{Directory, Result, command, wait_for};
use crate::support::mountinfo::{line, options};
use crate::support::needs::{Need, Test};
use crate::{ensure, ensure_eq, test};

pub(crate) const TESTS: &[Test] = &[
    test!(every_option_of_the_specification_is_taken),
    test!(several_options_in_one_string_are_taken),
    test!(a_remount_changes_what_is_mounted),
    test!(a_remount_of_a_bind_mount_changes_that_mount_alone),
    test!(
        a_remount_of_the_hosts_file_systems_leaves_the_host_alone,
        Need::Rrun
    ),
    test!(a_remount_of_nothing_is_refused),
    test!(an_overlay_is_mounted),
    test!(an_overlay_of_many_layers_is_mounted),
    test!(more_options_than_the_kernel_takes_are_refused, Need::Rrun),
    test!(
        a_user_namespace_in_the_hosts_network_sees_its_sysfs,
        Need::Rrun
    ),
    test!(
        a_user_namespace_in_the_hosts_ipc_sees_its_queues,
        Need::File("/dev/mqueue"),
        Need::Rrun
    ),
    test!(a_user_namespace_in_the_hosts_cgroup_namespace_sees_its_own_cgroup),
    test!(a_joined_ipc_namespace_has_its_queues),
    test!(
        parameters_never_go_to_what_is_mounted_in_proc,
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

/// What is in the list and should be, or is not and should not.
fn has(all: &[String], option: &str, wanted: bool) -> Result {
    ensure_eq!(
        all.iter().any(|there| there == option),
        wanted,
        "{option} among {all:?}"
    );
    Ok(())
}

fn every_option_of_the_specification_is_taken() -> Result {
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
            ensure_eq!(output.code, 0, "{typ} with {option}: {}", output.told());
        }
    }
    Ok(())
}

fn several_options_in_one_string_are_taken() -> Result {
    let mut bundle = Bundle::new(&["stat", "/data"])?;
    add(
        &mut bundle,
        "/data",
        "tmpfs",
        "tmpfs",
        &["size=1m,mode=1750"],
    );
    ensure_eq!(bundle.run()?.json()?["mode"], "1750", "mode");
    Ok(())
}

fn a_remount_changes_what_is_mounted() -> Result {
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
    for (option, wanted) in [("ro", true), ("noexec", true), ("nosuid", false)] {
        has(&own, option, wanted)?;
    }
    let line = line(&report, "/data")?;
    ensure!(line.contains("size=2048k"), "{line}");
    Ok(())
}

fn a_remount_of_a_bind_mount_changes_that_mount_alone() -> Result {
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

fn a_remount_of_the_hosts_file_systems_leaves_the_host_alone() -> Result {
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
        "the host's mounts"
    );
    Ok(())
}

fn a_remount_of_nothing_is_refused() -> Result {
    let mut bundle = Bundle::new(&["exit", "0"])?;
    add(&mut bundle, "/data", "tmpfs", "t", &["remount", "ro"]);
    let output = bundle.call(&["run"])?.exits(1)?;
    ensure!(output.stderr.contains("/data"), "{}", output.told());
    Ok(())
}

/// Layers of an overlay, and where it is written.
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
        "files in the overlay"
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

/// Longer than what fsconfig(2) takes as a value.
fn an_overlay_of_many_layers_is_mounted() -> Result {
    overlay(20)
}

fn more_options_than_the_kernel_takes_are_refused() -> Result {
    let mut bundle = Bundle::new(&["exit", "0"])?;
    let lower = format!("lowerdir={}", vec!["/nowhere/at/all"; 400].join(":"));
    add(&mut bundle, "/data", "overlay", "overlay", &[&lower]);
    let output = bundle.call(&["run"])?.exits(1)?;
    ensure!(
        output.stderr.contains("mounts[7].options") && output.stderr.contains("4095"),
        "{}",
        output.told()
    );
    Ok(())
}

/// A container in a user namespace of its own and without this other one.
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

fn a_user_namespace_in_the_hosts_network_sees_its_sysfs() -> Result {
    let mut bundle = in_user_namespace("network")?;
    let report = bundle.report()?;
    ensure!(line(&report, "/sys")?.contains("sysfs"), "{report:#}");
    for option in ["ro", "nosuid", "nodev", "noexec"] {
        has(&options(&report, "/sys")?, option, true)?;
    }
    // Of what is mounted below it, the container gets its own cgroup, and the rest read-only.
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
    ensure!(below.is_empty(), "writable below /sys: {below:#?}");
    bundle.args(&["ls", "/sys/class/net"]).run()?;
    Ok(())
}

fn a_user_namespace_in_the_hosts_ipc_sees_its_queues() -> Result {
    let mut bundle = in_user_namespace("ipc")?;
    // Only the network's parameters are its own now.
    line(&bundle.report()?, "/dev/mqueue")?;
    Ok(())
}

fn a_user_namespace_in_the_hosts_cgroup_namespace_sees_its_own_cgroup() -> Result {
    let mut bundle = in_user_namespace("cgroup")?;
    let report = bundle.report()?;
    line(&report, "/sys/fs/cgroup")?;
    Ok(())
}

fn a_joined_ipc_namespace_has_its_queues() -> Result {
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
    ensure_eq!(second.run()?.text(), "queue", "queues");
    first.end()?;
    Ok(())
}

/// CVE-2025-52881: in a mount namespace that others have had a hand on, a file of /proc may be
/// another than its name says.
fn parameters_never_go_to_what_is_mounted_in_proc() -> Result {
    const MEANT: &str = "/proc/sys/net/ipv4/ip_default_ttl";
    const OTHER: &str = "/proc/sys/kernel/msgmni";
    let ready = Directory::new("ready")?;
    for trap in [
        format!("mount -n --bind {OTHER} {MEANT}"),
        "mount -n -t tmpfs none /proc && mkdir -p /proc/sys/net/ipv4 && echo 1 >/proc/sys/net/ipv4/ip_default_ttl".to_owned(),
        "mount -n --bind /proc/sys /proc".to_owned(),
    ] {
        let mark = ready.join("mark");
        let script = format!("{trap} && touch {} && exec sleep 600", mark.display());
        let mut other = command("unshare", ["--mount", "--net", "sh", "-c", &script]).start()?;
        wait_for("the trap to be set", || {
            ensure!(other.lives(), "it ended: {}", other.stderr());
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
            "{}",
            output.told()
        );
        ensure_eq!(fs::read_to_string(OTHER)?, before, "{OTHER} after {trap}");
    }
    Ok(())
}
