//! The root file system and what is mounted in it.

use std::fs;
use std::os::unix::fs::symlink;

use nix::mount::{MntFlags, MsFlags, mount, umount2};
use serde_json::json;

use crate::support::bundle::Bundle;
use crate::support::machine::{Directory, Result};
use crate::support::mountinfo::{line, options};
use crate::support::needs::{Need, Test};
use crate::{ensure, ensure_eq, test};

pub(crate) const TESTS: &[Test] = &[
    test!(without_pivot_the_root_is_changed_all_the_same),
    test!(a_readonly_root_is_readonly),
    test!(a_writable_root_is_written_through),
    test!(the_hosts_root_is_out_of_reach),
    test!(a_bind_mount_shows_the_source),
    test!(the_hosts_root_is_shown_to_who_asks_for_it),
    test!(a_readonly_bind_mount_is_readonly),
    test!(a_file_is_bind_mounted_on_a_file_that_is_made),
    test!(a_tmpfs_has_its_options),
    test!(a_tmpfs_begins_with_what_it_covers),
    test!(a_read_only_tmpfs_can_have_mounts_inside),
    test!(a_cgroup_mount_is_read_only_without_a_namespace_too),
    test!(a_path_masked_twice_is_covered_once, Need::Rrun),
    test!(mount_flags_are_set),
    test!(mount_points_are_made),
    test!(a_mount_point_that_is_a_link_stays_inside),
    test!(masked_paths_are_empty),
    test!(readonly_paths_are_readonly),
    test!(default_devices_are_there),
    test!(devices_asked_for_are_made),
    test!(the_containers_cgroup_is_its_root),
    test!(a_slave_mount_gets_what_the_host_mounts),
    test!(a_private_mount_does_not),
    test!(the_hosts_mounts_are_not_seen),
];

fn bind(bundle: &mut Bundle, source: &std::path::Path, destination: &str, options: &[&str]) {
    bundle.add(
        "/mounts",
        json!({
            "destination": destination, "type": "bind", "source": source, "options": options,
        }),
    );
}

fn a_readonly_root_is_readonly() -> Result {
    let bundle = Bundle::new(&["write", "/data/file", "text"])?;
    let output = bundle.call(&["run"])?.exits(1)?;
    ensure!(
        output.stderr.contains("Read-only file system"),
        "{}",
        output.told()
    );
    Ok(())
}

fn a_writable_root_is_written_through() -> Result {
    let mut bundle = Bundle::new(&["write", "/data/file", "text"])?;
    bundle.set("/root/readonly", json!(false)).run()?;
    ensure_eq!(
        fs::read_to_string(bundle.join("rootfs/data/file"))?,
        "text",
        "what it wrote"
    );
    Ok(())
}

fn the_hosts_root_is_out_of_reach() -> Result {
    let bundle = Bundle::new(&["ls", "/"])?;
    let inside: Vec<String> = bundle.run()?.stdout.lines().map(str::to_owned).collect();
    ensure_eq!(
        inside,
        ["bin", "data", "dev", "etc", "proc", "sys", "tmp"],
        "names in /"
    );
    let mut bundle = Bundle::new(&["ls", "/../.."])?;
    ensure_eq!(bundle.run()?.stdout.lines().count(), 7, "names in /../..");
    let report = bundle.report()?;
    let line = line(&report, "/")?;
    ensure!(line.contains("rootfs"), "the root is {line}");
    Ok(())
}

fn a_bind_mount_shows_the_source() -> Result {
    let source = Directory::new("source")?;
    fs::write(source.join("file"), "from the host")?;
    let mut bundle = Bundle::new(&["cat", "/data/file"])?;
    bind(&mut bundle, source.path(), "/data", &["bind"]);
    ensure_eq!(
        bundle.run()?.stdout,
        "from the host",
        "the file in the bind mount"
    );
    bundle.args(&["write", "/data/back", "to the host"]).run()?;
    ensure_eq!(
        fs::read_to_string(source.join("back"))?,
        "to the host",
        "what it wrote"
    );
    Ok(())
}

