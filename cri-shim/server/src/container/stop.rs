//! StopContainer: the stop signal, the grace period, then the kill of the whole cgroup.

use std::sync::Arc;
use std::time::Duration;

use super::{Container, Phase};
use crate::clock::now;
use crate::node::Node;
use rrun_calls::error::{During, Error, Result};
use rrun_calls::wait::slow;
use rrun_monitor_client::MonitorError;
use rrun_protocol::FailureKind;

/// How long a killed container may take to end: longer only if the kernel can't end a process.
const KILL_TIMEOUT: Duration = Duration::from_secs(120);

/// Stops the container and returns when it has ended. `grace` in seconds.
pub(crate) async fn stop(node: &Arc<Node>, container: &Arc<Container>, grace: i64) -> Result<()> {
    let name = container.name();
    let phase = container.phase();
    if phase == Phase::Exited {
        return Ok(());
    }
    // Before its start there is only the runtime's own process, which obeys no stop signal.
    if phase == Phase::Running
        && let Ok(grace) = u64::try_from(grace)
        && grace > 0
    {
        send(node, container, container.stop_signal, false).await?;
        let timeout = Duration::from_secs(grace);
        let ended = tokio::time::timeout(timeout, container.wait_exited()).await;
        if ended.is_ok() {
            return Ok(());
        }
        log::info!("{name}: did not stop within {grace} s and is killed");
    }
    send(node, container, libc::SIGKILL, true).await?;
    let ended = slow(
        format!("{name}: its end after SIGKILL"),
        tokio::time::timeout(KILL_TIMEOUT, container.wait_exited()),
    )
    .await;
    ended.map_err(|_| {
        Error::new(
            tonic::Code::DeadlineExceeded,
            format!(
                "{name} did not end within {} s of SIGKILL",
                KILL_TIMEOUT.as_secs()
            ),
        )
    })
}

async fn send(node: &Arc<Node>, container: &Arc<Container>, signal: i32, all: bool) -> Result<()> {
    let name = container.name();
    let sent = slow(
        format!("{name}: send it signal {signal}"),
        container.sandbox.monitor.kill(&container.id, signal, all),
    )
    .await;
    match sent {
        Ok(()) => Ok(()),
        // Whoever watches the monitor finds it gone, too, and ends what it left.
        Err(MonitorError::Gone { .. }) => Ok(()),
        Err(MonitorError::Failed(failure)) if failure.kind == FailureKind::NotFound => {
            container.ended(node, 137, now(), "Unknown", "its monitor does not know it");
            Ok(())
        }
        Err(error) => Err(Error::from(error)).during(|| format!("stop {name}")),
    }
}
