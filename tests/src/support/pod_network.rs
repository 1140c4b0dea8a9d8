//! This module runs pods with a web server, and checks that the node or another pod can fetch a
//! page from the web server. The module also creates an additional network interface on the node.

use serde_json::{Value, json};

use crate::support::machine::{Result, command, wait_for};
use crate::support::node::{Node, WEB};

/// An additional network interface of the node. The interface has its own addresses. As with some
/// VPNs, the node has a route for half of all IPv4 addresses (128.0.0.0/1) through this interface.
/// Dropping the value deletes the interface.
pub(crate) struct Uplink;

impl Uplink {
    pub(crate) const V4: &str = "198.51.100.7";
    pub(crate) const V6: &str = "2001:db8::7";

    pub(crate) fn new() -> Result<Self> {
        let ip = |args: &[&str]| command("ip", args).ok().map(|_| ());
        ip(&["link", "add", "uplink7", "type", "bridge"])?;
        let uplink = Uplink;
        ip(&["link", "set", "uplink7", "up", "mtu", "1400"])?;
        ip(&["address", "add", "198.51.100.7/24", "dev", "uplink7"])?;
        ip(&[
            "address",
            "add",
            "2001:db8::7/64",
            "dev",
            "uplink7",
            "nodad",
        ])?;
        ip(&["route", "add", "128.0.0.0/1", "via", "198.51.100.1"])?;
        Ok(uplink)
    }
}

impl Drop for Uplink {
    fn drop(&mut self) {
        let _ = command("ip", ["link", "delete", "uplink7"]).end();
    }
}

/// Returns the configuration of a pod with the host ports `ports`.
pub(crate) fn mapped(node: &Node, name: &str, ports: Value) -> Value {
    let mut pod = node.pod(name);
    pod["port_mappings"] = ports;
    pod
}

/// Runs a pod with a web server on port 5000. Returns the ids of the pod and of its container.
pub(crate) fn web(node: &Node, pod: &Value) -> Result<(String, String)> {
    let pod_id = node.runp(pod)?;
    let name = pod["metadata"]["name"].as_str().unwrap_or_default();
    let mut web = node.container(&format!("web-{name}"), &[]);
    web["image"]["image"] = json!(WEB);
    let id = node.run(&pod_id, pod, &web)?;
    Ok((pod_id, id))
}

pub(crate) fn node_fetches(url: &str) -> Result {
    wait_for(&format!("the node to fetch the page at {url}"), || {
        let got = command("curl", ["-gfsS", "--max-time", "3", url]).end()?;
        Ok(got.text().contains("hello from rrun").then_some(()))
    })
}

pub(crate) fn pod_fetches(node: &Node, container: &str, url: &str) -> Result {
    wait_for(&format!("the pod to fetch the page at {url}"), || {
        let args = [
            "exec", "-s", container, "wget", "-T", "3", "-q", "-O", "-", url,
        ];
        let got = node.crictl(&args).end()?;
        Ok(got.text().contains("hello from rrun").then_some(()))
    })
}

/// Returns the addresses in the pod's status.
pub(crate) fn addresses(node: &Node, pod_id: &str) -> Result<Vec<String>> {
    let status = node.json(&["inspectp", pod_id])?;
    let network = status["status"]["network"].clone();
    let mut all = vec![network["ip"].as_str().unwrap_or_default().to_owned()];
    for more in network["additionalIps"].as_array().into_iter().flatten() {
        all.push(more["ip"].as_str().unwrap_or_default().to_owned());
    }
    Ok(all)
}

/// Restarts the server with a configuration in which pods can send packets from all addresses.
pub(crate) fn allow_spoofing(node: &mut Node) -> Result {
    configure(node, "spoof_protection = false\n")
}

/// Restarts the server with `text` as the table `[network]` of the configuration.
pub(crate) fn configure(node: &mut Node, text: &str) -> Result {
    let file = node.join("config.d/network.toml");
    std::fs::write(file, format!("[network]\n{text}"))?;
    node.terminate_server()?;
    node.start_server()
}