/// As `kubectl debug node` and every agent of a node ask for it.
fn the_hosts_root_is_shown_to_who_asks_for_it() -> Result {
    let source = Directory::new("source")?;
    fs::write(source.join("file"), "from the host")?;
    let there = format!("/data{}/file", source.path().display());
    let new_user = |bundle: &mut Bundle| {
        bundle.add("/linux/namespaces", json!({ "type": "user" }));
        for maps in ["/linux/uidMappings", "/linux/gidMappings"] {
            let all = json!([{ "containerID": 0, "hostID": 0, "size": 65536 }]);
            bundle.set(maps, all);
        }
    };
    let shared = |bundle: &mut Bundle| {
        bundle.set("/linux/rootfsPropagation", json!("rshared"));
    };
    type Variant<'a> = (&'a str, &'a [&'a str], &'a dyn Fn(&mut Bundle));
    let variants: [Variant<'_>; 4] = [
        ("plainly", &["run"], &|_| ()),
        ("without pivot_root", &["run", "--no-pivot"], &|_| ()),
        ("in a user namespace", &["run"], &new_user),
        ("with a shared root", &["run"], &shared),
    ];
    for (how, call, change) in variants {
        for options in [&["rbind"][..], &["rbind", "rslave", "ro"]] {
            let mut bundle = Bundle::new(&["cat", &there])?;
            bind(&mut bundle, std::path::Path::new("/"), "/data", options);
            change(&mut bundle);
            let output = bundle.call(call)?.ok()?;
            ensure_eq!(output.stdout, "from the host", "the host's file, {how}");
            bundle.args(&["ls", "/"]);
            let root = bundle.call(call)?.ok()?;
            ensure!(
                !root.stdout.contains("sbin"),
                "the container's root, {how}: {}",
                root.told()
            );
        }
    }
    Ok(())
}

fn a_readonly_bind_mount_is_readonly() -> Result {
    let source = Directory::new("source")?;
    let mut bundle = Bundle::new(&["write", "/data/file", "text"])?;
    bind(&mut bundle, source.path(), "/data", &["bind", "ro"]);
    let output = bundle.call(&["run"])?.exits(1)?;
    ensure!(
        output.stderr.contains("Read-only file system"),
        "{}",
        output.told()
    );
    ensure!(!source.join("file").exists(), "it was written all the same");
    fs::write(source.join("file"), "the host still writes")?;
    Ok(())
}

fn a_file_is_bind_mounted_on_a_file_that_is_made() -> Result {
    let source = Directory::new("source")?;
    fs::write(source.join("hosts"), "127.0.0.1 localhost")?;
    let mut bundle = Bundle::new(&["cat", "/etc/deep/hosts"])?;
    bind(
        &mut bundle,
        &source.join("hosts"),
        "/etc/deep/hosts",
        &["bind", "ro"],
    );
    ensure_eq!(bundle.run()?.stdout, "127.0.0.1 localhost", "the file");
    Ok(())
}

fn a_tmpfs_has_its_options() -> Result {
    let mut bundle = Bundle::new(&["stat", "/data"])?;
    bundle.add(
        "/mounts",
        json!({
            "destination": "/data", "type": "tmpfs", "source": "tmpfs",
            "options": ["nosuid", "nodev", "mode=1750", "uid=12", "gid=34", "size=1m"],
        }),
    );
    let stat = bundle.run()?.json()?;
    ensure_eq!(stat["mode"], "1750", "mode");
    ensure_eq!(
        (&stat["uid"], &stat["gid"]),
        (&json!(12), &json!(34)),
        "owner"
    );
    let report = bundle.report()?;
    let line = line(&report, "/data")?;
    ensure!(line.contains("size=1024k"), "{line}");
    Ok(())
}

fn a_tmpfs_begins_with_what_it_covers() -> Result {
    let mut bundle = Bundle::new(&["cat", "/data/below/file"])?;
    let data = bundle.join("rootfs/data");
    fs::create_dir(data.join("below"))?;
    fs::write(data.join("below/file"), "of the image")?;
    symlink("below/file", data.join("link"))?;
    std::os::unix::fs::chown(data.join("below/file"), Some(7), Some(8))?;
    let mode = std::os::unix::fs::PermissionsExt::from_mode(0o711);
    fs::set_permissions(&data, mode)?;
    bundle.add(
        "/mounts",
        json!({
            "destination": "/data", "type": "tmpfs", "source": "x", "options": ["tmpcopyup", "ro"],
        }),
    );
    ensure_eq!(bundle.run()?.stdout, "of the image", "the file");
    bundle.args(&["cat", "/data/link"]);
    ensure_eq!(bundle.run()?.stdout, "of the image", "by the link");
    let stat = bundle.args(&["stat", "/data/below/file"]).run()?.json()?;
    ensure_eq!(
        (&stat["uid"], &stat["gid"]),
        (&json!(7), &json!(8)),
        "owner"
    );
    let stat = bundle.args(&["stat", "/data"]).run()?.json()?;
    ensure_eq!(stat["mode"], "711", "mode of the tmpfs");
    bundle
        .args(&["write", "/data/new", "x"])
        .call(&["run"])?
        .exits(1)?;
    // Without the option, it is empty and has the mode all the same.
    let last = bundle.config["mounts"].as_array().map_or(0, Vec::len) - 1;
    bundle.set(&format!("/mounts/{last}/options"), json!([]));
    ensure_eq!(
        bundle.args(&["ls", "/data"]).run()?.stdout,
        "",
        "files in an empty tmpfs"
    );
    let stat = bundle.args(&["stat", "/data"]).run()?.json()?;
    ensure_eq!(stat["mode"], "711", "mode of an empty tmpfs");
    Ok(())
}

