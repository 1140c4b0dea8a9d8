//! The embedded network with many pods, and with a server that is killed: nothing is left.

use std::fs;
use std::time::Duration;

use rrun_proto::v1::{
    ListPodSandboxRequest, PodSandboxConfig, PortMapping, Protocol, RemovePodSandboxRequest,
    RunPodSandboxRequest, StopPodSandboxRequest,
};
use serde_json::{Value, json};
use tonic::Status;

use crate::support::calls::{Calls, RuntimeClient, pod};
use crate::support::machine::{Dice, Result, command, rounds, wait_for};
use crate::support::needs::{Need, Test};
use crate::support::node::{A_NODE, Node, is_pods_interface, on_a_node};
use crate::{ensure, ensure_eq, test};

pub(crate) const TESTS: &[Test] = &[
    test!(
        two_hundred_pods_ten_at_a_time_leave_nothing,
        A_NODE,
        Need::RrunCri,
        Need::NativeOrLong
    ),
    test!(
        a_server_killed_while_pods_come_and_go_leaves_nothing,
        A_NODE,
        Need::RrunCri,
        Need::NativeOrLong
    ),
];

/// A pod of its own network with a host port of TCP and of UDP.
fn config(name: &str, port: i32) -> PodSandboxConfig {
    let mapping = |protocol: Protocol| PortMapping {
        protocol: protocol.into(),
        container_port: 80,
        host_port: port,
        host_ip: String::new(),
    };
    PodSandboxConfig {
        port_mappings: vec![mapping(Protocol::Tcp), mapping(Protocol::Udp)],
        ..pod(name)
    }
}

async fn run(
    mut client: RuntimeClient,
    config: PodSandboxConfig,
) -> std::result::Result<String, Status> {
    let request = RunPodSandboxRequest {
        config: Some(config),
        ..RunPodSandboxRequest::default()
    };
    let answer = client.run_pod_sandbox(request).await?;
    Ok(answer.into_inner().pod_sandbox_id)
}

async fn remove(mut client: RuntimeClient, id: String) -> std::result::Result<(), Status> {
    let pod_sandbox_id = id.clone();
    let stop = StopPodSandboxRequest { pod_sandbox_id };
    client.stop_pod_sandbox(stop).await?;
    let remove = RemovePodSandboxRequest { pod_sandbox_id: id };
    client.remove_pod_sandbox(remove).await.map(drop)
}

/// What is there of pods: elements of the maps, interfaces, files, what the server has given out.
fn remains(node: &Node) -> Result<Vec<String>> {
    let mut all = Vec::new();
    for map in ["host_ports4", "host_ports6"] {
        let listed = command("nft", ["-j", "list", "map", "inet", "rrun0", map]).ok()?;
        let listed = listed.json()?;
        for part in listed["nftables"].as_array().into_iter().flatten() {
            if let Some(elements) = part.pointer("/map/elem") {
                all.push(format!("{map}: {elements}"));
            }
        }
    }
    for entry in fs::read_dir("/sys/class/net")? {
        let name = entry?.file_name().to_string_lossy().into_owned();
        if is_pods_interface(&name) {
            all.push(name);
        }
    }
    for dir in ["state/netns", "state/pods"] {
        for entry in fs::read_dir(node.join(dir))? {
            all.push(entry?.path().display().to_string());
        }
    }
    let info = node.json(&["info"])?;
    // crictl shows what is JSON as such, or as the text that it is.
    let given = match &info["embeddedNetwork"] {
        Value::String(text) => serde_json::from_str(text)?,
        other => other.clone(),
    };
    for key in ["podsWithAddresses", "podsWithHostPorts"] {
        ensure!(given[key].is_u64(), "no {key} in {info}");
        if given[key] != json!(0) {
            all.push(format!("{key}: {}", given[key]));
        }
    }
    Ok(all)
}

/// What goes in the background is given its time.
fn nothing_remains(node: &Node) -> Result {
    wait_for("nothing to remain of pods", || {
        let remains = remains(node)?;
        ensure!(remains.is_empty(), "{}", remains.join("\n"));
        Ok(Some(()))
    })
}

