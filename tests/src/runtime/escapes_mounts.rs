//! Tests of published container escapes through mount points. The attacks use links, renames while
//! the runtime creates the container, and a false /proc. Each test runs a published attack without
//! changes, and checks that the attack fails.

use std::fs;
use std::io::ErrorKind;
use std::os::unix::fs::{MetadataExt as _, symlink};
use std::path::Path;

use serde_json::{Value, json};

use crate::support::bundle::{Bundle, make_rootfs};
use crate::support::inside::attacker::{Exchange, rounds};
use crate::support::machine::{Directory, Result, note};
use crate::support::needs::{Need, Test};
use crate::support::refusals::refused;
use crate::support::secret::{SECRET, Secret};
use crate::{ensure, ensure_eq, test};

pub(crate) const TESTS: &[Test] = &[
    test!(cve_2025_52881_the_runtime_writes_nothing_to_a_false_proc),
    test!(cve_2025_52881_only_procfs_can_be_mounted_on_proc),
    test!(
        cve_2019_19921_proc_is_protected_even_if_it_is_renamed,
        Need::Rrun
    ),
    test!(
        cve_2021_30465_a_mount_is_always_inside_the_container,
        Need::Rrun
    ),
    test!(cve_2024_45310_the_runtime_creates_nothing_on_the_host),
    test!(a_link_that_replaces_root_path_during_the_creation_is_not_followed),
    test!(cve_2023_27561_and_28642_the_runtime_refuses_links_at_proc_and_sys),
    test!(a_masked_directory_has_no_room_for_files, Need::Rrun),
    test!(a_masked_file_does_not_expose_the_hosts_null_device),
    test!(a_read_only_path_that_leads_to_the_root_makes_the_root_read_only),
    test!(a_read_only_path_that_leads_to_proc_or_sys_uncovers_no_masked_path),
    test!(a_read_only_working_directory_is_created_and_read_only),
    test!(
        a_missing_path_does_not_lead_through_magic_links_of_proc,
        Need::Rrun
    ),
    test!(a_masked_path_that_leads_to_the_root_is_refused, Need::Rrun),
    test!(
        a_mount_must_not_replace_the_root_directory_through_a_link,
        Need::Rrun
    ),
];

/// Fills `dir` with files and directories that have the names of those in /proc. The directories
/// are real, but each file is a link to the secret file. A runtime writes to some of these files.
fn false_proc(dir: &Path, secret: &Secret) -> Result {
    for parent in [
        "self/attr",
        "self/task/1",
        "sys/net/ipv4",
        "sys/kernel",
        "thread-self/attr",
    ] {
        fs::create_dir_all(dir.join(parent))?;
    }
    for file in [
        "self/attr/exec",
        "self/attr/keycreate",
        "thread-self/attr/exec",
        "self/oom_score_adj",
        "self/setgroups",
        "self/uid_map",
        "self/timens_offsets",
        "sys/net/ipv4/ip_default_ttl",
        "sysrq-trigger",
    ] {
        symlink(secret.path(), dir.join(file))?;
        // The links are absolute. If a process in the container follows a link, the link leads to a
        // path below the container's root.
    }
    Ok(())
}

fn cve_2025_52881_the_runtime_writes_nothing_to_a_false_proc() -> Result {
    let secret = Secret::new()?;
    // The configuration contains no mount for /proc, and the image contains a false /proc.
    let mut bundle = Bundle::new(&["sleep", "600"])?;
    if let Some(Value::Array(all)) = bundle.config.pointer_mut("/mounts") {
        all.retain(|mount| mount["destination"] != "/proc");
    }
    false_proc(&bundle.join("rootfs/proc"), &secret)?;
    let inside = bundle.rootfs().join(secret.path().strip_prefix("/")?);
    fs::create_dir_all(inside.parent().ok_or("the secret's path has no parent")?)?;
    fs::write(&inside, SECRET)?;
    bundle
        .set("/root/readonly", json!(false))
        .set("/linux/sysctl", json!({ "net.ipv4.ip_default_ttl": "77" }))
        .set("/process/oomScoreAdj", json!(500));
    if bundle.call(&["create"])?.end()?.code == 0 {
        bundle.runtime(&["start", bundle.id()]).ok()?;
        bundle.exec(&[], &["exit", "0"]).end()?;
        bundle.end()?;
    }
    secret.unchanged()?;
    ensure_eq!(
        fs::read_to_string(&inside)?,
        SECRET,
        "the content of the file to which the links of the false /proc lead"
    );

    // The second attack exchanges /proc and the false /proc while the runtime creates the
    // container.
    let mut bundle = Bundle::new(&["cat", "/proc/sys/net/ipv4/ip_default_ttl"])?;
    bundle
        .set("/linux/sysctl", json!({ "net.ipv4.ip_default_ttl": "77" }))
        .set("/root/readonly", json!(false))
        .write_config()?;
    fs::create_dir(bundle.join("rootfs/false"))?;
    false_proc(&bundle.join("rootfs/false"), &secret)?;
    let race = Exchange::start(&bundle.join("rootfs/proc"), &bundle.join("rootfs/false"));
    for _ in 0..rounds() {
        bundle.runtime(&["run", bundle.id()]).end()?;
        secret.unchanged()?;
    }
    drop(race);
    Ok(())
}

