//! These tests check that the server never gets stuck. The tests kill the server at random moments,
//! cancel calls and repeat them, kill monitors, and simulate a reboot.

use std::fs;
use std::path::Path;
use std::sync::{Arc, Mutex};
use std::time::Duration;

use nix::sys::signal::{Signal, kill};
use rrun_proto::v1::{
    Container, ContainerConfig, ContainerFilter, ContainerState, CreateContainerRequest, ImageSpec,
    LinuxPodSandboxConfig, LinuxSandboxSecurityContext, ListContainersRequest,
    ListPodSandboxRequest, Mount, NamespaceMode, NamespaceOption, PodSandboxConfig,
    PodSandboxState, PullImageRequest, RemoveContainerRequest, RemoveImageRequest,
    RemovePodSandboxRequest, RunPodSandboxRequest, StartContainerRequest, StopContainerRequest,
    StopPodSandboxRequest,
};
use tonic::Status;

use crate::support::calls::{Calls, RuntimeClient, container, pod};
use crate::support::counted_lines::{line_numbers, without_gap};
use crate::support::machine::{Dice, Result, rounds, wait_for};
use crate::support::needs::{Need, Test};
use crate::support::node::{A_NODE, BUSYBOX, Node, on_a_node};
use crate::support::reboot::reboot;
use crate::{ensure, ensure_eq, test};

pub(crate) const TESTS: &[Test] = &[
    test!(
        a_server_that_is_killed_at_random_under_load_loses_and_leaks_nothing,
        A_NODE,
        Need::RrunCri
    ),
    test!(
        callers_get_the_same_answer_if_they_cancel_at_random_and_retry,
        A_NODE,
        Need::RrunCri
    ),
    test!(
        containers_are_stopped_and_reported_as_exited_if_their_monitor_is_killed,
        A_NODE,
        Need::RrunCri
    ),
    test!(
        pods_are_not_ready_after_a_reboot_and_can_be_removed,
        A_NODE,
        Need::RrunCri
    ),
];

type Answer<T> = std::result::Result<T, Status>;

/// The number of lines in the log of each pod's writer container.
const LINES: u64 = 300;

/// The progress of a CRI call, as the client of the call sees it.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord)]
enum Step {
    #[default]
    NotSent,
    Sent,
    Answered,
}

/// The life cycle of one pod: the pod's settings, and the progress of each CRI call from the
/// client's view.
#[derive(Clone, Debug, Default)]
struct LifeCycle {
    name: String,
    own_network: bool,
    code: i32,
    pod: String,
    run: Step,
    /// The id of the container that writes lines and exits with `code`.
    writer: String,
    create: Step,
    start: Step,
    /// The id of the sleeper container. This container sleeps until it is stopped.
    sleeper: String,
    sleeper_started: Step,
    sleeper_stopped: Step,
    sleeper_removed: Step,
    stop: Step,
    remove: Step,
}

/// The life cycle of a pod. The test can still read the life cycle after the client's task was
/// cancelled.
#[derive(Clone)]
struct SharedLifeCycle(Arc<Mutex<LifeCycle>>);

impl SharedLifeCycle {
    fn change(&self, change: impl FnOnce(&mut LifeCycle)) {
        change(&mut self.lock());
    }

    fn lock(&self) -> std::sync::MutexGuard<'_, LifeCycle> {
        self.0
            .lock()
            .unwrap_or_else(|poisoned| poisoned.into_inner())
    }

    fn copy(&self) -> LifeCycle {
        self.lock().clone()
    }
}

fn pod_config(life: &LifeCycle, logs: &Path) -> PodSandboxConfig {
    let network = if life.own_network {
        NamespaceMode::Pod
    } else {
        NamespaceMode::Node
    };
    PodSandboxConfig {
        log_directory: logs.join(&life.name).display().to_string(),
        linux: Some(LinuxPodSandboxConfig {
            security_context: Some(LinuxSandboxSecurityContext {
                namespace_options: Some(NamespaceOption {
                    network: network.into(),
                    pid: NamespaceMode::Container.into(),
                    ..NamespaceOption::default()
                }),
                ..LinuxSandboxSecurityContext::default()
            }),
            ..LinuxPodSandboxConfig::default()
        }),
        ..pod(&life.name)
    }
}

