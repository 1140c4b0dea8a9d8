//! The mounts and paths of a random config.json.

use serde_json::{Value, json};

use super::{Choices, Part, SOURCE, push, set};

pub(super) const PARTS: &[Part] = &[
    (30, mount),
    (15, mount),
    (6, fewer_mounts),
    (10, propagation),
    (15, masked_paths),
    (15, readonly_paths),
    (15, devices),
    (5, options_of_standard_mounts),
];

/// Adds a mount of a file system, or a bind mount.
fn mount(dice: &mut Choices, config: &mut Value) {
    let (kind, source, mut options) = if dice.one_in(2) {
        bind(dice)
    } else {
        file_system(dice)
    };
    let is_file = source.ends_with("file") || source == "/dev/null";
    let usual: &[&str] = if is_file {
        &["/etc/file", "/new/file", "/dev/file"]
    } else {
        &[
            "/data",
            "/data/below",
            "/new/directory",
            "/tmp",
            "/etc",
            "/dev/shm",
            "/dev/new",
        ]
    };
    let odd = [
        "/data",
        "/etc/file",
        "/link/x",
        "/proc/sys",
        "/sys/new",
        "data",
        "/a/../b",
        "/data/",
        "/",
    ];
    let destination = dice.either(usual, &odd);
    for _ in 0..dice.below(4) {
        let option = dice.either(OPTIONS, ODD_OPTIONS);
        options.push(option);
    }
    if dice.one_in(6) {
        options.push(dice.pick(PROPAGATION));
    }
    let mut mount = json!({ "destination": destination, "options": options });
    if !kind.is_empty() {
        mount["type"] = json!(kind);
    }
    if !source.is_empty() {
        mount["source"] = json!(source);
    }
    if dice.errs(6) {
        let host = 100_000 + 1000 * dice.below(2);
        let maps = json!([{ "containerID": 0, "hostID": host, "size": 1000 }]);
        mount["uidMappings"] = maps.clone();
        mount["gidMappings"] = maps;
    }
    push(config, "", "mounts", mount);
}

const OPTIONS: &[&str] = &[
    "ro",
    "rw",
    "nosuid",
    "suid",
    "nodev",
    "dev",
    "noexec",
    "exec",
    "noatime",
    "relatime",
    "strictatime",
    "nodiratime",
    "nosymfollow",
    "rro",
    "rnosuid",
    "rnoexec",
    "rnodev",
    "atime",
    "diratime",
    "rrw",
];

/// Options that not all runtimes support for all mounts.
const ODD_OPTIONS: &[&str] = &["defaults", "sync", "dirsync", "silent", "rnoatime"];

const PROPAGATION: &[&str] = &[
    "private",
    "rprivate",
    "slave",
    "rslave",
    "shared",
    "rshared",
    "unbindable",
    "runbindable",
];

fn bind(dice: &mut Choices) -> (&'static str, String, Vec<&'static str>) {
    let source = match dice.below(12) {
        0 => "rootfs/bin".to_owned(),
        1 if dice.mistakes => format!("{SOURCE}/missing"),
        2 => "/dev/null".to_owned(),
        3 => format!("{SOURCE}/link"),
        4 | 5 => format!("{SOURCE}/file"),
        6 => "/sys/fs/cgroup".to_owned(),
        _ => format!("{SOURCE}/tree"),
    };
    let mut options = vec![dice.pick(&["bind", "rbind"])];
    if dice.errs(6) {
        options.push(dice.pick(&["idmap", "ridmap"]));
    }
    (dice.pick(&["bind", "bind", "none", ""]), source, options)
}

