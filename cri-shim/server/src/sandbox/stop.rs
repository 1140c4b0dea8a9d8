//! StopPodSandbox and RemovePodSandbox. Callers can repeat both operations: a step that an earlier
//! call has already completed succeeds again.

use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use futures_util::future::join_all;
use rrun_proto::v1::ContainerEventType;

use super::{Sandbox, files, namespaces, pause};
use crate::cgroup;
use crate::container::{self, Container};
use crate::node::Node;
use rrun_calls::error::{Error, Result};
use rrun_calls::wait::{blocking, slow};
use rrun_kernel::own_cgroup;
use rrun_monitor_client::{MonitorClient, MonitorError};
use rrun_network::namespace as netns;
use rrun_network::{DetachOutcome, RetryBy};
use rrun_protocol::FailureKind;

/// The maximum time that a pod's removal waits for unfinished CreateContainer calls in the pod.
const CREATIONS_TIMEOUT: Duration = Duration::from_secs(10);

/// The time for which the server waits for a monitor's answer before it checks whether the monitor
/// hangs.
const HANG_CHECK_DELAY: Duration = Duration::from_secs(5);

/// Stops the pod's processes, and disconnects the pod from its network.
pub(crate) async fn stop(node: Arc<Node>, sandbox: Arc<Sandbox>) -> Result<()> {
    // After `ready` is set to false, no new container is accepted. A CreateContainer call in
    // progress checks `ready` again at its end, and fails if `ready` is false.
    let was_ready = std::mem::replace(&mut sandbox.state().ready, false);
    let containers = node.containers_of(&sandbox.id);
    let stops = containers
        .iter()
        .map(|container| container::stop::stop(&node, container, 0));
    if let Err(error) = first_error(join_all(stops).await) {
        kill_pause(&sandbox).await;
        return Err(error);
    }
    let records = containers.iter().map(|container| container.save(&node));
    first_error(join_all(records).await)?;
    release(&node, &sandbox, &containers, RetryBy::Caller).await?;
    // The containers are not in the runtime any more. A restarted server must not delete them again.
    for container in &containers {
        container.save_soon(&node);
    }
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

/// Stops the pod, removes its containers, and then removes its other resources.
pub(crate) async fn remove(node: Arc<Node>, sandbox: Arc<Sandbox>) -> Result<()> {
    stop(Arc::clone(&node), Arc::clone(&sandbox)).await?;
    wait_for_creations(&sandbox).await?;
    let containers = node.containers_of(&sandbox.id);
    let removals = containers
        .iter()
        .map(|container| container::remove::remove(&node, container));
    first_error(join_all(removals).await)?;
    roll_back(&node, &sandbox).await?;
    sandbox.delete_record(&node).await?;
    node.forget_sandbox(&sandbox.id);
    container::status::publish_sandbox(&node, &sandbox, ContainerEventType::ContainerDeletedEvent);
    log::info!("{}: removed", sandbox.name());
    Ok(())
}

/// Waits for CreateContainer calls that began before the pod was stopped. When such a call detects
/// that the pod is stopped, the call removes its container.
async fn wait_for_creations(sandbox: &Sandbox) -> Result<()> {
    let name = sandbox.name();
    let mut creating = sandbox.creating.subscribe();
    let ended = creating.wait_for(|count| *count == 0);
    let ended = slow(
        format!("{name}: wait until the CreateContainer calls for this pod have ended"),
        tokio::time::timeout(CREATIONS_TIMEOUT, ended),
    );
    match ended.await {
        Ok(_) => Ok(()),
        Err(_) => Err(Error::wrong_state(format!(
            "remove {name}: a container of this pod is still being created, probably because a volume hangs"
        ))),
    }
}

fn first_error(results: Vec<Result<()>>) -> Result<()> {
    results.into_iter().find(Result::is_err).unwrap_or(Ok(()))
}

/// Releases resources that a stopped pod does not need: the runtime's state of the pod's
/// containers, the pod's monitor, the mounts of the pod and its containers, and the pod's network.
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
    if let Err(error) = first_error(join_all(deletions).await) {
        kill_pause(sandbox).await;
        return Err(error);
    }
    sandbox.state().retired = true;
    slow(
        format!("{name}: stop the pod's monitor"),
        end_monitor(node, sandbox),
    )
    .await?;
    pause::remove(sandbox).await?;
    unmount(node, sandbox, containers).await?;
    if namespaces::sharing(&sandbox.config).is_ok_and(|sharing| !sharing.own_network) {
        if sandbox.config.port_mappings.is_empty() {
            return Ok(());
        }
        // Release the pod's host ports for use by other pods.
        let path = node.netns(&sandbox.id);
        let freed = node.network.detach(&sandbox.id, &path, retry_by);
        return freed.await.map(drop);
    }
    let path = node.netns(&sandbox.id);
    let detached = node.network.detach(&sandbox.id, &path, retry_by);
    let detached = slow(format!("{name}: disconnect the pod's network"), detached).await?;
    if detached == DetachOutcome::Pending {
        return Ok(());
    }
    blocking(
        format!("{name}: remove the pod's network namespace"),
        move || netns::remove(&path),
    )
    .await
    .map_err(Error::from)
}