fn writer_config(code: i32) -> ContainerConfig {
    let inside = std::env::temp_dir().join("rrun-e2e-inside");
    let (lines, code) = (LINES.to_string(), code.to_string());
    ContainerConfig {
        log_path: "writer.log".to_owned(),
        mounts: vec![Mount {
            container_path: "/inside".to_owned(),
            host_path: inside.display().to_string(),
            readonly: true,
            ..Mount::default()
        }],
        ..container("writer", &["/inside", "tell", &lines, &code])
    }
}

/// Makes all CRI calls in the life cycle of a pod, and records the progress of each CRI call.
async fn live(
    mut client: RuntimeClient,
    shared: SharedLifeCycle,
    logs: std::path::PathBuf,
) -> Answer<()> {
    let config = pod_config(&shared.copy(), &logs);
    let code = shared.lock().code;
    let sandbox_config = || Some(config.clone());
    shared.change(|life| life.run = Step::Sent);
    let request = RunPodSandboxRequest {
        config: sandbox_config(),
        ..RunPodSandboxRequest::default()
    };
    let pod_id = client
        .run_pod_sandbox(request)
        .await?
        .into_inner()
        .pod_sandbox_id;
    shared.change(|life| (life.run, life.pod) = (Step::Answered, pod_id.clone()));

    shared.change(|life| life.create = Step::Sent);
    let request = CreateContainerRequest {
        pod_sandbox_id: pod_id.clone(),
        config: Some(writer_config(code)),
        sandbox_config: sandbox_config(),
    };
    let id = client.create_container(request).await?.into_inner();
    let container_id = id.container_id;
    shared.change(|life| (life.create, life.writer) = (Step::Answered, container_id.clone()));
    shared.change(|life| life.start = Step::Sent);
    client
        .start_container(StartContainerRequest { container_id })
        .await?;
    shared.change(|life| life.start = Step::Answered);

    let request = CreateContainerRequest {
        pod_sandbox_id: pod_id.clone(),
        config: Some(container("sleeper", &["sleep", "600"])),
        sandbox_config: sandbox_config(),
    };
    let id = client.create_container(request).await?.into_inner();
    let container_id = id.container_id;
    shared.change(|life| life.sleeper.clone_from(&container_id));
    shared.change(|life| life.sleeper_started = Step::Sent);
    let request = StartContainerRequest {
        container_id: container_id.clone(),
    };
    client.start_container(request).await?;
    shared.change(|life| life.sleeper_started = Step::Answered);
    shared.change(|life| life.sleeper_stopped = Step::Sent);
    let request = StopContainerRequest {
        container_id: container_id.clone(),
        timeout: 0,
    };
    client.stop_container(request).await?;
    shared.change(|life| life.sleeper_stopped = Step::Answered);
    shared.change(|life| life.sleeper_removed = Step::Sent);
    client
        .remove_container(RemoveContainerRequest { container_id })
        .await?;
    shared.change(|life| life.sleeper_removed = Step::Answered);

    if code % 2 == 0 {
        return Ok(());
    }
    shared.change(|life| life.stop = Step::Sent);
    let request = StopPodSandboxRequest {
        pod_sandbox_id: pod_id.clone(),
    };
    client.stop_pod_sandbox(request).await?;
    shared.change(|life| life.stop = Step::Answered);
    shared.change(|life| life.remove = Step::Sent);
    let request = RemovePodSandboxRequest {
        pod_sandbox_id: pod_id,
    };
    client.remove_pod_sandbox(request).await?;
    shared.change(|life| life.remove = Step::Answered);
    Ok(())
}

async fn containers(client: &mut RuntimeClient, pod: &str) -> Answer<Vec<Container>> {
    let filter = ContainerFilter {
        pod_sandbox_id: pod.to_owned(),
        ..ContainerFilter::default()
    };
    let request = ListContainersRequest {
        filter: Some(filter),
    };
    Ok(client
        .list_containers(request)
        .await?
        .into_inner()
        .containers)
}

