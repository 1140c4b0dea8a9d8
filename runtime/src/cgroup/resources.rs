//! `linux.resources`: which controllers the limits need, and the limits themselves, which
//! libcgroups converts and writes.

use std::path::Path;

use libcgroups::common::{CgroupManager as _, ControllerOpt};
use libcgroups::v2::manager::Manager;
use oci_spec::runtime::LinuxResources;

use super::devices;
use super::directory::{Directory, MOUNT_POINT, read};
use crate::error::{Context as _, Error, Result, refuse};

/// What `events` and everyone else who looks into the files wants counted, limits or not.
const COUNTED_CONTROLLERS: [&str; 4] = ["cpu", "io", "memory", "pids"];

/// The weight that every cgroup has that was given none: as good as saying nothing.
const DEFAULT_SHARES: u64 = 1024;

/// # Errors
/// What cgroup v2 does not have, or this version does not support, by its field.
pub(crate) fn validate(path: &Path, resources: &LinuxResources) -> Result<()> {
    let escapes = path
        .components()
        .any(|component| matches!(component, std::path::Component::ParentDir));
    if escapes || path == Path::new("/") {
        refuse!(
            "linux.cgroupsPath: {} is no place for a container",
            path.display()
        );
    }
    if let Some(memory) = resources.memory() {
        let absent = [
            ("kernel", memory.kernel().is_some_and(|limit| limit > 0)),
            (
                "kernelTCP",
                memory.kernel_tcp().is_some_and(|limit| limit > 0),
            ),
            ("swappiness", memory.swappiness().is_some()),
            (
                "disableOOMKiller",
                memory.disable_oom_killer() == Some(true),
            ),
        ];
        for (field, present) in absent {
            if present {
                refuse!("linux.resources.memory.{field}: cgroup v2 has no such thing");
            }
        }
    }
    if let Some((swap, limit)) = resources.memory().as_ref().and_then(|memory| {
        let swap = memory.swap().filter(|swap| *swap > 0)?;
        Some((swap, memory.limit().unwrap_or(0)))
    }) {
        if limit <= 0 {
            refuse!("linux.resources.memory.swap: {swap} is a limit, but memory.limit is none");
        }
        if swap < limit {
            refuse!(
                "linux.resources.memory.swap: {swap} is less than memory.limit ({limit}), which it includes"
            );
        }
    }
    if let Some(cpu) = resources.cpu() {
        let realtime = [
            (
                "realtimeRuntime",
                cpu.realtime_runtime().is_some_and(|value| value != 0),
            ),
            (
                "realtimePeriod",
                cpu.realtime_period().is_some_and(|value| value != 0),
            ),
        ];
        for (field, present) in realtime {
            if present {
                refuse!("linux.resources.cpu.{field}: cgroup v2 has no such thing");
            }
        }
        if let Some(idle) = cpu.idle().filter(|idle| !matches!(idle, 0 | 1)) {
            refuse!("linux.resources.cpu.idle: {idle} is neither 0 nor 1");
        }
    }
    if let Some(io) = resources.block_io() {
        if io.leaf_weight().is_some_and(|weight| weight != 0) {
            refuse!("linux.resources.blockIO.leafWeight: cgroup v2 has no such thing");
        }
        let weight = io.weight().filter(|weight| *weight != 0);
        if let Some(weight) = weight.filter(|weight| !(10..=1000).contains(weight)) {
            refuse!("linux.resources.blockIO.weight: {weight} is not between 10 and 1000");
        }
    }
    for limit in resources.hugepage_limits().iter().flatten() {
        let size = limit.page_size();
        if size.is_empty() || !size.bytes().all(|byte| byte.is_ascii_alphanumeric()) {
            refuse!("linux.resources.hugepageLimits.pageSize: {size} is no size, as 2MB");
        }
    }
    if resources.network().as_ref().is_some_and(|network| {
        network.class_id().is_some() || network.priorities().as_ref().is_some_and(|p| !p.is_empty())
    }) {
        refuse!("linux.resources.network: cgroup v2 has no such thing");
    }
    for key in resources.unified().iter().flatten().map(|(key, _)| key) {
        if key.contains('/') || !key.contains('.') {
            refuse!("linux.resources.unified: {key} is no name of a cgroup's file");
        }
        if key.starts_with("cgroup.")
            && !matches!(key.as_str(), "cgroup.max.depth" | "cgroup.max.descendants")
        {
            refuse!("linux.resources.unified: {key} is not a limit, and is rrun's own to write");
        }
    }
    devices::validate(resources.devices().as_deref().unwrap_or_default())
}