/// Unmounts the file systems of the stopped pod and of its containers. Kubelet keeps stopped pods
/// for a long time, and their files in /dev/shm would use the node's memory meanwhile. The writable
/// layers and the logs of the containers remain.
pub(crate) async fn unmount(
    node: &Node,
    sandbox: &Sandbox,
    containers: &[Arc<Container>],
) -> Result<()> {
    let dir = node.sandbox_dir(&sandbox.id);
    let bundles: Vec<_> = containers
        .iter()
        .map(|container| node.bundle(&sandbox.id, &container.id))
        .collect();
    let what = format!("{}: unmount the pod's file systems", sandbox.name());
    blocking(what, move || {
        files::unmount_pod(&dir)?;
        bundles
            .iter()
            .try_for_each(|bundle| container::unmount::bundle(bundle))
    })
    .await
}

/// Kills the pause process of a pod with a container that could not be stopped or deleted. The
/// kernel then kills all processes in the pod's shared PID namespace, so the caller's next attempt
/// can succeed.
async fn kill_pause(sandbox: &Sandbox) {
    if let Err(error) = pause::remove(sandbox).await {
        log::error!("{}: {}", sandbox.name(), error.sentence());
    }
}

/// Stops the pod's monitor. Containers that the monitor still manages are deleted first.
async fn end_monitor(node: &Node, sandbox: &Sandbox) -> Result<()> {
    let monitor = &sandbox.monitor;
    let mut ended = unless_it_hangs(monitor, monitor.shutdown()).await;
    if let Err(MonitorError::Failed(failure)) = &ended
        && failure.kind == FailureKind::WrongState
        && let Ok((hello, _)) = monitor.subscribe().await
    {
        // Delete the containers that the monitor still manages. The server has no records of these
        // containers. It was killed while it created or removed them.
        for container in hello.containers {
            if let Err(error) = monitor.delete(&container.id).await {
                log::warn!("{}: {error}", sandbox.name());
            }
        }
        ended = unless_it_hangs(monitor, monitor.shutdown()).await;
    }
    match ended {
        Ok(()) | Err(MonitorError::Gone { .. }) => {}
        Err(error) => {
            let name = sandbox.name();
            log::error!("{name}: {error}; the server kills the monitor");
            let (known, dir) = (sandbox.state().monitor, node.sandbox_dir(&sandbox.id));
            if !blocking("kill a monitor", move || kill_monitor(known, &dir)).await {
                log::error!("{name}: the server found no process of the monitor");
            }
        }
    }
    sandbox.state().monitor = 0;
    Ok(())
}

/// Waits for the answer to a request that waits for calls of the runtime, which can take minutes. A
/// monitor that hangs does not answer other requests either. In this case, returns the error of the
/// other request without waiting for the answer.
pub(crate) async fn unless_it_hangs(
    monitor: &MonitorClient,
    answer: impl Future<Output = Result<(), MonitorError>>,
) -> Result<(), MonitorError> {
    let mut answer = std::pin::pin!(answer);
    tokio::select! {
        answer = answer.as_mut() => return answer,
        () = tokio::time::sleep(HANG_CHECK_DELAY) => {}
    }
    let hangs = async {
        loop {
            if let Err(error @ MonitorError::Deadline { .. }) = monitor.subscribe().await {
                return error;
            }
            tokio::time::sleep(HANG_CHECK_DELAY).await;
        }
    };
    tokio::select! {
        answer = answer => answer,
        error = hangs => Err(error),
    }
}

