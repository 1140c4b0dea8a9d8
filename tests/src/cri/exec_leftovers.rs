//! Tests of execs that leave something behind: a runtime call that hangs, or processes and cgroups.

use std::fs;

use crate::support::machine::{Result, wait_for};
use crate::support::needs::{Need, Test};
use crate::support::node::{A_NODE, BUSYBOX, Node, on_a_node};
use crate::{ensure, test};

pub(crate) const TESTS: &[Test] = &[
    test!(
        no_runtime_is_left_of_an_exec_whose_processes_the_container_stops,
        A_NODE,
        Need::RrunCri
    ),
];

/// Returns the number of children of the process `parent` that execute the program `rrun`.
fn runtimes(parent: i32) -> Result<usize> {
    let is_runtime = |stat: &str| {
        let (before, after) = stat.rsplit_once(')')?;
        let own_parent = after.split_ascii_whitespace().nth(1)?;
        Some(before.ends_with("(rrun") && own_parent.parse() == Ok(parent))
    };
    let processes = fs::read_dir("/proc")?.flatten();
    let stats = processes.filter_map(|entry| fs::read_to_string(entry.path().join("stat")).ok());
    Ok(stats.filter(|stat| is_runtime(stat) == Some(true)).count())
}

/// Starts a pod with a container that runs `/inside COMMAND`. Returns the ids of the pod and of the
/// container.
fn start(node: &Node, command: &str) -> Result<(String, String)> {
    node.pull(BUSYBOX)?;
    let pod = node.pod("execs");
    let pod_id = node.runp(&pod)?;
    let id = node.run(&pod_id, &pod, &node.container("c", &["/inside", command]))?;
    wait_for("the container to be ready", || {
        Ok(node.log_of("execs", "c")?.contains("ready").then_some(()))
    })?;
    Ok((pod_id, id))
}

/// The container stops the runtime's process that enters the container. The runtime then waits for
/// this process, until the client of the exec disconnects.
fn no_runtime_is_left_of_an_exec_whose_processes_the_container_stops() -> Result {
    on_a_node(|node| {
        let (pod_id, id) = start(node, "stop-others")?;
        let monitor = node.monitor(&pod_id)?.as_raw();
        for _ in 0..8 {
            let exec = ["exec", "--sync", "--timeout", "1", &id, "true"];
            let output = node.crictl(&exec).end()?;
            ensure!(
                output.code != 0,
                "an exec succeeded, although the container stops all processes"
            );
        }
        wait_for("the runtime calls of the execs to end", || {
            Ok((runtimes(monitor)? == 0).then_some(()))
        })
    })
}