/// The controllers that the limits need, each with the field that needs it. What says that
/// there is no limit needs none: see [`without_unlimited`].
fn needed(resources: &LinuxResources) -> Vec<(String, String)> {
    let mut needed: Vec<(String, String)> = Vec::new();
    let mut add = |controller: &str, field: &str| {
        if !needed.iter().any(|(known, _)| known == controller) {
            needed.push((controller.to_owned(), format!("linux.resources.{field}")));
        }
    };
    if let Some(memory) = resources.memory() {
        let set = |limit: Option<i64>| limit.is_some_and(|limit| limit > 0);
        if set(memory.limit()) {
            add("memory", "memory.limit");
        } else if set(memory.reservation()) {
            add("memory", "memory.reservation");
        } else if set(memory.swap()) {
            add("memory", "memory.swap");
        }
    }
    if let Some(cpu) = resources.cpu() {
        if cpu.quota().is_some_and(|quota| quota > 0) {
            add("cpu", "cpu.quota");
        } else if cpu.burst().is_some_and(|burst| burst != 0) {
            add("cpu", "cpu.burst");
        } else if cpu
            .shares()
            .is_some_and(|shares| !matches!(shares, 0 | DEFAULT_SHARES))
        {
            add("cpu", "cpu.shares");
        } else if cpu.idle().is_some_and(|idle| idle != 0) {
            add("cpu", "cpu.idle");
        }
        let set = |list: &Option<String>| list.as_ref().is_some_and(|list| !list.is_empty());
        if set(cpu.cpus()) {
            add("cpuset", "cpu.cpus");
        } else if set(cpu.mems()) {
            add("cpuset", "cpu.mems");
        }
    }
    if resources
        .pids()
        .as_ref()
        .is_some_and(|pids| pids.limit() >= 0)
    {
        add("pids", "pids.limit");
    }
    if let Some(io) = resources.block_io() {
        let throttled = [
            io.throttle_read_bps_device(),
            io.throttle_write_bps_device(),
            io.throttle_read_iops_device(),
            io.throttle_write_iops_device(),
        ];
        let set = io.weight().is_some_and(|weight| weight != 0)
            || io
                .weight_device()
                .as_ref()
                .is_some_and(|devices| !devices.is_empty())
            || throttled
                .into_iter()
                .flatten()
                .any(|devices| !devices.is_empty());
        if set {
            add("io", "blockIO");
        }
    }
    if resources
        .hugepage_limits()
        .as_ref()
        .is_some_and(|limits| !limits.is_empty())
    {
        add("hugetlb", "hugepageLimits");
    }
    if resources
        .rdma()
        .as_ref()
        .is_some_and(|limits| !limits.is_empty())
    {
        add("rdma", "rdma");
    }
    for (key, value) in resources.unified().iter().flatten() {
        if is_unlimited(key, value) {
            continue;
        }
        if let Some((controller, _)) = key.split_once('.').filter(|(name, _)| *name != "cgroup") {
            add(controller, &format!("unified {key}"));
        }
    }
    needed
}

/// Whether a key of what is unified takes a limit away.
fn is_unlimited(key: &str, value: &str) -> bool {
    let limits = key.ends_with(".max") || key.ends_with(".high");
    limits && value.split_whitespace().next() == Some("max")
}

/// Whether anything says that there is no limit.
fn has_unlimited(resources: &LinuxResources) -> bool {
    let memory = resources.memory().as_ref().is_some_and(|memory| {
        [memory.limit(), memory.reservation(), memory.swap()]
            .into_iter()
            .flatten()
            .any(|limit| limit < 0)
    });
    let cpu = resources.cpu().as_ref().is_some_and(|cpu| {
        cpu.quota().is_some_and(|quota| quota < 0)
            || cpu.period().is_some_and(|period| period != 0)
            || cpu.shares() == Some(DEFAULT_SHARES)
            || cpu.burst() == Some(0)
            || cpu.idle() == Some(0)
    });
    memory
        || cpu
        || resources
            .pids()
            .as_ref()
            .is_some_and(|pids| pids.limit() < 0)
        || resources
            .unified()
            .iter()
            .flatten()
            .any(|(key, value)| is_unlimited(key, value))
}