fn cve_2025_52881_only_procfs_can_be_mounted_on_proc() -> Result {
    let volume = Directory::new("false-proc")?;
    for (destination, typ) in [
        ("/proc", "bind"),
        ("/proc/self", "bind"),
        ("/proc/sys", "bind"),
        ("/proc/self/attr", "bind"),
        ("/proc/1", "tmpfs"),
        ("/data/link/attr", "tmpfs"),
        ("/proc", "tmpfs"),
    ] {
        let mut bundle = Bundle::new(&["exit", "0"])?;
        symlink("/proc/self", bundle.join("rootfs/data/link"))?;
        let options = if typ == "bind" {
            json!(["rbind"])
        } else {
            json!([])
        };
        bundle.add(
            "/mounts",
            json!({ "destination": destination, "type": typ, "source": volume.path(), "options": options }),
        );
        bundle.call(&["run"])?.exits(1)?;
    }
    Ok(())
}

/// Returns the mounts in the mount namespace of the process `pid`. An entry consists of the mount
/// point, its mount options, the file system type, and the file system's options.
fn mounts_of(pid: i32) -> Result<Vec<[String; 4]>> {
    let text = fs::read_to_string(format!("/proc/{pid}/mountinfo"))?;
    Ok(text
        .lines()
        .filter_map(|line| {
            let (own, system) = line.split_once(" - ")?;
            let mut own = own.split(' ').skip(4);
            let mut system = system.split(' ');
            Some([own.next()?, own.next()?, system.next()?, system.nth(1)?].map(str::to_owned))
        })
        .collect())
}

fn cve_2019_19921_proc_is_protected_even_if_it_is_renamed() -> Result {
    let mut bundle = Bundle::new(&["sleep", "600"])?;
    bundle.write_config()?;
    symlink("/data", bundle.join("rootfs/link"))?;
    let mut made = 0;
    let race = Exchange::start(&bundle.join("rootfs/proc"), &bundle.join("rootfs/link"));
    for _ in 0..rounds() {
        let output = bundle.runtime(&["create", bundle.id()]).end()?;
        if output.code != 0 {
            continue;
        }
        made += 1;
        let mounts = mounts_of(bundle.pid()?)?;
        for (name, protection) in [
            ("sys", "ro,"),
            ("sysrq-trigger", "ro,"),
            ("kcore", ""),
            ("keys", ""),
        ] {
            if !Path::new("/proc").join(name).exists() {
                continue;
            }
            // The attacker may have exchanged the names /proc and /link, so the mount can be below
            // either name.
            let mount = mounts.iter().find(|[point, ..]| {
                ["/proc", "/link"]
                    .iter()
                    .any(|place| *point == format!("{place}/{name}"))
            });
            ensure!(
                mount.is_some_and(|[_, options, ..]| options.starts_with(protection)),
                "no mount protects /proc/{name}; the container's mounts: {mounts:#?}"
            );
        }
        bundle.end()?;
    }
    note(format!(
        "CVE-2019-19921: the runtime created {made} of {} containers, while the attacker exchanged two paths {} times",
        rounds(),
        race.times()
    ));
    drop(race);
    // In the second attack, the image itself contains a link at /proc.
    bundle = Bundle::new(&["exit", "0"])?;
    fs::remove_dir(bundle.join("rootfs/proc"))?;
    symlink("data/level1/level2", bundle.join("rootfs/proc"))?;
    fs::create_dir_all(bundle.join("rootfs/data/level1/level2"))?;
    bundle.call(&["run"])?.exits(1)?;
    Ok(())
}

