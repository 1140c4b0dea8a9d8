//! Tests of processes that keep the pipes of their standard streams locked. A process that uses such a
//! pipe then waits in the kernel, and no signal ends the wait. Only the pod's own monitor uses them.

use std::fs::{self, File};
use std::io::Write;
use std::os::fd::AsFd;
use std::os::unix::net::UnixStream;
use std::thread;
use std::time::Duration;

use nix::fcntl::{SpliceFFlags, splice};

use crate::support::machine::{Result, wait_for};
use crate::support::needs::{Need, Test};
use crate::support::node::{A_NODE, BUSYBOX, Node, on_a_node};
use crate::support::streams::TRANSPORTS;
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

/// Returns whether the pod's monitor waits for a locked pipe.
fn monitor_waits(node: &Node, pod_id: &str) -> Result<bool> {
    let status = fs::read_to_string(format!("/proc/{}/status", node.monitor(pod_id)?))?;
    Ok(status.contains("State:\tD"))
}

fn wait_until_monitor_waits(node: &Node, pod_id: &str) -> Result {
    wait_for("the monitor to wait for a locked pipe", || {
        Ok(monitor_waits(node, pod_id)?.then_some(()))
    })
}

/// A thread that keeps a pipe locked. Dropping this value unlocks the pipe.
struct PipeLock {
    _silent: UnixStream,
}

impl PipeLock {
    /// Writes data to the pipe, and locks it. The data makes the other side read the pipe.
    fn new(pipe: &File) -> Result<Self> {
        let mut pipe = pipe.try_clone()?;
        let (socket, silent) = UnixStream::pair()?;
        thread::spawn(move || {
            let _ = pipe.write_all(b"data\n");
            let (from, to) = (socket.as_fd(), pipe.as_fd());
            splice(from, None, to, None, 4096, SpliceFFlags::empty())
        });
        Ok(PipeLock { _silent: silent })
    }
}

/// Checks that the server runs commands in the container `other`, also after it was restarted.
fn is_used(node: &mut Node, other: &str) -> Result {
    let exec = ["exec", "--sync", other, "/inside", "exit", "0"];
    node.asks(&exec)?;
    node.terminate_server()?;
    node.start_server()?;
    node.asks(&exec).map(drop)
}

fn remove(node: &Node, pod_id: &str) -> Result {
    node.asks(&["stopp", pod_id])?;
    node.asks(&["rmp", pod_id]).map(drop)
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
            is_used(node, &other)?;
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
        let attach = node.crictl(&["attach", "-i", &id]).stdin("typed");
        let running = attach.start()?;
        wait_until_monitor_waits(node, &pod_id)?;
        is_used(node, &other)?;
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
        is_used(node, &other)?;
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
        // The monitor can read the data before the pipe is locked.
        let lock = wait_for("the monitor to wait for the locked pipe", || {
            let lock = PipeLock::new(&pipe)?;
            thread::sleep(Duration::from_millis(200));
            Ok(monitor_waits(node, &pod_id)?.then_some(lock))
        })?;
        is_used(node, &other)?;
        drop(lock);
        remove(node, &pod_id)
    })
}