/// The limits without those that say that there is none, as far as the cgroup has no
/// controller for them: there is none then. Podman, docker and ctr always say some.
///
/// To be asked after [`enable`], which has handed down what the others need.
fn without_unlimited(cgroup: &Directory, resources: &LinuxResources) -> LinuxResources {
    let mut resources = resources.clone();
    if !has_unlimited(&resources) {
        return resources;
    }
    let present = read(cgroup.path(), "cgroup.controllers").unwrap_or_default();
    let lacks = |name: &str| !present.split(' ').any(|controller| controller == name);
    if lacks("memory")
        && let Some(memory) = resources.memory_mut()
    {
        memory.set_limit(None);
        memory.set_reservation(None);
        memory.set_swap(None);
    }
    if lacks("cpu")
        && let Some(cpu) = resources.cpu_mut()
    {
        cpu.set_shares(None);
        cpu.set_quota(None);
        cpu.set_period(None);
        cpu.set_burst(None);
        cpu.set_idle(None);
    }
    if lacks("pids") {
        resources.set_pids(None);
    }
    if let Some(unified) = resources.unified_mut() {
        unified.retain(|key, value| {
            let controller = key.split('.').next().unwrap_or_default();
            !(is_unlimited(key, value) && lacks(controller))
        });
    }
    resources
}

/// Puts limits in place in a cgroup that exists.
pub(crate) fn apply(cgroup: &Directory, resources: &LinuxResources) -> Result<()> {
    let needed = needed(resources);
    enable(cgroup.path(), &needed)?;
    if needed.is_empty() && !has_unlimited(resources) {
        return Ok(());
    }
    let resources = &without_unlimited(cgroup, resources);
    let failed = |error: &dyn std::fmt::Display| {
        Error::new(format!(
            "set limits of cgroup {}: {error}",
            cgroup.path().display()
        ))
    };
    let relative = cgroup
        .path()
        .strip_prefix(MOUNT_POINT)
        .unwrap_or(cgroup.path());
    let swap = swap_max(resources);
    let set = |field: &str, file: &str, value: &str| {
        cgroup.write(file, value).doing(|| {
            format!(
                "set linux.resources.{field} of cgroup {} ({file} {value})",
                cgroup.path().display()
            )
        })
    };
    let unified = resources.unified().clone().unwrap_or_default();
    let cpu = resources.cpu().as_ref();
    let idle = cpu.and_then(|cpu| cpu.idle());
    let burst = cpu
        .and_then(|cpu| cpu.burst())
        .map(|burst| burst.to_string());
    if let Some(idle) = idle {
        set("cpu.idle", "cpu.idle", &idle.to_string())?;
    }
    // No burst may be larger than the quota, neither the old one than the new quota nor the
    // new one than the old: one order of the two is right.
    let burst_is_set = burst
        .as_ref()
        .is_some_and(|burst| cgroup.write("cpu.max.burst", burst).is_ok());
    let io_weight = resources
        .block_io()
        .as_ref()
        .and_then(|io| io.weight())
        .filter(|weight| *weight != 0);
    let resources = &for_libcgroups(resources);
    let manager = Manager::new(MOUNT_POINT.into(), relative.to_owned()).map_err(|e| failed(&e))?;
    manager
        .apply(&ControllerOpt {
            resources,
            disable_oom_killer: false,
            oom_score_adj: None,
            freezer_state: None,
        })
        .map_err(|error| failed(&error))?;
    if let Some(burst) = burst.filter(|_| !burst_is_set) {
        set("cpu.burst", "cpu.max.burst", &burst)?;
    }
    if let Some(weight) = io_weight {
        // The file of the BFQ scheduler is there only where that is.
        match cgroup.write("io.bfq.weight", &weight.to_string()) {
            Err(rustix::io::Errno::NOENT) => {
                let weight = self::io_weight(weight).to_string();
                set("blockIO.weight", "io.weight", &weight)?;
            }
            result => result.doing(|| {
                format!(
                    "set linux.resources.blockIO.weight of cgroup {} (io.bfq.weight {weight})",
                    cgroup.path().display()
                )
            })?,
        }
    }
    if let Some(limit) = swap {
        match cgroup.write("memory.swap.max", &limit) {
            // A kernel without swap accounting has no swap to forbid.
            Err(rustix::io::Errno::NOENT) if limit == "0" || limit == "max" => {}
            result => result.doing(|| {
                format!(
                    "set linux.resources.memory.swap of cgroup {} (memory.swap.max {limit})",
                    cgroup.path().display()
                )
            })?,
        }
    }
    // The one controller that libcgroups leaves out.
    for (device, limit) in resources.rdma().iter().flatten() {
        let mut line = device.clone();
        if let Some(handles) = limit.hca_handles() {
            line.push_str(&format!(" hca_handle={handles}"));
        }
        if let Some(objects) = limit.hca_objects() {
            line.push_str(&format!(" hca_object={objects}"));
        }
        set("rdma", "rdma.max", &line)?;
    }
    // Last, because they are the most explicit.
    for (key, value) in &unified {
        set(&format!("unified {key}"), key, value)?;
    }
    Ok(())
}

