//! Tests of the container's root file system and of the mounts in it.

use std::fs;
use std::os::unix::fs::FileExt as _;
use std::os::unix::fs::symlink;

use nix::mount::{MntFlags, MsFlags, mount, umount2};
use serde_json::json;

use crate::support::bundle::Bundle;
use crate::support::machine::{Directory, Result};
use crate::support::mountinfo::{line, options};
use crate::support::needs::{Need, Test};
use crate::{ensure, ensure_eq, test};

pub(crate) const TESTS: &[Test] = &[
    test!(run_does_not_use_pivot_root_with_the_option_no_pivot),
    test!(a_readonly_root_file_system_is_readonly),
    test!(a_container_can_write_to_a_writable_root_file_system),
    test!(a_container_can_not_reach_the_hosts_root_directory),
    test!(a_bind_mount_shows_the_files_of_its_source),
    test!(a_bind_mount_of_the_hosts_root_directory_shows_the_hosts_files),
    test!(
        a_later_mount_of_the_host_in_the_root_is_not_visible_by_default,
        Need::Rrun
    ),
    test!(a_readonly_bind_mount_is_readonly),
    test!(the_runtime_creates_the_file_for_a_bind_mount_of_a_file),
    test!(a_tmpfs_has_the_configured_options),
    test!(a_tmpfs_with_tmpcopyup_contains_a_copy_of_the_covered_files),
    test!(
        a_tmpfs_with_tmpcopyup_gives_no_program_of_an_unmapped_user_to_root,
        Need::Rrun
    ),
    test!(
        a_tmpfs_with_tmpcopyup_has_room_for_the_holes_of_a_file,
        Need::Rrun
    ),
    test!(a_readonly_tmpfs_can_contain_mounts),
    test!(a_cgroup_mount_in_a_container_without_a_cgroup_namespace_is_readonly),
    test!(
        a_path_that_is_masked_twice_is_covered_by_one_mount,
        Need::Rrun
    ),
    test!(mount_flags_are_set),
    test!(the_runtime_creates_missing_mount_points),
    test!(a_mount_point_behind_a_link_is_inside_the_root_file_system),
    test!(masked_paths_are_empty),
    test!(readonly_paths_are_readonly),
    test!(the_default_devices_exist),
    test!(the_runtime_creates_the_configured_devices),
    test!(a_container_sees_its_cgroup_as_the_root_cgroup),
    test!(a_slave_mount_receives_mounts_that_the_host_creates_later),
    test!(a_private_mount_receives_no_mounts_that_the_host_creates_later),
    test!(a_container_does_not_see_the_hosts_mounts),
];

fn bind(bundle: &mut Bundle, source: &std::path::Path, destination: &str, options: &[&str]) {
    bundle.add(
        "/mounts",
        json!({
            "destination": destination, "type": "bind", "source": source, "options": options,
        }),
    );
}

fn a_readonly_root_file_system_is_readonly() -> Result {
    let bundle = Bundle::new(&["write", "/data/file", "text"])?;
    let output = bundle.call(&["run"])?.exits(1)?;
    ensure!(
        output.stderr.contains("Read-only file system"),
        "the write to the root file system does not fail with EROFS:\n{}",
        output.told()
    );
    Ok(())
}

fn a_container_can_write_to_a_writable_root_file_system() -> Result {
    let mut bundle = Bundle::new(&["write", "/data/file", "text"])?;
    bundle.set("/root/readonly", json!(false)).run()?;
    ensure_eq!(
        fs::read_to_string(bundle.join("rootfs/data/file"))?,
        "text",
        "the content of the file that the container wrote"
    );
    Ok(())
}