fn rules() -> Result<String> {
    Ok(command("nft", ["list", "ruleset"]).ok()?.stdout)
}

fn two_hundred_pods_ten_at_a_time_leave_nothing() -> Result {
    on_a_node(|node| {
        // Too few addresses for all, if they did not come back.
        fs::write(
            node.join("config.d/network.toml"),
            "[network]\nrange = \"10.77.0.0/26\"\nrange6 = \"fd00:77::/122\"\n",
        )?;
        node.terminate_server()?;
        node.start_server()?;
        let calls = Calls::new(node)?;
        let first = calls.wait(run(calls.runtime(), config("first", 20_000)))??;
        calls.wait(remove(calls.runtime(), first))??;
        nothing_remains(node)?;
        let before = rules()?;
        for crowd in 0..20 {
            let configs = (0..10).map(|number| {
                let number = crowd * 10 + number;
                // The ports of the crowd before: they are free at once.
                config(&format!("pod{number}"), 20_000 + number % 10)
            });
            let running = configs.map(|config| run(calls.runtime(), config));
            let running: Vec<_> = running.collect();
            let ids = calls.together(running)?;
            let ids = ids
                .into_iter()
                .collect::<std::result::Result<Vec<_>, _>>()?;
            let interfaces = fs::read_dir("/sys/class/net")?.flatten();
            let interfaces = interfaces
                .filter(|entry| is_pods_interface(&entry.file_name().to_string_lossy()))
                .count();
            ensure!(interfaces >= 10, "{interfaces} interfaces of ten pods");
            let removing = ids.into_iter().map(|id| remove(calls.runtime(), id));
            let removing: Vec<_> = removing.collect();
            for removed in calls.together(removing)? {
                removed?;
            }
        }
        nothing_remains(node)?;
        ensure_eq!(rules()?, before, "the rules");
        Ok(())
    })
}

fn a_server_killed_while_pods_come_and_go_leaves_nothing() -> Result {
    on_a_node(|node| {
        let mut dice = Dice::new();
        // The table, for what is looked at below.
        let calls = Calls::new(node)?;
        let first = calls.wait(run(calls.runtime(), config("first", 20_000)))??;
        calls.wait(remove(calls.runtime(), first))??;
        drop(calls);
        for round in 0..rounds(20, 200) {
            let calls = Calls::new(node)?;
            let mut moment = || Duration::from_micros(dice.below(80_000));
            // The same ports each time: a port that is not given back is seen.
            let configs =
                || (0..3).map(|number| config(&format!("k{round}-{number}"), 20_000 + number));
            let (going, coming) = (moment(), moment());
            if round % 2 == 0 {
                let work = configs().map(|config| run(calls.runtime(), config));
                let work: Vec<_> = work.collect();
                calls.together(work.into_iter().map(move |work| async move {
                    let _ = tokio::time::timeout(coming, work).await;
                }))?;
            } else {
                let work = configs().map(|config| run(calls.runtime(), config));
                let work: Vec<_> = work.collect();
                let ids = calls.together(work)?;
                let ids = ids
                    .into_iter()
                    .collect::<std::result::Result<Vec<_>, _>>()?;
                let work = ids.into_iter().map(|id| remove(calls.runtime(), id));
                let work: Vec<_> = work.collect();
                calls.together(work.into_iter().map(move |work| async move {
                    let _ = tokio::time::timeout(going, work).await;
                }))?;
            }
            node.kill_server()?;
            drop(calls);
            node.start_server()?;
            let calls = Calls::new(node)?;
            let mut client = calls.runtime();
            let listed = calls.wait(async move {
                client
                    .list_pod_sandbox(ListPodSandboxRequest::default())
                    .await
            })??;
            for pod in listed.into_inner().items {
                calls.wait(remove(calls.runtime(), pod.id))??;
            }
            nothing_remains(node).map_err(|error| {
                let message = error.message().unwrap_or_default();
                format!(
                    "seed {}, round {round}, {going:?} or {coming:?}: {message}",
                    dice.seed
                )
            })?;
        }
        Ok(())
    })
}
