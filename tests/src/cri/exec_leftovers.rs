//! Tests of execs that leave something behind: a runtime call that hangs, or processes and cgroups.

use std::fs;

use rrun_proto::v1::ExecSyncRequest;

use crate::support::calls::Calls;
use crate::support::cgroup_use::groups_below;
use crate::support::machine::{Result, wait_for};
use crate::support::needs::{Need, Test};
use crate::support::node::{A_NODE, BUSYBOX, Node, on_a_node};
use crate::{ensure_eq, test};

pub(crate) const TESTS: &[Test] = &[
    test!(
        no_runtime_is_left_of_an_exec_whose_processes_the_container_stops,
        A_NODE,
        Need::RrunCri
    ),
    test!(
        the_cgroups_of_many_execs_are_removed_after_their_processes_have_exited,
        A_NODE,
        Need::RrunCri
    ),
];

/// A number of execs that is larger than the number of cgroups that the monitor watches.
const EXECS: usize = 72;

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
            // An exec can succeed if its processes exit before the container stops them.
            node.crictl(&exec).end()?;
        }
        wait_for("the runtime calls of the execs to end", || {
            Ok((runtimes(monitor)? == 0).then_some(()))
        })
    })
}

fn the_cgroups_of_many_execs_are_removed_after_their_processes_have_exited() -> Result {
    on_a_node(|node| {
        let (_, id) = start(node, "wait")?;
        let cgroup = node.cgroup(&id)?;
        let calls = Calls::new(node)?;
        let exec = |script: &str| -> Result {
            let request = ExecSyncRequest {
                container_id: id.clone(),
                cmd: ["sh", "-c", script].map(str::to_owned).to_vec(),
                timeout: 0,
            };
            let mut runtime = calls.runtime();
            calls.wait(async move { runtime.exec_sync(request).await })??;
            Ok(())
        };
        for _ in 0..EXECS {
            exec("sleep 1000 >/dev/null 2>&1 </dev/null &")?;
        }
        ensure_eq!(
            groups_below(&cgroup).len(),
            EXECS,
            "the number of cgroups of execs that left a process behind"
        );
        exec("killall sleep")?;
        wait_for("the cgroups of all execs to be removed", || {
            Ok(groups_below(&cgroup).is_empty().then_some(()))
        })
    })
}