/// Checks the server's pods and containers after the test killed the server during the CRI calls
/// for the pod `life`. Every CRI call that the server answered must have taken effect.
fn check(node: &Node, calls: &Calls, life: &LifeCycle) -> Result {
    let mut client = calls.runtime();
    let listed = calls.wait(async move {
        client
            .list_pod_sandbox(ListPodSandboxRequest::default())
            .await
    })??;
    let pods: Vec<_> = listed
        .into_inner()
        .items
        .into_iter()
        .filter(|pod| pod.metadata.as_ref().is_some_and(|m| m.name == life.name))
        .collect();
    ensure!(
        pods.len() <= 1,
        "{} pods have the same name; progress of the CRI calls for the pod with this name: {life:?}",
        pods.len()
    );
    let pod = pods.first();
    if life.remove == Step::Answered {
        ensure!(
            pod.is_none(),
            "the server still lists the pod, although RemovePodSandbox succeeded; progress of its CRI calls: {life:?}"
        );
    }
    let Some(pod) = pod else {
        ensure!(
            life.run < Step::Answered || life.remove >= Step::Sent,
            "the server lost a pod whose RunPodSandbox call had succeeded; progress of its CRI calls: {life:?}"
        );
        return Ok(());
    };
    if life.run == Step::Answered {
        ensure_eq!(
            pod.id,
            life.pod,
            "the pod's id (progress of the pod's CRI calls: {life:?})"
        );
    }
    if life.stop == Step::NotSent {
        let ready = PodSandboxState::SandboxReady;
        ensure_eq!(
            pod.state(),
            ready,
            "the pod's state (progress of the pod's CRI calls: {life:?})"
        );
    }
    if life.stop == Step::Answered {
        let not_ready = PodSandboxState::SandboxNotready;
        ensure_eq!(
            pod.state(),
            not_ready,
            "the stopped pod's state (progress of the pod's CRI calls: {life:?})"
        );
    }
    let mut client = calls.runtime();
    let pod_id = pod.id.clone();
    let existing = calls.wait(async move { containers(&mut client, &pod_id).await })??;
    let find = |name: &str| {
        let mut of = existing
            .iter()
            .filter(|one| one.metadata.as_ref().is_some_and(|m| m.name == name));
        (of.next(), of.count())
    };
    let (writer, more) = find("writer");
    ensure_eq!(
        more,
        0,
        "number of additional writer containers (progress of the pod's CRI calls: {life:?})"
    );
    if life.create == Step::Answered && life.remove == Step::NotSent {
        let writer = writer.ok_or(format!(
            "the server lost the writer container; progress of the pod's CRI calls: {life:?}"
        ))?;
        ensure_eq!(
            writer.id,
            life.writer,
            "the writer container's id (progress of the pod's CRI calls: {life:?})"
        );
        if life.start == Step::NotSent {
            let created = ContainerState::ContainerCreated;
            ensure_eq!(
                writer.state(),
                created,
                "the state of the writer container (progress of the pod's CRI calls: {life:?})"
            );
        }
        if life.start == Step::Answered {
            // The writer container exits by itself. If the pod was stopped first, the server killed
            // the container, and the exit code is 137.
            let status = node.exited(&writer.id)?;
            let killed = life.stop > Step::NotSent && status["exitCode"] == 137;
            if !killed {
                ensure_eq!(
                    status["exitCode"],
                    life.code,
                    "the exit code of the writer container (progress of the pod's CRI calls: {life:?})"
                );
                let numbers = line_numbers(&node.log_of(&life.name, "writer")?)?;
                without_gap(&numbers)?;
                ensure_eq!(
                    numbers.len() as u64,
                    LINES,
                    "number of lines in the log of the writer container (progress of the pod's CRI calls: {life:?})"
                );
            }
        }
    }
    let (sleeper, more) = find("sleeper");
    ensure_eq!(
        more,
        0,
        "number of additional sleeper containers (progress of the pod's CRI calls: {life:?})"
    );
    if life.sleeper_removed == Step::Answered {
        ensure!(
            sleeper.is_none(),
            "the server still lists the sleeper container, although RemoveContainer succeeded; progress of the pod's CRI calls: {life:?}"
        );
    } else if life.sleeper_removed == Step::NotSent && life.sleeper_started == Step::Answered {
        let sleeper = sleeper.ok_or(format!(
            "the server lost the sleeper container; progress of the pod's CRI calls: {life:?}"
        ))?;
        match life.sleeper_stopped {
            Step::NotSent => {
                let running = ContainerState::ContainerRunning;
                ensure_eq!(
                    sleeper.state(),
                    running,
                    "the state of the sleeper container (progress of the pod's CRI calls: {life:?})"
                );
            }
            Step::Sent => {}
            Step::Answered => {
                let code = node.status(&sleeper.id)?["exitCode"].clone();
                ensure_eq!(
                    code,
                    137,
                    "the exit code of the sleeper container (progress of the pod's CRI calls: {life:?})"
                );
            }
        }
    }
    Ok(())
}

