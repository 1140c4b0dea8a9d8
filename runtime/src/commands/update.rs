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
use crate::sys::files::read_argument;
use crate::{cgroup, log};

pub(crate) const COMMAND: Command = Command {
    name: "update",
    usage: "[options] <container-id>",
    about: "change the resource limits of a container",
    flags: &[
        value(
            "resources",
            Some('r'),
            "JSON file with the content of linux.resources (- for standard input); rrun then ignores all other options",
        ),
        value("blkio-weight", None, "block I/O weight, from 10 to 1000"),
        value(
            "cpu-period",
            None,
            "period of the CPU limit, in microseconds",
        ),
        value(
            "cpu-quota",
            None,
            "limit of the CPU time in each period, in microseconds; -1 for no limit",
        ),
        value(
            "cpu-burst",
            None,
            "unused CPU time, in microseconds, that the container can save for later periods",
        ),
        value(
            "cpu-share",
            None,
            "CPU weight relative to other containers (cgroup v1 shares)",
        ),
        value(
            "cpu-rt-period",
            None,
            "period of the real-time CPU limit; not supported by cgroup v2",
        ),
        value(
            "cpu-rt-runtime",
            None,
            "real-time CPU time in each period; not supported by cgroup v2",
        ),
        value(
            "cpuset-cpus",
            None,
            "list of the allowed CPUs, such as 0-3,6",
        ),
        value(
            "cpuset-mems",
            None,
            "list of the allowed memory nodes, such as 0-1",
        ),
        value(
            "cpu-idle",
            None,
            "1: run the container only when no other process needs the CPU",
        ),
        value(
            "kernel-memory",
            None,
            "kernel memory limit; ignored, because cgroup v2 does not support this limit",
        ),
        value(
            "kernel-memory-tcp",
            None,
            "limit of TCP buffers; ignored, because cgroup v2 does not support this limit",
        ),
        value("memory", None, "memory limit in bytes; -1 for no limit"),
        value(
            "memory-reservation",
            None,
            "amount of memory, in bytes, that the kernel reclaims last",
        ),
        value(
            "memory-swap",
            None,
            "limit of the sum of memory and swap in bytes; -1 for no limit",
        ),
        value(
            "pids-limit",
            None,
            "limit of the number of processes and threads; -1 for no limit, 0 for no change",
        ),
        value(
            "l3-cache-schema",
            None,
            "L3 cache allocation, as a line of the resctrl group's schemata file",
        ),
        value(
            "mem-bw-schema",
            None,
            "memory bandwidth allocation, as a line of the resctrl group's schemata file",
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
    // Lock the container. Without the lock, two concurrent updates could both start from the old
    // state, and one update would be lost.
    let Lock::Acquired(dir) = ContainerDir::lock(&globals.root, &directory, || {})? else {
        refuse!(
            "cannot update container {id}: another process is creating, updating or removing it"
        );
    };
    let mut state = State::load(&globals.root, id)?;
    check(&state)?;
    // As in runc 1.3, a pids limit of 0 means that the update does not change the limit.
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
        // The write to the cgroup fails if the container exited during the update and another
        // process removed the cgroup.
        let exited = matches!(state.status(&directory), Ok(Status::Stopped) | Err(_));
        memory_limit(&resources)
            .filter(|_| exited)
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

/// Returns the error for a container that exited during the update. A new memory limit can be lower
/// than the cgroup's memory usage. The kernel then kills processes of the cgroup until the usage is
/// below the limit.
fn killed(cgroup: &Path, limit: i64) -> Error {
    Error::new(format!(
        "set linux.resources.memory.limit of cgroup {} (memory.max {limit}): the container \
         exited during the update; if it used more memory than the new limit, the kernel killed it",
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
        read_argument(Path::new(path))?
    };
    serde_json::from_slice(&bytes)
        .map_err(|error| Error::new(format!("parse resources from {path}: {error}")))
}

/// Converts the flags to the resources that a --resources file would contain. The value of a memory
/// flag can end in k, m, g or t.
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
            log::warning(&format!(
                "rrun ignores --{flag}, because cgroup v2 has no kernel memory limit"
            ));
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
        .map_err(|error| Error::new(format!("parse the limits on the command line: {error}")))
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
    fn sizes_can_have_units() {
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
