use std::io::Read as _;
use std::path::Path;

use oci_spec::runtime::LinuxResources;
use serde_json::{Map, Value, json};

use crate::arguments::{Arguments, value};
use crate::commands::globals::{Command, Globals};
use crate::error::{Context, Error, Result, refuse};
use crate::lifecycle::container_dir::{ContainerDir, Lock, directory};
use crate::lifecycle::state::{State, Status};
use crate::namespaces::resctrl;
use crate::sys::files::read_bounded;
use crate::{cgroup, log};

pub(crate) const COMMAND: Command = Command {
    name: "update",
    usage: "[options] <container-id>",
    about: "change the limits of a container",
    flags: &[
        value(
            "resources",
            Some('r'),
            "file with linux.resources as JSON, - for standard input; other options are then ignored",
        ),
        value("blkio-weight", None, "weight of block I/O, 10 to 1000"),
        value(
            "cpu-period",
            None,
            "period of the CPU limit, in microseconds",
        ),
        value(
            "cpu-quota",
            None,
            "CPU time in each period, in microseconds; -1 for no limit",
        ),
        value(
            "cpu-burst",
            None,
            "unused CPU time that may be saved up, in microseconds",
        ),
        value(
            "cpu-share",
            None,
            "weight beside other containers (cgroup v1 shares)",
        ),
        value("cpu-rt-period", None, "not in cgroup v2"),
        value("cpu-rt-runtime", None, "not in cgroup v2"),
        value("cpuset-cpus", None, "CPUs to use"),
        value("cpuset-mems", None, "memory nodes to use"),
        value("cpu-idle", None, "1 to run only when nothing else does"),
        value("kernel-memory", None, "ignored, not in cgroup v2"),
        value("kernel-memory-tcp", None, "ignored, not in cgroup v2"),
        value("memory", None, "memory limit in bytes; -1 for none"),
        value(
            "memory-reservation",
            None,
            "memory that is reclaimed last, in bytes",
        ),
        value(
            "memory-swap",
            None,
            "memory and swap together, in bytes; -1 for no limit",
        ),
        value(
            "pids-limit",
            None,
            "processes and threads; -1 for no limit, 0 to leave it as it is",
        ),
        value(
            "l3-cache-schema",
            None,
            "shares of the cache, a line of the resctrl group's schemata",
        ),
        value(
            "mem-bw-schema",
            None,
            "shares of memory bandwidth, a line of the resctrl group's schemata",
        ),
    ],
    rest_is_foreign: false,
    call: update,
};

fn update(globals: &Globals, arguments: &Arguments) -> Result<u8> {
    let id = arguments.container_id()?;
    let directory = directory(&globals.root, id)?;
    let check = |state: &State| match state.status(&directory)? {
        status @ (Status::Stopped | Status::Creating) => {
            refuse!(
                "cannot update container {id}: container not running, it is {}",
                status.as_str()
            )
        }
        _ => Ok(()),
    };
    check(&State::load(&globals.root, id)?)?;
    let (mut resources, schemata) = match arguments.value("resources") {
        Some(path) => (from_file(path)?, Vec::new()),
        None => (from_flags(arguments)?, schemata(arguments)),
    };
    // Two updates at once would each build on what was before the other.
    let Lock::Acquired(dir) = ContainerDir::lock(&directory, || {})? else {
        refuse!("cannot update container {id}: another process is making, updating or removing it");
    };
    let mut state = State::load(&globals.root, id)?;
    check(&state)?;
    // runc 1.3 and its callers mean by 0 that nothing is said.
    if resources.pids().is_some_and(|pids| pids.limit() == 0) {
        resources.set_pids(None);
    }
    cgroup::complete_update(&state.cgroup, state.memory_swap, &mut resources)?;
    cgroup::validate(Path::new("/update"), &resources)?;
    let checked = resources
        .memory()
        .as_ref()
        .and_then(|memory| memory.check_before_update());
    if checked == Some(true) {
        cgroup::check_memory_above_use(&state.cgroup, &resources)?;
    }
    cgroup::update(&state.cgroup, state.unit.as_deref(), &resources).map_err(|error| {
        // With the container its cgroup goes, and the files that were to be written next.
        let dead = matches!(state.status(&directory), Ok(Status::Stopped) | Err(_));
        memory_limit(&resources)
            .filter(|_| dead)
            .map_or(error, |limit| killed(&state.cgroup, limit))
    })?;
    if let Some(swap) = cgroup::memory_swap(&resources).filter(|swap| *swap != state.memory_swap) {
        state.memory_swap = swap;
        state.save(&dir)?;
    }
    if !schemata.is_empty() {
        resctrl::update(state.pid, &schemata)?;
    }
    Ok(0)
}

