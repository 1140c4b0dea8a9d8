//! Tests that kill and restart the server. Whenever the server is killed, it loses no pod,
//! container or image, and the containers continue to run.

use std::fs;
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::time::Duration;

use rrun_proto::v1::{
    ContainerFilter, ContainerState, CreateContainerRequest, ListContainersRequest,
    RunPodSandboxRequest, StartContainerRequest,
};
use serde_json::json;

use crate::support::calls::{Calls, RuntimeClient, container, pod};
use crate::support::counted_lines::{line_numbers, without_gap};
use crate::support::machine::{Result, command, wait_for};
use crate::support::needs::{Need, Test};
use crate::support::node::{A_NODE, BUSYBOX, WEB, is_rrun, on_a_node};
use crate::{ensure, ensure_eq, test};

pub(crate) const TESTS: &[Test] = &[
    test!(
        a_restarted_server_finds_pods_and_containers_unchanged,
        A_NODE
    ),
    test!(
        a_server_that_is_killed_during_a_call_leaves_no_partial_pod_or_container,
        A_NODE,
        Need::RrunCri
    ),
    test!(
        a_server_that_was_killed_during_a_pull_can_pull_the_image_again,
        A_NODE
    ),
    test!(a_stopped_server_leaves_the_containers_running, A_NODE),
    test!(
        a_server_that_is_killed_while_it_creates_a_cgroup_leaves_no_cgroup,
        A_NODE,
        Need::RrunCri,
        Need::Program("strace")
    ),
    test!(
        a_restarted_server_kills_the_hanging_monitor_of_a_partial_pod,
        A_NODE,
        Need::RrunCri
    ),
];

fn a_restarted_server_finds_pods_and_containers_unchanged() -> Result {
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
        // The container `later` exits while no server runs.
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
            ensure_eq!(
                status["state"],
                state,
                "state of the container {name} after the restart"
            );
            ensure_eq!(
                status["exitCode"],
                code,
                "exit code of the container {name} after the restart"
            );
        }
        ensure_eq!(
            node.pid(&counts)?,
            pid,
            "process id of the running container after the restart"
        );
        let status = node.json(&["inspectp", &pod_id])?["status"].clone();
        ensure_eq!(
            status["state"],
            "SANDBOX_READY",
            "the pod's state after the restart"
        );
        ensure_eq!(
            status["network"]["ip"],
            address,
            "the pod's address after the restart"
        );

        // The test kills the server several times, with different pauses before the restart.
        for pause in [0, 30, 100, 300] {
            node.kill_server()?;
            std::thread::sleep(Duration::from_millis(pause));
            node.start_server()?;
        }
        ensure_eq!(
            node.pid(&counts)?,
            pid,
            "process id of the running container after several restarts"
        );

        // All CRI calls still work after the restarts.
        node.asks(&["start", &waits])?;
        ensure_eq!(
            node.asks(&["exec", "-s", &counts, "echo", "hello"])?.trim(),
            "hello",
            "output of an exec command after the restarts"
        );
        let other = node.pod("other");
        let other_id = node.runp(&other)?;
        let second = node.json(&["inspectp", &other_id])?["status"]["network"]["ip"].clone();
        ensure!(
            second != address,
            "two pods have the same address {address}"
        );
        node.asks(&["stop", "--timeout", "0", &counts])?;
        let numbers = line_numbers(&node.log_of("stays", "counts")?)?;
        without_gap(&numbers)?;
        ensure!(
            numbers.len() > while_down,
            "the container's log contains no line from the time after the restart"
        );
        ensure_eq!(
            node.status(&counts)?["exitCode"],
            json!(137),
            "exit code of the stopped container"
        );
        Ok(())
    })
}

