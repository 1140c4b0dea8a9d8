//! StopPodSandbox and RemovePodSandbox. Each step is right also when it has been done before.

use std::sync::Arc;
use std::time::Duration;

use futures_util::future::join_all;
use rrun_proto::v1::ContainerEventType;

use super::{Sandbox, files, namespaces};
use crate::cgroup;
use crate::container::{self, Container};
use crate::node::Node;
use rrun_calls::error::{Error, Result};
use rrun_calls::wait::{blocking, slow};
use rrun_monitor_client::MonitorError;
use rrun_network::namespace as netns;
use rrun_network::{DetachOutcome, RetryBy};
use rrun_protocol::FailureKind;

/// How long a pod's removal waits for containers being made in it.
const CREATIONS_TIMEOUT: Duration = Duration::from_secs(10);

/// Stops what runs in the pod and gives its network back.
pub(crate) async fn stop(node: Arc<Node>, sandbox: Arc<Sandbox>) -> Result<()> {
    // From here on no container begins; one under way finds out at its end.
    let was_ready = std::mem::replace(&mut sandbox.state().ready, false);
    let containers = node.containers_of(&sandbox.id);
    let stops = containers
        .iter()
        .map(|container| container::stop::stop(&node, container, 0));
    first_error(join_all(stops).await)?;
    let records = containers.iter().map(|container| container.save(&node));
    first_error(join_all(records).await)?;
    release(&node, &sandbox, &containers, RetryBy::Caller).await?;
    sandbox.save(&node).await?;
    if was_ready {
        container::status::publish_sandbox(
            &node,
            &sandbox,
            ContainerEventType::ContainerStoppedEvent,
        );
        log::info!("{}: stopped", sandbox.name());
    }
    Ok(())
}

/// Stops the pod, removes its containers, and then all that is left of it.
pub(crate) async fn remove(node: Arc<Node>, sandbox: Arc<Sandbox>) -> Result<()> {
    stop(Arc::clone(&node), Arc::clone(&sandbox)).await?;
    creations_ended(&sandbox).await?;
    let containers = node.containers_of(&sandbox.id);
    let removals = containers
        .iter()
        .map(|container| container::remove::remove(&node, container));
    first_error(join_all(removals).await)?;
    unmake(&node, &sandbox).await?;
    sandbox.delete_record(&node).await?;
    node.forget_sandbox(&sandbox.id);
    container::status::publish_sandbox(&node, &sandbox, ContainerEventType::ContainerDeletedEvent);
    log::info!("{}: removed", sandbox.name());
    Ok(())
}

/// Waits for containers that were begun before the pod was stopped; each finds out and unmakes
/// itself.
async fn creations_ended(sandbox: &Sandbox) -> Result<()> {
    let name = sandbox.name();
    let mut creating = sandbox.creating.subscribe();
    let ended = creating.wait_for(|count| *count == 0);
    let ended = slow(
        format!("{name}: the end of a CreateContainer in it"),
        tokio::time::timeout(CREATIONS_TIMEOUT, ended),
    );
    match ended.await {
        Ok(_) => Ok(()),
        Err(_) => Err(Error::wrong_state(format!(
            "remove {name}: a container is still being made in it, most likely by a volume that hangs"
        ))),
    }
}

fn first_error(results: Vec<Result<()>>) -> Result<()> {
    results.into_iter().find(Result::is_err).unwrap_or(Ok(()))
}

