//! Tests of processes that keep a lock of the kernel. Everybody else who needs the lock waits in the
//! kernel, and no signal ends the wait. Only the pod's own monitor uses pipes and terminals that
//! processes of a container can lock.

use std::fs::{self, File};
use std::path::PathBuf;

use crate::support::kernel_locks::{PipeLock, SlowCopy};
use crate::support::machine::{Result, wait_for};
use crate::support::needs::{Need, Test};
use crate::support::node::{A_NODE, BUSYBOX, Node, on_a_node};
use crate::support::streams::TRANSPORTS;
use crate::support::terminal::{TMUX, Terminal};
use crate::{ensure, test};

pub(crate) const TESTS: &[Test] = &[
    test!(
        a_command_that_locks_its_pipes_stops_only_its_own_pod,
        A_NODE,
        Need::RrunCri
    ),
    test!(
        a_client_that_is_attached_to_a_locked_pipe_does_not_stop_the_server,
        A_NODE,
        Need::RrunCri
    ),
    test!(
        a_pod_whose_first_process_locks_its_pipes_is_stopped_and_removed,
        A_NODE,
        Need::RrunCri
    ),
    test!(
        a_pipe_that_a_process_of_another_pod_locks_stops_only_its_own_pod,
        A_NODE,
        Need::RrunCri
    ),
    test!(
        a_terminal_with_a_locked_size_stops_only_its_own_pod,
        A_NODE,
        Need::RrunCri,
        TMUX
    ),
    test!(
        status_is_answered_while_a_process_keeps_the_network_devices_locked,
        A_NODE,
        Need::RrunCri
    ),
    test!(
        leases_delay_only_calls_for_their_container,
        A_NODE,
        Need::RrunCri
    ),
];

/// Starts a pod with one container, and returns their ids.
fn start(node: &Node, name: &str, command: &[&str], stdin: bool) -> Result<(String, String)> {
    let pod = node.pod(name);
    let pod_id = node.runp(&pod)?;
    let mut container = node.container("c", command);
    container["stdin"] = stdin.into();
    let id = node.run(&pod_id, &pod, &container)?;
    Ok((pod_id, id))
}

fn wait_until_monitor_waits(node: &Node, pod_id: &str) -> Result {
    wait_for("the monitor to wait for a lock", || {
        let status = fs::read_to_string(format!("/proc/{}/status", node.monitor(pod_id)?))?;
        Ok(status.contains("State:\tD").then_some(()))
    })
}

/// Checks that the server runs commands in the container `other`.
fn is_used(node: &Node, other: &str) -> Result {
    let exec = ["exec", "--sync", other, "/inside", "exit", "0"];
    node.asks(&exec).map(drop)
}

/// Like [`is_used`], and checks that a server that is started again runs commands, too.
fn is_used_and_restarted(node: &mut Node, other: &str) -> Result {
    is_used(node, other)?;
    node.terminate_server()?;
    node.start_server()?;
    is_used(node, other)
}

fn remove(node: &Node, pod_id: &str) -> Result {
    node.asks(&["stopp", pod_id])?;
    node.asks(&["rmp", pod_id]).map(drop)
}

/// A process can take leases on the files of its container's cgroup and on the file of its network
/// namespace. Another process that opens one of these files waits until the kernel breaks the lease
/// after 45 s. The deadline of each call in this test is 30 s.
fn leases_delay_only_calls_for_their_container() -> Result {
    on_a_node(|node| {
        node.pull(BUSYBOX)?;
        let (_, other) = start(node, "other", &["/inside", "wait"], false)?;
        let files = [
            "cgroup.controllers",
            "cgroup.events",
            "cgroup.freeze",
            "cgroup.kill",
            "cgroup.procs",
            "cgroup.threads",
            "cpu.pressure",
            "cpu.stat",
            "io.pressure",
            "memory.current",
            "memory.pressure",
        ];
        let paths = files.map(|file| format!("/sys/fs/cgroup/{file}"));
        let lease = ["/inside", "lease"];
        let command: Vec<&str> = lease
            .into_iter()
            .chain(paths.iter().map(String::as_str))
            .chain(["/proc/self/ns/net"])
            .collect();
        let (pod_id, id) = start(node, "leases", &command, false)?;
        let log = node.join("logs/leases/c.log");
        wait_for("the container to have all leases", || {
            let text = fs::read_to_string(&log).unwrap_or_default();
            Ok(text.contains("leased").then_some(()))
        })?;
        for list in ["stats", "statsp"] {
            node.asks(&[list])?;
        }
        node.asks(&["metricsp"])?;
        let update = node.crictl(&["update", "--cpu-quota", "50000", &id]);
        let updating = update.start()?;
        is_used_and_restarted(node, &other)?;
        node.asks(&["stats"])?;
        remove(node, &pod_id)?;
        updating.end().map(drop)
    })
}

