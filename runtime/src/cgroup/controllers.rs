//! The cgroup controllers that a container's limits need. This module finds these controllers and
//! enables them.

use std::collections::BTreeSet;
use std::io::ErrorKind;
use std::path::Path;

use oci_spec::runtime::LinuxResources;
use rrun_kernel::cgroup;

use super::directory::{MOUNT_POINT, read};
use crate::error::{Context, Error, Result, refuse};

/// The controllers that rrun enables even without limits. `events` and other commands read
/// statistics from the files of these controllers.
const COUNTED_CONTROLLERS: [&str; 4] = ["cpu", "io", "memory", "pids"];

/// The kernel's default CPU weight, expressed as a value of `cpu.shares`. A container with this
/// value does not need the cpu controller.
const DEFAULT_SHARES: u64 = 1024;

/// A list of controllers, each with the first field of config.json that needs the controller.
#[derive(Default)]
struct NeededControllers {
    list: Vec<(String, String)>,
    names: BTreeSet<String>,
}

/// Returns the controllers that the limits need. The second string of each pair is the first field
/// that needs the controller. A value that means "unlimited" does not need a controller: see
/// [`has_unlimited`].
pub(super) fn needed(resources: &LinuxResources) -> Vec<(String, String)> {
    let mut needed = NeededControllers::default();
    needed.add_memory(resources);
    needed.add_cpu(resources);
    if resources
        .pids()
        .as_ref()
        .is_some_and(|pids| pids.limit() >= 0)
    {
        needed.add("pids", "pids.limit");
    }
    needed.add_io(resources);
    if resources
        .hugepage_limits()
        .as_ref()
        .is_some_and(|limits| !limits.is_empty())
    {
        needed.add("hugetlb", "hugepageLimits");
    }
    if resources
        .rdma()
        .as_ref()
        .is_some_and(|limits| !limits.is_empty())
    {
        needed.add("rdma", "rdma");
    }
    for (key, value) in resources.unified().iter().flatten() {
        if is_unlimited(key, value) {
            continue;
        }
        if let Some((controller, _)) = key.split_once('.').filter(|(name, _)| *name != "cgroup") {
            needed.add(controller, &format!("unified {key}"));
        }
    }
    needed.list
}

impl NeededControllers {
    fn add(&mut self, controller: &str, field: &str) {
        if self.names.insert(controller.to_owned()) {
            let field = format!("linux.resources.{field}");
            self.list.push((controller.to_owned(), field));
        }
    }

    fn add_memory(&mut self, resources: &LinuxResources) {
        let Some(memory) = resources.memory() else {
            return;
        };
        let set = |limit: Option<i64>| limit.is_some_and(|limit| limit > 0);
        if set(memory.limit()) {
            self.add("memory", "memory.limit");
        } else if set(memory.reservation()) {
            self.add("memory", "memory.reservation");
        } else if set(memory.swap()) {
            self.add("memory", "memory.swap");
        }
    }

    fn add_cpu(&mut self, resources: &LinuxResources) {
        let Some(cpu) = resources.cpu() else {
            return;
        };
        if cpu.quota().is_some_and(|quota| quota > 0) {
            self.add("cpu", "cpu.quota");
        } else if cpu.burst().is_some_and(|burst| burst != 0) {
            self.add("cpu", "cpu.burst");
        } else if cpu
            .shares()
            .is_some_and(|shares| !matches!(shares, 0 | DEFAULT_SHARES))
        {
            self.add("cpu", "cpu.shares");
        } else if cpu.idle().is_some_and(|idle| idle != 0) {
            self.add("cpu", "cpu.idle");
        }
        let set = |list: &Option<String>| list.as_ref().is_some_and(|list| !list.is_empty());
        if set(cpu.cpus()) {
            self.add("cpuset", "cpu.cpus");
        } else if set(cpu.mems()) {
            self.add("cpuset", "cpu.mems");
        }
    }

    fn add_io(&mut self, resources: &LinuxResources) {
        let Some(io) = resources.block_io() else {
            return;
        };
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
            self.add("io", "blockIO");
        }
    }
}

/// Returns whether an entry of `unified` removes a limit by setting the limit to "max".
pub(super) fn is_unlimited(key: &str, value: &str) -> bool {
    let limits = key.ends_with(".max") || key.ends_with(".high");
    limits && value.split_whitespace().next() == Some("max")
}

/// Returns whether any limit is explicitly set to "unlimited" or to the kernel's default.
pub(super) fn has_unlimited(resources: &LinuxResources) -> bool {
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

/// Returns the content of a cgroup file that lists controllers. The content is empty if the cgroup
/// does not exist.
pub(super) fn listed(path: &Path, file: &str) -> Result<String> {
    match read(path, file) {
        Err(error) if error.kind() == ErrorKind::NotFound => Ok(String::new()),
        text => text.doing(|| format!("read {file} of cgroup {}", path.display())),
    }
}

/// Enables the controllers for the cgroup at `path`. A controller must be enabled in every ancestor
/// of the cgroup. rrun starts at the root of the hierarchy, and enables the controllers in one
/// ancestor after the other.
///
/// Usually the controllers are enabled already, because other containers have the same parent
/// cgroup.
pub(super) fn enable(path: &Path, needed: &[(String, String)]) -> Result<()> {
    let missing_in = |path: &Path, file: &str| -> Result<Vec<&(String, String)>> {
        let present = listed(path, file)?;
        let missing = needed
            .iter()
            .filter(|(controller, _)| !present.split(' ').any(|name| name == controller));
        Ok(missing.collect())
    };
    let present = listed(path, "cgroup.controllers")?;
    let has = |name: &str| present.split(' ').any(|controller| controller == name);
    if COUNTED_CONTROLLERS.into_iter().all(has) && needed.iter().all(|(name, _)| has(name)) {
        return Ok(());
    }
    let offered = listed(Path::new(MOUNT_POINT), "cgroup.controllers")?;
    let offers = |name: &str| offered.split(' ').any(|controller| controller == name);
    if needed.is_empty() && !COUNTED_CONTROLLERS.into_iter().any(offers) {
        return Ok(());
    }
    let relative = path.strip_prefix(MOUNT_POINT).unwrap_or(Path::new(""));
    let mut ancestor = Path::new(MOUNT_POINT).to_owned();
    for component in relative.components() {
        if let Some((controller, field)) = missing_in(&ancestor, "cgroup.controllers")?.first() {
            refuse!(
                "{field}: needs the {controller} controller, which the cgroup {} does not have",
                ancestor.display()
            );
        }
        let missing = missing_in(&ancestor, "cgroup.subtree_control")?;
        enable_counted(&ancestor);
        if !missing.is_empty() {
            let line: Vec<String> = missing.iter().map(|(name, _)| format!("+{name}")).collect();
            std::fs::write(ancestor.join("cgroup.subtree_control"), line.join(" ")).map_err(
                |error| {
                    Error::new(format!(
                        "enable the controllers {} for the children of cgroup {}: {}",
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

/// Enables [`COUNTED_CONTROLLERS`] for the children of `ancestor`, except the controllers that
/// `ancestor` itself lacks. This function ignores failures. Without these controllers, the children
/// only lack statistics.
fn enable_counted(ancestor: &Path) {
    for name in cgroup::missing_below(ancestor) {
        if COUNTED_CONTROLLERS.contains(&name.as_str()) {
            let _ = cgroup::enable_below(ancestor, &name);
        }
    }
}