/// Creates a volume, and adds a mount of the volume at /data to the configuration. The volume
/// contains the directory `dir`, and a link to the host's directory `host`. The attacker exchanges
/// the directory and the link.
fn racing_volume(bundle: &mut Bundle, host: &Path) -> Result<Directory> {
    let volume = Directory::new("shared")?;
    fs::create_dir(volume.join("dir"))?;
    symlink(host, volume.join("link"))?;
    bundle.add(
        "/mounts",
        json!({ "destination": "/data", "type": "bind", "source": volume.path(), "options": ["rbind"] }),
    );
    Ok(volume)
}

fn cve_2021_30465_a_mount_is_always_inside_the_container() -> Result {
    let secret = Secret::new()?;
    let before = fs::read_to_string("/proc/self/mountinfo")?.lines().count();
    let mut bundle = Bundle::new(&["sleep", "600"])?;
    let volume = racing_volume(&mut bundle, Path::new("/"))?;
    for destination in ["/data/dir", "/data/dir/tmp"] {
        bundle.add(
            "/mounts",
            json!({ "destination": destination, "type": "tmpfs", "source": "x", "options": ["size=1236k"] }),
        );
    }
    bundle.set("/root/readonly", json!(false)).write_config()?;
    let race = Exchange::start(&volume.join("dir"), &volume.join("link"));
    let mut made = 0;
    for _ in 0..rounds() {
        if bundle.runtime(&["create", bundle.id()]).end()?.code != 0 {
            continue;
        }
        made += 1;
        let mounts = mounts_of(bundle.pid()?)?;
        // A successful attack would create a mount on the host. This mount would be missing in the
        // container's list of mounts.
        let ours = mounts
            .iter()
            .filter(|mount| mount[3].contains("size=1236k"));
        ensure_eq!(
            ours.count(),
            2,
            "the number of the test's mounts in the container's mount namespace (all mounts: {mounts:#?})"
        );
        bundle.end()?;
        secret.unchanged()?;
        let now = fs::read_to_string("/proc/self/mountinfo")?.lines().count();
        ensure_eq!(now, before, "the number of mounts on the host");
    }
    note(format!(
        "CVE-2021-30465: the runtime created {made} of {} containers, while the attacker exchanged two paths {} times",
        rounds(),
        race.times()
    ));
    Ok(())
}

/// A user with write access to a directory of root.path could otherwise choose the container's root.
fn a_link_that_replaces_root_path_during_the_creation_is_not_followed() -> Result {
    let other = Directory::new("other")?;
    make_rootfs(other.path())?;
    fs::write(other.join("secret"), SECRET)?;
    for new_user in [false, true] {
        let mut bundle = Bundle::new(&["sleep", "600"])?;
        if new_user {
            bundle.map_users(65_536);
        }
        bundle.write_config()?;
        symlink(other.path(), bundle.join("link"))?;
        let race = Exchange::start(&bundle.rootfs(), &bundle.join("link"));
        for _ in 0..rounds() {
            if bundle.runtime(&["create", bundle.id()]).end()?.code != 0 {
                continue;
            }
            let secret = format!("/proc/{}/root/secret", bundle.pid()?);
            ensure!(
                !Path::new(&secret).exists(),
                "the container's root is the directory to which the link leads"
            );
            bundle.end()?;
        }
        drop(race);
        if fs::symlink_metadata(bundle.rootfs())?.is_symlink() {
            fs::rename(bundle.rootfs(), bundle.join("moved"))?;
            fs::rename(bundle.join("link"), bundle.rootfs())?;
        }
    }
    Ok(())
}

fn cve_2024_45310_the_runtime_creates_nothing_on_the_host() -> Result {
    let secret = Secret::new()?;
    let file = Directory::new("source")?;
    fs::write(file.join("file"), "text")?;
    let mut bundle = Bundle::new(&["exit", "0"])?;
    let volume = racing_volume(&mut bundle, secret.directory())?;
    for (destination, source) in [
        ("/data/dir/a/b", file.path().to_owned()),
        ("/data/dir/c/file", file.join("file")),
        ("/data/dir/d", file.join("file")),
    ] {
        bundle.add(
            "/mounts",
            json!({ "destination": destination, "type": "bind", "source": source, "options": ["rbind"] }),
        );
    }
    bundle.set("/root/readonly", json!(false)).write_config()?;
    let race = Exchange::start(&volume.join("dir"), &volume.join("link"));
    let mut made = 0;
    for _ in 0..rounds() {
        made += usize::from(bundle.runtime(&["run", bundle.id()]).end()?.code == 0);
        secret.unchanged()?;
        // The test removes the directories and files of this round. In the next round, the runtime
        // must create them again.
        for path in [volume.path(), &bundle.rootfs()] {
            for name in ["dir", "link"] {
                for made in ["a", "c"] {
                    let _ = fs::remove_dir_all(path.join(name).join(made));
                }
                let _ = fs::remove_file(path.join(name).join("d"));
            }
        }
        secret.unchanged()?;
    }
    note(format!(
        "CVE-2024-45310: the runtime created {made} of {} containers, while the attacker exchanged two paths {} times",
        rounds(),
        race.times()
    ));
    Ok(())
}

