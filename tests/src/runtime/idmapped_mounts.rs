//! Tests of bind mounts with id mappings, and of bind mounts in a user namespace. In a mount with id
//! mappings, the container and the host see different owners for the same file.

use std::fs;
use std::os::unix::fs::{MetadataExt, chown};
use std::path::Path;

use nix::mount::{MntFlags, MsFlags, mount, umount2};
use serde_json::{Value, json};

use crate::support::bundle::{Bundle, runtime_program};
use crate::support::hung::{FUSE, Hung};
use crate::support::machine::{Directory, Result, wait_for};
use crate::support::needs::{Need, Test};
use crate::{ensure, ensure_eq, test};

pub(crate) const TESTS: &[Test] = &[
    test!(a_mount_maps_ids_without_a_user_namespace),
    test!(the_mappings_of_the_containers_user_namespace_apply_to_a_mount),
    test!(the_id_mappings_of_a_mount_apply_in_a_user_namespace),
    test!(the_mappings_of_a_joined_user_namespace_apply_to_a_mount),
    test!(ridmap_maps_ids_in_nested_mounts_but_idmap_does_not),
    test!(two_mounts_can_have_different_id_mappings),
    test!(an_idmapped_mount_also_has_its_other_options),
    test!(invalid_id_mappings_are_refused),
    test!(a_container_in_a_user_namespace_can_have_hundreds_of_mounts),
    test!(a_user_namespace_cannot_change_the_mounts_of_the_host),
    test!(
        a_user_namespace_keeps_the_restrictions_of_the_hosts_mounts,
        Need::Rrun
    ),
    test!(
        other_containers_of_the_user_namespace_cannot_change_the_sources_of_mounts,
        FUSE,
        Need::Rrun
    ),
    test!(a_bind_mount_in_a_user_namespace_can_be_without_the_mounts_below_it),
    test!(a_bind_mount_in_a_user_namespace_can_have_a_source_in_proc),
    test!(
        mounts_in_a_shared_volume_propagate_from_a_user_namespace_to_the_host,
        Need::Rrun
    ),
];

fn maps(host: u32, size: u32) -> Value {
    json!([{ "containerID": 0, "hostID": host, "size": size }])
}

fn in_user_namespace(bundle: &mut Bundle) -> Result {
    bundle
        .add("/linux/namespaces", json!({ "type": "user" }))
        .set("/linux/uidMappings", maps(100_000, 65_536))
        .set("/linux/gidMappings", maps(200_000, 65_536));
    for dir in ["rootfs", "rootfs/data", "rootfs/tmp"] {
        chown(bundle.join(dir), Some(100_000), Some(200_000))?;
    }
    Ok(())
}

/// Creates a volume with two files. Root owns the file `root`, and user 5 owns the file `five`.
fn volume() -> Result<Directory> {
    let source = Directory::new("volume")?;
    for (name, id) in [("root", 0), ("five", 5)] {
        fs::write(source.join(name), name)?;
        chown(source.join(name), Some(id), Some(id))?;
    }
    Ok(source)
}

fn bind(bundle: &mut Bundle, source: &Path, options: &[&str], maps: Option<(Value, Value)>) {
    let mut mount = json!({
        "destination": "/data", "type": "bind", "source": source, "options": options,
    });
    if let Some((uid, gid)) = maps {
        mount["uidMappings"] = uid;
        mount["gidMappings"] = gid;
    }
    bundle.add("/mounts", mount);
}

fn owner(bundle: &mut Bundle, path: &str) -> Result<(u64, u64)> {
    let stat = bundle.args(&["stat", path]).run()?.json()?;
    let id = |name: &str| stat[name].as_u64().unwrap_or(u64::MAX);
    Ok((id("uid"), id("gid")))
}

