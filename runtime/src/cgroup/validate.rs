//! The checks of `linux.resources` and `linux.cgroupsPath`. These checks run before rrun creates
//! the cgroup or a process.

use std::path::Path;

use oci_spec::runtime::LinuxResources;

use super::devices;
use crate::error::{Result, refuse};
use crate::sys::device_number::device_number;

/// Checks the path and the limits of a cgroup.
///
/// # Errors
/// Fails if cgroup v2 or this version of rrun does not support a setting. The error names the field
/// that contains the setting.
pub(crate) fn validate(path: &Path, resources: &LinuxResources) -> Result<()> {
    validate_path(path)?;
    validate_memory(resources)?;
    validate_cpu(resources)?;
    validate_io(resources)?;
    for limit in resources.hugepage_limits().iter().flatten() {
        let size = limit.page_size();
        if size.is_empty() || !size.bytes().all(|byte| byte.is_ascii_alphanumeric()) {
            refuse!(
                "linux.resources.hugepageLimits.pageSize: {size} is not a valid page size (a valid example is 2MB)"
            );
        }
    }
    if resources.network().as_ref().is_some_and(|network| {
        network.class_id().is_some() || network.priorities().as_ref().is_some_and(|p| !p.is_empty())
    }) {
        refuse!("linux.resources.network: cgroup v2 does not support this setting");
    }
    validate_unified(resources)?;
    devices::validate(resources.devices().as_deref().unwrap_or_default())
}

fn validate_path(path: &Path) -> Result<()> {
    let escapes = path
        .components()
        .any(|component| matches!(component, std::path::Component::ParentDir));
    if escapes || path == Path::new("/") {
        refuse!(
            "linux.cgroupsPath: {}: the path must not contain \"..\", and must not be the root cgroup",
            path.display()
        );
    }
    Ok(())
}

fn validate_memory(resources: &LinuxResources) -> Result<()> {
    let Some(memory) = resources.memory() else {
        return Ok(());
    };
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
            refuse!("linux.resources.memory.{field}: cgroup v2 does not support this setting");
        }
    }
    let limit = memory.limit().unwrap_or(0);
    let Some(swap) = memory.swap().filter(|swap| *swap > 0) else {
        return Ok(());
    };
    if limit <= 0 {
        refuse!(
            "linux.resources.memory.swap: {swap} is a limit on the sum of memory and swap, but memory.limit is missing or unlimited"
        );
    }
    if swap < limit {
        refuse!(
            "linux.resources.memory.swap: the limit {swap} on the sum of memory and swap is less than memory.limit ({limit})"
        );
    }
    Ok(())
}

fn validate_cpu(resources: &LinuxResources) -> Result<()> {
    let Some(cpu) = resources.cpu() else {
        return Ok(());
    };
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
            refuse!("linux.resources.cpu.{field}: cgroup v2 does not support this setting");
        }
    }
    if let Some(idle) = cpu.idle().filter(|idle| !matches!(idle, 0 | 1)) {
        refuse!("linux.resources.cpu.idle: {idle} is neither 0 nor 1");
    }
    Ok(())
}

fn validate_io(resources: &LinuxResources) -> Result<()> {
    let Some(io) = resources.block_io() else {
        return Ok(());
    };
    if io.leaf_weight().is_some_and(|weight| weight != 0) {
        refuse!("linux.resources.blockIO.leafWeight: cgroup v2 does not support this setting");
    }
    let weight = io.weight().filter(|weight| *weight != 0);
    if let Some(weight) = weight.filter(|weight| !(10..=1000).contains(weight)) {
        refuse!("linux.resources.blockIO.weight: {weight} is not between 10 and 1000");
    }
    let weights = io.weight_device().iter().flatten();
    let weights = weights.map(|device| ("weightDevice", device.major(), device.minor()));
    let throttled = [
        ("throttleReadBpsDevice", io.throttle_read_bps_device()),
        ("throttleWriteBpsDevice", io.throttle_write_bps_device()),
        ("throttleReadIOPSDevice", io.throttle_read_iops_device()),
        ("throttleWriteIOPSDevice", io.throttle_write_iops_device()),
    ];
    let throttled = throttled.into_iter().flat_map(|(field, devices)| {
        let devices = devices.iter().flatten();
        devices.map(move |device| (field, device.major(), device.minor()))
    });
    for (field, major, minor) in weights.chain(throttled) {
        device_number(|| format!("linux.resources.blockIO.{field}"), major, minor)?;
    }
    Ok(())
}

fn validate_unified(resources: &LinuxResources) -> Result<()> {
    for key in resources.unified().iter().flatten().map(|(key, _)| key) {
        if key.contains('/') || !key.contains('.') {
            refuse!("linux.resources.unified: {key} is not the name of a cgroup file");
        }
        if key.starts_with("cgroup.")
            && !matches!(key.as_str(), "cgroup.max.depth" | "cgroup.max.descendants")
        {
            refuse!(
                "linux.resources.unified: {key} is not a limit, and only rrun is allowed to write this file"
            );
        }
    }
    Ok(())
}