fn a_container_can_not_reach_the_hosts_root_directory() -> Result {
    let bundle = Bundle::new(&["ls", "/"])?;
    let inside: Vec<String> = bundle.run()?.stdout.lines().map(str::to_owned).collect();
    ensure_eq!(
        inside,
        ["bin", "data", "dev", "etc", "proc", "sys", "tmp"],
        "the file names in the container's /"
    );
    let mut bundle = Bundle::new(&["ls", "/../.."])?;
    ensure_eq!(
        bundle.run()?.stdout.lines().count(),
        7,
        "the number of files that the container sees in /../.."
    );
    let report = bundle.report()?;
    let line = line(&report, "/")?;
    ensure!(
        line.contains("rootfs"),
        "the container's root is not the bundle's rootfs; the root's line in mountinfo: {line}"
    );
    Ok(())
}

fn a_bind_mount_shows_the_files_of_its_source() -> Result {
    let source = Directory::new("source")?;
    fs::write(source.join("file"), "from the host")?;
    let mut bundle = Bundle::new(&["cat", "/data/file"])?;
    bind(&mut bundle, source.path(), "/data", &["bind"]);
    ensure_eq!(
        bundle.run()?.stdout,
        "from the host",
        "the content of the file in the bind mount"
    );
    bundle.args(&["write", "/data/back", "to the host"]).run()?;
    ensure_eq!(
        fs::read_to_string(source.join("back"))?,
        "to the host",
        "the content of the file that the container wrote into the bind mount"
    );
    Ok(())
}

/// `kubectl debug node` and node agents mount the host's root file system in the same way as this
/// test.
fn a_bind_mount_of_the_hosts_root_directory_shows_the_hosts_files() -> Result {
    let source = Directory::new("source")?;
    fs::write(source.join("file"), "from the host")?;
    let path = format!("/data{}/file", source.path().display());
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
        ("with the default options", &["run"], &|_| ()),
        ("without pivot_root", &["run", "--no-pivot"], &|_| ()),
        ("in a user namespace", &["run"], &new_user),
        ("with rootfsPropagation rshared", &["run"], &shared),
    ];
    for (variant, call, change) in variants {
        for options in [&["rbind"][..], &["rbind", "rslave", "ro"]] {
            let mut bundle = Bundle::new(&["cat", &path])?;
            bind(&mut bundle, std::path::Path::new("/"), "/data", options);
            change(&mut bundle);
            let output = bundle.call(call)?.ok()?;
            ensure_eq!(
                output.stdout,
                "from the host",
                "the content of the host's file, read through the bind mount by a container {variant}"
            );
            bundle.args(&["ls", "/"]);
            let root = bundle.call(call)?.ok()?;
            ensure!(
                !root.stdout.contains("sbin"),
                "the root file system of a container {variant} is the host's root file system:\n{}",
                root.told()
            );
        }
    }
    Ok(())
}

fn a_later_mount_of_the_host_in_the_root_is_not_visible_by_default() -> Result {
    for (propagation, visible) in [(None, false), (Some("rslave"), true)] {
        let mut bundle = Bundle::new(&["sleep", "600"])?;
        if let Some(propagation) = propagation {
            bundle.set("/linux/rootfsPropagation", json!(propagation));
        }
        bundle.start()?;
        let tmpfs = Some("tmpfs");
        let none: Option<&str> = None;
        let place = bundle.rootfs().join("data");
        nix::mount::mount(tmpfs, &place, tmpfs, nix::mount::MsFlags::empty(), none)?;
        let table = fs::read_to_string(format!("/proc/{}/mountinfo", bundle.pid()?))?;
        nix::mount::umount(&place)?;
        ensure_eq!(
            table.contains(" /data "),
            visible,
            "whether a container with the propagation {propagation:?} sees the host's mount ({table})"
        );
        bundle.end()?;
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
        "the write to the read-only bind mount does not fail with EROFS:\n{}",
        output.told()
    );
    ensure!(
        !source.join("file").exists(),
        "the container wrote to the read-only bind mount"
    );
    fs::write(source.join("file"), "the host still writes")?;
    Ok(())
}