fn a_mount_maps_ids_without_a_user_namespace() -> Result {
    let source = volume()?;
    let mut bundle = Bundle::new(&[])?;
    let both = Some((maps(1000, 10), maps(2000, 10)));
    bind(&mut bundle, source.path(), &["bind", "idmap"], both);
    ensure_eq!(
        owner(&mut bundle, "/data/root")?,
        (1000, 2000),
        "the owner that the container sees for the file of the host's root"
    );
    ensure_eq!(
        owner(&mut bundle, "/data/five")?,
        (1005, 2005),
        "the owner that the container sees for the file of the host's user 5"
    );
    // The id mappings of the mount do not change the owner of a file on the disk. If user 1000
    // creates a file in the mount, root owns this file on the disk.
    ensure_eq!(
        fs::metadata(source.join("root"))?.uid(),
        0,
        "the owner of root's file on the disk"
    );
    bundle.set("/process/user", json!({ "uid": 1000, "gid": 2000 }));
    chown(source.path(), Some(0), Some(0))?;
    bundle.args(&["write", "/data/made", "text"]).run()?;
    let made = fs::metadata(source.join("made"))?;
    ensure_eq!(
        (made.uid(), made.gid()),
        (0, 0),
        "the owner on the disk of the file that the container created"
    );
    Ok(())
}

fn the_mappings_of_the_containers_user_namespace_apply_to_a_mount() -> Result {
    let source = volume()?;
    let mut bundle = Bundle::new(&[])?;
    in_user_namespace(&mut bundle)?;
    bind(&mut bundle, source.path(), &["rbind", "idmap"], None);
    ensure_eq!(
        owner(&mut bundle, "/data/root")?,
        (0, 0),
        "the owner that the container sees for the file of the host's root"
    );
    ensure_eq!(
        owner(&mut bundle, "/data/five")?,
        (5, 5),
        "the owner that the container sees for the file of the host's user 5"
    );
    bundle.args(&["write", "/data/made", "text"]).run()?;
    ensure_eq!(
        fs::metadata(source.join("made"))?.uid(),
        0,
        "the owner on the disk of the file that the container created"
    );

    let mut without = Bundle::new(&[])?;
    in_user_namespace(&mut without)?;
    bind(&mut without, source.path(), &["rbind"], None);
    let nobody = (65_534, 65_534);
    ensure_eq!(
        owner(&mut without, "/data/root")?,
        nobody,
        "the owner that a container without the mount option idmap sees for the file of the host's root"
    );
    Ok(())
}

fn the_id_mappings_of_a_mount_apply_in_a_user_namespace() -> Result {
    let source = volume()?;
    // kubelet passes the pod's id mappings with each volume. The mappings must apply with and
    // without the option `idmap` or `ridmap`.
    for options in [&["bind", "idmap"][..], &["rbind", "ridmap"], &["bind"]] {
        let mut bundle = Bundle::new(&[])?;
        in_user_namespace(&mut bundle)?;
        let both = Some((maps(100_007, 100), maps(200_008, 100)));
        bind(&mut bundle, source.path(), options, both);
        ensure_eq!(
            owner(&mut bundle, "/data/root")?,
            (7, 8),
            "the owner that a container with the mount options {options:?} sees for the file of the host's root"
        );
        ensure_eq!(
            owner(&mut bundle, "/data/five")?,
            (12, 13),
            "the owner that a container with the mount options {options:?} sees for the file of the host's user 5"
        );
    }
    Ok(())
}

fn the_mappings_of_a_joined_user_namespace_apply_to_a_mount() -> Result {
    let source = volume()?;
    let mut first = Bundle::new(&["sleep", "600"])?;
    in_user_namespace(&mut first)?;
    first.start()?;
    let mut second = Bundle::new(&[])?;
    in_user_namespace(&mut second)?;
    second.without_namespace("user");
    let path = format!("/proc/{}/ns/user", first.pid()?);
    second
        .add("/linux/namespaces", json!({ "type": "user", "path": path }))
        .without("/linux/uidMappings")
        .without("/linux/gidMappings");
    bind(&mut second, source.path(), &["bind", "idmap"], None);
    ensure_eq!(
        owner(&mut second, "/data/five")?,
        (5, 5),
        "the owner that the container sees for the file of the host's user 5"
    );
    first.end()?;
    Ok(())
}

/// A volume with a tmpfs mounted at `below`. The tmpfs contains a file that root owns.
struct Below(Directory);

impl Below {
    fn new() -> Result<Self> {
        let dir = volume()?;
        let below = dir.join("below");
        fs::create_dir(&below)?;
        let none: Option<&str> = None;
        mount(Some("x"), &below, Some("tmpfs"), MsFlags::empty(), none)?;
        fs::write(below.join("file"), "text")?;
        Ok(Below(dir))
    }
}

impl Drop for Below {
    fn drop(&mut self) {
        let _ = umount2(&self.0.join("below"), MntFlags::MNT_DETACH);
    }
}

