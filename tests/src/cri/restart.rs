//! The server is killed at any moment and started again: nothing is lost, and nobody noticed.

use std::fs;
use std::time::Duration;

use rrun_proto::v1::{
    ContainerFilter, ContainerState, CreateContainerRequest, ListContainersRequest,
    RunPodSandboxRequest, StartContainerRequest,
};
use serde_json::json;

use crate::support::calls::{Calls, RuntimeClient, container, pod};
use crate::support::counted_lines::{line_numbers, without_gap};
use crate::support::machine::Result;
use crate::support::needs::{Need, Test};
use crate::support::node::{A_NODE, BUSYBOX, WEB, is_rrun, on_a_node};
use crate::{ensure, ensure_eq, test};

pub(crate) const TESTS: &[Test] = &[
    test!(a_killed_server_finds_everything_as_it_was, A_NODE),
    test!(
        a_server_killed_at_its_work_leaves_nothing_half_done,
        A_NODE,
        Need::RrunCri
    ),
    test!(a_server_killed_in_a_pull_pulls_again, A_NODE),
    test!(a_stopped_server_leaves_the_containers_running, A_NODE),
];

fn a_killed_server_finds_everything_as_it_was() -> Result {
    on_a_node(|node| {
        node.pull(BUSYBOX)?;
        let pod = node.pod("stays");
        let pod_id = node.runp(&pod)?;
        let run =
            |name: &str, command: &[&str]| node.run(&pod_id, &pod, &node.container(name, command));
        let ended = run("ended", &["sh", "-c", "exit 7"])?;
        node.exited(&ended)?;
        let counts = run("counts", &["/inside", "count", "5"])?;
        let waits = node.create(&pod_id, &pod, &node.container("waits", &["sleep", "600"]))?;
        let later = run("later", &["/inside", "later", "6", "42"])?;
        let pid = node.pid(&counts)?;
        let address = node.json(&["inspectp", &pod_id])?["status"]["network"]["ip"].clone();

        node.kill_server()?;
        // Its end comes while nobody is there to see it.
        std::thread::sleep(Duration::from_secs(7));
        let log = fs::read_to_string(node.join("logs/stays/counts.log"))?;
        let while_down = line_numbers(&log)?.len();
        node.start_server()?;

        for (id, state, code) in [
            (&ended, "CONTAINER_EXITED", json!(7)),
            (&counts, "CONTAINER_RUNNING", json!(0)),
            (&waits, "CONTAINER_CREATED", json!(0)),
            (&later, "CONTAINER_EXITED", json!(42)),
        ] {
            let status = node.status(id)?;
            let name = &status["metadata"]["name"];
            ensure_eq!(status["state"], state, "state of {name} after the restart");
            ensure_eq!(
                status["exitCode"],
                code,
                "exit code of {name} after the restart"
            );
        }
        ensure_eq!(node.pid(&counts)?, pid, "process of the running container");
        let status = node.json(&["inspectp", &pod_id])?["status"].clone();
        ensure_eq!(status["state"], "SANDBOX_READY", "the pod's state");
        ensure_eq!(status["network"]["ip"], address, "the pod's address");

        // Again and again, at one moment and another.
        for pause in [0, 30, 100, 300] {
            node.kill_server()?;
            std::thread::sleep(Duration::from_millis(pause));
            node.start_server()?;
        }
        ensure_eq!(node.pid(&counts)?, pid, "process of the running container");

        // Everything goes on from there.
        node.asks(&["start", &waits])?;
        ensure_eq!(
            node.asks(&["exec", "-s", &counts, "echo", "hello"])?.trim(),
            "hello",
            "exec"
        );
        let other = node.pod("other");
        let other_id = node.runp(&other)?;
        let second = node.json(&["inspectp", &other_id])?["status"]["network"]["ip"].clone();
        ensure!(second != address, "{address} was given twice");
        node.asks(&["stop", "--timeout", "0", &counts])?;
        let numbers = line_numbers(&node.log_of("stays", "counts")?)?;
        without_gap(&numbers)?;
        ensure!(
            numbers.len() > while_down,
            "no line was written after the restart"
        );
        ensure_eq!(
            node.status(&counts)?["exitCode"],
            json!(137),
            "exit code of what was stopped"
        );
        Ok(())
    })
}

