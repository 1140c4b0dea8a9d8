//! RemoveContainer, and the end of containers whose monitor is gone. Each step is right also when
//! it has been done before.

use std::process::Stdio;
use std::sync::Arc;
use std::time::Duration;

use rrun_proto::v1::ContainerEventType;
use tokio::process::Command;

use super::{Container, Phase, image_volume, status, stop};
use crate::cgroup;
use crate::clock::now;
use crate::node::Node;
use crate::sandbox::files::{remove_tree, unmount};
use rrun_calls::error::{During, Error, Result};
use rrun_calls::wait::{blocking, slow};
use rrun_monitor_client::MonitorError;
use rrun_protocol::ExitRecord;

/// How long a runtime's `delete` may take when no monitor waits for it.
const DELETE_TIMEOUT: Duration = Duration::from_secs(120);

/// Kills the container if it lives, and removes all that there is of it. Its log stays: that is
/// kubelet's.
pub(crate) async fn remove(node: &Arc<Node>, container: &Arc<Container>) -> Result<()> {
    stop::stop(node, container, 0).await?;
    remove_files(node, container).await?;
    // One transaction, most likely.
    let (released, deleted) = tokio::join!(release(node, container), container.delete_record(node));
    released.and(deleted)?;
    node.forget_container(&container.id);
    node.stats.forget(&container.id);
    status::publish(node, container, ContainerEventType::ContainerDeletedEvent);
    log::info!("{}: removed", container.name());
    Ok(())
}

/// Removes everything that was ever made for the container but its record.
pub(crate) async fn unmake(node: &Arc<Node>, container: &Arc<Container>) -> Result<()> {
    remove_files(node, container).await?;
    release(node, container).await
}

async fn release(node: &Node, container: &Container) -> Result<()> {
    let name = container.name();
    let images = image_volume::owners(&container.id, &container.config.mounts);
    for owner in std::iter::once(container.id.clone()).chain(images) {
        let released = node.images.release(&owner);
        slow(format!("{name}: let go of its image"), released).await?;
    }
    Ok(())
}

async fn remove_files(node: &Node, container: &Container) -> Result<()> {
    delete_from_runtime(node, container).await?;
    let name = container.name();
    let bundle = node.bundle(&container.sandbox.id, &container.id);
    let writable = node.writable_layer(&container.id);
    let (trash, id) = (Arc::clone(&node.trash), container.id.clone());
    blocking(format!("{name}: remove its files"), move || {
        unmount(&bundle.join("rootfs"))?;
        image_volume::unmount(&bundle)?;
        remove_tree(&bundle)?;
        trash.put(&writable, &id)
    })
    .await
}

/// Lets the monitor and the runtime forget the container, killing what is left of it.
pub(crate) async fn delete_from_runtime(node: &Node, container: &Container) -> Result<()> {
    if !container.state().in_runtime {
        return Ok(());
    }
    let name = container.name();
    let monitor = &container.sandbox.monitor;
    let deleted = slow(
        format!("{name}: the runtime's delete"),
        monitor.delete(&container.id),
    );
    match deleted.await {
        Ok(()) => {}
        Err(MonitorError::Gone { .. }) => delete_without_monitor(node, container).await?,
        // Internal whatever the monitor says: kubelet would take NotFound for a success.
        Err(error) => return Err(Error::internal(format!("delete {name}: {error}"))),
    }
    container.change(|state| state.in_runtime = false);
    Ok(())
}

/// What the monitor would have done.
async fn delete_without_monitor(node: &Node, container: &Container) -> Result<()> {
    let dir = container.cgroup_dir();
    let name = container.name();
    slow(format!("{name}: kill its cgroup"), cgroup::destroy(&dir)).await?;
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
                // With --force a container that is not there is no error: this is another one.
                let said = String::from_utf8_lossy(&output.stderr);
                log::warn!("{}: {}: {}", what(), output.status, said.trim());
            }
            Ok(())
        }
        Err(_) => Err(Error::internal(format!(
            "{}: it did not end within {} s",
            what(),
            DELETE_TIMEOUT.as_secs()
        ))),
    }
}

/// Ends a container whose monitor died: kills what is left of it and records how it had ended,
/// if the monitor had come to write that down.
pub(crate) async fn end_without_monitor(
    node: &Arc<Node>,
    container: &Arc<Container>,
) -> Result<()> {
    let bundle = node.bundle(&container.sandbox.id, &container.id);
    // Ours: the monitor writes this file.
    let exit = std::fs::read(bundle.join("exit.json"))
        .ok()
        .and_then(|json| serde_json::from_slice::<ExitRecord>(&json).ok());
    delete_without_monitor(node, container).await?;
    container.change(|state| state.in_runtime = false);
    if container.phase() == Phase::Exited {
        return Ok(());
    }
    match exit {
        Some(exit) => container.has_exited(node, &exit),
        None => container.ended(
            node,
            137,
            now(),
            "Unknown",
            "its monitor died, and it was killed",
        ),
    }
    Ok(())
}
