//! Tests of containers that act on their parent. The parent of a container's first process and of
//! the process of an exec is the pod's monitor, a process of the node.

use std::fs;

use serde_json::json;

use crate::support::machine::{Result, wait_for};
use crate::support::needs::{Need, Test};
use crate::support::node::{A_NODE, BUSYBOX, on_a_node};
use crate::{ensure_eq, test};

pub(crate) const TESTS: &[Test] = &[
    test!(
        a_container_that_its_parent_traces_has_not_exited_when_it_stops,
        A_NODE,
        Need::RrunCri
    ),
    test!(
        a_container_can_not_replace_the_session_keyring_of_the_monitor,
        A_NODE,
        Need::RrunCri
    ),
];

fn a_container_that_its_parent_traces_has_not_exited_when_it_stops() -> Result {
    on_a_node(|node| {
        node.pull(BUSYBOX)?;
        let pod = node.pod("parents");
        let pod_id = node.runp(&pod)?;
        let container = node.container("stops", &["/inside", "traced", "stop"]);
        let id = node.run(&pod_id, &pod, &container)?;
        let stat = format!("/proc/{}/stat", node.pid(&id)?);
        wait_for("the container's process to stop", || {
            Ok(fs::read_to_string(&stat)?.contains(") t ").then_some(()))
        })?;
        node.asks(&["exec", "--sync", &id, "/inside", "exit", "0"])?;
        node.asks(&["stop", "--timeout", "0", &id])?;
        ensure_eq!(
            node.exited(&id)?["exitCode"],
            137,
            "the exit code of the container after it was killed"
        );
        Ok(())
    })
}

/// If a container has a log, a thread of the monitor writes the log. So this container has no log.
fn a_container_can_not_replace_the_session_keyring_of_the_monitor() -> Result {
    on_a_node(|node| {
        node.pull(BUSYBOX)?;
        let pod = node.pod("parents");
        let pod_id = node.runp(&pod)?;
        let shared = node.join("shared");
        fs::create_dir(&shared)?;
        let script = "exec /inside keys to-parent >/shared/answer";
        let mut container = node.container("keys", &["sh", "-c", script]);
        container["log_path"] = json!("");
        if let Some(mounts) = container["mounts"].as_array_mut() {
            mounts.push(json!({ "container_path": "/shared", "host_path": shared }));
        }
        let id = node.run(&pod_id, &pod, &container)?;
        node.exited(&id)?;
        ensure_eq!(
            fs::read_to_string(shared.join("answer"))?,
            "Err(EPERM)\n",
            "the kernel's answer to the container"
        );
        Ok(())
    })
}
