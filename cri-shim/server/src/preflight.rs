//! Checks at startup for missing features of the node. The log then reports a missing feature
//! before a pod fails for lack of it.

use std::path::Path;

use crate::cgroup::CgroupDriver;
use crate::cgroup::{self, slice};
use crate::config::Config;

/// The cgroup controllers that pods' limits and statistics need (cgroup-v2.rst).
const CONTROLLERS: [&str; 5] = ["cpu", "cpuset", "io", "memory", "pids"];

/// Logs a warning for each missing program or feature of this node that pods need.
pub(crate) fn warn(config: &Config) {
    for warning in warnings(config) {
        log::warn!("{warning}");
    }
}

fn warnings(config: &Config) -> Vec<String> {
    let mut warnings = Vec::new();
    warnings.extend(controllers(Path::new(cgroup::MOUNT_POINT)));
    warnings.extend(config.monitor_missing());
    for (name, handler) in &config.runtimes {
        if let Some(missing) = handler.missing() {
            let consequence = if *name == config.default_runtime {
                "pods cannot be created, because this handler is the default handler"
            } else {
                "pods that choose this handler cannot be created"
            };
            warnings.push(format!(
                "the runtime handler {name:?}: {missing} ({consequence})"
            ));
        }
    }
    if config.cgroup_driver == CgroupDriver::Systemd && !slice::is_systemd_booted() {
        warnings.push(
            "cgroup_driver is \"systemd\", but systemd is not PID 1 (/run/systemd/system does not exist): \
             pods cannot be created"
                .to_owned(),
        );
    }
    warnings
}

/// Returns a warning if the cgroup at `root` lacks some of the [`CONTROLLERS`].
fn controllers(root: &Path) -> Option<String> {
    let available = cgroup::read(root, "cgroup.controllers").unwrap_or_default();
    let missing: Vec<&str> = CONTROLLERS
        .into_iter()
        .filter(|one| !available.split_ascii_whitespace().any(|name| name == *one))
        .collect();
    if missing.is_empty() {
        return None;
    }
    Some(format!(
        "{} lacks the cgroup controllers {}: rrun-cri refuses their limits and cannot report their \
         statistics. If cgroup v1 is mounted, boot with systemd.unified_cgroup_hierarchy=1",
        root.display(),
        missing.join(", ")
    ))
}
