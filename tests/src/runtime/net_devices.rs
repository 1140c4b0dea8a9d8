//! Tests of `linux.netDevices`. This field lists network devices of the host. The runtime moves
//! these devices into the container.

use serde_json::{Value, json};

use crate::support::bundle::Bundle;
use crate::support::machine::{Output, Result, command};
use crate::support::needs::{Need, Test};
use crate::{ensure, ensure_eq, test};

pub(crate) const TESTS: &[Test] = &[
    test!(
        a_network_device_moves_with_its_addresses_and_gets_a_new_name,
        NEEDS
    ),
    test!(
        a_network_device_moves_to_a_container_with_a_user_namespace,
        NEEDS
    ),
    test!(
        the_error_about_a_missing_network_device_names_the_device,
        NEEDS
    ),
    test!(net_devices_require_a_separate_network_namespace, NEEDS),
];

/// runc supports `linux.netDevices` since version 1.4, and crun does not support it.
const NEEDS: Need = Need::Rrun;

/// One device of a veth pair on the host. Dropping the value deletes both devices of the pair.
struct Device;

const PEER: &str = "e2e-peer0";

impl Device {
    fn new(name: &str) -> Result<Device> {
        ip(&["link", "add", name, "type", "veth", "peer", "name", PEER])?;
        let device = Device;
        ip(&["address", "add", "192.0.2.7/24", "dev", name])?;
        ip(&["address", "add", "2001:db8::7/64", "dev", name, "nodad"])?;
        ip(&["link", "set", name, "up"])?;
        Ok(device)
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

/// Returns the output of `ip -json address` about `device` in the network namespace of the process
/// `pid`.
fn inside(pid: i32, device: &str) -> Result<Value> {
    let devices = command("nsenter", ["--net", "--target", &pid.to_string(), "--"])
        .args(["ip", "-json", "address", "show", "dev", device])
        .ok()?
        .json()?;
    Ok(devices[0].clone())
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

fn check_moved_device(bundle: &mut Bundle) -> Result {
    let _device = Device::new("e2e-moved0")?;
    bundle.set(
        "/linux/netDevices",
        json!({ "e2e-moved0": { "name": "net7" } }),
    );
    bundle.start()?;
    ensure!(
        !std::fs::exists("/sys/class/net/e2e-moved0")?,
        "the device is still in the host's network namespace"
    );
    let device = inside(bundle.pid()?, "net7")?;
    ensure_eq!(
        addresses(&device),
        ["192.0.2.7/24", "2001:db8::7/64"],
        "the addresses of the network device {device}"
    );
    let flags = device["flags"].to_string();
    ensure!(
        flags.contains("\"UP\""),
        "the network device is not up; its flags: {flags}"
    );
    bundle.end()?;
    Ok(())
}

fn a_network_device_moves_with_its_addresses_and_gets_a_new_name() -> Result {
    check_moved_device(&mut Bundle::new(&["sleep", "600"])?)
}

fn a_network_device_moves_to_a_container_with_a_user_namespace() -> Result {
    let mut bundle = Bundle::new(&["sleep", "600"])?;
    let map = json!([{ "containerID": 0, "hostID": 100_000, "size": 65536 }]);
    bundle
        .add("/linux/namespaces", json!({ "type": "user" }))
        .set("/linux/uidMappings", map.clone())
        .set("/linux/gidMappings", map);
    check_moved_device(&mut bundle)
}

fn the_error_about_a_missing_network_device_names_the_device() -> Result {
    let mut bundle = Bundle::new(&["sleep", "600"])?;
    bundle.set("/linux/netDevices", json!({ "e2e-absent": {} }));
    let output = bundle.call(&["create"])?.exits(1)?;
    for word in ["linux.netDevices", "e2e-absent"] {
        ensure!(
            output.stderr.contains(word),
            "the error of `create` does not contain {word}:\n{}",
            output.told()
        );
    }
    Ok(())
}

fn net_devices_require_a_separate_network_namespace() -> Result {
    let _device = Device::new("e2e-stays0")?;
    let mut bundle = Bundle::new(&["sleep", "600"])?;
    bundle
        .without_namespace("network")
        .set("/linux/netDevices", json!({ "e2e-stays0": {} }));
    let output = bundle.call(&["create"])?.exits(1)?;
    ensure!(
        output.stderr.contains("linux.netDevices"),
        "the error of `create` does not name the field linux.netDevices:\n{}",
        output.told()
    );
    ensure!(
        std::fs::exists("/sys/class/net/e2e-stays0")?,
        "the device no longer exists on the host"
    );
    Ok(())
}
