//! StopContainer: sends the stop signal, waits for the grace period, then kills the whole cgroup.

use std::sync::Arc;
use std::time::Duration;

use super::remove::end_without_monitor;
use super::{Container, Phase, UNKNOWN_TO_MONITOR};
use crate::clock::now;
use crate::node::Node;
use rrun_calls::error::{During, Error, Result};
use rrun_calls::wait::slow;
use rrun_monitor_client::MonitorError;
use rrun_protocol::FailureKind;

/// The time limit for a container's exit after SIGKILL. An exit takes longer only if the kernel
/// can't end a process.
const KILL_TIMEOUT: Duration = Duration::from_secs(120);

/// The time within which the monitor must answer the request to kill the container. The monitor
/// answers it immediately.
const KILL_ANSWER_TIMEOUT: Duration = Duration::from_secs(5);

/// Stops the container and returns when it has exited. `grace` is the grace period in seconds.
pub(crate) async fn stop(node: &Arc<Node>, container: &Arc<Container>, grace: i64) -> Result<()> {
    let name = container.name();
    let phase = container.phase();
    if phase == Phase::Exited {
        return Ok(());
    }
    // The server has given up the pod's monitor, so it would not learn of the container's exit. The
    // monitor can answer again later.
    if container.sandbox.state().retired {
        return end_without_monitor(node, container).await;
    }
    // A container that was not started is killed without a grace period. It contains only the
    // runtime's own process, and this process ignores stop signals.
    if phase == Phase::Running
        && let Ok(grace) = u64::try_from(grace)
        && grace > 0
    {
        // The grace period also limits the time for which the server waits for the monitor's answer.
        let ended = tokio::time::timeout(Duration::from_secs(grace), async {
            send(node, container, container.stop_signal, false).await?;
            container.wait_exited().await;
            Ok(())
        });
        if let Ok(ended) = ended.await {
            return ended;
        }
        log::info!("{name}: did not stop within {grace} s, so the server kills it");
    }
    let killed = send(node, container, libc::SIGKILL, true);
    match tokio::time::timeout(KILL_ANSWER_TIMEOUT, killed).await {
        Ok(killed) => killed?,
        Err(_) => {
            log::error!(
                "{name}: the pod's monitor did not answer the request to kill the container within {} s, so the server itself kills the container",
                KILL_ANSWER_TIMEOUT.as_secs()
            );
            return end_without_monitor(node, container).await;
        }
    }
    let ended = slow(
        format!("{name}: wait for the container's exit after SIGKILL"),
        tokio::time::timeout(KILL_TIMEOUT, container.wait_exited()),
    )
    .await;
    ended.map_err(|_| {
        Error::new(
            tonic::Code::DeadlineExceeded,
            format!(
                "{name} did not exit within {} s of SIGKILL",
                KILL_TIMEOUT.as_secs()
            ),
        )
    })
}

async fn send(node: &Arc<Node>, container: &Arc<Container>, signal: i32, all: bool) -> Result<()> {
    let name = container.name();
    let sent = slow(
        format!("{name}: send signal {signal} to the container"),
        container.sandbox.monitor.kill(&container.id, signal, all),
    )
    .await;
    match sent {
        Ok(()) => Ok(()),
        // The lost connection is ignored here. Another task watches the monitor, notices its death,
        // and cleans up the pod's containers.
        Err(MonitorError::Gone { .. }) => Ok(()),
        Err(MonitorError::Failed(failure)) if failure.kind == FailureKind::NotFound => {
            container.record_end(node, 137, now(), "Unknown", UNKNOWN_TO_MONITOR);
            Ok(())
        }
        Err(error) => Err(Error::from(error)).during(|| format!("stop {name}")),
    }
}
