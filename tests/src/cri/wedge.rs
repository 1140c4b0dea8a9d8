//! The server can't be wedged: killed at any moment, asked again by callers that gave up, with
//! monitors killed under it, and after a reboot.

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
        a_server_killed_at_random_under_load_loses_and_leaks_nothing,
        A_NODE,
        Need::RrunCri
    ),
    test!(
        callers_that_cancel_at_random_and_retry_get_one_answer,
        A_NODE,
        Need::RrunCri
    ),
    test!(
        a_killed_monitors_containers_are_stopped_and_reported,
        A_NODE,
        Need::RrunCri
    ),
    test!(
        after_a_reboot_pods_are_not_ready_and_can_be_removed,
        A_NODE,
        Need::RrunCri
    ),
];

type Answer<T> = std::result::Result<T, Status>;

/// Lines that the container of each pod writes.
const LINES: u64 = 300;

/// How far something has come, as far as its client knows.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord)]
enum Step {
    #[default]
    Not,
    Asked,
    Answered,
}

/// One pod's life, as its client saw it.
#[derive(Clone, Debug, Default)]
struct Life {
    name: String,
    own_network: bool,
    code: i32,
    pod: String,
    run: Step,
    /// The container that writes lines and exits with `code`.
    writer: String,
    create: Step,
    start: Step,
    /// The container that would sleep.
    sleeper: String,
    sleeper_started: Step,
    sleeper_stopped: Step,
    sleeper_removed: Step,
    stop: Step,
    remove: Step,
}

/// A life that others look at after its task has gone.
#[derive(Clone)]
struct Told(Arc<Mutex<Life>>);

impl Told {
    fn change(&self, change: impl FnOnce(&mut Life)) {
        change(&mut self.look());
    }

    fn look(&self) -> std::sync::MutexGuard<'_, Life> {
        self.0
            .lock()
            .unwrap_or_else(|poisoned| poisoned.into_inner())
    }

    fn copy(&self) -> Life {
        self.look().clone()
    }
}

