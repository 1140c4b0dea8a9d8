//! Follows a pod's monitor: exits, lack of memory, the monitor's own end.

use std::sync::{Arc, Weak};
use std::time::Duration;

use super::Sandbox;
use crate::container;
use crate::node::Node;
use rrun_calls::error::Result;
use rrun_monitor_client::MonitorError;
use rrun_protocol::{Event, Hello, Phase};

/// How often a monitor that closed its connection is asked again before it is held for dead. The
/// kernel refuses a connection at once when there is no process behind the socket.
const SUBSCRIBE_ATTEMPTS: u32 = 5;

/// Begins a task that lives as long as the monitor.
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
                    let Some((node, sandbox)) = alive(&weak_node, &weak_sandbox) else {
                        return;
                    };
                    apply(&node, &sandbox, hello);
                    drop((node, sandbox));
                    loop {
                        match events.next().await {
                            Ok(event) => {
                                let Some((node, sandbox)) = alive(&weak_node, &weak_sandbox) else {
                                    return;
                                };
                                handle(&node, &sandbox, event);
                            }
                            Err(error) => break error,
                        }
                    }
                }
                Err(error) => {
                    failures += 1;
                    error
                }
            };
            let Some((node, sandbox)) = alive(&weak_node, &weak_sandbox) else {
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
            tokio::time::sleep(Duration::from_millis(20 << failures)).await;
        }
    });
}

fn alive(node: &Weak<Node>, sandbox: &Weak<Sandbox>) -> Option<(Arc<Node>, Arc<Sandbox>)> {
    Some((node.upgrade()?, sandbox.upgrade()?))
}

/// Whether a second refusal in a row says for certain that no process is behind the socket.
fn is_dead(error: &MonitorError, failures: u32) -> bool {
    failures >= 2 && matches!(error, MonitorError::Gone { .. })
}

/// Brings the containers' states to what the monitor says.
pub(crate) fn apply(node: &Arc<Node>, sandbox: &Sandbox, hello: Hello) {
    {
        let mut state = sandbox.state();
        state.monitor = hello.pid;
        state.pid1 = hello.pid1;
        state.holder = hello.holder;
        state.passes_after = hello.passes_after;
    }
    for reported in hello.containers {
        let Ok(container) = node.container(&reported.id) else {
            continue;
        };
        match reported.phase {
            Phase::Created => {}
            Phase::Running => container.is_running(node, reported.pid),
            Phase::Exited(exit) => container.has_exited(node, &exit),
        }
    }
}

fn handle(node: &Arc<Node>, sandbox: &Sandbox, event: Event) {
    match event {
        Event::Exited { id, exit } => {
            // One that is not in the index is still being made, or is being removed.
            if let Ok(container) = node.container(&id) {
                container.has_exited(node, &exit);
            }
        }
        Event::OutOfMemory { id } => {
            let id = crate::id::short(&id);
            log::warn!(
                "{}: container {id}: the kernel killed a process, it had reached its memory limit",
                sandbox.name()
            );
        }
    }
}

/// The monitor is gone and was not told to go: its containers can't be looked after any more.
/// They end, as they would have if their runtime's shim had died elsewhere.
pub(crate) async fn lost(
    node: &Arc<Node>,
    sandbox: &Arc<Sandbox>,
    why: &MonitorError,
) -> Result<()> {
    if node.sandbox_dir(&sandbox.id).is_dir() {
        log::error!(
            "{}: {why}; its containers are stopped, the pod is not ready",
            sandbox.name()
        );
    } else {
        // After a reboot, or after a kill in the middle of its removal.
        log::info!(
            "{}: nothing of it is there, it is not ready",
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