fn cve_2023_27561_and_28642_the_runtime_refuses_links_at_proc_and_sys() -> Result {
    for (name, to) in [
        ("proc", "data"),
        ("proc", "/data"),
        ("sys", "data"),
        ("sys", "../data"),
    ] {
        let bundle = Bundle::new(&["exit", "0"])?;
        fs::remove_dir(bundle.join("rootfs").join(name))?;
        symlink(to, bundle.join("rootfs").join(name))?;
        bundle.call(&["run"])?.exits(1)?;
    }
    Ok(())
}

fn a_masked_directory_has_no_room_for_files() -> Result {
    let mut bundle = Bundle::new(&["cat", "/proc/self/mountinfo"])?;
    let directories = ["/sys/firmware", "/data"];
    bundle.set("/linux/maskedPaths", json!(directories));
    let mounts = bundle.run()?.stdout;
    for directory in directories {
        let place = format!(" {directory} ");
        let mount = mounts.lines().find(|line| line.contains(&place));
        let mount = mount.ok_or(format!("{directory} is not masked:\n{mounts}"))?;
        // A container with CAP_SYS_ADMIN can make the mount writable. The only inode is the root
        // directory of the mount.
        ensure!(
            mount.contains("nr_inodes=1") && mount.contains("size=4k"),
            "the file system at the masked {directory} has room for files: {mount}"
        );
    }
    Ok(())
}

/// A container with the user id 0 owns the host's /dev/null. If a mount of /dev/null were writable,
/// chmod(2) in the container would change the mode of /dev/null for the whole host.
fn a_masked_file_does_not_expose_the_hosts_null_device() -> Result {
    let mut bundle = Bundle::new(&["sleep", "1000"])?;
    let files = ["/data/one", "/data/two"];
    for file in files {
        fs::write(bundle.rootfs().join(&file[1..]), "secret")?;
    }
    bundle.set("/linux/maskedPaths", json!(files));
    bundle.start()?;
    let host = fs::metadata("/dev/null")?;
    for file in files {
        let path = format!("/proc/{}/root{file}", bundle.pid()?);
        let masked = fs::metadata(&path)?;
        if (masked.dev(), masked.ino()) != (host.dev(), host.ino()) {
            continue;
        }
        let changed = fs::set_permissions(&path, host.permissions());
        let error = changed.map_err(|error| error.kind()).err();
        ensure_eq!(
            error,
            Some(ErrorKind::ReadOnlyFilesystem),
            "the error of chmod(2) on the masked {file}, which is the host's /dev/null"
        );
        fs::write(&path, "ignored")?;
    }
    bundle.end()?;
    Ok(())
}

/// A mount on the root directory would not affect the first process, and would hide the masked
/// paths from `exec`.
fn a_read_only_path_that_leads_to_the_root_makes_the_root_read_only() -> Result {
    for path in ["/", "/up"] {
        let mut bundle = Bundle::new(&["write", "/data/new", "text"])?;
        symlink("/", bundle.join("rootfs/up"))?;
        bundle
            .set("/root/readonly", json!(false))
            .set("/process/cwd", json!("/work/here"))
            .set("/linux/readonlyPaths", json!([path, "/proc/sys"]));
        let output = bundle.call(&["run"])?.exits(1)?;
        ensure!(
            output.stderr.contains("Read-only file system"),
            "the root is not read-only for the first process:\n{}",
            output.told()
        );
        bundle.args(&["sleep", "600"]).start()?;
        let output = bundle.exec(&[], &["write", "/data/new", "text"]).exits(1)?;
        ensure!(
            output.stderr.contains("Read-only file system"),
            "the root is not read-only for `exec`:\n{}",
            output.told()
        );
        ensure_eq!(
            bundle.exec(&[], &["cat", "/proc/keys"]).ok()?.stdout,
            "",
            "the content of the masked /proc/keys"
        );
        bundle.end()?;
    }
    Ok(())
}