fn ridmap_maps_ids_in_nested_mounts_but_idmap_does_not() -> Result {
    let source = Below::new()?;
    for (option, below) in [("idmap", (0, 0)), ("ridmap", (1000, 2000))] {
        let mut bundle = Bundle::new(&[])?;
        let both = Some((maps(1000, 10), maps(2000, 10)));
        bind(&mut bundle, source.0.path(), &["rbind", option], both);
        ensure_eq!(
            owner(&mut bundle, "/data/root")?,
            (1000, 2000),
            "the owner that a container with the mount option {option} sees for the file of the host's root"
        );
        let file = owner(&mut bundle, "/data/below/file")?;
        ensure_eq!(
            file,
            below,
            "the owner that a container with the mount option {option} sees for a file in the nested tmpfs"
        );
    }
    Ok(())
}

fn two_mounts_can_have_different_id_mappings() -> Result {
    let source = volume()?;
    let mut bundle = Bundle::new(&[])?;
    for (destination, id) in [("/data", 1000), ("/tmp", 3000), ("/etc", 1000)] {
        bundle.add(
            "/mounts",
            json!({
                "destination": destination, "type": "bind", "source": source.path(),
                "options": ["bind", "idmap"],
                "uidMappings": maps(id, 10), "gidMappings": maps(id, 10),
            }),
        );
    }
    for (path, id) in [
        ("/data/root", 1000),
        ("/tmp/root", 3000),
        ("/etc/root", 1000),
    ] {
        ensure_eq!(
            owner(&mut bundle, path)?,
            (id, id),
            "the owner that the container sees for the file {path}"
        );
    }
    Ok(())
}

fn an_idmapped_mount_also_has_its_other_options() -> Result {
    let source = volume()?;
    let mut bundle = Bundle::new(&[])?;
    let both = Some((maps(1000, 10), maps(2000, 10)));
    let options = ["bind", "idmap", "ro", "nosuid", "noexec"];
    bind(&mut bundle, source.path(), &options, both);
    let report = bundle.report()?;
    let line = report["mounts"]
        .as_array()
        .into_iter()
        .flatten()
        .filter_map(Value::as_str)
        .find(|line| line.split(' ').nth(4) == Some("/data"))
        .ok_or("nothing is mounted on /data")?
        .to_owned();
    for option in ["ro", "nosuid", "noexec"] {
        let own = line.split(' ').nth(5).unwrap_or_default();
        ensure!(
            own.split(',').any(|set| set == option),
            "the mount on /data does not have the option {option}; its line in mountinfo: {line}"
        );
    }
    Ok(())
}

fn invalid_id_mappings_are_refused() -> Result {
    let source = volume()?;
    let bind = |options: &[&str]| {
        json!({
            "destination": "/data", "type": "bind", "source": source.path(), "options": options,
        })
    };
    let mut cases = vec![(bind(&["bind", "idmap"]), "idmap")];
    let mut one_sided = bind(&["bind", "idmap"]);
    one_sided["uidMappings"] = maps(1000, 10);
    cases.push((one_sided, "gidMappings"));
    let mut tmpfs = json!({ "destination": "/data", "type": "tmpfs", "source": "x" });
    tmpfs["uidMappings"] = maps(1000, 10);
    tmpfs["gidMappings"] = maps(1000, 10);
    cases.push((tmpfs, "bind"));
    for (uid, word) in [
        (maps(1000, 0), "size"),
        (
            json!([
                { "containerID": 0, "hostID": 1, "size": 10 },
                { "containerID": 5, "hostID": 100, "size": 10 },
            ]),
            "uidMappings[1]",
        ),
    ] {
        let mut bad = bind(&["bind", "idmap"]);
        bad["uidMappings"] = uid;
        bad["gidMappings"] = maps(1000, 10);
        cases.push((bad, word));
    }
    let is_rrun = runtime_program().ends_with("rrun");
    for (mount, word) in cases {
        let mut bundle = Bundle::new(&["exit", "0"])?;
        bundle.add("/mounts", mount.clone());
        let output = bundle.call(&["run"])?.exits(1)?;
        ensure!(
            !is_rrun || output.stderr.contains(word),
            "the error about the mount {mount} does not contain {word:?}:\n{}",
            output.told()
        );
    }
    Ok(())
}