fn memory_limit(resources: &LinuxResources) -> Option<i64> {
    let memory = resources.memory().as_ref()?;
    memory.limit().filter(|limit| *limit > 0)
}

/// The kernel makes room for a limit below what is in use by killing.
fn killed(cgroup: &Path, limit: i64) -> Error {
    Error::new(format!(
        "set linux.resources.memory.limit of cgroup {} (memory.max {limit}): the container ended \
         meanwhile; if it used more than that, the kernel has killed it",
        cgroup.display()
    ))
}

fn schemata(arguments: &Arguments) -> Vec<&str> {
    ["l3-cache-schema", "mem-bw-schema"]
        .into_iter()
        .filter_map(|flag| arguments.value(flag).filter(|text| !text.is_empty()))
        .collect()
}

fn from_file(path: &str) -> Result<LinuxResources> {
    let bytes = if path == "-" {
        let mut bytes = Vec::new();
        std::io::stdin()
            .take(1 << 20)
            .read_to_end(&mut bytes)
            .doing(|| "read resources from standard input")?;
        bytes
    } else {
        read_bounded(Path::new(path))?
    };
    serde_json::from_slice(&bytes)
        .map_err(|error| Error::new(format!("parse resources from {path}: {error}")))
}

/// The flags, put into the form of the file. Sizes may end in k, m or g.
fn from_flags(arguments: &Arguments) -> Result<LinuxResources> {
    let (mut memory, mut cpu) = (Map::new(), Map::new());
    for (flag, field) in [
        ("memory", "limit"),
        ("memory-reservation", "reservation"),
        ("memory-swap", "swap"),
    ] {
        if let Some(text) = arguments.value(flag).filter(|text| !text.is_empty()) {
            memory.insert(field.to_owned(), json!(size(flag, text)?));
        }
    }
    for flag in ["kernel-memory", "kernel-memory-tcp"] {
        if arguments.value(flag).is_some_and(|text| !text.is_empty()) {
            log::warning(&format!("--{flag} is ignored: cgroup v2 has no such limit"));
        }
    }
    for (flag, field) in [
        ("cpu-period", "period"),
        ("cpu-quota", "quota"),
        ("cpu-burst", "burst"),
        ("cpu-share", "shares"),
        ("cpu-idle", "idle"),
        ("cpu-rt-period", "realtimePeriod"),
        ("cpu-rt-runtime", "realtimeRuntime"),
    ] {
        if let Some(number) = arguments.number::<i64>(flag)? {
            cpu.insert(field.to_owned(), json!(number));
        }
    }
    for (flag, field) in [("cpuset-cpus", "cpus"), ("cpuset-mems", "mems")] {
        if let Some(list) = arguments.value(flag).filter(|list| !list.is_empty()) {
            cpu.insert(field.to_owned(), json!(list));
        }
    }
    let mut all = Map::new();
    if !memory.is_empty() {
        all.insert("memory".to_owned(), Value::Object(memory));
    }
    if !cpu.is_empty() {
        all.insert("cpu".to_owned(), Value::Object(cpu));
    }
    if let Some(limit) = arguments.number::<i64>("pids-limit")? {
        all.insert("pids".to_owned(), json!({ "limit": limit }));
    }
    if let Some(weight) = arguments.number::<u16>("blkio-weight")? {
        all.insert("blockIO".to_owned(), json!({ "weight": weight }));
    }
    serde_json::from_value(Value::Object(all))
        .map_err(|error| Error::new(format!("the limits on the command line: {error}")))
}

fn size(flag: &str, text: &str) -> Result<i64> {
    let lower = text.to_ascii_lowercase();
    let digits = lower.trim_end_matches(|letter: char| letter.is_ascii_alphabetic());
    let factor = match lower.strip_prefix(digits).unwrap_or_default() {
        "" | "b" => Some(1i64),
        "k" | "kb" | "kib" => Some(1 << 10),
        "m" | "mb" | "mib" => Some(1 << 20),
        "g" | "gb" | "gib" => Some(1 << 30),
        "t" | "tb" | "tib" => Some(1 << 40),
        _ => None,
    };
    factor
        .and_then(|factor| digits.parse::<i64>().ok()?.checked_mul(factor))
        .ok_or_else(|| Error::new(format!("invalid value \"{text}\" for flag -{flag}")))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sizes_with_and_without_units() {
        for (text, bytes) in [
            ("-1", -1),
            ("1024", 1024),
            ("64m", 64 << 20),
            ("2GiB", 2 << 30),
        ] {
            assert_eq!(size("memory", text).unwrap(), bytes);
        }
        for text in ["", "m", "1x", "9999999999g"] {
            assert!(size("memory", text).is_err(), "{text}");
        }
    }
}