fn the_runtime_creates_the_file_for_a_bind_mount_of_a_file() -> Result {
    let source = Directory::new("source")?;
    fs::write(source.join("hosts"), "127.0.0.1 localhost")?;
    let mut bundle = Bundle::new(&["cat", "/etc/deep/hosts"])?;
    bind(
        &mut bundle,
        &source.join("hosts"),
        "/etc/deep/hosts",
        &["bind", "ro"],
    );
    ensure_eq!(
        bundle.run()?.stdout,
        "127.0.0.1 localhost",
        "the content of the mounted file"
    );
    Ok(())
}

fn a_tmpfs_has_the_configured_options() -> Result {
    let mut bundle = Bundle::new(&["stat", "/data"])?;
    bundle.add(
        "/mounts",
        json!({
            "destination": "/data", "type": "tmpfs", "source": "tmpfs",
            "options": ["nosuid", "nodev", "mode=1750", "uid=12", "gid=34", "size=1m"],
        }),
    );
    let stat = bundle.run()?.json()?;
    ensure_eq!(stat["mode"], "1750", "the mode of the tmpfs");
    ensure_eq!(
        (&stat["uid"], &stat["gid"]),
        (&json!(12), &json!(34)),
        "the owner of the tmpfs"
    );
    let report = bundle.report()?;
    let line = line(&report, "/data")?;
    ensure!(
        line.contains("size=1024k"),
        "the size of the tmpfs is not 1024k; its line in mountinfo: {line}"
    );
    Ok(())
}

fn a_tmpfs_with_tmpcopyup_gives_no_program_of_an_unmapped_user_to_root() -> Result {
    let mut bundle = Bundle::new(&[])?;
    bundle.map_users(1000).add(
        "/mounts",
        json!({
            "destination": "/data", "type": "tmpfs", "source": "x", "options": ["tmpcopyup"],
        }),
    );
    for (name, owner) in [("unmapped", 5), ("mapped", 100_005)] {
        let path = bundle.join("rootfs/data").join(name);
        fs::write(&path, "program")?;
        std::os::unix::fs::lchown(&path, Some(owner), Some(owner))?;
        let mode = std::os::unix::fs::PermissionsExt::from_mode(0o6755);
        fs::set_permissions(&path, mode)?;
    }
    for (name, owner, mode) in [("unmapped", 0, "755"), ("mapped", 5, "6755")] {
        let path = format!("/data/{name}");
        let stat = bundle.args(&["stat", &path]).run()?.json()?;
        ensure_eq!(
            json!([stat["uid"], stat["gid"], stat["mode"]]),
            json!([owner, owner, mode]),
            "the owner, the group and the mode of the copy of the {name} user's program"
        );
    }
    Ok(())
}

fn a_tmpfs_with_tmpcopyup_has_room_for_the_holes_of_a_file() -> Result {
    let mut bundle = Bundle::new(&["cat", "/data/sparse"])?;
    let file = fs::File::create(bundle.join("rootfs/data/lastlog"))?;
    file.set_len(40 << 30)?;
    let file = fs::File::create(bundle.join("rootfs/data/sparse"))?;
    file.write_all_at(b"middle", 1 << 20)?;
    file.set_len(2 << 20)?;
    bundle.add(
        "/mounts",
        json!({
            "destination": "/data", "type": "tmpfs", "source": "x",
            "options": ["tmpcopyup", "size=8m"],
        }),
    );
    let holes = ["\0".repeat(1 << 20), "\0".repeat((1 << 20) - 6)];
    ensure!(
        bundle.run()?.stdout == holes.join("middle"),
        "the copied sparse file has another content"
    );
    Ok(())
}