/// Requests the pod again, and then removes all pods. The new request joins a RunPodSandbox call
/// that is still in progress, or returns the existing pod.
fn end(calls: &Calls, life: &LifeCycle, logs: &Path) -> Result {
    let mut client = calls.runtime();
    let config = pod_config(life, logs);
    let finish = async move {
        let request = RunPodSandboxRequest {
            config: Some(config),
            ..RunPodSandboxRequest::default()
        };
        client.run_pod_sandbox(request).await?;
        let listed = client
            .list_pod_sandbox(ListPodSandboxRequest::default())
            .await?;
        for pod in listed.into_inner().items {
            let request = RemovePodSandboxRequest {
                pod_sandbox_id: pod.id,
            };
            client.remove_pod_sandbox(request).await?;
        }
        Ok::<_, Status>(())
    };
    let ended = calls.wait(finish)?;
    Ok(ended.map_err(|status| {
        format!(
            "cannot request the pod {} again and remove all pods: {status}",
            life.name
        )
    })?)
}

/// Waits until the server's directories contain no files of pods or containers.
fn nothing_is_left(node: &Node) -> Result {
    wait_for(
        "the server's directories for pods and containers to be empty",
        || {
            for dir in ["state/pods", "state/netns", "root/containers"] {
                if let Ok(mut entries) = fs::read_dir(node.join(dir))
                    && let Some(entry) = entries.next()
                {
                    return Err(format!(
                        "the file {} of a removed pod or container still exists",
                        entry?.path().display()
                    )
                    .into());
                }
            }
            Ok(Some(()))
        },
    )
}

fn a_server_that_is_killed_at_random_under_load_loses_and_leaks_nothing() -> Result {
    on_a_node(|node| {
        node.pull(BUSYBOX)?;
        let logs = node.join("logs");
        let mut dice = Dice::new();
        for round in 0..rounds(20, 200) {
            let calls = Calls::new(node)?;
            let lives: Vec<SharedLifeCycle> = (0..3)
                .map(|number| {
                    SharedLifeCycle(Arc::new(Mutex::new(LifeCycle {
                        name: format!("k{round}-{number}"),
                        own_network: number == 0,
                        code: i32::try_from(dice.below(100)).unwrap_or_default(),
                        ..LifeCycle::default()
                    })))
                })
                .collect();
            let moment = Duration::from_micros(dice.below(150_000));
            let work = lives
                .iter()
                .map(|shared| live(calls.runtime(), shared.clone(), logs.clone()));
            let work: Vec<_> = work.collect();
            let _ = calls.together(work.into_iter().map(|work| async move {
                // The client cancels its calls after `moment`. Then the test kills the server.
                tokio::time::timeout(moment, work).await.is_ok()
            }))?;
            node.kill_server()?;
            drop(calls);
            node.start_server()?;
            let calls = Calls::new(node)?;
            for shared in &lives {
                let life = shared.copy();
                check(node, &calls, &life).map_err(|failed| {
                    let message = failed.message().unwrap_or_default();
                    format!(
                        "in round {round} (random seed {}), the test killed the server at most {moment:?} after the start of the CRI calls; the failure: {message}",
                        dice.seed
                    )
                })?;
            }
            for shared in &lives {
                end(&calls, &shared.copy(), &logs)?;
            }
            nothing_is_left(node)?;
        }
        Ok(())
    })
}

