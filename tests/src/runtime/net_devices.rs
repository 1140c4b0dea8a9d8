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
    test!(
        a_network_device_with_a_name_that_is_in_use_stays_on_the_host,
        NEEDS
    ),
    test!(network_devices_return_if_the_creation_fails, NEEDS),
    test!(
        a_network_device_does_not_return_from_the_network_namespace_of_others,
        NEEDS
    ),
    test!(a_network_device_gets_the_first_free_number, NEEDS),
];

/// runc supports `linux.netDevices` since version 1.4, and crun does not support it.
const NEEDS: Need = Need::Rrun;

/// One device of a veth pair on the host. Dropping the value deletes both devices of the pair.
struct Device {
    peer: String,
}

impl Device {
    fn new(name: &str) -> Result<Device> {
        let device = Device {
            peer: name.replace("e2e-", "peer-"),
        };
        ip(&[
            "link",
            "add",
            name,
            "type",
            "veth",
            "peer",
            "name",
            &device.peer,
        ])?;
        ip(&["address", "add", "192.0.2.7/24", "dev", name])?;
        ip(&["address", "add", "2001:db8::7/64", "dev", name, "nodad"])?;
        ip(&["link", "set", name, "up"])?;
        Ok(device)
    }
}

impl Drop for Device {
    fn drop(&mut self) {
        let _ = command("ip", ["link", "delete", &self.peer]).end();
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

/// Returns the addresses, the flags and the routes of a device on the host.
fn on_host(device: &str) -> Result<(Vec<String>, String, String)> {
    let found = ip(&["-json", "address", "show", "dev", device])?.json()?;
    let routes = |family| ip(&[family, "route", "show", "dev", device]);
    // The kernel adds the route of link-local addresses only some time after the device is up.
    let all = routes("-4")?.stdout + &routes("-6")?.stdout;
    let routes: Vec<&str> = all.lines().filter(|line| !line.contains("fe80")).collect();
    Ok((
        addresses(&found[0]),
        found[0]["flags"].to_string(),
        routes.join("\n"),
    ))
}

fn with_routes(name: &str) -> Result<Device> {
    let device = Device::new(name)?;
    ip(&["link", "set", &device.peer, "up"])?;
    ip(&[
        "route",
        "add",
        "203.0.113.0/24",
        "via",
        "192.0.2.1",
        "dev",
        name,
    ])?;
    ip(&[
        "route",
        "add",
        "2001:db8:1::/64",
        "via",
        "2001:db8::1",
        "dev",
        name,
    ])?;
    Ok(device)
}

fn create_fails_and_the_device_is_unchanged(bundle: &Bundle, device: &str) -> Result<Output> {
    let before = on_host(device)?;
    let output = bundle.call(&["create"])?.exits(1)?;
    ensure!(
        !output.stderr.contains("undo the failed creation"),
        "the device could not be moved back:\n{}",
        output.told()
    );
    ensure_eq!(
        on_host(device)?,
        before,
        "the addresses, flags and routes of the device after the failed creation"
    );
    Ok(output)
}

/// The kernel changes a device's name after it has moved the device. A virtual device whose name
/// the kernel refuses would be deleted together with the network namespace of the container.
fn a_network_device_with_a_name_that_is_in_use_stays_on_the_host() -> Result {
    let _device = with_routes("e2e-stays1")?;
    let _other = Device::new("e2e-other1")?;
    let mut first = Bundle::new(&["sleep", "600"])?;
    first.set(
        "/linux/netDevices",
        json!({ "e2e-other1": { "name": "net1" } }),
    );
    first.start()?;
    let mut bundle = Bundle::new(&["sleep", "600"])?;
    for devices in [
        json!({ "e2e-stays1": { "name": "lo" } }),
        json!({ "lo": { "name": "net0" } }),
        json!({ "e2e-stays1": { "name": "net0" }, "lo": { "name": "net1" } }),
        json!({ "e2e-stays1": { "name": "net0" }, "e2e-absent": {} }),
    ] {
        bundle.set("/linux/netDevices", devices);
        create_fails_and_the_device_is_unchanged(&bundle, "e2e-stays1")?;
    }
    let path = format!("/proc/{}/ns/net", first.pid()?);
    bundle
        .without_namespace("network")
        .add(
            "/linux/namespaces",
            json!({ "type": "network", "path": path }),
        )
        .set(
            "/linux/netDevices",
            json!({ "e2e-stays1": { "name": "net1" } }),
        );
    create_fails_and_the_device_is_unchanged(&bundle, "e2e-stays1")?
        .fails_with("the container already has a device with this name")?;
    first.end()?;
    Ok(())
}

fn network_devices_return_if_the_creation_fails() -> Result {
    let _devices = [with_routes("e2e-back0")?, Device::new("e2e-back1")?];
    let mut bundle = Bundle::new(&["sleep", "600"])?;
    // Each of the devices gets the name that the other device has on the host.
    bundle
        .set(
            "/linux/netDevices",
            json!({ "e2e-back0": { "name": "e2e-back1" }, "e2e-back1": { "name": "e2e-back0" } }),
        )
        .set("/process/args", json!(["/bin/missing"]));
    let other = on_host("e2e-back1")?;
    create_fails_and_the_device_is_unchanged(&bundle, "e2e-back0")?;
    ensure_eq!(
        on_host("e2e-back1")?,
        other,
        "the addresses, flags and routes of the other device"
    );
    Ok(())
}

/// Another container in the network namespace can rename the device, and give its name to another
/// device. This other device must not become a device of the host.
fn a_network_device_does_not_return_from_the_network_namespace_of_others() -> Result {
    let _device = with_routes("e2e-joined0")?;
    let first = Bundle::new(&["sleep", "600"])?;
    first.start()?;
    let pid = first.pid()?;
    let mut bundle = Bundle::new(&["exit", "0"])?;
    bundle
        .set("/process/args", json!(["/bin/missing"]))
        .without_namespace("network")
        .add(
            "/linux/namespaces",
            json!({ "type": "network", "path": format!("/proc/{pid}/ns/net") }),
        )
        .set(
            "/linux/netDevices",
            json!({ "e2e-joined0": { "name": "net5" } }),
        );
    bundle
        .call(&["create"])?
        .exits(1)?
        .fails_with("it stays in the container's network namespace")?;
    ensure!(
        !std::fs::exists("/sys/class/net/e2e-joined0")?,
        "a device with the name of the moved device is on the host"
    );
    inside(pid, "net5")?;
    first.end()?;
    Ok(())
}

fn a_network_device_gets_the_first_free_number() -> Result {
    let _devices = [Device::new("e2e-number0")?, Device::new("e2e-number1")?];
    let mut bundle = Bundle::new(&["sleep", "600"])?;
    bundle.set(
        "/linux/netDevices",
        json!({ "e2e-number0": { "name": "net%d" }, "e2e-number1": { "name": "net0" } }),
    );
    bundle.start()?;
    inside(bundle.pid()?, "net0")?;
    inside(bundle.pid()?, "net1")?;
    bundle.end()?;
    Ok(())
}
