//! Tests of containers that hide the exits of processes from their parent, the pod's monitor. A
//! process can make the monitor trace thousands of its threads, or can trace another process and
//! never read its exit status. Also tests of a monitor that hangs.

use std::fs::{self, File};

use nix::sys::signal::{Signal, kill};
use nix::sys::stat::Mode;
use serde_json::{Value, json};

use crate::support::cgroup_use::groups_below;
use crate::support::machine::{Result, wait_for};
use crate::support::needs::{Need, Test};
use crate::support::node::{A_NODE, BUSYBOX, Node, on_a_node};
use crate::{ensure, ensure_eq, test};

pub(crate) const TESTS: &[Test] = &[
    test!(
        a_pod_is_used_and_stopped_although_its_monitor_traces_thousands_of_threads,
        A_NODE,
        Need::RrunCri
    ),
    test!(
        the_exit_of_a_container_is_reported_although_another_container_traces_it,
        A_NODE,
        Need::RrunCri
    ),
    test!(
        a_killed_exec_ends_although_the_container_traces_its_process,
        A_NODE,
        Need::RrunCri
    ),
    test!(
        a_pod_whose_monitor_hangs_is_stopped_and_removed,
        A_NODE,
        Need::RrunCri
    ),
];

/// Starts a container of the pod. `pid` is the mode of the PID namespace.
fn run(node: &Node, pod_id: &str, pod: &Value, mut container: Value, pid: i32) -> Result<String> {
    container["linux"]["security_context"]["namespace_options"]["pid"] = json!(pid);
    node.run(pod_id, pod, &container)
}

/// Waits until the container `tracer` of the pod `pod` traces this number of processes.
fn wait_for_traces(node: &Node, pod: &str, count: usize) -> Result {
    wait_for("the container to trace the other processes", || {
        let log = node.log_of(pod, "tracer")?;
        Ok((log.lines().count() >= count).then_some(()))
    })
}

fn a_pod_is_used_and_stopped_although_its_monitor_traces_thousands_of_threads() -> Result {
    on_a_node(|node| {
        node.pull(BUSYBOX)?;
        let pod = node.pod("floods");
        let pod_id = node.runp(&pod)?;
        let floods = node.container("floods", &["/inside", "traced", "flood"]);
        let id = node.run(&pod_id, &pod, &floods)?;
        wait_for("the threads to exist", || {
            Ok(node
                .log_of("floods", "floods")?
                .contains("ready")
                .then_some(()))
        })?;
        for code in ["0", "0"] {
            node.asks(&["exec", "--sync", &id, "/inside", "exit", code])?;
        }
        let beside = node.run(
            &pod_id,
            &pod,
            &node.container("beside", &["/inside", "exit", "3"]),
        )?;
        ensure_eq!(
            node.exited(&beside)?["exitCode"],
            3,
            "the exit code of another container of the pod"
        );
        node.asks(&["stop", "--timeout", "0", &id])?;
        ensure_eq!(
            node.status(&id)?["exitCode"],
            137,
            "the exit code of the container after it was killed"
        );
        node.asks(&["stopp", &pod_id])?;
        node.asks(&["rmp", &pod_id]).map(drop)
    })
}

fn the_exit_of_a_container_is_reported_although_another_container_traces_it() -> Result {
    on_a_node(|node| {
        node.pull(BUSYBOX)?;
        let mut pod = node.pod("traces");
        pod["linux"]["security_context"]["namespace_options"]["pid"] = json!(0);
        let pod_id = node.runp(&pod)?;
        let shared = node.join("shared");
        fs::create_dir(&shared)?;
        let fifo = shared.join("fifo");
        nix::unistd::mkfifo(&fifo, Mode::S_IRWXU)?;
        let mut exits = node.container("exits", &["sh", "-c", "read line </shared/fifo; exit 7"]);
        if let Some(mounts) = exits["mounts"].as_array_mut() {
            mounts.push(json!({ "container_path": "/shared", "host_path": shared }));
        }
        let exits = run(node, &pod_id, &pod, exits, 0)?;
        let killed = node.container("killed", &["/inside", "wait"]);
        let killed = run(node, &pod_id, &pod, killed, 0)?;
        let tracer = node.container("tracer", &["/inside", "traced", "hold"]);
        run(node, &pod_id, &pod, tracer, 0)?;
        wait_for_traces(node, "traces", 2)?;
        let cgroups = [node.cgroup(&killed)?, node.cgroup(&exits)?];
        drop(File::options().write(true).open(&fifo)?);
        node.asks(&["stop", "--timeout", "0", &killed])?;
        for (id, code) in [(&killed, 137), (&exits, 7)] {
            ensure_eq!(
                node.exited(id)?["exitCode"],
                code,
                "the exit code of a container that another container traces"
            );
            node.asks(&["rm", id])?;
        }
        for cgroup in cgroups {
            ensure!(
                !cgroup.exists(),
                "the cgroup {} of a removed container exists",
                cgroup.display()
            );
        }
        node.asks(&["stopp", &pod_id])?;
        node.asks(&["rmp", &pod_id]).map(drop)
    })
}

fn a_killed_exec_ends_although_the_container_traces_its_process() -> Result {
    on_a_node(|node| {
        node.pull(BUSYBOX)?;
        let pod = node.pod("traces");
        let pod_id = node.runp(&pod)?;
        let tracer = node.container("tracer", &["/inside", "traced", "hold"]);
        let id = run(node, &pod_id, &pod, tracer, 1)?;
        let cgroup = node.cgroup(&id)?;
        for count in 1..=4 {
            let exec = ["exec", "--sync", "--timeout", "1", &id, "/inside", "wait"];
            let output = node.crictl(&exec).end()?;
            ensure!(output.code != 0, "the exec ended before its timeout");
            wait_for_traces(node, "traces", count)?;
        }
        wait_for("the cgroups of the execs to be removed", || {
            Ok(groups_below(&cgroup).is_empty().then_some(()))
        })?;
        node.asks(&["stop", "--timeout", "0", &id])?;
        node.asks(&["stopp", &pod_id])?;
        node.asks(&["rmp", &pod_id]).map(drop)
    })
}

fn a_pod_whose_monitor_hangs_is_stopped_and_removed() -> Result {
    on_a_node(|node| {
        node.pull(BUSYBOX)?;
        let pod = node.pod("hangs");
        let pod_id = node.runp(&pod)?;
        let id = node.run(&pod_id, &pod, &node.container("c", &["/inside", "wait"]))?;
        let ended = node.run(
            &pod_id,
            &pod,
            &node.container("ended", &["/inside", "exit", "3"]),
        )?;
        node.exited(&ended)?;
        let cgroup = node.cgroup(&id)?;
        kill(node.monitor(&pod_id)?, Signal::SIGSTOP)?;
        node.asks(&["stop", "--timeout", "1", &id])?;
        ensure_eq!(
            node.status(&id)?["state"],
            "CONTAINER_EXITED",
            "the state of the stopped container"
        );
        ensure!(
            !cgroup.exists(),
            "the cgroup of the stopped container exists"
        );
        node.asks(&["rm", &ended])?;
        node.asks(&["stopp", &pod_id])?;
        node.asks(&["rmp", &pod_id]).map(drop)
    })
}
