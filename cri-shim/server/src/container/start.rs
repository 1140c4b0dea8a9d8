//! StartContainer and UpdateContainerResources.

use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::Duration;

use rrun_proto::v1::{ContainerEventType, LinuxContainerResources};

use super::{Container, resources, status};
use crate::clock::now;
use crate::node::Node;
use crate::sandbox::watch;
use rrun_calls::error::{During, Error, Result};
use rrun_calls::wait::slow;
use rrun_monitor_client::MonitorError;
use rrun_protocol::{FailureKind, Phase};

/// The exit code of what could not be started, as containerd's users know it.
const START_FAILED_EXIT_CODE: i32 = 128;

/// How often the monitor is asked whether a start that another call requested has ended.
const START_POLL_INTERVAL: Duration = Duration::from_millis(20);

/// Starts the container's process. One that runs already is as it should be.
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
    let starting = ask(&node, &container);
    let started = slow(format!("{name}: the runtime's start"), starting).await;
    match started {
        Ok(()) => has_started(&node, &container),
        Err(error) => {
            has_not_started(&node, &container, &error.to_string()).await?;
            Err(Error::from(error)).during(|| format!("start {name}"))
        }
    }
}

/// Records the failed start as the container's end.
async fn has_not_started(node: &Arc<Node>, container: &Arc<Container>, reason: &str) -> Result<()> {
    // The created process must not be left waiting for its start.
    let monitor = &container.sandbox.monitor;
    if let Err(error) = monitor.kill(&container.id, libc::SIGKILL, true).await {
        log::warn!(
            "{}: kill it after a failed start: {error}",
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
    status::publish(node, container, ContainerEventType::ContainerStoppedEvent);
    Ok(())
}

fn has_started(node: &Arc<Node>, container: &Arc<Container>) -> Result<()> {
    container.change(|state| {
        if state.started_at == 0 {
            // Its end may have been reported first.
            let ended = Some(state.finished_at).filter(|ended| *ended != 0);
            state.started_at = ended.map_or(now(), |ended| ended.min(now()));
        }
        // It can have ended by now.
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
    container.write_down(node)?;
    container.save_soon(node);
    Ok(())
}

/// Calls the monitor. A server that was killed may have called it before: then what came of that is
/// the answer.
async fn ask(node: &Arc<Node>, container: &Arc<Container>) -> Result<(), MonitorError> {
    let monitor = &container.sandbox.monitor;
    loop {
        match monitor.start(&container.id).await {
            Err(MonitorError::Failed(failure)) if failure.kind == FailureKind::WrongState => {
                let (hello, _) = monitor.subscribe().await?;
                let reported = hello.containers.iter().find(|one| one.id == container.id);
                match reported.map(|one| &one.phase) {
                    // The other start is under way.
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

/// Changes the limits of a container that lives.
pub(crate) async fn update(
    node: Arc<Node>,
    container: Arc<Container>,
    requested: LinuxContainerResources,
) -> Result<()> {
    let name = container.name();
    if container.phase() == super::Phase::Exited {
        return Err(Error::wrong_state(format!("{name} has exited already")));
    }
    let dir = container.cgroup_dir();
    let controllers = resources::Controllers::of(&dir);
    let all = resources::updated(&container.state().resources, &requested);
    let mut changed = requested;
    // Memory and swap are one number to the specification: one can't change without the other.
    if changed.memory_limit_in_bytes == 0 && changed.memory_swap_limit_in_bytes != 0 {
        changed.memory_limit_in_bytes = all.memory_limit_in_bytes;
    }
    resources::check_use(&dir, &changed).during(|| format!("update {name}"))?;
    let json = resources::update_json(&changed, controllers)?;
    slow(
        format!("{name}: the runtime's update"),
        container.sandbox.monitor.update(&container.id, json),
    )
    .await
    .map_err(Error::from)
    .during(|| format!("update {name}"))?;
    container.change(|state| state.resources = all);
    container.save(&node).await
}
