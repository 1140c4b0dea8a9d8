//! The code that sets the limits of `linux.resources`. libcgroups converts and writes most of the
//! limits. The module `controllers` determines which controllers the limits need.

use std::path::Path;

use libcgroups::common::{CgroupManager as _, ControllerOpt};
use libcgroups::v2::manager::Manager;
use oci_spec::runtime::LinuxResources;
use rustix::io::Errno;

use super::controllers::{enable, has_unlimited, is_unlimited, listed, needed};
use super::directory::{Directory, MOUNT_POINT, read};
use crate::error::{Context as _, Error, Result, refuse};
use rrun_kernel::errno;

/// Removes "unlimited" values for controllers that the cgroup lacks. A resource without a
/// controller is always unlimited. Podman, docker and ctr always send some "unlimited" values.
///
/// The caller must call [`enable`] first. After [`enable`], a controller can be missing only if all
/// its values are "unlimited".
fn without_unlimited(cgroup: &Directory, resources: &LinuxResources) -> Result<LinuxResources> {
    let mut resources = resources.clone();
    if !has_unlimited(&resources) {
        return Ok(resources);
    }
    let present = listed(cgroup.path(), "cgroup.controllers")?;
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
    Ok(resources)
}

/// Sets the limits of an existing cgroup.
pub(super) fn apply(cgroup: &Directory, resources: &LinuxResources) -> Result<()> {
    let needed = needed(resources);
    enable(cgroup.path(), &needed)?;
    if needed.is_empty() && !has_unlimited(resources) {
        return Ok(());
    }
    let resources = &without_unlimited(cgroup, resources)?;
    let cpu = resources.cpu().as_ref();
    if let Some(idle) = cpu.and_then(|cpu| cpu.idle()) {
        set(cgroup, "cpu.idle", "cpu.idle", &idle.to_string())?;
    }
    // The kernel refuses a burst that is larger than the quota. If both values decrease, rrun must
    // write the burst first. If both values increase, rrun must write the quota first. So rrun
    // first tries to write the burst. If this write fails, rrun writes the burst again after the
    // quota.
    let burst = cpu.and_then(|cpu| cpu.burst());
    let burst = burst.map(|burst| burst.to_string());
    let burst_is_set = burst
        .as_ref()
        .is_some_and(|burst| cgroup.write("cpu.max.burst", burst).is_ok());
    apply_by_libcgroups(cgroup, resources)?;
    if let Some(burst) = burst.filter(|_| !burst_is_set) {
        set(cgroup, "cpu.burst", "cpu.max.burst", &burst)?;
    }
    apply_io_weight(cgroup, resources)?;
    apply_swap(cgroup, resources)?;
    apply_rdma(cgroup, resources)?;
    // rrun writes the values of `unified` last, so that they override the other limits. The values
    // of `unified` are the most explicit settings, because each value names its cgroup file.
    for (key, value) in resources.unified().iter().flatten() {
        set(cgroup, &format!("unified {key}"), key, value)?;
    }
    Ok(())
}

fn set(cgroup: &Directory, field: &str, file: &str, value: &str) -> Result<()> {
    let written = cgroup.write(file, value);
    written.doing(|| setting(cgroup, field, file, value))
}

fn setting(cgroup: &Directory, field: &str, file: &str, value: &str) -> String {
    format!(
        "set linux.resources.{field} of cgroup {} ({file} {value})",
        cgroup.path().display()
    )
}

fn apply_by_libcgroups(cgroup: &Directory, resources: &LinuxResources) -> Result<()> {
    let path = cgroup.path();
    let failed = |error: &dyn std::fmt::Display| {
        Error::new(format!(
            "set the limits of cgroup {}: {}",
            path.display(),
            with_errno_name(&error.to_string())
        ))
    };
    let relative = path.strip_prefix(MOUNT_POINT).unwrap_or(path);
    let manager = Manager::new(MOUNT_POINT.into(), relative.to_owned()).map_err(|e| failed(&e))?;
    manager
        .apply(&ControllerOpt {
            resources: &for_libcgroups(resources),
            disable_oom_killer: false,
            oom_score_adj: None,
            freezer_state: None,
        })
        .map_err(|error| failed(&error))
}

/// Replaces the number of an errno in an error of libcgroups, such as `(os error 28)`, by its name.
fn with_errno_name(sentence: &str) -> String {
    let sentence = sentence.trim_start_matches("io error: ");
    let number = sentence
        .rsplit_once("(os error ")
        .and_then(|(_, rest)| rest.split(')').next()?.parse().ok());
    number.map_or_else(
        || sentence.to_owned(),
        |number| {
            let error = std::io::Error::from_raw_os_error(number);
            sentence.replace(&error.to_string(), &errno::text(number))
        },
    )
}