/// What libcgroups is to write: all but what it would get wrong.
///
/// It takes a zero for a value where the specification means that nothing is said, and a
/// swap limit equal to the memory limit, which forbids swap, for none; see [`swap_max`].
/// It writes a burst only after the quota, computes weights of I/O in too few bits, and
/// names no key of what is unified in its errors.
fn for_libcgroups(resources: &LinuxResources) -> LinuxResources {
    let mut resources = resources.clone();
    if let Some(memory) = resources.memory_mut() {
        memory.set_swap(None);
    }
    if let Some(cpu) = resources.cpu_mut() {
        cpu.set_period(cpu.period().filter(|period| *period != 0));
        cpu.set_quota(cpu.quota().filter(|quota| *quota != 0));
        cpu.set_cpus(cpu.cpus().clone().filter(|list| !list.is_empty()));
        cpu.set_mems(cpu.mems().clone().filter(|list| !list.is_empty()));
        if cpu.idle() == Some(1) {
            // Has no weight; the kernel refuses to set one.
            cpu.set_shares(None);
        }
        cpu.set_idle(None);
        cpu.set_burst(None);
    }
    if let Some(io) = resources.block_io_mut() {
        io.set_weight(None);
    }
    resources.set_unified(None);
    resources
}

/// Content of memory.swap.max. In the specification swap is memory and swap together, as in
/// cgroup v1; in cgroup v2 it is swap alone.
pub(super) fn swap_max(resources: &LinuxResources) -> Option<String> {
    let memory = resources.memory().as_ref()?;
    match (memory.swap()?, memory.limit().unwrap_or(0)) {
        (0, _) => None,
        (..0, _) => Some("max".to_owned()),
        (swap, limit) => Some((swap - limit.max(0)).to_string()),
    }
}

/// Whether the limit on processes leaves room for a single one.
pub(super) fn takes_one_process(resources: &LinuxResources) -> bool {
    let unified = resources
        .unified()
        .as_ref()
        .and_then(|all| all.get("pids.max"));
    match unified {
        Some(limit) => matches!(limit.trim(), "0" | "1"),
        None => matches!(
            resources.pids().as_ref().map(|pids| pids.limit()),
            Some(0 | 1)
        ),
    }
}

/// cpu.weight (1 to 10000) from `cpu.shares` (2 to 262144), so that the smallest, the
/// default (1024 and 100) and the largest of both meet. The same curve as libcgroups and
/// runc have.
pub(super) fn cpu_weight(shares: u64) -> u64 {
    match shares {
        ..=2 => 1,
        262_144.. => 10_000,
        shares => {
            let log = (shares as f64).log2();
            let exponent = (log * log + 125.0 * log) / 612.0 - 7.0 / 34.0;
            (10f64.powf(exponent).ceil() as u64).clamp(1, 10_000)
        }
    }
}

/// io.weight (1 to 10000) from `blockIO.weight` (10 to 1000).
pub(super) fn io_weight(weight: u16) -> u64 {
    1 + u64::from(weight.clamp(10, 1000) - 10) * 9999 / 990
}