fn mount_flags_are_set() -> Result {
    let source = Directory::new("source")?;
    let mut bundle = Bundle::new(&[])?;
    bind(
        &mut bundle,
        source.path(),
        "/data",
        &["rbind", "nosuid", "nodev", "noexec", "noatime", "ro"],
    );
    let report = bundle.report()?;
    let options = options(&report, "/data")?;
    for option in ["nosuid", "nodev", "noexec", "noatime", "ro"] {
        ensure!(
            options.iter().any(|there| there == option),
            "no {option} in {options:?}"
        );
    }
    Ok(())
}

fn mount_points_are_made() -> Result {
    let mut bundle = Bundle::new(&["stat", "/made/for/it"])?;
    bundle.add(
        "/mounts",
        json!({
            "destination": "/made/for/it", "type": "tmpfs", "source": "tmpfs", "options": [],
        }),
    );
    let stat = bundle.run()?.json()?;
    ensure_eq!(stat["kind"], "directory", "what the mount point is");
    ensure_eq!(stat["mode"], "1777", "the tmpfs's own mode");
    Ok(())
}

/// It is so only when what is mounted inside has its place.
fn a_read_only_tmpfs_can_have_mounts_inside() -> Result {
    let source = Directory::new("source")?;
    let mut bundle = Bundle::new(&[])?;
    bundle.add(
        "/mounts",
        json!({
            "destination": "/data", "type": "tmpfs", "source": "x", "options": ["ro", "nosuid"],
        }),
    );
    bind(&mut bundle, source.path(), "/data/inside", &["bind"]);
    let mut config = bundle.report()?;
    for (point, expected) in [("/data", true), ("/data/inside", false)] {
        let there = options(&config, point)?;
        ensure_eq!(
            there.iter().any(|option| option == "ro"),
            expected,
            "read-only {point}: {there:?}"
        );
    }
    let mut bundle = Bundle::new(&[])?;
    for mount in bundle.mounts() {
        if mount["destination"] == "/dev" {
            mount["options"] = json!(["ro", "nosuid", "mode=755"]);
        }
    }
    config = bundle.report()?;
    let there = options(&config, "/dev")?;
    ensure!(there.iter().any(|option| option == "ro"), "/dev: {there:?}");
    let there = options(&config, "/dev/pts")?;
    ensure!(
        there.iter().all(|option| option != "ro"),
        "/dev/pts: {there:?}"
    );
    Ok(())
}

fn a_cgroup_mount_is_read_only_without_a_namespace_too() -> Result {
    let mut bundle = Bundle::new(&[])?;
    bundle.without_namespace("cgroup").add(
        "/mounts",
        json!({
            "destination": "/data", "type": "cgroup", "source": "cgroup",
            "options": ["nosuid", "noexec", "nodev", "ro"],
        }),
    );
    let report = bundle.report()?;
    let there = options(&report, "/data")?;
    ensure!(there.iter().any(|option| option == "ro"), "{there:?}");
    Ok(())
}

fn a_path_masked_twice_is_covered_once() -> Result {
    let mut bundle = Bundle::new(&[])?;
    fs::create_dir(bundle.join("rootfs/data/hidden"))?;
    bundle.set(
        "/linux/maskedPaths",
        json!(["/data/hidden", "/data/hidden"]),
    );
    let report = bundle.report()?;
    let covers = report["mounts"]
        .as_array()
        .into_iter()
        .flatten()
        .filter(|line| {
            line.as_str()
                .is_some_and(|line| line.split(' ').nth(4) == Some("/data/hidden"))
        });
    ensure_eq!(covers.count(), 1, "mounts on it");
    Ok(())
}

