//! A report of all settings that a program in a container can observe, for comparisons of runtimes.

use std::collections::BTreeMap;
use std::fs;
use std::os::unix::fs::{FileTypeExt, MetadataExt};
use std::path::Path;

use nix::libc;
use nix::unistd::{AccessFlags, access};
use serde_json::{Value, json};

use super::{report_value, say, text};

/// The first line that the program prints.
pub(crate) const STARTED: &str = "started";
/// The exit code of the program.
pub(crate) const OBSERVED: i32 = 42;

/// The paths whose attributes the program prints.
const PATHS: &[&str] = &[
    "/proc/kcore",
    "/proc/sys",
    "/proc/sys/kernel/msgmax",
    "/proc/sysrq-trigger",
    "/sys/firmware",
    "/etc",
    "/etc/file",
    "/bin/no-program",
    "/tmp",
    "/tmp/three",
    "/data",
    "/data/below",
    "/data/tree",
    "/new",
    "/new/directory",
    "/new/four",
    "/link",
    "/dev",
    "/sys/fs/cgroup",
    "/proc/self/cmdline",
];

const SYSCTLS: &[&str] = &[
    "net/ipv4/ip_forward",
    "net/ipv4/ping_group_range",
    "net/ipv4/conf/lo/forwarding",
    "net/core/somaxconn",
    "kernel/msgmax",
    "kernel/shm_rmid_forced",
    "kernel/sem",
    "fs/mqueue/msg_max",
];

/// Prints [`STARTED`], and then a JSON document. Returns [`OBSERVED`].
pub(super) fn observe() -> i32 {
    let printed = say(STARTED).and_then(|()| {
        let mut report = report_value()?;
        report["paths"] = paths();
        report["sysctls"] = SYSCTLS
            .iter()
            .map(|name| (*name, text(&format!("/proc/sys/{name}"))))
            .collect();
        report["time_offsets"] = json!(text("/proc/self/timens_offsets"));
        report["all_limits"] = limits();
        say(&report.to_string())
    });
    printed.map_or(1, |()| OBSERVED)
}

/// Returns the soft and the hard limit of each resource, by the number of the resource.
fn limits() -> Value {
    (0..16)
        .map(|resource| {
            let mut limit = libc::rlimit {
                rlim_cur: 0,
                rlim_max: 0,
            };
            // SAFETY: `limit` is writable.
            unsafe { libc::getrlimit(resource as _, &raw mut limit) };
            json!([limit.rlim_cur, limit.rlim_max])
        })
        .collect()
}

fn paths() -> Value {
    let mut all: BTreeMap<String, Value> = PATHS
        .iter()
        .map(|path| ((*path).to_owned(), attributes(Path::new(path))))
        .collect();
    for directory in ["/dev", "/dev/dir"] {
        for entry in fs::read_dir(directory).into_iter().flatten().flatten() {
            let path = entry.path();
            all.insert(path.display().to_string(), attributes(&path));
        }
    }
    json!(all)
}

/// Returns the type, the attributes, and whether the program can read and write the file.
fn attributes(path: &Path) -> Value {
    let Ok(file) = fs::symlink_metadata(path) else {
        return Value::Null;
    };
    let kind = file.file_type();
    let is_device = kind.is_char_device() || kind.is_block_device();
    let may = |flags| access(path, flags).is_ok();
    json!({
        "mode": format!("{:o}", file.mode()),
        "owner": [file.uid(), file.gid()],
        "device": is_device.then(|| [libc::major(file.rdev()), libc::minor(file.rdev())]),
        "target": fs::read_link(path).ok(),
        "reads": may(AccessFlags::R_OK),
        "writes": may(AccessFlags::W_OK),
        "entries": fs::read_dir(path).map(Iterator::count).unwrap_or(0).min(1),
    })
}
