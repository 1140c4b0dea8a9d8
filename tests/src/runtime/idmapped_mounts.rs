//! Bind mounts whose ids are mapped: the host's files in a container as another user's.

use std::fs;
use std::os::unix::fs::{MetadataExt, chown};
use std::path::Path;

use nix::mount::{MntFlags, MsFlags, mount, umount2};
use serde_json::{Value, json};

use crate::support::bundle::{Bundle, runtime_program};
use crate::support::machine::{Directory, Result};
use crate::support::needs::Test;
use crate::{ensure, ensure_eq, test};

pub(crate) const TESTS: &[Test] = &[
    test!(ids_are_mapped_without_a_user_namespace),
    test!(ids_are_mapped_as_in_the_containers_user_namespace),
    test!(ids_are_mapped_as_the_mount_says_in_a_user_namespace),
    test!(ids_are_mapped_as_in_a_joined_user_namespace),
    test!(ridmap_maps_mounts_below_and_idmap_does_not),
    test!(two_mounts_have_two_mappings),
    test!(a_mapped_mount_keeps_its_other_options),
    test!(mappings_that_can_not_be_are_refused),
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

/// A volume with a file of root's and one of user 5's.
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

fn ids_are_mapped_without_a_user_namespace() -> Result {
    let source = volume()?;
    let mut bundle = Bundle::new(&[])?;
    let both = Some((maps(1000, 10), maps(2000, 10)));
    bind(&mut bundle, source.path(), &["bind", "idmap"], both);
    ensure_eq!(owner(&mut bundle, "/data/root")?, (1000, 2000), "root's");
    ensure_eq!(owner(&mut bundle, "/data/five")?, (1005, 2005), "user 5's");
    // On the disk nothing has changed, and what user 1000 makes is root's there.
    ensure_eq!(fs::metadata(source.join("root"))?.uid(), 0, "on the disk");
    bundle.set("/process/user", json!({ "uid": 1000, "gid": 2000 }));
    chown(source.path(), Some(0), Some(0))?;
    bundle.args(&["write", "/data/made", "text"]).run()?;
    let made = fs::metadata(source.join("made"))?;
    ensure_eq!((made.uid(), made.gid()), (0, 0), "owner of what it made");
    Ok(())
}

fn ids_are_mapped_as_in_the_containers_user_namespace() -> Result {
    let source = volume()?;
    let mut bundle = Bundle::new(&[])?;
    in_user_namespace(&mut bundle)?;
    bind(&mut bundle, source.path(), &["rbind", "idmap"], None);
    ensure_eq!(owner(&mut bundle, "/data/root")?, (0, 0), "root's");
    ensure_eq!(owner(&mut bundle, "/data/five")?, (5, 5), "user 5's");
    bundle.args(&["write", "/data/made", "text"]).run()?;
    ensure_eq!(fs::metadata(source.join("made"))?.uid(), 0, "on the disk");

    let mut without = Bundle::new(&[])?;
    in_user_namespace(&mut without)?;
    bind(&mut without, source.path(), &["rbind"], None);
    let nobody = (65_534, 65_534);
    ensure_eq!(owner(&mut without, "/data/root")?, nobody, "without idmap");
    Ok(())
}

fn ids_are_mapped_as_the_mount_says_in_a_user_namespace() -> Result {
    let source = volume()?;
    // As kubelet asks for it: the mappings of the pod, with and without the option.
    for options in [&["bind", "idmap"][..], &["rbind", "ridmap"], &["bind"]] {
        let mut bundle = Bundle::new(&[])?;
        in_user_namespace(&mut bundle)?;
        let both = Some((maps(100_007, 100), maps(200_008, 100)));
        bind(&mut bundle, source.path(), options, both);
        ensure_eq!(owner(&mut bundle, "/data/root")?, (7, 8), "{options:?}");
        ensure_eq!(owner(&mut bundle, "/data/five")?, (12, 13), "{options:?}");
    }
    Ok(())
}

fn ids_are_mapped_as_in_a_joined_user_namespace() -> Result {
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
    ensure_eq!(owner(&mut second, "/data/five")?, (5, 5), "user 5's");
    first.end()?;
    Ok(())
}

/// A tmpfs at DIR/below, with a file of root's in it.
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

fn ridmap_maps_mounts_below_and_idmap_does_not() -> Result {
    let source = Below::new()?;
    for (option, below) in [("idmap", (0, 0)), ("ridmap", (1000, 2000))] {
        let mut bundle = Bundle::new(&[])?;
        let both = Some((maps(1000, 10), maps(2000, 10)));
        bind(&mut bundle, source.0.path(), &["rbind", option], both);
        ensure_eq!(owner(&mut bundle, "/data/root")?, (1000, 2000), "{option}");
        let file = owner(&mut bundle, "/data/below/file")?;
        ensure_eq!(file, below, "owner in the mount below with {option}");
    }
    Ok(())
}

fn two_mounts_have_two_mappings() -> Result {
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
        ensure_eq!(owner(&mut bundle, path)?, (id, id), "{path}");
    }
    Ok(())
}

fn a_mapped_mount_keeps_its_other_options() -> Result {
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
        ensure!(own.split(',').any(|there| there == option), "{line}");
    }
    Ok(())
}

fn mappings_that_can_not_be_are_refused() -> Result {
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
            "{mount} does not say {word}:\n{}",
            output.told()
        );
    }
    Ok(())
}