fn callers_get_the_same_answer_if_they_cancel_at_random_and_retry() -> Result {
    on_a_node(|node| {
        node.pull(BUSYBOX)?;
        let calls = Calls::new(node)?;
        let mut dice = Dice::new();
        for round in 0..rounds(20, 200) {
            let name = format!("c{round}");
            let life = LifeCycle {
                name: name.clone(),
                own_network: round % 2 == 0,
                ..LifeCycle::default()
            };
            let config = pod_config(&life, &node.join("logs"));
            let mut given_up = Duration::ZERO;
            let mut moment = |most: u64| {
                given_up = Duration::from_micros(dice.below(most));
                given_up
            };
            let run = |timeout: Option<Duration>| {
                let mut client = calls.runtime();
                let request = RunPodSandboxRequest {
                    config: Some(config.clone()),
                    ..RunPodSandboxRequest::default()
                };
                calls.wait(with_timeout(timeout, async move {
                    let answer = client.run_pod_sandbox(request).await?;
                    Ok(answer.into_inner().pod_sandbox_id)
                }))
            };
            run(Some(moment(20_000)))?;
            let pod_id = run(None)?.ok_or("RunPodSandbox returned no answer")??;

            let create = |timeout: Option<Duration>| {
                let mut client = calls.runtime();
                let request = CreateContainerRequest {
                    pod_sandbox_id: pod_id.clone(),
                    config: Some(container("one", &["sleep", "600"])),
                    sandbox_config: Some(config.clone()),
                };
                calls.wait(with_timeout(timeout, async move {
                    let answer = client.create_container(request).await?;
                    Ok(answer.into_inner().container_id)
                }))
            };
            create(Some(moment(8_000)))?;
            let id = create(None)?.ok_or("CreateContainer returned no answer")??;
            ensure_eq!(
                create(None)?.ok_or("CreateContainer returned no answer")??,
                id,
                "container id that a second CreateContainer returned"
            );
            node.asks(&["start", &id])?;
            // If the container already runs, CreateContainer still returns its id.
            ensure_eq!(
                create(None)?.ok_or("CreateContainer returned no answer")??,
                id,
                "container id that CreateContainer returned"
            );
            let mut client = calls.runtime();
            let of = pod_id.clone();
            let existing = calls.wait(async move { containers(&mut client, &of).await })??;
            ensure_eq!(
                existing.len(),
                1,
                "number of containers in the pod of round {round}"
            );

            let mut client = calls.runtime();
            calls.wait(async move {
                let request = RemovePodSandboxRequest {
                    pod_sandbox_id: pod_id,
                };
                client.remove_pod_sandbox(request).await
            })??;

            let image = || ImageSpec {
                image: BUSYBOX.to_owned(),
                ..ImageSpec::default()
            };
            let mut client = calls.image();
            calls.wait(async move {
                let request = RemoveImageRequest {
                    image: Some(image()),
                };
                client.remove_image(request).await
            })??;
            let pull = |timeout: Option<Duration>| {
                let mut client = calls.image();
                let request = PullImageRequest {
                    image: Some(image()),
                    ..PullImageRequest::default()
                };
                calls.wait(with_timeout(timeout, async move {
                    Ok(client.pull_image(request).await?.into_inner().image_ref)
                }))
            };
            pull(Some(moment(40_000)))?;
            pull(None)?.ok_or("PullImage returned no answer")??;
            let pods = node.asks(&["pods", "--quiet"])?;
            ensure!(
                pods.is_empty(),
                "pods of round {round} still exist after their removal: {pods}"
            );
        }
        nothing_is_left(node)
    })
}

/// Returns the answer, or `None` if no answer arrived within the timeout.
async fn with_timeout<T>(
    timeout: Option<Duration>,
    work: impl Future<Output = Answer<T>>,
) -> Option<Answer<T>> {
    match timeout {
        None => Some(work.await),
        Some(timeout) => tokio::time::timeout(timeout, work).await.ok(),
    }
}

