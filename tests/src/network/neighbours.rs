//! Tests of permanent entries in the neighbour caches of the node and of pods. All network namespaces
//! share the kernel's limit on neighbour entries, so a pod can reach the limit. Then the kernel
//! creates only permanent entries.

use std::fs::File;
use std::os::fd::AsFd;

use crate::support::machine::{Result, command, wait_for};
use crate::support::needs::{Need, Test};
use crate::support::network_view::{in_a_new_network, ip, within};
use crate::support::node::{A_NODE, BUSYBOX, Node, on_a_node};
use crate::support::pod_network::{addresses, allow_spoofing};
use crate::{ensure, ensure_eq, test};

pub(crate) const TESTS: &[Test] = &[
    test!(
        a_pod_and_the_node_reach_each_other_without_looking_up_neighbours,
        A_NODE,
        Need::RrunCri
    ),
    test!(
        without_spoof_protection_no_neighbour_entry_is_permanent,
        A_NODE,
        Need::RrunCri
    ),
];

/// Runs a pod with a container. Returns the pod's id and the pod's network namespace.
fn run_pod(node: &Node, name: &str) -> Result<(String, File)> {
    node.pull(BUSYBOX)?;
    let pod = node.pod(name);
    let pod_id = node.runp(&pod)?;
    let container = node.run(&pod_id, &pod, &node.container(name, &["sleep", "600"]))?;
    let network = File::open(format!("/proc/{}/ns/net", node.pid(&container)?))?;
    Ok((pod_id, network))
}

/// Returns the addresses with permanent entries for the interface `interface`, sorted.
fn permanent(interface: &str) -> Result<Vec<String>> {
    let mut found = Vec::new();
    for family in ["-4", "-6"] {
        let all = ip(&format!(
            "{family} neighbour show dev {interface} nud permanent"
        ))?;
        let words = all.lines().filter_map(|line| line.split(' ').next());
        found.extend(words.map(str::to_owned));
    }
    found.sort();
    Ok(found)
}

fn a_pod_and_the_node_reach_each_other_without_looking_up_neighbours() -> Result {
    in_a_new_network(|| {
        on_a_node(|node| {
            let (pod_id, network) = run_pod(node, "neighbours")?;
            let mut of_pod = addresses(node, &pod_id)?;
            of_pod.sort();
            ensure_eq!(permanent("rrun0")?, of_pod, "permanent entries of the node");
            let in_pod = within(network.as_fd(), || permanent("eth0"))?;
            ensure_eq!(
                in_pod,
                ["10.88.0.1", "fd72:7275:6e30::1"],
                "permanent entries of the pod"
            );
            // The server adds the entries again if another program deletes the bridge, and when it
            // starts.
            ip("link delete rrun0")?;
            node.asks(&["info"])?;
            ensure_eq!(permanent("rrun0")?, of_pod, "entries for the new bridge");
            node.kill_server()?;
            for address in &of_pod {
                ip(&format!("neighbour delete {address} dev rrun0"))?;
            }
            node.start_server()?;
            ensure_eq!(permanent("rrun0")?, of_pod, "entries after the start");
            for address in &of_pod {
                let reached = command("ping", ["-c", "1", "-W", "5", address]).ok();
                ensure!(reached.is_ok(), "the node does not reach {address}");
            }
            node.asks(&["rmp", "-f", &pod_id])?;
            wait_for("the deletion of the pod's neighbour entries", || {
                Ok(permanent("rrun0")?.is_empty().then_some(()))
            })
        })
    })
}

/// Without the protection, a pod can take over an address of another pod.
fn without_spoof_protection_no_neighbour_entry_is_permanent() -> Result {
    in_a_new_network(|| {
        on_a_node(|node| {
            allow_spoofing(node)?;
            let (_, network) = run_pod(node, "free")?;
            ensure_eq!(
                permanent("rrun0")?,
                [""; 0],
                "permanent entries of the node"
            );
            let in_pod = within(network.as_fd(), || permanent("eth0"))?;
            ensure_eq!(in_pod, [""; 0], "permanent entries of the pod");
            Ok(())
        })
    })
}