fn a_mount_point_that_is_a_link_stays_inside() -> Result {
    let outside = Directory::new("outside")?;
    let source = Directory::new("source")?;
    fs::write(source.join("file"), "mounted")?;
    let mut bundle = Bundle::new(&["cat", "/data/trap/file"])?;
    // What is /tmp/… to the host is another /tmp/… inside.
    symlink(outside.path(), bundle.join("rootfs/data/trap"))?;
    bind(&mut bundle, source.path(), "/data/trap", &["bind"]);
    ensure_eq!(bundle.run()?.stdout, "mounted", "the file behind the link");
    ensure!(
        !outside.join("file").exists(),
        "it was mounted outside of the root file system"
    );
    ensure!(
        fs::read_dir(outside.path())?.next().is_none(),
        "something was made outside"
    );
    let inside = bundle.rootfs().join(outside.path().strip_prefix("/")?);
    ensure!(inside.exists(), "{} was not made", inside.display());
    Ok(())
}

fn masked_paths_are_empty() -> Result {
    let mut bundle = Bundle::new(&["ls", "/data/hidden"])?;
    fs::create_dir(bundle.join("rootfs/data/hidden"))?;
    fs::write(bundle.join("rootfs/data/hidden/secret"), "secret")?;
    fs::write(bundle.join("rootfs/data/file"), "secret")?;
    bundle.set(
        "/linux/maskedPaths",
        json!(["/data/hidden", "/data/file", "/data/not-there"]),
    );
    ensure_eq!(bundle.run()?.stdout, "", "names in the masked directory");
    ensure_eq!(
        bundle.args(&["cat", "/data/file"]).run()?.stdout,
        "",
        "the masked file"
    );
    bundle
        .args(&["write", "/data/hidden/new", "text"])
        .call(&["run"])?
        .exits(1)?;
    Ok(())
}

fn readonly_paths_are_readonly() -> Result {
    let mut bundle = Bundle::new(&["write", "/data/fixed/file", "text"])?;
    fs::create_dir(bundle.join("rootfs/data/fixed"))?;
    bundle.set("/root/readonly", json!(false)).set(
        "/linux/readonlyPaths",
        json!(["/data/fixed", "/proc/sys", "/data/not-there"]),
    );
    let output = bundle.call(&["run"])?.exits(1)?;
    ensure!(
        output.stderr.contains("Read-only file system"),
        "{}",
        output.told()
    );
    bundle
        .args(&["write", "/proc/sys/kernel/hostname", "x"])
        .call(&["run"])?
        .exits(1)?;
    bundle.args(&["write", "/data/file", "text"]).run()?;
    Ok(())
}

fn default_devices_are_there() -> Result {
    let mut bundle = Bundle::new(&[])?;
    for (name, numbers) in [
        ("null", [1, 3]),
        ("zero", [1, 5]),
        ("full", [1, 7]),
        ("random", [1, 8]),
        ("urandom", [1, 9]),
        ("tty", [5, 0]),
    ] {
        let stat = bundle
            .args(&["stat", &format!("/dev/{name}")])
            .run()?
            .json()?;
        ensure_eq!(stat["kind"], "character device", "/dev/{name}");
        ensure_eq!(stat["device"], json!(numbers), "numbers of /dev/{name}");
        ensure_eq!(stat["mode"], "666", "mode of /dev/{name}");
    }
    for name in ["fd", "stdin", "stdout", "stderr", "ptmx"] {
        let stat = bundle
            .args(&["stat", &format!("/dev/{name}")])
            .run()?
            .json()?;
        ensure_eq!(stat["kind"], "link", "/dev/{name}");
    }
    bundle.args(&["write", "/dev/null", "text"]).run()?;
    Ok(())
}

fn devices_asked_for_are_made() -> Result {
    let mut bundle = Bundle::new(&["stat", "/dev/deep/fuse"])?;
    bundle.set(
        "/linux/devices",
        json!([{
            "path": "/dev/deep/fuse", "type": "c", "major": 10, "minor": 229,
            "fileMode": 0o640, "uid": 5, "gid": 6,
        }]),
    );
    let stat = bundle.run()?.json()?;
    ensure_eq!(stat["kind"], "character device", "/dev/deep/fuse");
    ensure_eq!(stat["device"], json!([10, 229]), "its numbers");
    ensure_eq!(stat["mode"], "640", "its mode");
    ensure_eq!(
        (&stat["uid"], &stat["gid"]),
        (&json!(5), &json!(6)),
        "its owner"
    );
    Ok(())
}