fn pod_config(life: &Life, logs: &Path) -> PodSandboxConfig {
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

/// A pod's whole life, told step by step.
async fn live(mut client: RuntimeClient, told: Told, logs: std::path::PathBuf) -> Answer<()> {
    let config = pod_config(&told.copy(), &logs);
    let code = told.look().code;
    let sandbox_config = || Some(config.clone());
    told.change(|life| life.run = Step::Asked);
    let request = RunPodSandboxRequest {
        config: sandbox_config(),
        ..RunPodSandboxRequest::default()
    };
    let pod_id = client
        .run_pod_sandbox(request)
        .await?
        .into_inner()
        .pod_sandbox_id;
    told.change(|life| (life.run, life.pod) = (Step::Answered, pod_id.clone()));

    told.change(|life| life.create = Step::Asked);
    let request = CreateContainerRequest {
        pod_sandbox_id: pod_id.clone(),
        config: Some(writer_config(code)),
        sandbox_config: sandbox_config(),
    };
    let id = client.create_container(request).await?.into_inner();
    let container_id = id.container_id;
    told.change(|life| (life.create, life.writer) = (Step::Answered, container_id.clone()));
    told.change(|life| life.start = Step::Asked);
    client
        .start_container(StartContainerRequest { container_id })
        .await?;
    told.change(|life| life.start = Step::Answered);

    let request = CreateContainerRequest {
        pod_sandbox_id: pod_id.clone(),
        config: Some(container("sleeper", &["sleep", "600"])),
        sandbox_config: sandbox_config(),
    };
    let id = client.create_container(request).await?.into_inner();
    let container_id = id.container_id;
    told.change(|life| life.sleeper.clone_from(&container_id));
    told.change(|life| life.sleeper_started = Step::Asked);
    let request = StartContainerRequest {
        container_id: container_id.clone(),
    };
    client.start_container(request).await?;
    told.change(|life| life.sleeper_started = Step::Answered);
    told.change(|life| life.sleeper_stopped = Step::Asked);
    let request = StopContainerRequest {
        container_id: container_id.clone(),
        timeout: 0,
    };
    client.stop_container(request).await?;
    told.change(|life| life.sleeper_stopped = Step::Answered);
    told.change(|life| life.sleeper_removed = Step::Asked);
    client
        .remove_container(RemoveContainerRequest { container_id })
        .await?;
    told.change(|life| life.sleeper_removed = Step::Answered);

    if code % 2 == 0 {
        return Ok(());
    }
    told.change(|life| life.stop = Step::Asked);
    let request = StopPodSandboxRequest {
        pod_sandbox_id: pod_id.clone(),
    };
    client.stop_pod_sandbox(request).await?;
    told.change(|life| life.stop = Step::Answered);
    told.change(|life| life.remove = Step::Asked);
    let request = RemovePodSandboxRequest {
        pod_sandbox_id: pod_id,
    };
    client.remove_pod_sandbox(request).await?;
    told.change(|life| life.remove = Step::Answered);
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

/// What must be there of a life that a kill cut short, and what must not.
fn check(node: &Node, calls: &Calls, life: &Life) -> Result {
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
    ensure!(pods.len() <= 1, "{} pods of one name: {life:?}", pods.len());
    let pod = pods.first();
    if life.remove == Step::Answered {
        ensure!(pod.is_none(), "a removed pod is back: {life:?}");
    }
    let Some(pod) = pod else {
        ensure!(
            life.run < Step::Answered || life.remove >= Step::Asked,
            "a pod that was answered is lost: {life:?}"
        );
        return Ok(());
    };
    if life.run == Step::Answered {
        ensure_eq!(pod.id, life.pod, "the pod's id, {life:?}");
    }
    if life.stop == Step::Not {
        let ready = PodSandboxState::SandboxReady;
        ensure_eq!(pod.state(), ready, "the pod's state, {life:?}");
    }
    if life.stop == Step::Answered {
        let not_ready = PodSandboxState::SandboxNotready;
        ensure_eq!(pod.state(), not_ready, "the stopped pod's state, {life:?}");
    }
    let mut client = calls.runtime();
    let pod_id = pod.id.clone();
    let there = calls.wait(async move { containers(&mut client, &pod_id).await })??;
    let find = |name: &str| {
        let mut of = there
            .iter()
            .filter(|one| one.metadata.as_ref().is_some_and(|m| m.name == name));
        (of.next(), of.count())
    };
    let (writer, more) = find("writer");
    ensure_eq!(more, 0, "further writers, {life:?}");
    if life.create == Step::Answered && life.remove == Step::Not {
        let writer = writer.ok_or(format!("the container is lost: {life:?}"))?;
        ensure_eq!(writer.id, life.writer, "the container's id, {life:?}");
        if life.start == Step::Not {
            let created = ContainerState::ContainerCreated;
            ensure_eq!(writer.state(), created, "its state, {life:?}");
        }
        if life.start == Step::Answered {
            // It ends by itself, unless its pod was stopped before it could.
            let status = node.exited(&writer.id)?;
            let killed = life.stop > Step::Not && status["exitCode"] == 137;
            if !killed {
                ensure_eq!(status["exitCode"], life.code, "exit code, {life:?}");
                let numbers = line_numbers(&node.log_of(&life.name, "writer")?)?;
                without_gap(&numbers)?;
                ensure_eq!(numbers.len() as u64, LINES, "lines in the log, {life:?}");
            }
        }
    }
    let (sleeper, more) = find("sleeper");
    ensure_eq!(more, 0, "further sleepers, {life:?}");
    if life.sleeper_removed == Step::Answered {
        ensure!(sleeper.is_none(), "a removed container is back: {life:?}");
    } else if life.sleeper_removed == Step::Not && life.sleeper_started == Step::Answered {
        let sleeper = sleeper.ok_or(format!("the sleeper is lost: {life:?}"))?;
        match life.sleeper_stopped {
            Step::Not => {
                let running = ContainerState::ContainerRunning;
                ensure_eq!(sleeper.state(), running, "the sleeper's state, {life:?}");
            }
            Step::Asked => {}
            Step::Answered => {
                let code = node.status(&sleeper.id)?["exitCode"].clone();
                ensure_eq!(code, 137, "the sleeper's exit code, {life:?}");
            }
        }
    }
    Ok(())
}

/// Runs the pod, or joins or finds it, and removes it.
fn end(calls: &Calls, life: &Life, logs: &Path) -> Result {
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
    Ok(ended.map_err(|status| format!("{}: {status}", life.name))?)
}

/// Nothing of any pod is there.
fn nothing_is_left(node: &Node) -> Result {
    wait_for("the server's directories to be empty", || {
        for dir in ["state/pods", "state/netns", "root/containers", "root/trash"] {
            if let Ok(mut entries) = fs::read_dir(node.join(dir))
                && let Some(entry) = entries.next()
            {
                return Err(format!("{} is left", entry?.path().display()).into());
            }
        }
        Ok(Some(()))
    })
}

fn a_server_killed_at_random_under_load_loses_and_leaks_nothing() -> Result {
    on_a_node(|node| {
        node.pull(BUSYBOX)?;
        let logs = node.join("logs");
        let mut dice = Dice::new();
        for round in 0..rounds(20, 200) {
            let calls = Calls::new(node)?;
            let lives: Vec<Told> = (0..3)
                .map(|number| {
                    Told(Arc::new(Mutex::new(Life {
                        name: format!("k{round}-{number}"),
                        own_network: number == 0,
                        code: i32::try_from(dice.below(100)).unwrap_or_default(),
                        ..Life::default()
                    })))
                })
                .collect();
            let moment = Duration::from_micros(dice.below(150_000));
            let work = lives
                .iter()
                .map(|told| live(calls.runtime(), told.clone(), logs.clone()));
            let work: Vec<_> = work.collect();
            let _ = calls.together(work.into_iter().map(|work| async move {
                // Past this moment the client is gone, and then the server.
                tokio::time::timeout(moment, work).await.is_ok()
            }))?;
            node.kill_server()?;
            drop(calls);
            node.start_server()?;
            let calls = Calls::new(node)?;
            for told in &lives {
                let life = told.copy();
                check(node, &calls, &life).map_err(|failed| {
                    let message = failed.message().unwrap_or_default();
                    format!(
                        "round {round}, after {moment:?}, seed {}: {message}",
                        dice.seed
                    )
                })?;
            }
            for told in &lives {
                end(&calls, &told.copy(), &logs)?;
            }
            nothing_is_left(node)?;
        }
        Ok(())
    })
}

fn callers_that_cancel_at_random_and_retry_get_one_answer() -> Result {
    on_a_node(|node| {
        node.pull(BUSYBOX)?;
        let calls = Calls::new(node)?;
        let mut dice = Dice::new();
        for round in 0..rounds(20, 200) {
            let name = format!("c{round}");
            let life = Life {
                name: name.clone(),
                own_network: round % 2 == 0,
                ..Life::default()
            };
            let config = pod_config(&life, &node.join("logs"));
            let mut given_up = Duration::ZERO;
            let mut moment = |most: u64| {
                given_up = Duration::from_micros(dice.below(most));
                given_up
            };
            let run = |patience: Option<Duration>| {
                let mut client = calls.runtime();
                let request = RunPodSandboxRequest {
                    config: Some(config.clone()),
                    ..RunPodSandboxRequest::default()
                };
                calls.wait(impatient(patience, async move {
                    let answer = client.run_pod_sandbox(request).await?;
                    Ok(answer.into_inner().pod_sandbox_id)
                }))
            };
            run(Some(moment(20_000)))?;
            let pod_id = run(None)?.ok_or("no answer")??;

            let create = |patience: Option<Duration>| {
                let mut client = calls.runtime();
                let request = CreateContainerRequest {
                    pod_sandbox_id: pod_id.clone(),
                    config: Some(container("one", &["sleep", "600"])),
                    sandbox_config: Some(config.clone()),
                };
                calls.wait(impatient(patience, async move {
                    let answer = client.create_container(request).await?;
                    Ok(answer.into_inner().container_id)
                }))
            };
            create(Some(moment(8_000)))?;
            let id = create(None)?.ok_or("no answer")??;
            ensure_eq!(create(None)?.ok_or("no answer")??, id, "asked again");
            node.asks(&["start", &id])?;
            // Also of one that runs.
            ensure_eq!(create(None)?.ok_or("no answer")??, id, "asked when it runs");
            let mut client = calls.runtime();
            let of = pod_id.clone();
            let there = calls.wait(async move { containers(&mut client, &of).await })??;
            ensure_eq!(there.len(), 1, "containers of round {round}");

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
            let pull = |patience: Option<Duration>| {
                let mut client = calls.image();
                let request = PullImageRequest {
                    image: Some(image()),
                    ..PullImageRequest::default()
                };
                calls.wait(impatient(patience, async move {
                    Ok(client.pull_image(request).await?.into_inner().image_ref)
                }))
            };
            pull(Some(moment(40_000)))?;
            pull(None)?.ok_or("no answer")??;
            let pods = node.asks(&["pods", "--quiet"])?;
            ensure!(pods.is_empty(), "pods of round {round} are left: {pods}");
        }
        nothing_is_left(node)
    })
}

/// What came of it within that time; `None`: it was given up.
async fn impatient<T>(
    patience: Option<Duration>,
    work: impl Future<Output = Answer<T>>,
) -> Option<Answer<T>> {
    match patience {
        None => Some(work.await),
        Some(patience) => tokio::time::timeout(patience, work).await.ok(),
    }
}

fn a_killed_monitors_containers_are_stopped_and_reported() -> Result {
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
            wait_for("the exec", || {
                let all = node.asks(&["exec", "-s", &id, "ps"])?;
                Ok((all.matches("sleep 600").count() > 1).then_some(()))
            })?;
            kill(node.monitor(&pod_id)?, Signal::SIGKILL)?;

            let status = node.exited(&id)?;
            ensure_eq!(status["exitCode"], 137, "exit code of what it looked after");
            ensure!(
                !status["message"].as_str().unwrap_or_default().is_empty(),
                "no sentence in {status}"
            );
            ensure_eq!(
                node.exited(&ended)?["exitCode"],
                3,
                "of what had ended before"
            );
            node.exited(&waits)?;
            ensure!(
                !fs::exists(format!("/proc/{pid}"))?
                    || fs::read(format!("/proc/{pid}/cmdline"))?.is_empty(),
                "the container lives on"
            );
            let output = exec.end()?;
            ensure!(output.code != 0, "the exec succeeded: {}", output.told());
            wait_for("the pod to be NotReady", || {
                let state = node.json(&["inspectp", &pod_id])?["status"]["state"].clone();
                Ok((state == "SANDBOX_NOTREADY").then_some(()))
            })?;
            let refused = node.crictl(&["exec", "-s", &id, "true"]).end()?;
            ensure!(refused.code != 0, "an exec in it succeeded");
            node.asks(&["rmp", "--force", &pod_id])?;
        }
        nothing_is_left(node)
    })
}

fn after_a_reboot_pods_are_not_ready_and_can_be_removed() -> Result {
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
            "of what ran"
        );
        ensure_eq!(node.status(&ended)?["exitCode"], 5, "of what had ended");
        // kubelet makes the pod again, with the next attempt, and removes the old one.
        let mut again = pod;
        again["metadata"]["attempt"] = 1.into();
        let new_id = node.runp(&again)?;
        let new = node.run(&new_id, &again, &node.container("runs", &["sleep", "600"]))?;
        ensure_eq!(
            node.asks(&["exec", "-s", &new, "echo", "up"])?,
            "up",
            "exec"
        );
        node.asks(&["stopp", &pod_id])?;
        node.asks(&["rmp", &pod_id])?;
        Ok(())
    })
}
