//! RemoveContainer, and the cleanup of containers whose monitor has died. Callers can repeat both
//! operations: a step that an earlier call has already completed succeeds again.

use std::process::Stdio;
use std::sync::Arc;
use std::time::Duration;

use futures_util::future::try_join_all;
use rrun_proto::v1::ContainerEventType;
use tokio::process::Command;

use super::{Container, Phase, image_volume, status, stop, unmount};
use crate::cgroup;
use crate::clock::now;
use crate::node::Node;
use crate::sandbox::files::{read_record, remove_tree};
use crate::sandbox::stop::unless_it_hangs;
use rrun_calls::error::{During, Error, Result};
use rrun_calls::wait::{blocking, slow};
use rrun_monitor_client::MonitorError;
use rrun_protocol::ExitRecord;

/// The time limit for the runtime's `delete` if the server itself runs the command. The server runs
/// it only if the container's monitor has died or does not answer.
const DELETE_TIMEOUT: Duration = Duration::from_secs(120);

/// Kills the container if it is running, and removes its files, its record and its resources. The
/// log is not removed, because kubelet owns it.
pub(crate) async fn remove(node: &Arc<Node>, container: &Arc<Container>) -> Result<()> {
    stop::stop(node, container, 0).await?;
    remove_files(node, container).await?;
    // `release` and `delete_record` run in parallel. The store can then commit the changes of both
    // in one transaction.
    let (released, deleted) = tokio::join!(release(node, container), container.delete_record(node));
    released.and(deleted)?;
    node.forget_container(&container.id);
    node.stats.forget(&container.id);
    status::publish(node, container, ContainerEventType::ContainerDeletedEvent);
    log::info!("{}: removed", container.name());
    Ok(())
}

/// Removes everything that was created for the container except its record.
pub(crate) async fn unmake(node: &Arc<Node>, container: &Arc<Container>) -> Result<()> {
    remove_files(node, container).await?;
    release(node, container).await
}

async fn release(node: &Node, container: &Container) -> Result<()> {
    let name = container.name();
    let images = image_volume::owners(&container.id, &container.config.mounts);
    let owners = std::iter::once(container.id.clone()).chain(images);
    // The leases are released in parallel, because the store then writes all changes to the disk at
    // once.
    let released = owners.map(async |owner| node.images.release(&owner).await);
    let released = try_join_all(released);
    slow(format!("{name}: release the leases on images"), released).await?;
    Ok(())
}

async fn remove_files(node: &Node, container: &Container) -> Result<()> {
    delete_from_runtime(node, container).await?;
    let name = container.name();
    let bundle = node.bundle(&container.sandbox.id, &container.id);
    let writable = node.writable_layer(&container.id);
    blocking(format!("{name}: remove the container's files"), move || {
        unmount::bundle(&bundle)?;
        remove_tree(&bundle)
    })
    .await?;
    let pod = &container.sandbox.id;
    node.removals.begin_counted(pod, vec![writable]);
    Ok(())
}

/// Deletes the container from the monitor and the runtime, and kills its remaining processes.
pub(crate) async fn delete_from_runtime(node: &Node, container: &Container) -> Result<()> {
    if !container.state().in_runtime {
        return Ok(());
    }
    let name = container.name();
    let monitor = &container.sandbox.monitor;
    let deleted = slow(
        format!("{name}: wait for the runtime's `delete`"),
        unless_it_hangs(monitor, monitor.delete(&container.id)),
    );
    match deleted.await {
        Ok(()) => {}
        Err(error @ (MonitorError::Gone { .. } | MonitorError::Deadline { .. })) => {
            if let MonitorError::Deadline { .. } = error {
                log::error!(
                    "{name}: {error}; the server deletes the container without the monitor"
                );
            }
            delete_without_monitor(node, container).await?;
        }
        // Every failure that the monitor reports becomes an Internal error. Kubelet would treat
        // NotFound as success.
        Err(error) => return Err(Error::internal(format!("delete {name}: {error}"))),
    }
    container.change(|state| state.in_runtime = false);
    Ok(())
}

/// Deletes the container without its monitor: kills the container's cgroup and runs the runtime's
/// `delete`.
async fn delete_without_monitor(node: &Node, container: &Container) -> Result<()> {
    let name = container.name();
    cgroup::destroy(&container.cgroup_dir()).await?;
    let Some(runtime) = container.runtime_command(node) else {
        return Ok(());
    };
    let Some((program, options)) = runtime.split_first() else {
        return Ok(());
    };
    let mut command = Command::new(program);
    command
        .args(options)
        .args(["delete", "--force", &container.id])
        .stdin(Stdio::null())
        .stdout(Stdio::null())
        .stderr(Stdio::piped())
        .kill_on_drop(true);
    let what = || format!("run {program} delete for {name}");
    let child = command.spawn().during(what)?;
    let output = slow(
        what(),
        tokio::time::timeout(DELETE_TIMEOUT, child.wait_with_output()),
    )
    .await;
    match output {
        Ok(output) => {
            let output = output.during(what)?;
            if !output.status.success() {
                // With --force, `delete` also succeeds if the container does not exist. So this
                // failure has another cause, and the server logs it.
                let stderr = String::from_utf8_lossy(&output.stderr);
                log::warn!("{}: {}: {}", what(), output.status, stderr.trim());
            }
            Ok(())
        }
        Err(_) => Err(Error::internal(format!(
            "{}: the command did not exit within {} s",
            what(),
            DELETE_TIMEOUT.as_secs()
        ))),
    }
}

/// Kills the remaining processes of a container whose monitor died or does not answer, and records
/// the container's exit. The exit status is known only if the monitor wrote it to the disk before.
pub(crate) async fn end_without_monitor(
    node: &Arc<Node>,
    container: &Arc<Container>,
) -> Result<()> {
    let bundle = node.bundle(&container.sandbox.id, &container.id);
    let exit = read_record::<ExitRecord>(&bundle.join("exit.json"))?;
    delete_without_monitor(node, container).await?;
    container.change(|state| state.in_runtime = false);
    if container.phase() == Phase::Exited {
        return Ok(());
    }
    match exit {
        Some(exit) => container.record_exit(node, &exit),
        None => container.record_end(
            node,
            137,
            now(),
            "Unknown",
            "the container was killed because its monitor died or did not answer",
        ),
    }
    Ok(())
}
