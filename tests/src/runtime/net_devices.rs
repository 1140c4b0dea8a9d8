//! Network devices of the host that move into a container: `linux.netDevices`.

use serde_json::{Value, json};

use crate::support::bundle::Bundle;
use crate::support::machine::{Output, Result, command};
use crate::support::needs::{Need, Test};
use crate::{ensure, ensure_eq, test};

pub(crate) const TESTS: &[Test] = &[
    test!(a_device_moves_with_its_addresses_under_a_new_name, NEEDS),
    test!(a_device_moves_to_a_container_with_a_user_namespace, NEEDS),
    test!(a_device_that_is_not_there_is_told_by_its_name, NEEDS),
    test!(devices_need_a_network_namespace, NEEDS),
];

/// runc has it since 1.4, crun not.
const NEEDS: Need = Need::Rrun;

/// One end of a pair of the host's, both of which go when this is dropped.
struct Device;

const PEER: &str = "e2e-peer0";

impl Device {
    fn new(name: &str) -> Result<Device> {
        ip(&["link", "add", name, "type", "veth", "peer", "name", PEER])?;
        let made = Device;
        ip(&["address", "add", "192.0.2.7/24", "dev", name])?;
        ip(&["address", "add", "2001:db8::7/64", "dev", name, "nodad"])?;
        ip(&["link", "set", name, "up"])?;
        Ok(made)
    }
}

impl Drop for Device {
    fn drop(&mut self) {
        let _ = command("ip", ["link", "delete", PEER]).end();
    }
}

fn ip(args: &[&str]) -> Result<Output> {
    command("ip", args).ok()
}

/// What `ip -json address` says of a device in the network namespace of a process.
fn inside(pid: i32, device: &str) -> Result<Value> {
    let told = command("nsenter", ["--net", "--target", &pid.to_string(), "--"])
        .args(["ip", "-json", "address", "show", "dev", device])
        .ok()?
        .json()?;
    Ok(told[0].clone())
}

fn addresses(device: &Value) -> Vec<String> {
    let mut all: Vec<String> = device["addr_info"]
        .as_array()
        .into_iter()
        .flatten()
        .filter(|address| address["scope"] == "global")
        .map(|address| {
            let (local, prefix) = (address["local"].as_str(), &address["prefixlen"]);
            format!("{}/{prefix}", local.unwrap_or_default())
        })
        .collect();
    all.sort();
    all
}

fn moved(bundle: &mut Bundle) -> Result {
    let _device = Device::new("e2e-moved0")?;
    bundle.set(
        "/linux/netDevices",
        json!({ "e2e-moved0": { "name": "net7" } }),
    );
    bundle.start()?;
    ensure!(
        !std::fs::exists("/sys/class/net/e2e-moved0")?,
        "the device is still the host's"
    );
    let device = inside(bundle.pid()?, "net7")?;
    ensure_eq!(
        addresses(&device),
        ["192.0.2.7/24", "2001:db8::7/64"],
        "addresses of {device}"
    );
    let flags = device["flags"].to_string();
    ensure!(flags.contains("\"UP\""), "the device is not up: {flags}");
    bundle.end()?;
    Ok(())
}

fn a_device_moves_with_its_addresses_under_a_new_name() -> Result {
    moved(&mut Bundle::new(&["sleep", "600"])?)
}

fn a_device_moves_to_a_container_with_a_user_namespace() -> Result {
    let mut bundle = Bundle::new(&["sleep", "600"])?;
    let map = json!([{ "containerID": 0, "hostID": 100_000, "size": 65536 }]);
    bundle
        .add("/linux/namespaces", json!({ "type": "user" }))
        .set("/linux/uidMappings", map.clone())
        .set("/linux/gidMappings", map);
    moved(&mut bundle)
}

fn a_device_that_is_not_there_is_told_by_its_name() -> Result {
    let mut bundle = Bundle::new(&["sleep", "600"])?;
    bundle.set("/linux/netDevices", json!({ "e2e-absent": {} }));
    let output = bundle.call(&["create"])?.exits(1)?;
    for word in ["linux.netDevices", "e2e-absent"] {
        ensure!(output.stderr.contains(word), "{}", output.told());
    }
    Ok(())
}

fn devices_need_a_network_namespace() -> Result {
    let _device = Device::new("e2e-stays0")?;
    let mut bundle = Bundle::new(&["sleep", "600"])?;
    bundle
        .without_namespace("network")
        .set("/linux/netDevices", json!({ "e2e-stays0": {} }));
    let output = bundle.call(&["create"])?.exits(1)?;
    ensure!(
        output.stderr.contains("linux.netDevices"),
        "{}",
        output.told()
    );
    ensure!(
        std::fs::exists("/sys/class/net/e2e-stays0")?,
        "the device is gone"
    );
    Ok(())
}