/// What kubelet does for a pod of one container, at first and after a failure: it looks for what
/// is there, and makes what is not.
async fn a_whole_pod(
    mut client: RuntimeClient,
    name: String,
) -> std::result::Result<String, tonic::Status> {
    let config = pod(&name);
    let request = RunPodSandboxRequest {
        config: Some(config.clone()),
        ..RunPodSandboxRequest::default()
    };
    let pod_sandbox_id = client
        .run_pod_sandbox(request)
        .await?
        .into_inner()
        .pod_sandbox_id;
    let filter = ContainerFilter {
        pod_sandbox_id: pod_sandbox_id.clone(),
        ..ContainerFilter::default()
    };
    let listed = client
        .list_containers(ListContainersRequest {
            filter: Some(filter),
        })
        .await?;
    let there = listed
        .into_inner()
        .containers
        .into_iter()
        .find_map(|container| {
            let running = container.state() == ContainerState::ContainerRunning;
            running.then_some(container.id)
        });
    if let Some(id) = there {
        return Ok(id);
    }
    let request = CreateContainerRequest {
        pod_sandbox_id,
        config: Some(container("main", &["sleep", "600"])),
        sandbox_config: Some(config),
    };
    let container_id = client
        .create_container(request)
        .await?
        .into_inner()
        .container_id;
    let request = StartContainerRequest {
        container_id: container_id.clone(),
    };
    client.start_container(request).await?;
    Ok(container_id)
}

fn a_server_killed_at_its_work_leaves_nothing_half_done() -> Result {
    on_a_node(|node| {
        node.pull(BUSYBOX)?;
        for round in 0..10u64 {
            let name = format!("hasty-{round}");
            let calls = Calls::new(node)?;
            // Past the kill, the connection breaks or the time is up.
            let moment = Duration::from_millis(3 + round * 9);
            let work = a_whole_pod(calls.runtime(), name.clone());
            let _ = calls.wait(async move { tokio::time::timeout(moment, work).await.is_ok() })?;
            node.kill_server()?;
            node.start_server()?;

            let calls = Calls::new(node)?;
            let id = calls.wait(a_whole_pod(calls.runtime(), name.clone()))?;
            let id = id.map_err(|status| format!("round {round}: {status}"))?;
            ensure!(!id.is_empty(), "no container in round {round}");
            let pods = node.json(&["pods"])?;
            let ready = pods["items"]
                .as_array()
                .into_iter()
                .flatten()
                .filter(|pod| {
                    pod["metadata"]["name"] == name.as_str() && pod["state"] == "SANDBOX_READY"
                });
            ensure_eq!(ready.count(), 1, "Ready pods of round {round}");
        }
        ensure_eq!(
            node.asks(&["ps", "--quiet"])?.lines().count(),
            10,
            "running containers"
        );
        Ok(())
    })
}

fn a_server_killed_in_a_pull_pulls_again() -> Result {
    on_a_node(|node| {
        for pause in [20, 60, 150, 400] {
            let pull = node.crictl(&["pull", WEB]).start()?;
            std::thread::sleep(Duration::from_millis(pause));
            node.kill_server()?;
            let _ = pull.end();
            node.start_server()?;
            // Either the whole image is there, or nothing of it.
            let listed = node.asks(&["images", "--quiet"])?;
            if listed.contains(|c: char| c.is_ascii_hexdigit()) && is_rrun() {
                node.asks(&["inspecti", WEB])?;
                node.asks(&["rmi", WEB])?;
            }
        }
        node.pull(WEB)?;
        let pod = node.pod("after");
        let pod_id = node.runp(&pod)?;
        let mut web = node.container("web", &["cat", "/www/index.html"]);
        web["image"]["image"] = json!(WEB);
        let id = node.run(&pod_id, &pod, &web)?;
        ensure_eq!(node.exited(&id)?["exitCode"], json!(0), "exit code of cat");
        ensure_eq!(node.asks(&["logs", &id])?, "hello from rrun", "the page");
        Ok(())
    })
}

fn a_stopped_server_leaves_the_containers_running() -> Result {
    on_a_node(|node| {
        node.pull(BUSYBOX)?;
        let pod = node.pod("calm");
        let pod_id = node.runp(&pod)?;
        let id = node.run(
            &pod_id,
            &pod,
            &node.container("counts", &["/inside", "count", "10"]),
        )?;
        let pid = node.pid(&id)?;
        node.terminate_server()?;
        ensure!(
            fs::exists(format!("/proc/{pid}"))?,
            "the container went with the server"
        );
        node.start_server()?;
        ensure_eq!(node.pid(&id)?, pid, "the container's process");
        node.asks(&["stop", "--timeout", "0", &id])?;
        without_gap(&line_numbers(&node.log_of("calm", "counts")?)?)
    })
}
