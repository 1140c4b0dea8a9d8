//! Tests of processes whose main thread has exited, and that run on in another thread. In /proc,
//! such a process is a zombie, and a kill of its cgroup does not end it.

use std::fs;
use std::path::{Path, PathBuf};

use nix::mount::{MntFlags, MsFlags, mount, umount2};
use nix::sys::signal::{Signal, kill};
use serde_json::json;

use crate::support::cgroup_use::{file, groups_below};
use crate::support::machine::{Result, wait_for};
use crate::support::needs::{Need, Test};
use crate::support::node::{A_NODE, BUSYBOX, Node, on_a_node};
use crate::{ensure, ensure_eq, test};

pub(crate) const TESTS: &[Test] = &[
    test!(
        a_container_whose_first_process_has_no_main_thread_is_used_and_stopped,
        A_NODE,
        Need::RrunCri
    ),
    test!(
        stop_container_ends_processes_without_a_main_thread,
        A_NODE,
        Need::RrunCri
    ),
    test!(
        processes_without_a_main_thread_end_if_their_monitor_is_killed,
        A_NODE,
        Need::RrunCri
    ),
    test!(
        the_timeout_of_exec_sync_ends_processes_without_a_main_thread,
        A_NODE,
        Need::RrunCri
    ),
    test!(
        stop_pod_sandbox_kills_the_pause_process_if_a_container_can_not_be_deleted,
        A_NODE,
        Need::RrunCri
    ),
];

/// Starts a pod with a container that runs `/inside COMMAND…`. `pid` is the mode of the PID
/// namespace: 0 if the pod's containers share it, or 1. Returns the ids of the pod and of the
/// container.
fn start(node: &Node, pid: i32, command: &[&str]) -> Result<(String, String)> {
    node.pull(BUSYBOX)?;
    let mut pod = node.pod("threads");
    pod["linux"]["security_context"]["namespace_options"]["pid"] = json!(pid);
    let pod_id = node.runp(&pod)?;
    let mut container = node.container("c", &[&["/inside"], command].concat());
    container["linux"]["security_context"]["namespace_options"]["pid"] = json!(pid);
    let id = node.run(&pod_id, &pod, &container)?;
    Ok((pod_id, id))
}

/// Returns whether the cgroup or a cgroup below it contains a process whose main thread has exited.
fn has_process_without_main_thread(cgroup: &Path) -> bool {
    let has_no_main_thread = |pid: &str| {
        let stat = fs::read_to_string(format!("/proc/{pid}/stat"));
        stat.is_ok_and(|stat| stat.contains(") Z "))
    };
    let mut groups = groups_below(cgroup);
    groups.push(cgroup.to_owned());
    let processes = groups
        .iter()
        .filter_map(|group| file(group, "cgroup.procs").ok());
    processes
        .flat_map(|text| text.lines().map(has_no_main_thread).collect::<Vec<_>>())
        .any(|it| it)
}

fn wait_for_process_without_main_thread(cgroup: &Path) -> Result {
    wait_for("a main thread of the container to exit", || {
        Ok(has_process_without_main_thread(cgroup).then_some(()))
    })
}

/// Checks that the CRI reports the container's exit, and that the container has no process.
fn is_gone(node: &Node, id: &str, cgroup: &Path) -> Result {
    let status = node.status(id)?;
    ensure_eq!(
        status["state"],
        "CONTAINER_EXITED",
        "the state of the stopped container"
    );
    let events = file(cgroup, "cgroup.events").unwrap_or_default();
    ensure!(
        !events.contains("populated 1"),
        "processes of the stopped container are still alive"
    );
    Ok(())
}

fn a_container_whose_first_process_has_no_main_thread_is_used_and_stopped() -> Result {
    on_a_node(|node| {
        let (pod_id, id) = start(node, 1, &["headless"])?;
        let cgroup = node.cgroup(&id)?;
        wait_for_process_without_main_thread(&cgroup)?;
        node.asks(&["exec", "--sync", &id, "/inside", "exit", "0"])?;
        node.asks(&["stop", "--timeout", "1", &id])?;
        is_gone(node, &id, &cgroup)?;
        node.asks(&["rmp", "--force", &pod_id]).map(drop)
    })
}