fn containers_are_stopped_and_reported_as_exited_if_their_monitor_is_killed() -> Result {
    on_a_node(|node| {
        node.pull(BUSYBOX)?;
        for (name, pid_mode) in [("own", 1), ("shared", 0)] {
            let mut pod = node.pod(name);
            pod["linux"]["security_context"]["namespace_options"]["pid"] = pid_mode.into();
            let pod_id = node.runp(&pod)?;
            let mut config = node.container("sleeps", &["sleep", "600"]);
            config["linux"]["security_context"]["namespace_options"]["pid"] = pid_mode.into();
            let id = node.run(&pod_id, &pod, &config)?;
            let ended = node.run(
                &pod_id,
                &pod,
                &node.container("ended", &["sh", "-c", "exit 3"]),
            )?;
            node.exited(&ended)?;
            let waits = node.create(&pod_id, &pod, &node.container("waits", &["sleep", "600"]))?;
            let pid = node.pid(&id)?;
            let exec = node.crictl(&["exec", "-s", &id, "sleep", "600"]).start()?;
            wait_for("the command of the exec session to start", || {
                let all = node.asks(&["exec", "-s", &id, "ps"])?;
                Ok((all.matches("sleep 600").count() > 1).then_some(()))
            })?;
            kill(node.monitor(&pod_id)?, Signal::SIGKILL)?;

            let status = node.exited(&id)?;
            ensure_eq!(
                status["exitCode"],
                137,
                "exit code of a container whose monitor was killed"
            );
            ensure!(
                !status["message"].as_str().unwrap_or_default().is_empty(),
                "the status of a container whose monitor was killed has no message: {status}"
            );
            ensure_eq!(
                node.exited(&ended)?["exitCode"],
                3,
                "exit code of a container that exited before the kill of the monitor"
            );
            node.exited(&waits)?;
            ensure!(
                !fs::exists(format!("/proc/{pid}"))?
                    || fs::read(format!("/proc/{pid}/cmdline"))?.is_empty(),
                "a container's process still runs although the container's monitor was killed"
            );
            let output = exec.end()?;
            ensure!(
                output.code != 0,
                "crictl exec succeeded although the container's monitor was killed: {}",
                output.told()
            );
            wait_for("the pod to be NotReady", || {
                let state = node.json(&["inspectp", &pod_id])?["status"]["state"].clone();
                Ok((state == "SANDBOX_NOTREADY").then_some(()))
            })?;
            let refused = node.crictl(&["exec", "-s", &id, "true"]).end()?;
            ensure!(
                refused.code != 0,
                "crictl exec succeeded in a container whose monitor was killed"
            );
            node.asks(&["rmp", "--force", &pod_id])?;
        }
        nothing_is_left(node)
    })
}

fn pods_are_not_ready_after_a_reboot_and_can_be_removed() -> Result {
    on_a_node(|node| {
        node.pull(BUSYBOX)?;
        let pod = node.pod("before");
        let pod_id = node.runp(&pod)?;
        let runs = node.run(&pod_id, &pod, &node.container("runs", &["sleep", "600"]))?;
        let ended = node.run(
            &pod_id,
            &pod,
            &node.container("ended", &["sh", "-c", "exit 5"]),
        )?;
        node.exited(&ended)?;
        reboot(node)?;

        let state = node.json(&["inspectp", &pod_id])?["status"]["state"].clone();
        ensure_eq!(state, "SANDBOX_NOTREADY", "the pod's state after a reboot");
        ensure_eq!(
            node.status(&runs)?["state"],
            "CONTAINER_EXITED",
            "state of a container after the reboot"
        );
        ensure_eq!(
            node.status(&ended)?["exitCode"],
            5,
            "exit code of a container that exited before the reboot"
        );
        // kubelet creates the pod again with the next attempt number, and removes the old pod.
        let mut again = pod;
        again["metadata"]["attempt"] = 1.into();
        let new_id = node.runp(&again)?;
        let new = node.run(&new_id, &again, &node.container("runs", &["sleep", "600"]))?;
        ensure_eq!(
            node.asks(&["exec", "-s", &new, "echo", "up"])?,
            "up",
            "output of a command that exec ran in the new pod"
        );
        node.asks(&["stopp", &pod_id])?;
        node.asks(&["rmp", &pod_id])?;
        Ok(())
    })
}