fn the_containers_cgroup_is_its_root() -> Result {
    let mut bundle = Bundle::new(&["cat", "/sys/fs/cgroup/cgroup.procs"])?;
    ensure_eq!(
        bundle.run()?.text(),
        "1",
        "processes in the cgroup that it sees"
    );
    ensure_eq!(bundle.report()?["cgroup"], "0::/", "its cgroup's path");
    Ok(())
}

/// A directory that is a mount point of its own, shared with its peers.
struct Shared(Directory);

impl Shared {
    fn new() -> Result<Self> {
        let dir = Directory::new("shared")?;
        let none: Option<&str> = None;
        mount(Some(dir.path()), dir.path(), none, MsFlags::MS_BIND, none)
            .and_then(|()| mount(none, dir.path(), none, MsFlags::MS_SHARED, none))
            .map_err(|errno| format!("share {}: {errno}", dir.path().display()))?;
        fs::create_dir(dir.join("below"))?;
        Ok(Shared(dir))
    }

    fn mount_below(&self) -> Result {
        let none: Option<&str> = None;
        mount(
            Some("tmpfs"),
            &self.0.join("below"),
            Some("tmpfs"),
            MsFlags::empty(),
            none,
        )
        .map_err(|errno| format!("mount: {errno}"))?;
        Ok(fs::write(self.0.join("below/file"), "mounted later")?)
    }
}

impl Drop for Shared {
    fn drop(&mut self) {
        let _ = umount2(&self.0.join("below"), MntFlags::MNT_DETACH);
        let _ = umount2(self.0.path(), MntFlags::MNT_DETACH);
    }
}

fn mounted_later_is_seen(option: &str) -> Result<bool> {
    let shared = Shared::new()?;
    let mut bundle = Bundle::new(&["sleep", "600"])?;
    bind(&mut bundle, shared.0.path(), "/data", &["rbind", option]);
    bundle.start()?;
    shared.mount_below()?;
    let seen = bundle.exec(&[], &["cat", "/data/below/file"]).end()?.code == 0;
    bundle.end()?;
    Ok(seen)
}

fn a_slave_mount_gets_what_the_host_mounts() -> Result {
    ensure!(
        mounted_later_is_seen("rslave")?,
        "what was mounted later is not seen"
    );
    Ok(())
}

fn a_private_mount_does_not() -> Result {
    ensure!(
        !mounted_later_is_seen("rprivate")?,
        "what was mounted later is seen"
    );
    Ok(())
}

fn the_hosts_mounts_are_not_seen() -> Result {
    let report = Bundle::new(&[])?.report()?;
    let points: Vec<&str> = report["mounts"]
        .as_array()
        .into_iter()
        .flatten()
        .filter_map(|line| line.as_str()?.split(' ').nth(4))
        .collect();
    for point in &points {
        ensure!(
            *point == "/"
                || ["/proc", "/dev", "/sys"]
                    .iter()
                    .any(|ours| point.starts_with(ours)),
            "{point} is among {points:?}"
        );
    }
    Ok(())
}

fn without_pivot_the_root_is_changed_all_the_same() -> Result {
    let proc_is_there = || -> Result<bool> {
        let mounts = std::fs::read_to_string("/proc/self/mountinfo")?;
        Ok(mounts
            .lines()
            .any(|line| line.split(' ').nth(4) == Some("/proc")))
    };
    let mut bundle = Bundle::new(&["ls", "/"])?;
    bundle.set("/linux/rootfsPropagation", json!("rslave"));
    let output = bundle.call(&["run", "--no-pivot"])?.ok()?;
    ensure!(
        !output.stdout.contains("sbin") && output.stdout.contains("data"),
        "not the container's root:\n{}",
        output.told()
    );
    bundle.args(&["sleep", "600"]);
    bundle.call(&["run", "--detach", "--no-pivot"])?.ok()?;
    let seen = bundle.exec(&[], &["ls", "/"]).ok()?;
    ensure_eq!(seen.stdout, output.stdout, "the root that exec finds");
    ensure!(proc_is_there()?, "the host's /proc was taken off");
    bundle.end()?;
    Ok(())
}
