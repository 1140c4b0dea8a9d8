//! Tests of the embedded network with many pods, and with a server that is killed. No object of a
//! removed pod may remain.

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
        two_hundred_pods_in_groups_of_ten_leave_nothing_behind,
        A_NODE,
        Need::RrunCri,
        Need::NativeOrLong
    ),
    test!(
        nothing_is_left_behind_if_the_server_is_killed_while_pods_are_created_and_removed,
        A_NODE,
        Need::RrunCri,
        Need::NativeOrLong
    ),
];

/// Returns the configuration of a pod with its own network namespace, a TCP host port and a UDP
/// host port.
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

/// Returns the network objects that still exist for pods: elements of nftables maps, interfaces,
/// files, addresses and host ports.
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
    // crictl shows embeddedNetwork either as JSON or as a string that contains JSON.
    let assigned = match &info["embeddedNetwork"] {
        Value::String(text) => serde_json::from_str(text)?,
        other => other.clone(),
    };
    for key in ["podsWithAddresses", "podsWithHostPorts"] {
        ensure!(
            assigned[key].is_u64(),
            "the counter {key} is missing in the output of `crictl info`: {info}"
        );
        if assigned[key] != json!(0) {
            all.push(format!("{key}: {}", assigned[key]));
        }
    }
    Ok(all)
}

/// Waits until no object of a pod remains. The server removes some objects in the background.
fn nothing_remains(node: &Node) -> Result {
    wait_for("all objects of pods to be removed", || {
        let remains = remains(node)?;
        ensure!(
            remains.is_empty(),
            "these objects of pods still exist:\n{}",
            remains.join("\n")
        );
        Ok(Some(()))
    })
}

fn rules() -> Result<String> {
    Ok(command("nft", ["list", "ruleset"]).ok()?.stdout)
}

fn two_hundred_pods_in_groups_of_ten_leave_nothing_behind() -> Result {
    on_a_node(|node| {
        // The range has fewer addresses than this test has pods, so the server must reuse
        // addresses.
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
        for group in 0..20 {
            let configs = (0..10).map(|number| {
                let number = group * 10 + number;
                // Each group uses the same host ports as the previous group. Therefore, a removed
                // pod must release its host ports immediately.
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
            ensure!(
                interfaces >= 10,
                "only {interfaces} network interfaces exist for ten pods"
            );
            let removing = ids.into_iter().map(|id| remove(calls.runtime(), id));
            let removing: Vec<_> = removing.collect();
            for removed in calls.together(removing)? {
                removed?;
            }
        }
        nothing_remains(node)?;
        ensure_eq!(
            rules()?,
            before,
            "the nftables rules after the removal of all pods"
        );
        Ok(())
    })
}

fn nothing_is_left_behind_if_the_server_is_killed_while_pods_are_created_and_removed() -> Result {
    on_a_node(|node| {
        let mut dice = Dice::new();
        // The first pod creates the nftables table, which `remains` reads.
        let calls = Calls::new(node)?;
        let first = calls.wait(run(calls.runtime(), config("first", 20_000)))??;
        calls.wait(remove(calls.runtime(), first))??;
        drop(calls);
        for round in 0..rounds(20, 200) {
            let calls = Calls::new(node)?;
            let mut moment = || Duration::from_micros(dice.below(80_000));
            // Each round uses the same host ports. If a removed pod did not release its host ports,
            // the next round fails.
            let configs =
                || (0..3).map(|number| config(&format!("k{round}-{number}"), 20_000 + number));
            let (removal_time, creation_time) = (moment(), moment());
            if round % 2 == 0 {
                let work = configs().map(|config| run(calls.runtime(), config));
                let work: Vec<_> = work.collect();
                calls.together(work.into_iter().map(move |work| async move {
                    let _ = tokio::time::timeout(creation_time, work).await;
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
                    let _ = tokio::time::timeout(removal_time, work).await;
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
                let (work, time) = match round % 2 {
                    0 => ("creation of pods", creation_time),
                    _ => ("removal of pods", removal_time),
                };
                format!(
                    "seed {} of the random times, round {round}: the test sent the requests ({work}) and killed the server {time:?} later; the failure: {message}",
                    dice.seed
                )
            })?;
        }
        Ok(())
    })
}
