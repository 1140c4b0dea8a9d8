//! What the node lacks, told in the log at the start: not here is found out when a pod wants it.

use std::path::Path;

use crate::cgroup::CgroupDriver;
use crate::cgroup::{self, slice};
use crate::config::Config;

/// The controllers that pods' limits and statistics need, cgroup-v2.rst.
const CONTROLLERS: [&str; 5] = ["cpu", "cpuset", "io", "memory", "pids"];

/// One line of the log for each thing that is missing.
pub(crate) fn warn(config: &Config) {
    for lack in lacks(config) {
        log::warn!("{lack}");
    }
}

fn lacks(config: &Config) -> Vec<String> {
    let mut lacks = Vec::new();
    lacks.extend(controllers(Path::new(cgroup::MOUNT_POINT)));
    lacks.extend(config.monitor_missing());
    for (name, handler) in &config.runtimes {
        if let Some(missing) = handler.missing() {
            let named = if *name == config.default_runtime {
                "the default one: no pod can be made"
            } else {
                "pods that choose it can't be made"
            };
            lacks.push(format!("the runtime handler {name:?}: {missing} ({named})"));
        }
    }
    if config.cgroup_driver == CgroupDriver::Systemd && !slice::is_systemd_booted() {
        lacks.push(
            "cgroup_driver is \"systemd\", and systemd is not PID 1 (there is no /run/systemd/system): \
             no pod can be made"
                .to_owned(),
        );
    }
    lacks
}

/// A sentence if the hierarchy at `root` lacks controllers.
fn controllers(root: &Path) -> Option<String> {
    let there = cgroup::read(root, "cgroup.controllers").unwrap_or_default();
    let missing: Vec<&str> = CONTROLLERS
        .into_iter()
        .filter(|one| !there.split_ascii_whitespace().any(|had| had == *one))
        .collect();
    if missing.is_empty() {
        return None;
    }
    Some(format!(
        "{} has no controller {}: what these limit is refused, and what they count is not told; a host \
         with cgroup v1 beside it boots with systemd.unified_cgroup_hierarchy=1",
        root.display(),
        missing.join(", ")
    ))
}