fn a_command_that_locks_its_pipes_stops_only_its_own_pod() -> Result {
    on_a_node(|node| {
        node.pull(BUSYBOX)?;
        let (_, other) = start(node, "other", &["/inside", "wait"], false)?;
        let sync = vec!["exec", "--sync", "--timeout", "100"];
        let sessions = TRANSPORTS.map(|transport| vec!["exec", "--transport", transport]);
        for exec in [vec![sync], sessions.to_vec()].concat() {
            let (pod_id, id) = start(node, "locks", &["/inside", "wait"], false)?;
            let locks = [id.as_str(), "/inside", "lock-pipes", "1", "2"];
            let running = node.crictl(&exec).args(locks).start()?;
            wait_until_monitor_waits(node, &pod_id)?;
            if exec.contains(&"--sync") {
                is_used_and_restarted(node, &other)?;
            } else {
                is_used(node, &other)?;
            }
            remove(node, &pod_id)?;
            let ended = running.end()?;
            ensure!(
                ended.code != 0,
                "`crictl {}` of a killed command succeeded",
                exec.join(" ")
            );
        }
        Ok(())
    })
}

fn a_client_that_is_attached_to_a_locked_pipe_does_not_stop_the_server() -> Result {
    on_a_node(|node| {
        node.pull(BUSYBOX)?;
        let (_, other) = start(node, "other", &["/inside", "wait"], false)?;
        let locks = ["sh", "-c", "exec /inside lock-pipes 0 0<>/proc/self/fd/0"];
        let (pod_id, id) = start(node, "locks", &locks, true)?;
        wait_for("the container to lock its stdin", || {
            let log = node.crictl(&["logs", &id]).ok()?.stdout;
            Ok(log.contains("locked").then_some(()))
        })?;
        let attach = node.crictl(&["attach", "-i", &id]).stdin("typed");
        let running = attach.start()?;
        wait_until_monitor_waits(node, &pod_id)?;
        is_used_and_restarted(node, &other)?;
        remove(node, &pod_id)?;
        running.end().map(drop)
    })
}

fn a_pod_whose_first_process_locks_its_pipes_is_stopped_and_removed() -> Result {
    on_a_node(|node| {
        node.pull(BUSYBOX)?;
        let (_, other) = start(node, "other", &["/inside", "wait"], false)?;
        let (pod_id, _) = start(node, "locks", &["/inside", "lock-pipes", "1", "2"], false)?;
        wait_until_monitor_waits(node, &pod_id)?;
        is_used_and_restarted(node, &other)?;
        remove(node, &pod_id)
    })
}

/// A process of another pod can have the pipe, for example after it received the pipe over a socket in a
/// shared volume. The processes of the pod then can't exit, because an exit closes the pipe.
fn a_pipe_that_a_process_of_another_pod_locks_stops_only_its_own_pod() -> Result {
    on_a_node(|node| {
        node.pull(BUSYBOX)?;
        let (_, other) = start(node, "other", &["/inside", "wait"], false)?;
        let (pod_id, id) = start(node, "locks", &["/inside", "wait"], false)?;
        let path = format!("/proc/{}/fd/1", node.pid(&id)?);
        let pipe = File::options().write(true).open(path)?;
        let lock = PipeLock::new(&pipe)?;
        wait_until_monitor_waits(node, &pod_id)?;
        is_used_and_restarted(node, &other)?;
        drop(lock);
        remove(node, &pod_id)
    })
}

fn a_terminal_with_a_locked_size_stops_only_its_own_pod() -> Result {
    on_a_node(|node| {
        node.pull(BUSYBOX)?;
        let (_, other) = start(node, "other", &["/inside", "wait"], false)?;
        let crictl = format!(
            "crictl --runtime-endpoint unix://{}",
            node.socket().display()
        );
        for transport in TRANSPORTS {
            for what in ["exec -it ID sh", "attach -it ID"] {
                let pod = node.pod("locks");
                let pod_id = node.runp(&pod)?;
                let mut shell = node.container("c", &["sh"]);
                (shell["stdin"], shell["tty"]) = (true.into(), what.starts_with("attach").into());
                let id = node.run(&pod_id, &pod, &shell)?;
                let what = what.replace("ID", &format!("--transport {transport} {id}"));
                let client = Terminal::open(node.join("tmux"), &format!("{crictl} {what}"))?;
                client.types("echo pro''mpt")?;
                client.shows("prompt")?;
                let terminal = format!("/proc/{}/root/dev/pts/0", node.pid(&id)?);
                let lock = SlowCopy::of_terminal_size(&PathBuf::from(terminal))?;
                client.tmux(&["resize-window", "-x", "101", "-y", "31"])?;
                wait_until_monitor_waits(node, &pod_id)?;
                if transport == "spdy" {
                    is_used_and_restarted(node, &other)?;
                } else {
                    is_used(node, &other)?;
                }
                drop(lock);
                remove(node, &pod_id)?;
            }
        }
        Ok(())
    })
}

fn status_is_answered_while_a_process_keeps_the_network_devices_locked() -> Result {
    on_a_node(|node| {
        node.asks(&["info"])?;
        let lock = SlowCopy::of_interfaces()?;
        for _ in 0..3 {
            node.asks(&["info"])?;
        }
        drop(lock);
        node.asks(&["info"]).map(drop)
    })
}