/// Hands the controllers down from the root of the hierarchy to the cgroup.
///
/// Mostly they are there already, because other containers have the same parent.
fn enable(path: &Path, needed: &[(String, String)]) -> Result<()> {
    let missing_in = |path: &Path, file: &str| -> Vec<&(String, String)> {
        let present = read(path, file).unwrap_or_default();
        needed
            .iter()
            .filter(|(controller, _)| !present.split(' ').any(|name| name == controller))
            .collect()
    };
    let present = read(path, "cgroup.controllers").unwrap_or_default();
    let has = |name: &str| present.split(' ').any(|controller| controller == name);
    if COUNTED_CONTROLLERS.into_iter().all(has) && needed.iter().all(|(name, _)| has(name)) {
        return Ok(());
    }
    let offered = read(Path::new(MOUNT_POINT), "cgroup.controllers").unwrap_or_default();
    let offers = |name: &str| offered.split(' ').any(|controller| controller == name);
    if needed.is_empty() && !COUNTED_CONTROLLERS.into_iter().any(offers) {
        return Ok(());
    }
    let relative = path.strip_prefix(MOUNT_POINT).unwrap_or(Path::new(""));
    let mut ancestor = Path::new(MOUNT_POINT).to_owned();
    for component in relative.components() {
        if let Some((controller, field)) = missing_in(&ancestor, "cgroup.controllers").first() {
            refuse!(
                "{field}: needs the {controller} controller, which {} has not",
                ancestor.display()
            );
        }
        let missing = missing_in(&ancestor, "cgroup.subtree_control");
        hand_down_counted(&ancestor);
        if !missing.is_empty() {
            let line: Vec<String> = missing.iter().map(|(name, _)| format!("+{name}")).collect();
            std::fs::write(ancestor.join("cgroup.subtree_control"), line.join(" ")).map_err(
                |error| {
                    Error::new(format!(
                        "hand {} down from cgroup {}: {}",
                        line.join(" "),
                        ancestor.display(),
                        crate::error::Reason::reason(&error)
                    ))
                },
            )?;
        }
        ancestor.push(component);
    }
    Ok(())
}

/// Hands down what it has of the controllers that count; where it can not, nothing is
/// counted below, which is nobody's error.
fn hand_down_counted(ancestor: &Path) {
    let offered = read(ancestor, "cgroup.controllers").unwrap_or_default();
    if offered.is_empty() {
        return;
    }
    let down = read(ancestor, "cgroup.subtree_control").unwrap_or_default();
    let among = |list: &str, name: &str| list.split(' ').any(|known| known == name);
    for name in COUNTED_CONTROLLERS {
        if among(&offered, name) && !among(&down, name) {
            let _ = std::fs::write(ancestor.join("cgroup.subtree_control"), format!("+{name}"));
        }
    }
}

/// The limit on memory and swap together that is asked for, if one is; -1 for none, which
/// no limit on memory means, too.
pub(crate) fn memory_swap(resources: &LinuxResources) -> Option<i64> {
    let memory = resources.memory().as_ref()?;
    match (memory.swap(), memory.limit()) {
        (None | Some(0), Some(..0)) => Some(-1),
        (swap, _) => swap.filter(|swap| *swap != 0),
    }
}

/// What an update leaves unsaid: a limit on memory and swap together means something only
/// beside the one on memory, and holds on when that one changes. `memory_swap` is the one
/// that was asked for last.
pub(crate) fn complete_update(
    path: &Path,
    memory_swap: i64,
    resources: &mut LinuxResources,
) -> Result<()> {
    let swap_alone = resources
        .unified()
        .as_ref()
        .is_some_and(|unified| unified.contains_key("memory.swap.max"));
    let Some(memory) = resources.memory_mut() else {
        return Ok(());
    };
    match (memory.limit().unwrap_or(0), memory.swap().unwrap_or(0)) {
        (0, 1..) => {
            let current = read(path, "memory.max")
                .doing(|| format!("read memory.max of cgroup {}", path.display()))?;
            // "max" stays none, which is refused beside a limit on both.
            memory.set_limit(current.parse().ok());
        }
        (1.., 0) if memory_swap > 0 && !swap_alone => {
            memory.set_swap(Some(memory_swap));
        }
        _ => {}
    }
    Ok(())
}

/// # Errors
/// A memory limit below what is in use: setting it would make the kernel kill.
pub(crate) fn check_memory_above_use(path: &Path, resources: &LinuxResources) -> Result<()> {
    let limit = resources
        .memory()
        .as_ref()
        .and_then(|memory| memory.limit());
    let Some(limit) = limit.filter(|limit| *limit > 0) else {
        return Ok(());
    };
    let used = read(path, "memory.current")
        .ok()
        .and_then(|text| text.parse::<i64>().ok())
        .unwrap_or(0);
    if used > limit {
        refuse!(
            "memory.limit: {limit} bytes are less than the {used} bytes in use in cgroup {}",
            path.display()
        );
    }
    Ok(())
}

#[cfg(test)]
mod tests;