fn a_container_in_a_user_namespace_can_have_hundreds_of_mounts() -> Result {
    let source = volume()?;
    let mut bundle = Bundle::new(&["cat", "/proc/self/mountinfo"])?;
    in_user_namespace(&mut bundle)?;
    let many = bundle.rootfs().join("many");
    fs::create_dir(&many)?;
    chown(&many, Some(100_000), Some(200_000))?;
    for number in 0..400 {
        bundle.add(
            "/mounts",
            json!({
                "destination": format!("/many/{number}"), "type": "bind", "source": source.path(),
                "options": ["rbind", "ro"],
            }),
        );
    }
    let mounts = bundle.run()?.stdout;
    ensure_eq!(
        mounts.matches(" /many/").count(),
        400,
        "the number of mounts below /many"
    );
    Ok(())
}

/// A volume that the host has mounted read-only, like a volume of a storage driver. The volume also
/// contains a tmpfs of the host.
struct ReadOnly(Below);

impl ReadOnly {
    fn new() -> Result<Self> {
        let volume = ReadOnly(Below::new()?);
        let none: Option<&str> = None;
        let path = volume.path();
        let bind = MsFlags::MS_BIND | MsFlags::MS_REC;
        mount(Some(path), path, none, bind, none)?;
        let flags = MsFlags::MS_BIND | MsFlags::MS_REMOUNT | MsFlags::MS_RDONLY;
        mount(none, path, none, flags | MsFlags::MS_NODEV, none)?;
        Ok(volume)
    }

    fn path(&self) -> &Path {
        self.0.0.path()
    }
}

impl Drop for ReadOnly {
    fn drop(&mut self) {
        let _ = umount2(self.path(), MntFlags::MNT_DETACH);
    }
}

/// The kernel locks the mounts of the host in the mount namespace of another user namespace. The
/// container's CAP_SYS_ADMIN then does not permit changes to these mounts.
fn a_user_namespace_cannot_change_the_mounts_of_the_host() -> Result {
    let source = ReadOnly::new()?;
    let mappings = (maps(100_000, 65_536), maps(200_000, 65_536));
    for mappings in [None, Some(mappings)] {
        let mut bundle = Bundle::new(&["attack", "unlock", "/data", "/data/below"])?;
        in_user_namespace(&mut bundle)?;
        for set in ["bounding", "effective", "permitted"] {
            let pointer = format!("/process/capabilities/{set}");
            bundle.add(&pointer, json!("CAP_SYS_ADMIN"));
        }
        bind(&mut bundle, source.path(), &["rbind", "ro"], mappings);
        ensure_eq!(
            bundle.run()?.stdout,
            "mount: Err(EPERM)\numount: Err(EINVAL)\n",
            "the results of mount(2) without MS_RDONLY on the read-only volume, and of umount(2) on the mount below it"
        );
    }
    Ok(())
}

/// kubelet requests `rw` for each volume that the pod does not mount read-only. The kernel also locks
/// the update of access times.
fn a_user_namespace_keeps_the_restrictions_of_the_hosts_mounts() -> Result {
    let source = ReadOnly::new()?;
    let mut bundle = Bundle::new(&["cat", "/proc/self/mountinfo"])?;
    in_user_namespace(&mut bundle)?;
    let options = ["rbind", "rw", "dev", "exec", "nosuid", "noatime"];
    bind(&mut bundle, source.path(), &options, None);
    let mounts = bundle.run()?.stdout;
    let mut fields = mounts.lines().map(|line| line.split(' ').skip(4));
    let data = fields.find_map(|mut fields| (fields.next()? == "/data").then(|| fields.next())?);
    ensure_eq!(
        data,
        Some("ro,nosuid,nodev,relatime"),
        "the options of the volume in the container"
    );
    Ok(())
}

/// Returns the inode numbers of the mount namespaces of a process and of its threads.
fn mount_namespaces(process: &Path) -> Vec<u64> {
    let tasks = fs::read_dir(process.join("task")).into_iter().flatten();
    tasks
        .flatten()
        .filter_map(|task| Some(fs::metadata(task.path().join("ns/mnt")).ok()?.ino()))
        .collect()
}