fn apply_io_weight(cgroup: &Directory, resources: &LinuxResources) -> Result<()> {
    let io = resources.block_io().as_ref();
    let Some(weight) = io.and_then(|io| io.weight()).filter(|weight| *weight != 0) else {
        return Ok(());
    };
    let field = "blockIO.weight";
    let bfq_weight = weight.to_string();
    match cgroup.write("io.bfq.weight", &bfq_weight) {
        // The file io.bfq.weight exists only if the kernel has the BFQ scheduler.
        Err(Errno::NOENT) => set(cgroup, field, "io.weight", &io_weight(weight).to_string()),
        result => result.doing(|| setting(cgroup, field, "io.bfq.weight", &bfq_weight)),
    }
}

fn apply_swap(cgroup: &Directory, resources: &LinuxResources) -> Result<()> {
    let Some(limit) = swap_max(resources) else {
        return Ok(());
    };
    match cgroup.write("memory.swap.max", &limit) {
        // On a kernel without swap accounting, memory.swap.max does not exist. As runc does, rrun
        // then ignores a limit that forbids swap or allows unlimited swap.
        Err(Errno::NOENT) if limit == "0" || limit == "max" => Ok(()),
        result => result.doing(|| setting(cgroup, "memory.swap", "memory.swap.max", &limit)),
    }
}

/// Sets the limits of the rdma controller, the only controller that libcgroups does not support.
fn apply_rdma(cgroup: &Directory, resources: &LinuxResources) -> Result<()> {
    for (device, limit) in resources.rdma().iter().flatten() {
        let mut line = device.clone();
        if let Some(handles) = limit.hca_handles() {
            line.push_str(&format!(" hca_handle={handles}"));
        }
        if let Some(objects) = limit.hca_objects() {
            line.push_str(&format!(" hca_object={objects}"));
        }
        set(cgroup, "rdma", "rdma.max", &line)?;
    }
    Ok(())
}

/// Returns a copy of `resources` without the limits that libcgroups would write incorrectly.
///
/// libcgroups writes a zero as a value, but in the specification a zero means "unset". libcgroups
/// treats a swap limit equal to the memory limit as "unlimited", although such a limit forbids swap
/// (see [`swap_max`]). libcgroups writes a burst only after the quota, so it cannot decrease both
/// values together (see [`apply`]). libcgroups computes I/O weights in 16-bit arithmetic, which
/// overflows. If libcgroups cannot write an entry of `unified`, the error from libcgroups does not
/// name the entry's key.
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
            // The kernel refuses to set the CPU weight of an idle cgroup.
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

/// Returns the value for memory.swap.max, if a swap limit is set. In the specification,
/// `memory.swap` limits the sum of memory and swap, as in cgroup v1. In cgroup v2, memory.swap.max
/// limits swap alone, so this function subtracts the memory limit.
pub(super) fn swap_max(resources: &LinuxResources) -> Option<String> {
    let memory = resources.memory().as_ref()?;
    match (memory.swap()?, memory.limit().unwrap_or(0)) {
        (0, _) => None,
        (..0, _) => Some("max".to_owned()),
        (swap, limit) => Some((swap - limit.max(0)).to_string()),
    }
}

/// Returns whether the pids limit allows only a single process.
pub(super) fn allows_one_process(resources: &LinuxResources) -> bool {
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

/// Converts `cpu.shares` (2 to 262144) to cpu.weight (1 to 10000). The formula converts 2 to 1, the
/// default 1024 to the default 100, and 262144 to 10000. libcgroups and runc use the same formula.
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

/// Converts `blockIO.weight` (10 to 1000) to io.weight (1 to 10000).
pub(super) fn io_weight(weight: u16) -> u64 {
    1 + u64::from(weight.clamp(10, 1000) - 10) * 9999 / 990
}

/// Returns the requested limit on the sum of memory and swap, if any. The value -1 means unlimited.
/// If the memory limit is unlimited and no swap limit is set, this function also returns -1.
pub(crate) fn memory_swap(resources: &LinuxResources) -> Option<i64> {
    let memory = resources.memory().as_ref()?;
    match (memory.swap(), memory.limit()) {
        (None | Some(0), Some(..0)) => Some(-1),
        (swap, _) => swap.filter(|swap| *swap != 0),
    }
}

/// Adds the limit that an update does not specify: the memory limit, or the limit on the sum of
/// memory and swap. rrun needs both limits to compute memory.swap.max. If an update changes only
/// the memory limit, the limit on the sum remains in force. `memory_swap` is the last requested
/// limit on the sum of memory and swap.
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
            // If memory.max contains "max", the memory limit remains unset. Validation then refuses
            // the limit on the sum of memory and swap.
            memory.set_limit(current.parse().ok());
        }
        (1.., 0) if memory_swap > 0 && !swap_alone => {
            memory.set_swap(Some(memory_swap));
        }
        _ => {}
    }
    Ok(())
}

/// Checks a new memory limit against the memory in use.
///
/// # Errors
/// Fails if the limit is below the memory in use, because the kernel would then kill processes.
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