fn a_tmpfs_with_tmpcopyup_contains_a_copy_of_the_covered_files() -> Result {
    let mut bundle = Bundle::new(&["cat", "/data/below/file"])?;
    let data = bundle.join("rootfs/data");
    fs::create_dir(data.join("below"))?;
    fs::write(data.join("below/file"), "of the image")?;
    symlink("below/file", data.join("link"))?;
    nix::unistd::mkfifo(&data.join("fifo"), nix::sys::stat::Mode::S_IRWXU)?;
    for name in ["below/file", "link", "fifo"] {
        std::os::unix::fs::lchown(data.join(name), Some(7), Some(8))?;
    }
    let mode = std::os::unix::fs::PermissionsExt::from_mode(0o711);
    fs::set_permissions(&data, mode)?;
    bundle.add(
        "/mounts",
        json!({
            "destination": "/data", "type": "tmpfs", "source": "x", "options": ["tmpcopyup", "ro"],
        }),
    );
    ensure_eq!(
        bundle.run()?.stdout,
        "of the image",
        "the content of the copied file"
    );
    bundle.args(&["cat", "/data/link"]);
    ensure_eq!(
        bundle.run()?.stdout,
        "of the image",
        "the content of the file to which the copied link leads"
    );
    for name in ["below/file", "link", "fifo"] {
        let path = format!("/data/{name}");
        let stat = bundle.args(&["stat", &path]).run()?.json()?;
        ensure_eq!(
            (&stat["uid"], &stat["gid"]),
            (&json!(7), &json!(8)),
            "the owner of the copied {name}"
        );
    }
    let stat = bundle.args(&["stat", "/data"]).run()?.json()?;
    ensure_eq!(stat["mode"], "711", "the mode of the tmpfs");
    bundle
        .args(&["write", "/data/new", "x"])
        .call(&["run"])?
        .exits(1)?;
    let last = bundle.config["mounts"].as_array().map_or(0, Vec::len) - 1;
    let set = json!(["tmpcopyup", "uid=3", "gid=5", "mode=750"]);
    bundle.set(&format!("/mounts/{last}/options"), set);
    let stat = bundle.args(&["stat", "/data"]).run()?.json()?;
    ensure_eq!(
        json!([stat["uid"], stat["gid"], stat["mode"]]),
        json!([3, 5, "750"]),
        "the owner, the group and the mode of the tmpfs, which the options set"
    );
    // Without the option `tmpcopyup`, the tmpfs is empty, but still has the mode of the covered
    // directory.
    bundle.set(&format!("/mounts/{last}/options"), json!([]));
    ensure_eq!(
        bundle.args(&["ls", "/data"]).run()?.stdout,
        "",
        "the file names in a tmpfs without `tmpcopyup`"
    );
    let stat = bundle.args(&["stat", "/data"]).run()?.json()?;
    ensure_eq!(
        stat["mode"],
        "711",
        "the mode of a tmpfs without `tmpcopyup`"
    );
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
            options.iter().any(|set| set == option),
            "the mount on /data does not have the option {option}; its options: {options:?}"
        );
    }
    Ok(())
}

fn the_runtime_creates_missing_mount_points() -> Result {
    let mut bundle = Bundle::new(&["stat", "/made/for/it"])?;
    bundle.add(
        "/mounts",
        json!({
            "destination": "/made/for/it", "type": "tmpfs", "source": "tmpfs", "options": [],
        }),
    );
    let stat = bundle.run()?.json()?;
    ensure_eq!(
        stat["kind"],
        "directory",
        "the file type of the mount point"
    );
    ensure_eq!(stat["mode"], "1777", "the mode of the tmpfs");
    Ok(())
}

/// The runtime first creates the mount points inside a read-only tmpfs, and then makes the tmpfs
/// read-only.
fn a_readonly_tmpfs_can_contain_mounts() -> Result {
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
        let set = options(&config, point)?;
        ensure_eq!(
            set.iter().any(|option| option == "ro"),
            expected,
            "whether the mount on {point} is read-only (its options: {set:?})"
        );
    }
    let mut bundle = Bundle::new(&[])?;
    for mount in bundle.mounts() {
        if mount["destination"] == "/dev" {
            mount["options"] = json!(["ro", "nosuid", "mode=755"]);
        }
    }
    config = bundle.report()?;
    let set = options(&config, "/dev")?;
    ensure!(
        set.iter().any(|option| option == "ro"),
        "the mount on /dev is not read-only; its options: {set:?}"
    );
    let set = options(&config, "/dev/pts")?;
    ensure!(
        set.iter().all(|option| option != "ro"),
        "the mount on /dev/pts is read-only; its options: {set:?}"
    );
    Ok(())
}

