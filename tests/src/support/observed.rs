//! The properties of a container's processes that a runtime sets. Two containers with the same
//! configuration have equal properties. The module therefore leaves out process ids, inode numbers
//! and the like.

use std::collections::BTreeMap;
use std::fs::{self, File};
use std::os::fd::AsRawFd as _;
use std::os::unix::fs::MetadataExt as _;
use std::path::Path;

use nix::errno::Errno;
use nix::libc;
use serde_json::{Value, json};

use crate::support::bundle::Bundle;
use crate::support::machine::Result;

/// The fields of /proc/PID/status that a runtime sets.
const STATUS: &[&str] = &[
    "Uid",
    "Gid",
    "Groups",
    "Umask",
    "NoNewPrivs",
    "Seccomp",
    "Seccomp_filters",
    "CapInh",
    "CapPrm",
    "CapEff",
    "CapBnd",
    "CapAmb",
    "SigBlk",
    "SigIgn",
    "SigCgt",
    "Cpus_allowed_list",
    "Speculation_Store_Bypass",
];

/// Returns the properties in a report of the program `inside`.
pub(crate) fn of_report(report: &str) -> Result<Value> {
    let mut report: Value = serde_json::from_str(report.trim()).map_err(|error| {
        format!("the container's program wrote no report ({error}): {report:?}")
    })?;
    for key in ["pid", "parent", "session"] {
        report[key] = Value::Null;
    }
    let status = report["status"].as_object_mut();
    status
        .into_iter()
        .for_each(|all| all.retain(|name, _| STATUS.contains(&&**name)));
    for (name, link) in report["namespaces"].as_object_mut().into_iter().flatten() {
        let own = fs::read_link(format!("/proc/self/ns/{name}")).unwrap_or_default();
        *link = json!(*link == json!(own));
    }
    for descriptor in report["fds"].as_object_mut().into_iter().flatten() {
        *descriptor.1 = json!(kind(descriptor.1.as_str().unwrap_or_default()));
    }
    let mounts = report["mounts"].as_array_mut().into_iter().flatten();
    mounts.for_each(|line| *line = json!(mount(line.as_str().unwrap_or_default())));
    // The fields of /proc/PID/stat after the process name: nice, rt_priority and policy.
    let stat: Vec<Value> = [16, 37, 38].map(|at| report["stat"][at].clone()).into();
    report["stat"] = json!(stat);
    // The fields of a keyring's description: type, owner, group, permissions and name. If the key
    // quota of the owner is used up, rrun chooses another owner.
    let keyring = report["keyring"].as_str().unwrap_or_default();
    let fields: Vec<&str> = keyring.split(';').collect();
    report["keyring"] = json!([fields.first(), fields.get(2), fields.get(3)]);
    Ok(report)
}

/// Returns a link in /proc/PID/fd without the number of an inode.
fn kind(link: &str) -> &str {
    match link.split_once(":[") {
        Some((kind, _)) => kind,
        None => link,
    }
}

/// Returns a line of mountinfo without the numbers of mounts, devices and peer groups.
fn mount(line: &str) -> String {
    let words = line.split(' ').skip(3);
    words
        .map(|word| match word.split_once(':') {
            Some((kind @ ("shared" | "master" | "propagate_from"), _)) => kind,
            _ => word,
        })
        .collect::<Vec<_>>()
        .join(" ")
}

/// Returns the properties of the first process of a created container, and of its cgroup. The
/// process waits for `start`.
pub(crate) fn of_waiting_process(bundle: &Bundle) -> Result<Value> {
    // The command `state` connects to the start socket, and the process would have one more open
    // descriptor for a short time. So this function reads the state file itself.
    let state = fs::read(bundle.root().join(bundle.id()).join("state.json"))?;
    let pid = &serde_json::from_slice::<Value>(&state)?["pid"];
    let read = |file: &str| fs::read_to_string(format!("/proc/{pid}/{file}")).unwrap_or_default();
    let status: BTreeMap<String, String> = read("status")
        .lines()
        .filter_map(|line| line.split_once(':'))
        .filter(|(name, _)| STATUS.contains(name))
        .map(|(name, value)| (name.to_owned(), value.trim().to_owned()))
        .collect();
    let descriptors: BTreeMap<String, String> = fs::read_dir(format!("/proc/{pid}/fd"))?
        .flatten()
        .filter_map(|entry| {
            let link = fs::read_link(entry.path()).ok()?;
            let name = entry.file_name().to_string_lossy().into_owned();
            Some((name, kind(&link.to_string_lossy()).to_owned()))
        })
        .collect();
    // If other processes may not inspect the process, root owns these files.
    let owner = fs::metadata(format!("/proc/{pid}/environ"))?;
    Ok(json!({
        "status": bundle.status()?,
        "process": status,
        "oom_score_adj": read("oom_score_adj").trim(),
        "limits": read("limits"),
        "cgroup": read("cgroup").lines().find(|line| line.starts_with("0::")),
        "descriptors": descriptors,
        "owner": [owner.uid(), owner.gid()],
        "device_programs": device_programs(&bundle.cgroup())?,
    }))
}

/// Returns the number of BPF programs that decide about the devices of a cgroup. See bpf(2),
/// `BPF_PROG_QUERY`.
pub(crate) fn device_programs(cgroup: &Path) -> Result<u32> {
    /// The fields of `union bpf_attr` for BPF_PROG_QUERY.
    #[repr(C)]
    struct Query {
        target: u32,
        attach_type: u32,
        query_flags: u32,
        attach_flags: u32,
        ids: u64,
        count: u32,
        padding: u32,
    }
    const BPF_PROG_QUERY: libc::c_int = 16;
    const BPF_CGROUP_DEVICE: u32 = 6;
    let directory = File::open(cgroup)?;
    let mut query = Query {
        target: directory.as_raw_fd() as u32,
        attach_type: BPF_CGROUP_DEVICE,
        query_flags: 0,
        attach_flags: 0,
        ids: 0,
        count: 0,
        padding: 0,
    };
    // SAFETY: `query` is valid for the size that the kernel gets, and the kernel only writes to it.
    let returned = unsafe {
        libc::syscall(
            libc::SYS_bpf,
            BPF_PROG_QUERY,
            &raw mut query,
            size_of::<Query>(),
        )
    };
    Errno::result(returned)
        .map_err(|errno| format!("cannot query the programs of {}: {errno}", cgroup.display()))?;
    Ok(query.count)
}