fn file_system(dice: &mut Choices) -> (&'static str, String, Vec<&'static str>) {
    let odd = ["mode=888", "size=", "no_such_option", "noswap"];
    let usual = [
        "size=64k",
        "size=1%",
        "mode=755",
        "mode=1777",
        "mode=0",
        "uid=1000",
        "gid=5",
        "nr_inodes=10",
        "tmpcopyup",
        "huge=never",
        "mode=700,size=4k",
    ];
    let usual_kinds = ["tmpfs", "tmpfs", "tmpfs", "tmpfs", "mqueue", "devpts"];
    // crun mounts the others only at their usual places.
    let kind = dice.either(
        &usual_kinds,
        &["proc", "sysfs", "cgroup", "cgroup2", "no-such-fs"],
    );
    let (source, options) = match kind {
        "devpts" => (kind, vec!["newinstance", "mode=0620"]),
        "tmpfs" => {
            let all = [usual.as_slice(), if dice.errs(2) { &odd } else { &[] }].concat();
            let count = 1 + dice.below(2) as usize;
            let source = dice.pick(&["tmpfs", "none", "", "x y"]);
            (source, dice.draw(all, count))
        }
        _ => (kind, vec![]),
    };
    (kind, source.to_owned(), options)
}

/// Removes some of the standard mounts, but not /proc.
fn fewer_mounts(dice: &mut Choices, config: &mut Value) {
    if let Some(Value::Array(mounts)) = config.get_mut("mounts") {
        let mut first = true;
        mounts.retain(|_| std::mem::take(&mut first) || !dice.one_in(3));
    }
}

fn options_of_standard_mounts(dice: &mut Choices, config: &mut Value) {
    if let Some(Value::Array(mounts)) = config.get_mut("mounts") {
        let index = dice.below(mounts.len() as u64) as usize;
        let option = dice.either(OPTIONS, ODD_OPTIONS);
        push(&mut mounts[index], "", "options", json!(option));
    }
}

fn propagation(dice: &mut Choices, config: &mut Value) {
    let odd = ["", "no-such", "SHARED", "unbindable", "runbindable"];
    let value = dice.either(&PROPAGATION[..6], &odd);
    set(config, "/linux", "rootfsPropagation", json!(value));
}

const PATHS: &[&str] = &[
    "/proc/kcore",
    "/proc/sys",
    "/sys/firmware",
    "/no/such/path",
    "/etc",
    "/bin/no-program",
    "/tmp",
    "/data",
    "/dev/shm",
    "/data/tree",
    "/etc/",
    "/bin/../etc",
];

const ODD_PATHS: &[&str] = &[
    "/dev/null",
    "/link",
    "/proc/self/cmdline",
    "relative",
    "",
    "/",
];

fn paths(dice: &mut Choices) -> Value {
    let count = dice.below(4) as usize;
    let mut paths = dice.draw(PATHS.to_vec(), count);
    if dice.errs(4) {
        paths.push(dice.pick(ODD_PATHS));
    }
    json!(paths)
}

fn masked_paths(dice: &mut Choices, config: &mut Value) {
    let mut paths = paths(dice);
    if !dice.mistakes
        && let Value::Array(all) = &mut paths
    {
        // runc reads a file of a masked /proc/sys.
        all.retain(|path| path != "/proc/sys");
    }
    set(config, "/linux", "maskedPaths", paths);
}

fn readonly_paths(dice: &mut Choices, config: &mut Value) {
    let paths = paths(dice);
    set(config, "/linux", "readonlyPaths", paths);
}

fn devices(dice: &mut Choices, config: &mut Value) {
    for _ in 0..=dice.below(2) {
        let usual = ["/dev/one", "/dev/dir/two", "/tmp/three", "/new/four"];
        let path = dice.either(&usual, &["/dev/null"]);
        let kind = dice.pick(&["c", "c", "u", "b", "p"]);
        let (major, minor) = dice.pick(&[(1, 3), (1, 5), (10, 200), (7, 0), (4095, 1_048_575)]);
        let mut device = json!({ "path": path, "type": kind });
        if kind != "p" {
            device["major"] = json!(major);
            device["minor"] = json!(minor);
        }
        if dice.one_in(2) {
            device["fileMode"] = json!(dice.either(&[0o666, 0o600, 0], &[0o20644, 0o4755]));
        }
        if dice.one_in(3) {
            device["uid"] = json!(dice.pick(&[0, 1000]));
            device["gid"] = json!(dice.pick(&[0, 5]));
        }
        if dice.errs(8) {
            device["type"] = json!(dice.pick(&["x", "", "a"]));
        }
        push(config, "/linux", "devices", device);
    }
}