/// Lets go of all that costs something while a pod only waits for its removal: the runtime's
/// records of its containers, its monitor, its network.
async fn release(
    node: &Node,
    sandbox: &Sandbox,
    containers: &[Arc<Container>],
    retry_by: RetryBy,
) -> Result<()> {
    let name = sandbox.name();
    let deletions = containers
        .iter()
        .map(|container| container::remove::delete_from_runtime(node, container));
    first_error(join_all(deletions).await)?;
    sandbox.state().retired = true;
    slow(format!("{name}: end its monitor"), end_monitor(sandbox)).await?;
    if namespaces::sharing(&sandbox.config).is_ok_and(|sharing| !sharing.own_network) {
        if sandbox.config.port_mappings.is_empty() {
            return Ok(());
        }
        // Its host ports are other pods' from here on.
        let path = node.netns(&sandbox.id);
        let freed = node.network.detach(&sandbox.id, &path, retry_by);
        return freed.await.map(drop);
    }
    let path = node.netns(&sandbox.id);
    let detached = node.network.detach(&sandbox.id, &path, retry_by);
    let detached = slow(format!("{name}: disconnect its network"), detached).await?;
    if detached == DetachOutcome::Pending {
        return Ok(());
    }
    blocking(format!("{name}: remove its network namespace"), move || {
        netns::remove(&path)
    })
    .await
    .map_err(Error::from)
}

/// Ends the monitor; what it still runs ends first.
async fn end_monitor(sandbox: &Sandbox) -> Result<()> {
    let monitor = &sandbox.monitor;
    let mut ended = monitor.shutdown().await;
    if let Err(MonitorError::Failed(failure)) = &ended
        && failure.kind == FailureKind::WrongState
        && let Ok((hello, _)) = monitor.subscribe().await
    {
        // Containers that the server no longer knows, of a call that a kill cut short.
        for container in hello.containers {
            if let Err(error) = monitor.delete(&container.id).await {
                log::warn!("{}: {error}", sandbox.name());
            }
        }
        ended = monitor.shutdown().await;
    }
    match ended {
        Ok(()) | Err(MonitorError::Gone { .. }) => {}
        Err(error) => {
            log::error!("{}: {error}; the monitor is killed", sandbox.name());
            kill_monitor(sandbox);
        }
    }
    sandbox.state().monitor = 0;
    Ok(())
}

/// Kills a monitor that does not answer, if its pid is still its own.
fn kill_monitor(sandbox: &Sandbox) {
    let pid = sandbox.state().monitor;
    let Some(process) = rustix::process::Pid::from_raw(pid) else {
        return;
    };
    let flags = rustix::process::PidfdFlags::empty();
    let Ok(pidfd) = rustix::process::pidfd_open(process, flags) else {
        return;
    };
    // The pidfd holds the process; what its command line says now, it said before.
    let arguments = std::fs::read(format!("/proc/{pid}/cmdline")).unwrap_or_default();
    if String::from_utf8_lossy(&arguments).contains(&sandbox.id) {
        let _ = rustix::process::pidfd_send_signal(&pidfd, rustix::process::Signal::KILL);
    }
}

/// Removes everything that was ever made for the pod, its containers excepted.
pub(crate) async fn unmake(node: &Node, sandbox: &Sandbox) -> Result<()> {
    release(node, sandbox, &[], RetryBy::Server).await?;
    let name = sandbox.name();
    let parent = node.config.default_cgroup_parent();
    if sandbox.cgroup == cgroup::own(parent, &sandbox.id) {
        let dir = cgroup::directory(&sandbox.cgroup);
        slow(format!("{name}: remove its cgroup"), async {
            if !dir.exists() {
                return Ok(());
            }
            cgroup::destroy(&dir).await?;
            if cgroup::slice::is_slice(&sandbox.cgroup) {
                cgroup::slice::stop(&sandbox.cgroup).await
            } else {
                Ok(())
            }
        })
        .await?;
        if !cgroup::slice::is_slice(parent) {
            // The last one out; with pods in it the kernel refuses.
            cgroup::remove_dirs(&[cgroup::directory(parent)]);
        }
    }
    let made = sandbox.cgroups_made.clone();
    let dir = node.sandbox_dir(&sandbox.id);
    blocking(format!("{name}: remove its files"), move || {
        cgroup::remove_dirs(&made);
        files::unmount(&dir.join("shm"))?;
        files::remove_tree(&dir)
    })
    .await
}