fn a_cgroup_mount_in_a_container_without_a_cgroup_namespace_is_readonly() -> Result {
    let mut bundle = Bundle::new(&[])?;
    bundle.without_namespace("cgroup").add(
        "/mounts",
        json!({
            "destination": "/data", "type": "cgroup", "source": "cgroup",
            "options": ["nosuid", "noexec", "nodev", "ro"],
        }),
    );
    let report = bundle.report()?;
    let set = options(&report, "/data")?;
    ensure!(
        set.iter().any(|option| option == "ro"),
        "the cgroup mount is not read-only; its options: {set:?}"
    );
    Ok(())
}

fn a_path_that_is_masked_twice_is_covered_by_one_mount() -> Result {
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
    ensure_eq!(covers.count(), 1, "the number of mounts on the masked path");
    Ok(())
}

fn a_mount_point_behind_a_link_is_inside_the_root_file_system() -> Result {
    let outside = Directory::new("outside")?;
    let source = Directory::new("source")?;
    fs::write(source.join("file"), "mounted")?;
    let mut bundle = Bundle::new(&["cat", "/data/trap/file"])?;
    // The link leads to a directory in the host's /tmp. Inside the container, the same path is a
    // different directory.
    symlink(outside.path(), bundle.join("rootfs/data/trap"))?;
    bind(&mut bundle, source.path(), "/data/trap", &["bind"]);
    ensure_eq!(
        bundle.run()?.stdout,
        "mounted",
        "the content of the mounted file, which the container reads through the link"
    );
    ensure!(
        !outside.join("file").exists(),
        "the source was mounted outside the container's root file system"
    );
    ensure!(
        fs::read_dir(outside.path())?.next().is_none(),
        "the runtime created a file outside the container's root file system"
    );
    let inside = bundle.rootfs().join(outside.path().strip_prefix("/")?);
    ensure!(
        inside.exists(),
        "the mount point {} does not exist in the container's root file system",
        inside.display()
    );
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
    ensure_eq!(
        bundle.run()?.stdout,
        "",
        "the file names in the masked directory"
    );
    ensure_eq!(
        bundle.args(&["cat", "/data/file"]).run()?.stdout,
        "",
        "the content of the masked file"
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
        "the write to the read-only path does not fail with EROFS:\n{}",
        output.told()
    );
    bundle
        .args(&["write", "/proc/sys/kernel/hostname", "x"])
        .call(&["run"])?
        .exits(1)?;
    bundle.args(&["write", "/data/file", "text"]).run()?;
    Ok(())
}

fn the_default_devices_exist() -> Result {
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
        ensure_eq!(
            stat["kind"],
            "character device",
            "the file type of /dev/{name}"
        );
        ensure_eq!(
            stat["device"],
            json!(numbers),
            "the device numbers of /dev/{name}"
        );
        ensure_eq!(stat["mode"], "666", "the mode of /dev/{name}");
    }
    for name in ["fd", "stdin", "stdout", "stderr", "ptmx"] {
        let stat = bundle
            .args(&["stat", &format!("/dev/{name}")])
            .run()?
            .json()?;
        ensure_eq!(stat["kind"], "link", "the file type of /dev/{name}");
    }
    bundle.args(&["write", "/dev/null", "text"]).run()?;
    Ok(())
}