fn a_read_only_path_that_leads_to_proc_or_sys_uncovers_no_masked_path() -> Result {
    let mut bundle = Bundle::new(&["sleep", "600"])?;
    for (link, target) in [("p", "/proc"), ("s", "/sys"), ("below", "/sys/fs")] {
        symlink(target, bundle.join("rootfs").join(link))?;
    }
    bundle.set("/linux/maskedPaths/0", json!("/sys/fs/cgroup/cgroup.procs"));
    for user_namespace in [false, true] {
        if user_namespace {
            bundle.map_users(65_536);
        }
        for paths in [
            json!(["/p", "/s"]),
            json!(["/proc", "/sys"]),
            json!(["/below"]),
        ] {
            bundle.set("/linux/readonlyPaths", paths.clone()).start()?;
            for masked in ["/proc/keys", "/sys/fs/cgroup/cgroup.procs"] {
                ensure_eq!(
                    bundle.exec(&[], &["cat", masked]).ok()?.stdout,
                    "",
                    "the content of the masked {masked} beside the readonlyPaths {paths} (user namespace: {user_namespace})"
                );
            }
            ensure_eq!(
                bundle.exec(&[], &["ls", "/sys/firmware"]).ok()?.stdout,
                "",
                "the files in the masked /sys/firmware beside the readonlyPaths {paths} (user namespace: {user_namespace})"
            );
            bundle.end()?;
        }
    }
    Ok(())
}

fn a_read_only_working_directory_is_created_and_read_only() -> Result {
    for cwd in ["/locked", "/locked/below"] {
        let mut bundle = Bundle::new(&["write", "/locked/new", "text"])?;
        bundle
            .set("/root/readonly", json!(false))
            .set("/process/cwd", json!(cwd))
            .set("/linux/readonlyPaths", json!(["/locked"]));
        let output = bundle.call(&["run"])?.exits(1)?;
        ensure!(
            output.stderr.contains("Read-only file system"),
            "/locked is not read-only beside the working directory {cwd}:\n{}",
            output.told()
        );
    }
    Ok(())
}

/// The text of such a link is a path of the host, which the container would then see.
fn a_missing_path_does_not_lead_through_magic_links_of_proc() -> Result {
    for (field, words) in [
        ("/mounts/-", "ELOOP"),
        ("/process/cwd", "enter process.cwd /data/link/new"),
    ] {
        let mut bundle = Bundle::new(&["exit", "0"])?;
        // The kernel does not find `missing`, so the runtime resolves the rest of the path itself.
        symlink(
            "missing/../../proc/self/cwd",
            bundle.join("rootfs/data/link"),
        )?;
        if field == "/process/cwd" {
            bundle.set(field, json!("/data/link/new"));
        } else {
            bundle.add(
                "/mounts",
                json!({ "destination": "/data/link/new", "type": "tmpfs", "source": "x" }),
            );
        }
        let before = fs::read_dir(bundle.rootfs())?.count();
        let output = bundle.call(&["run"])?.exits(1)?;
        ensure!(
            output.stderr.contains(words),
            "the error about {field}: {}",
            output.told()
        );
        ensure_eq!(
            fs::read_dir(bundle.rootfs())?.count(),
            before,
            "the number of files in the root directory after the refusal of {field}"
        );
    }
    Ok(())
}

fn a_masked_path_that_leads_to_the_root_is_refused() -> Result {
    for path in ["/", "/up"] {
        let mut bundle = Bundle::new(&["exit", "0"])?;
        symlink("/", bundle.join("rootfs/up"))?;
        bundle.set("/linux/maskedPaths", json!([path, "/proc/keys"]));
        bundle.write_config()?;
        refused(
            &bundle,
            &["linux.maskedPaths", "leads to the root directory"],
        )?;
    }
    Ok(())
}

fn a_mount_must_not_replace_the_root_directory_through_a_link() -> Result {
    let volume = Directory::new("volume")?;
    for target in ["/", ".", "../../..", "/data/.."] {
        let mut bundle = Bundle::new(&["exit", "0"])?;
        symlink(target, bundle.join("rootfs/up"))?;
        bundle.add(
            "/mounts",
            json!({ "destination": "/up", "type": "bind", "source": volume.path(), "options": ["rbind"] }),
        );
        bundle.write_config()?;
        refused(&bundle, &[])?;
    }
    Ok(())
}
