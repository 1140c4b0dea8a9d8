//! Observation of a pod's monitor: exits of containers, out-of-memory events, and the monitor's own
//! exit.

use std::sync::{Arc, Weak};
use std::time::Duration;

use rrun_proto::v1::ContainerEventType;

use super::Sandbox;
use crate::container;
use crate::node::Node;
use rrun_calls::error::Result;
use rrun_monitor_client::MonitorError;
use rrun_protocol::{Event, Hello, Phase};

/// The limit on failed attempts to connect to a monitor again. After this number of failures, the
/// server considers the monitor dead. The attempts need little time: if no process owns the
/// monitor's socket, the kernel refuses the connection immediately.
const SUBSCRIBE_ATTEMPTS: u32 = 5;

/// Starts a task that handles the monitor's events until the monitor's exit.
pub(crate) fn begin(node: &Arc<Node>, sandbox: &Arc<Sandbox>) {
    let weak_node = Arc::downgrade(node);
    let weak_sandbox = Arc::downgrade(sandbox);
    let monitor = sandbox.monitor.clone();
    tokio::spawn(async move {
        let mut failures = 0;
        loop {
            let error = match monitor.subscribe().await {
                Ok((hello, mut events)) => {
                    failures = 0;
                    let Some((node, sandbox)) = upgrade(&weak_node, &weak_sandbox) else {
                        return;
                    };
                    apply(&node, &sandbox, hello);
                    drop((node, sandbox));
                    loop {
                        match events.next().await {
                            Ok(event) => {
                                let Some((node, sandbox)) = upgrade(&weak_node, &weak_sandbox)
                                else {
                                    return;
                                };
                                handle(&node, &sandbox, event);
                            }
                            Err(error) => break error,
                        }
                    }
                }
                Err(error @ MonitorError::Unreachable { .. }) => error,
                Err(error) => {
                    failures += 1;
                    error
                }
            };
            let Some((node, sandbox)) = upgrade(&weak_node, &weak_sandbox) else {
                return;
            };
            if sandbox.state().retired {
                return;
            }
            if failures >= SUBSCRIBE_ATTEMPTS || is_dead(&error, failures) {
                if let Err(error) = lost(&node, &sandbox, &error).await {
                    log::error!("{}: {error}", sandbox.name());
                }
                return;
            }
            drop((node, sandbox));
            tokio::time::sleep(pause(failures)).await;
        }
    });
}

/// Connects to the monitor of a pod that an earlier server process created. Returns an error only
/// if the monitor is dead or does not answer.
pub(crate) async fn first_hello(sandbox: &Sandbox) -> std::result::Result<Hello, MonitorError> {
    let mut failures = 0;
    loop {
        let error = match sandbox.monitor.subscribe().await {
            Ok((hello, _events)) => return Ok(hello),
            Err(error) => error,
        };
        failures += 1;
        let answers = !matches!(error, MonitorError::Deadline { .. });
        if !answers || failures >= SUBSCRIBE_ATTEMPTS || is_dead(&error, failures) {
            return Err(error);
        }
        tokio::time::sleep(pause(failures)).await;
    }
}

/// Returns the time between two attempts to connect to a monitor.
fn pause(failures: u32) -> Duration {
    Duration::from_millis(20 << failures)
}

fn upgrade(node: &Weak<Node>, sandbox: &Weak<Sandbox>) -> Option<(Arc<Node>, Arc<Sandbox>)> {
    Some((node.upgrade()?, sandbox.upgrade()?))
}

/// Returns whether the monitor is certainly dead: two attempts in a row failed, and no process owns
/// its socket.
fn is_dead(error: &MonitorError, failures: u32) -> bool {
    failures >= 2 && matches!(error, MonitorError::Gone { .. })
}

/// Updates the states of the pod and its containers with the states that the monitor reports.
pub(crate) fn apply(node: &Arc<Node>, sandbox: &Arc<Sandbox>, hello: Hello) {
    if sandbox.lacks_pause_process(hello.pid1, hello.holder) {
        pause_exited(node, sandbox);
    }
    {
        let mut state = sandbox.state();
        state.monitor = hello.pid;
        state.pid1 = hello.pid1;
        state.holder = hello.holder;
        state.passes_after = hello.passes_after;
        state.relays = hello.relays;
        state.relays_terminals = hello.relays_terminals;
    }
    for reported in hello.containers {
        let Ok(container) = node.container(&reported.id) else {
            continue;
        };
        match reported.phase {
            Phase::Created => {}
            Phase::Running => container.record_running(node, reported.pid),
            Phase::Exited(exit) => container.record_exit(node, &exit),
        }
    }
}

/// Handles the exit of the pod's pause process. As in containerd, the pod is then not
/// ready, and its remaining containers keep running until kubelet stops the pod.
fn pause_exited(node: &Arc<Node>, sandbox: &Arc<Sandbox>) {
    if !std::mem::replace(&mut sandbox.state().ready, false) {
        return;
    }
    log::error!(
        "{}: the pod's pause process has exited, so the pod is not ready any more",
        sandbox.name()
    );
    sandbox.save_soon(node);
    let kind = ContainerEventType::ContainerStoppedEvent;
    container::status::publish_sandbox(node, sandbox, kind);
}

fn handle(node: &Arc<Node>, sandbox: &Sandbox, event: Event) {
    match event {
        Event::Exited { id, exit } => {
            // The node's index does not contain a container during its creation and after its
            // removal. The exit of such a container is ignored.
            if let Ok(container) = node.container(&id) {
                container.record_exit(node, &exit);
            }
        }
        Event::OutOfMemory { id } => {
            let id = crate::id::short(&id);
            log::warn!(
                "{}: container {id}: the kernel killed a process because the container reached its memory limit",
                sandbox.name()
            );
        }
    }
}

/// Handles the unexpected exit of a monitor. Without a monitor, the server can't manage the pod's
/// containers, so the server stops them. Other runtimes also stop a container when its shim dies.
pub(crate) async fn lost(
    node: &Arc<Node>,
    sandbox: &Arc<Sandbox>,
    why: &MonitorError,
) -> Result<()> {
    if node.sandbox_dir(&sandbox.id).is_dir() {
        log::error!(
            "{}: {why}; the server stops the pod's containers, and the pod is not ready any more",
            sandbox.name()
        );
    } else {
        // The pod's directory can be missing for two reasons: the host was rebooted, or the server
        // was killed during the pod's removal.
        log::info!(
            "{}: the pod's directory does not exist, so the pod is not ready",
            sandbox.name()
        );
    }
    {
        let mut state = sandbox.state();
        state.ready = false;
        state.retired = true;
        state.monitor = 0;
    }
    for container in node.containers_of(&sandbox.id) {
        container::remove::end_without_monitor(node, &container).await?;
    }
    sandbox.save(node).await
}