/// A container with CAP_SYS_ADMIN in the user namespace can enter the mount namespace of a new
/// container in the same user namespace. On Linux 6.18, it opens this mount namespace by a guessed
/// file handle (open_by_handle_at(2)). The runtime must not look up the sources of mounts there,
/// because it has root's rights. In this test, the lookup hangs.
fn other_containers_of_the_user_namespace_cannot_change_the_sources_of_mounts() -> Result {
    let directory = Directory::new("hung")?;
    let mut first = Bundle::new(&["sleep", "600"])?;
    in_user_namespace(&mut first)?;
    first.start()?;
    let users = format!("/proc/{}/ns/user", first.pid()?);
    let mut second = Bundle::new(&["exit", "0"])?;
    second.add(
        "/linux/namespaces",
        json!({ "type": "user", "path": users }),
    );
    let hung = Hung::mount(directory.path())?;
    bind(
        &mut second,
        &directory.path().join("source"),
        &["rbind", "idmap"],
        None,
    );
    let own = fs::metadata("/proc/self/ns/mnt")?.ino();
    let running = second.call(&["create"])?.start()?;
    let runtime = Path::new("/proc").join(running.pid().to_string());
    let entered = wait_for("the runtime to look up the source of the mount", || {
        let all = mount_namespaces(&runtime);
        Ok(all.into_iter().find(|namespace| *namespace != own))
    })?;
    let users = fs::metadata(users)?.ino();
    for process in fs::read_dir("/proc")?.flatten() {
        let path = process.path();
        if fs::metadata(path.join("ns/user")).is_ok_and(|own| own.ino() == users) {
            ensure!(
                !mount_namespaces(&path).contains(&entered),
                "the runtime looks up the source in the mount namespace of process {}",
                path.display()
            );
        }
    }
    drop(hung);
    running.end()?.fails_with("(mounts[")?;
    first.end()?;
    Ok(())
}

fn a_bind_mount_in_a_user_namespace_can_be_without_the_mounts_below_it() -> Result {
    let source = Below::new()?;
    let mut bundle = Bundle::new(&["ls", "/data/below"])?;
    in_user_namespace(&mut bundle)?;
    bind(&mut bundle, source.0.path(), &["bind"], None);
    ensure_eq!(
        bundle.run()?.stdout,
        "",
        "the files in the directory on which the host has mounted a tmpfs"
    );
    Ok(())
}

fn a_bind_mount_in_a_user_namespace_can_have_a_source_in_proc() -> Result {
    let source = volume()?;
    let own = std::process::id();
    let path = format!("/proc/{own}/root{}", source.path().display());
    let mut bundle = Bundle::new(&["ls", "/data"])?;
    in_user_namespace(&mut bundle)?;
    bind(&mut bundle, Path::new(&path), &["rbind"], None);
    ensure_eq!(
        bundle.run()?.stdout,
        "five\nroot\n",
        "the files in the mount whose source is {path}"
    );
    Ok(())
}

/// Returns the number of the peer group of the mount at `path`, from the lines of mountinfo. See
/// mount_namespaces(7).
fn peer_group(mountinfo: &str, path: &str) -> Option<String> {
    let fields = |line: &str| line.split(' ').map(str::to_owned).collect::<Vec<_>>();
    let mut lines = mountinfo.lines().map(fields);
    let mount = lines.find(|fields| fields.get(4).is_some_and(|point| point == path))?;
    mount.into_iter().find(|field| field.starts_with("shared:"))
}

/// A storage driver can run in a user namespace. Its mounts must then propagate to the host.
fn mounts_in_a_shared_volume_propagate_from_a_user_namespace_to_the_host() -> Result {
    let source = Below::new()?;
    let path = source.0.path().join("below");
    let none: Option<&str> = None;
    mount(none, &path, none, MsFlags::MS_SHARED, none)?;
    let mut bundle = Bundle::new(&["cat", "/proc/self/mountinfo"])?;
    in_user_namespace(&mut bundle)?;
    bundle.set("/linux/rootfsPropagation", json!("rshared"));
    bind(&mut bundle, &path, &["rbind", "rshared"], None);
    let host = fs::read_to_string("/proc/self/mountinfo")?;
    let group = peer_group(&host, &path.display().to_string());
    ensure!(group.is_some(), "the volume on the host is not shared");
    ensure_eq!(
        peer_group(&bundle.run()?.stdout, "/data"),
        group,
        "the peer group of the volume in the container"
    );
    Ok(())
}