/// The containers of the pod share a PID namespace. So the kernel does not kill the other processes
/// of a container when its first process exits.
fn stop_container_ends_processes_without_a_main_thread() -> Result {
    on_a_node(|node| {
        for mode in ["child", "multiply"] {
            let (pod_id, id) = start(node, 0, &["headless", mode])?;
            let cgroup = node.cgroup(&id)?;
            wait_for_process_without_main_thread(&cgroup)?;
            node.asks(&["stop", "--timeout", "1", &id])?;
            is_gone(node, &id, &cgroup)?;
            node.asks(&["rm", &id])?;
            ensure!(
                !cgroup.exists(),
                "the cgroup of `headless {mode}` still exists after `crictl rm`"
            );
            node.asks(&["stopp", &pod_id])?;
            node.asks(&["rmp", &pod_id])?;
        }
        Ok(())
    })
}

fn processes_without_a_main_thread_end_if_their_monitor_is_killed() -> Result {
    on_a_node(|node| {
        let (pod_id, id) = start(node, 0, &["headless", "child"])?;
        let cgroup = node.cgroup(&id)?;
        wait_for_process_without_main_thread(&cgroup)?;
        kill(node.monitor(&pod_id)?, Signal::SIGKILL)?;
        node.exited(&id)?;
        is_gone(node, &id, &cgroup)?;
        node.asks(&["rmp", "--force", &pod_id]).map(drop)
    })
}

fn the_timeout_of_exec_sync_ends_processes_without_a_main_thread() -> Result {
    on_a_node(|node| {
        let (_, id) = start(node, 1, &["wait"])?;
        let cgroup = node.cgroup(&id)?;
        for mode in [&[][..], &["child"], &["multiply"]] {
            let exec = [
                "exec",
                "--sync",
                "--timeout",
                "1",
                &id,
                "/inside",
                "headless",
            ];
            let output = node.crictl(&[&exec, mode].concat()).end()?;
            ensure!(
                output.code != 0,
                "`inside headless {}` ended before the timeout",
                mode.concat()
            );
            wait_for(
                "the processes and the cgroup of the exec to be removed",
                || Ok(groups_below(&cgroup).is_empty().then_some(())),
            )?;
            ensure!(
                !has_process_without_main_thread(&cgroup),
                "a process of the exec is in the container's cgroup after the timeout"
            );
        }
        Ok(())
    })
}

/// A mount on the directory of a cgroup. The kernel refuses to remove a directory with a mount.
struct Pinned(PathBuf);

impl Pinned {
    fn new(cgroup: &Path) -> Result<Self> {
        mount(
            Some(cgroup),
            cgroup,
            None::<&str>,
            MsFlags::MS_BIND,
            None::<&str>,
        )?;
        Ok(Pinned(cgroup.to_owned()))
    }
}

impl Drop for Pinned {
    fn drop(&mut self) {
        let _ = umount2(&self.0, MntFlags::MNT_DETACH);
    }
}

fn stop_pod_sandbox_kills_the_pause_process_if_a_container_can_not_be_deleted() -> Result {
    on_a_node(|node| {
        let (pod_id, id) = start(node, 0, &["wait"])?;
        let pause = node.pause_process(&pod_id)?;
        let pinned = Pinned::new(&node.cgroup(&id)?)?;
        let output = node.crictl(&["stopp", &pod_id]).end()?;
        ensure!(
            output.code != 0 && output.stderr.contains("remove"),
            "`crictl stopp` with a cgroup that cannot be removed prints: {}",
            output.stderr
        );
        ensure!(
            !fs::exists(format!("/proc/{pause}"))?,
            "the pause process is still alive after `crictl stopp`"
        );
        drop(pinned);
        node.asks(&["stopp", &pod_id])?;
        node.asks(&["rmp", &pod_id]).map(drop)
    })
}