fn the_runtime_creates_the_configured_devices() -> Result {
    let mut bundle = Bundle::new(&["stat", "/dev/deep/fuse"])?;
    bundle.set(
        "/linux/devices",
        json!([{
            "path": "/dev/deep/fuse", "type": "c", "major": 10, "minor": 229,
            "fileMode": 0o640, "uid": 5, "gid": 6,
        }]),
    );
    let stat = bundle.run()?.json()?;
    ensure_eq!(
        stat["kind"],
        "character device",
        "the file type of /dev/deep/fuse"
    );
    ensure_eq!(
        stat["device"],
        json!([10, 229]),
        "the device numbers of /dev/deep/fuse"
    );
    ensure_eq!(stat["mode"], "640", "the mode of /dev/deep/fuse");
    ensure_eq!(
        (&stat["uid"], &stat["gid"]),
        (&json!(5), &json!(6)),
        "the owner of /dev/deep/fuse"
    );
    Ok(())
}

fn a_container_sees_its_cgroup_as_the_root_cgroup() -> Result {
    let mut bundle = Bundle::new(&["cat", "/sys/fs/cgroup/cgroup.procs"])?;
    ensure_eq!(
        bundle.run()?.text(),
        "1",
        "the processes that the container sees in /sys/fs/cgroup/cgroup.procs"
    );
    ensure_eq!(
        bundle.report()?["cgroup"],
        "0::/",
        "the cgroup path that the container sees"
    );
    Ok(())
}

/// A directory on the host that is a separate mount point with shared propagation.
struct Shared(Directory);

impl Shared {
    fn new() -> Result<Self> {
        let dir = Directory::new("shared")?;
        let none: Option<&str> = None;
        mount(Some(dir.path()), dir.path(), none, MsFlags::MS_BIND, none)
            .and_then(|()| mount(none, dir.path(), none, MsFlags::MS_SHARED, none))
            .map_err(|errno| {
                format!(
                    "cannot make {} a shared mount: {errno}",
                    dir.path().display()
                )
            })?;
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
        .map_err(|errno| format!("cannot mount a tmpfs below the shared mount: {errno}"))?;
        Ok(fs::write(self.0.join("below/file"), "mounted later")?)
    }
}

impl Drop for Shared {
    fn drop(&mut self) {
        let _ = umount2(&self.0.join("below"), MntFlags::MNT_DETACH);
        let _ = umount2(self.0.path(), MntFlags::MNT_DETACH);
    }
}

fn container_sees_a_later_host_mount(option: &str) -> Result<bool> {
    let shared = Shared::new()?;
    let mut bundle = Bundle::new(&["sleep", "600"])?;
    bind(&mut bundle, shared.0.path(), "/data", &["rbind", option]);
    bundle.start()?;
    shared.mount_below()?;
    let seen = bundle.exec(&[], &["cat", "/data/below/file"]).end()?.code == 0;
    bundle.end()?;
    Ok(seen)
}

fn a_slave_mount_receives_mounts_that_the_host_creates_later() -> Result {
    ensure!(
        container_sees_a_later_host_mount("rslave")?,
        "the container does not see the mount that the host created later"
    );
    Ok(())
}

fn a_private_mount_receives_no_mounts_that_the_host_creates_later() -> Result {
    ensure!(
        !container_sees_a_later_host_mount("rprivate")?,
        "the container sees the mount that the host created later"
    );
    Ok(())
}

fn a_container_does_not_see_the_hosts_mounts() -> Result {
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
            "the container sees the host's mount on {point}; the mount points in the container: {points:?}"
        );
    }
    Ok(())
}

fn run_does_not_use_pivot_root_with_the_option_no_pivot() -> Result {
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
        "the program does not see the container's root directory:\n{}",
        output.told()
    );
    bundle.args(&["sleep", "600"]);
    bundle.call(&["run", "--detach", "--no-pivot"])?.ok()?;
    let seen = bundle.exec(&[], &["ls", "/"]).ok()?;
    ensure_eq!(
        seen.stdout,
        output.stdout,
        "the file names that the process started by `exec` sees in the root directory"
    );
    ensure!(proc_is_there()?, "the runtime unmounted the host's /proc");
    bundle.end()?;
    Ok(())
}