/// Starts a pod with one container, and returns the container's id. The function makes the same CRI
/// calls as kubelet, both at the first start and after a failed start. The function requests the
/// pod, and lists the pod's containers. If no container runs, the function creates the container.
async fn ensure_pod(
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
    let existing = listed
        .into_inner()
        .containers
        .into_iter()
        .find_map(|container| {
            let running = container.state() == ContainerState::ContainerRunning;
            running.then_some(container.id)
        });
    if let Some(id) = existing {
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

fn a_server_that_is_killed_during_a_call_leaves_no_partial_pod_or_container() -> Result {
    on_a_node(|node| {
        node.pull(BUSYBOX)?;
        for round in 0..10u64 {
            let name = format!("hasty-{round}");
            let calls = Calls::new(node)?;
            // In each round, the client cancels its calls after a different time. Then the test
            // kills the server.
            let moment = Duration::from_millis(3 + round * 9);
            let work = ensure_pod(calls.runtime(), name.clone());
            let _ = calls.wait(async move { tokio::time::timeout(moment, work).await.is_ok() })?;
            node.kill_server()?;
            node.start_server()?;

            let calls = Calls::new(node)?;
            let id = calls.wait(ensure_pod(calls.runtime(), name.clone()))?;
            let id =
                id.map_err(|status| format!("RunPodSandbox failed in round {round}: {status}"))?;
            ensure!(
                !id.is_empty(),
                "the server returned an empty container id in round {round}"
            );
            let pods = node.json(&["pods"])?;
            let ready = pods["items"]
                .as_array()
                .into_iter()
                .flatten()
                .filter(|pod| {
                    pod["metadata"]["name"] == name.as_str() && pod["state"] == "SANDBOX_READY"
                });
            ensure_eq!(
                ready.count(),
                1,
                "number of Ready pods that have the pod name of round {round}"
            );
        }
        ensure_eq!(
            node.asks(&["ps", "--quiet"])?.lines().count(),
            10,
            "number of running containers"
        );
        Ok(())
    })
}

fn a_server_that_was_killed_during_a_pull_can_pull_the_image_again() -> Result {
    on_a_node(|node| {
        for pause in [20, 60, 150, 400] {
            let pull = node.crictl(&["pull", WEB]).start()?;
            std::thread::sleep(Duration::from_millis(pause));
            node.kill_server()?;
            let _ = pull.end();
            node.start_server()?;
            // The killed server has stored either the whole image or no part of the image.
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
        ensure_eq!(
            node.exited(&id)?["exitCode"],
            json!(0),
            "exit code of the container that prints the page"
        );
        ensure_eq!(
            node.asks(&["logs", &id])?,
            "hello from rrun",
            "content of the page in the pulled image"
        );
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
            "the container exited together with the server"
        );
        node.start_server()?;
        ensure_eq!(
            node.pid(&id)?,
            pid,
            "the container's process id after the restart of the server"
        );
        node.asks(&["stop", "--timeout", "0", &id])?;
        without_gap(&line_numbers(&node.log_of("calm", "counts")?)?)
    })
}

fn a_server_that_is_killed_while_it_creates_a_cgroup_leaves_no_cgroup() -> Result {
    on_a_node(|node| {
        let outer = Path::new("/sys/fs/cgroup/e2e-killed");
        let inner = outer.join("inner");
        let mut pod = node.pod("killed");
        pod["linux"]["cgroup_parent"] = json!("/e2e-killed/inner");
        let pid = node.server_pid()?.to_string();
        // The kernel kills the server when the server creates the inner cgroup.
        let mut strace = command("strace", ["-f", "-p", &pid, "-P"])
            .arg(&inner)
            .args(["-e", "inject=mkdir,mkdirat:signal=KILL"])
            .start()?;
        wait_for("strace to attach to the server", || {
            Ok(strace.stderr().contains("attached").then_some(()))
        })?;
        let created = node.try_runp(&pod)?;
        ensure!(
            created.code != 0 && outer.is_dir(),
            "the server was not killed after it had created {}: {}",
            outer.display(),
            created.told()
        );
        strace.end()?;
        node.kill_server()?;
        node.start_server()?;
        ensure!(
            !outer.exists(),
            "the restarted server did not remove {}",
            outer.display()
        );
        Ok(())
    })
}

fn a_restarted_server_kills_the_hanging_monitor_of_a_partial_pod() -> Result {
    on_a_node(|node| {
        let hanging = node.join("hanging-monitor");
        fs::write(&hanging, "#!/bin/sh\nkill -STOP $$\n")?;
        fs::set_permissions(&hanging, PermissionsExt::from_mode(0o755))?;
        let file = node.join("config.toml");
        let text = fs::read_to_string(&file)?;
        node.terminate_server()?;
        fs::write(&file, format!("monitor = {hanging:?}\n{text}"))?;
        node.start_server()?;
        let pod = node.pod("hangs");
        let run = node.start_runp(&pod)?;
        let script = hanging.display().to_string();
        wait_for("the monitor to hang", || {
            Ok((!monitors(&script)?.is_empty()).then_some(()))
        })?;
        node.kill_server()?;
        run.end()?;
        fs::write(&file, text)?;
        node.start_server()?;
        wait_for("the restarted server to kill the hanging monitor", || {
            Ok(monitors(&script)?.is_empty().then_some(()))
        })?;
        node.runp(&pod)?;
        Ok(())
    })
}

/// Returns the stopped processes whose command lines contain `script`.
fn monitors(script: &str) -> Result<Vec<PathBuf>> {
    let mut found = Vec::new();
    for process in fs::read_dir("/proc")?.flatten() {
        let read = |name: &str| fs::read_to_string(process.path().join(name)).unwrap_or_default();
        if read("cmdline").contains(script) && read("stat").contains(") T ") {
            found.push(process.path());
        }
    }
    Ok(found)
}
