//! StartContainer and UpdateContainerResources.

use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::Duration;

use rrun_proto::v1::{ContainerEventType, LinuxContainerResources};

use super::{Container, resources, status, unmount};
use crate::clock::now;
use crate::node::Node;
use crate::sandbox::watch;
use rrun_calls::error::{During, Error, Result};
use rrun_calls::wait::{blocking, slow};
use rrun_monitor_client::MonitorError;
use rrun_protocol::{FailureKind, Phase};

/// The exit code of a container that could not be started; containerd reports the same code.
const START_FAILED_EXIT_CODE: i32 = 128;

/// The interval at which the server checks whether the start requested by an earlier server process
/// has completed.
const START_POLL_INTERVAL: Duration = Duration::from_millis(20);

/// Starts the container's process. If the container is already running, the call succeeds.
pub(crate) async fn start(node: Arc<Node>, container: Arc<Container>) -> Result<()> {
    let name = container.name();
    match container.phase() {
        super::Phase::Created => {}
        super::Phase::Running => return Ok(()),
        super::Phase::Exited => {
            return Err(Error::wrong_state(format!("{name} has exited already")));
        }
    }
    if !container.sandbox.state().ready {
        let pod = container.sandbox.name();
        return Err(Error::wrong_state(format!("{pod} is not ready")));
    }
    container.starting.store(true, Ordering::Relaxed);
    let starting = request_start(&node, &container);
    let started = slow(format!("{name}: wait for the runtime's `start`"), starting).await;
    match started {
        Ok(()) => {
            record_start(&node, &container);
            Ok(())
        }
        Err(error) => {
            record_failed_start(&node, &container, &error.to_string()).await?;
            Err(Error::from(error)).during(|| format!("start {name}"))
        }
    }
}

/// Records the failed start as the container's exit.
async fn record_failed_start(
    node: &Arc<Node>,
    container: &Arc<Container>,
    reason: &str,
) -> Result<()> {
    // Kill the process that the runtime created. That process would otherwise wait forever for the
    // start.
    let monitor = &container.sandbox.monitor;
    if let Err(error) = monitor.kill(&container.id, libc::SIGKILL, true).await {
        log::warn!(
            "{}: kill the container's process after a failed start: {error}",
            container.name()
        );
    }
    container.change(|state| {
        container.starting.store(false, Ordering::Relaxed);
        state.phase = super::Phase::Exited;
        state.pid = 0;
        state.started_at = 0;
        state.finished_at = now();
        state.exit_code = START_FAILED_EXIT_CODE;
        "StartError".clone_into(&mut state.reason);
        reason.clone_into(&mut state.message);
    });
    container.save(node).await?;
    let bundle = node.bundle(&container.sandbox.id, &container.id);
    unmount::soon(&container.name(), bundle);
    status::publish(node, container, ContainerEventType::ContainerStoppedEvent);
    Ok(())
}

fn record_start(node: &Arc<Node>, container: &Arc<Container>) {
    container.change(|state| {
        if state.started_at == 0 {
            // If the container's exit is already recorded, the recorded start must not be later
            // than the exit.
            let ended = Some(state.finished_at).filter(|ended| *ended != 0);
            state.started_at = ended.map_or(now(), |ended| ended.min(now()));
        }
        // The phase is already `Exited` if the monitor has reported the container's exit.
        if state.phase == super::Phase::Created {
            state.phase = super::Phase::Running;
        }
    });
    status::publish(node, container, ContainerEventType::ContainerStartedEvent);
    log::info!("{}: started", container.name());
    let mut ended = false;
    container.change(|state| {
        container.starting.store(false, Ordering::Relaxed);
        ended = state.phase == super::Phase::Exited;
    });
    if ended {
        status::publish(node, container, ContainerEventType::ContainerStoppedEvent);
    }
    // The container is running, so the call succeeds even if the file can't be written. The store
    // contains the start time, too.
    if let Err(error) = container.write_container_json(node) {
        log::error!("{}: {error}", container.name());
    }
    container.save_soon(node);
}

/// Requests the container's start from the pod's monitor. A server process may have requested the
/// start and then been killed. The monitor then refuses the next server's request. In that case,
/// this function waits for the completion of the earlier start. It then records the state in the
/// monitor's report.
async fn request_start(node: &Arc<Node>, container: &Arc<Container>) -> Result<(), MonitorError> {
    let monitor = &container.sandbox.monitor;
    loop {
        match monitor.start(&container.id).await {
            Err(MonitorError::Failed(failure)) if failure.kind == FailureKind::WrongState => {
                let (hello, _) = monitor.subscribe().await?;
                let reported = hello.containers.iter().find(|one| one.id == container.id);
                match reported.map(|one| &one.phase) {
                    // The start that the earlier server process requested is still in progress.
                    Some(Phase::Created) => tokio::time::sleep(START_POLL_INTERVAL).await,
                    Some(_) => {
                        watch::apply(node, &container.sandbox, hello);
                        return Ok(());
                    }
                    None => return Err(MonitorError::Failed(failure)),
                }
            }
            answer => return answer,
        }
    }
}

/// Changes the limits of a container that is created or running.
pub(crate) async fn update(
    node: Arc<Node>,
    container: Arc<Container>,
    requested: LinuxContainerResources,
) -> Result<()> {
    let name = container.name();
    if container.phase() == super::Phase::Exited {
        return Err(Error::wrong_state(format!("{name} has exited already")));
    }
    let all = resources::updated(&container.state().resources, &requested);
    let mut changed = requested;
    // In the runtime specification, the swap limit applies to memory and swap together. A new swap
    // limit is therefore sent together with the memory limit.
    if changed.memory_limit_in_bytes == 0 && changed.memory_swap_limit_in_bytes != 0 {
        changed.memory_limit_in_bytes = all.memory_limit_in_bytes;
    }
    let dir = container.cgroup_dir();
    let checked = blocking(format!("{name}: read its cgroup"), move || {
        resources::check_use(&dir, &changed)?;
        resources::update_json(&changed, resources::Controllers::of(&dir)?)
    });
    let json = checked.await.during(|| format!("update {name}"))?;
    slow(
        format!("{name}: wait for the runtime's `update`"),
        container.sandbox.monitor.update(&container.id, json),
    )
    .await
    .map_err(Error::from)
    .during(|| format!("update {name}"))?;
    container.change(|state| state.resources = all);
    container.save(&node).await
}