/// Kills the unresponsive monitor of the pod with this directory. `known` is the monitor's process
/// id, or 0 if the monitor has not reported its process id to this server. Returns whether a monitor
/// was killed. This call blocks.
fn kill_monitor(known: i32, dir: &Path) -> bool {
    let candidates = match known {
        0 => own_cgroup::processes(),
        known => vec![known],
    };
    let mut killed = false;
    for pid in candidates {
        let Some(process) = rustix::process::Pid::from_raw(pid) else {
            continue;
        };
        let flags = rustix::process::PidfdFlags::empty();
        let Ok(pidfd) = rustix::process::pidfd_open(process, flags) else {
            continue;
        };
        // The pidfd always refers to the same process. The signal therefore can't reach a later
        // process with the same process id.
        let arguments = std::fs::read(format!("/proc/{pid}/cmdline")).unwrap_or_default();
        if is_monitor_of(&arguments, dir) {
            let kill = rustix::process::Signal::KILL;
            killed |= rustix::process::pidfd_send_signal(&pidfd, kill).is_ok();
        }
    }
    killed
}

/// Returns whether a command line in the format of proc_pid_cmdline(5) contains `--dir` and the
/// pod's directory, as the command line of the pod's monitor does.
fn is_monitor_of(arguments: &[u8], dir: &Path) -> bool {
    let arguments: Vec<&[u8]> = arguments.split(|byte| *byte == 0).collect();
    let expected = [b"--dir".as_slice(), dir.as_os_str().as_encoded_bytes()];
    arguments.windows(2).any(|pair| pair == expected)
}

/// Removes everything that was created for the pod, except its containers.
pub(crate) async fn roll_back(node: &Node, sandbox: &Sandbox) -> Result<()> {
    release(node, sandbox, &[], RetryBy::Server).await?;
    let name = sandbox.name();
    let parent = node.config.default_cgroup_parent();
    if sandbox.cgroup == cgroup::own(parent, &sandbox.id) {
        let dir = cgroup::directory(&sandbox.cgroup);
        if dir.try_exists().unwrap_or(true) {
            cgroup::destroy(&dir).await?;
            if cgroup::slice::is_slice(&sandbox.cgroup) {
                let stopped = cgroup::slice::stop(&sandbox.cgroup);
                slow(format!("{name}: stop the pod's slice"), stopped).await?;
            }
        }
        if !cgroup::slice::is_slice(parent) {
            // The removal of the last pod also removes the parent cgroup. The kernel refuses to
            // remove the parent cgroup while it contains the cgroups of other pods.
            let parent = [cgroup::directory(parent)];
            let what = format!("{name}: remove the parent cgroup");
            blocking(what, move || cgroup::remove_dirs(&parent)).await;
        }
    }
    let made = sandbox.cgroups_made.clone();
    let dir = node.sandbox_dir(&sandbox.id);
    blocking(format!("{name}: remove the pod's files"), move || {
        cgroup::remove_dirs(&made);
        files::remove_tree(&dir)
    })
    .await
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_monitor_is_identified_by_the_directory_in_its_command_line() {
        let dir = Path::new("/run/rrun/pods/ab");
        for (arguments, expected) in [
            ("rrun-monitor\0--dir\0/run/rrun/pods/ab\0", true),
            (
                "sh\0monitor\0--dir\0/run/rrun/pods/ab\0--runtime-timeout\09\0",
                true,
            ),
            ("rrun-monitor\0--dir\0/run/rrun/pods/abc\0", false),
            ("cat\0/run/rrun/pods/ab\0", false),
            ("", false),
        ] {
            assert_eq!(is_monitor_of(arguments.as_bytes(), dir), expected);
        }
    }
}
