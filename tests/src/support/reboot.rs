//! This module simulates the reboot of a node. The node loses all processes, cgroups, mounts,
//! namespaces and interfaces, and all files in /run.

use std::collections::BTreeSet;
use std::fs;
use std::path::Path;

use nix::sys::signal::{Signal, kill};

use crate::ensure;
use crate::support::cgroup_use::groups_below;
use crate::support::machine::{Result, command, wait_for};
use crate::support::node::Node;

/// Simulates a reboot, and starts the server again with the files that remain. The caller must stop
/// kubelet before the reboot.
pub(crate) fn reboot(node: &mut Node) -> Result {
    let mut groups = BTreeSet::new();
    for container in node.asks(&["ps", "--quiet"])?.lines() {
        let group = node.cgroup(container)?;
        groups.insert(group.parent().ok_or("the cgroup has no parent")?.to_owned());
    }
    let mut monitors = Vec::new();
    for pod in node.asks(&["pods", "--quiet", "--state", "Ready"])?.lines() {
        monitors.push(node.monitor(pod)?);
    }
    node.kill_server()?;
    for monitor in monitors {
        kill(monitor, Signal::SIGKILL)?;
    }
    for group in groups {
        fs::write(group.join("cgroup.kill"), "1")?;
        wait_for("a pod's cgroup to be removed", || remove(&group).map(Some))?;
    }
    node.unmount_all()?;
    fs::remove_dir_all(node.join("state"))?;
    let _ = command("ip", ["link", "delete", "rrun0"]).end();
    let _ = command("nft", ["delete", "table", "inet", "rrun0"]).end();
    node.start_server()
}

/// Removes a cgroup and all cgroups below it. Fails while the kernel is still killing the processes
/// in these cgroups.
fn remove(group: &Path) -> Result {
    // systemd manages the cgroups with names that end with `.slice`. systemctl must therefore
    // remove these cgroups.
    let name = group.file_name().unwrap_or_default().to_string_lossy();
    if name.ends_with(".slice") {
        command("systemctl", ["stop", &name]).ok()?;
        ensure!(
            !group.exists(),
            "the cgroup {} still exists after systemd stopped the cgroup's slice",
            group.display()
        );
        return Ok(());
    }
    for below in groups_below(group) {
        fs::remove_dir(below)?;
    }
    Ok(fs::remove_dir(group)?)
}
