//! The sysctls that a node and its pods need: ip-sysctl in the kernel's documentation.

use std::io::ErrorKind;
use std::path::Path;

use crate::error::NetworkError;

const IPV4: &str = "/proc/sys/net/ipv4/ip_forward";
const IPV6: &str = "/proc/sys/net/ipv6/conf/all/forwarding";
const IPV6_INTERFACES: &str = "/proc/sys/net/ipv6/conf";

/// Whether the kernel has IPv6 and it is not turned off.
pub(crate) fn has_ipv6() -> bool {
    let all = format!("{IPV6_INTERFACES}/all/disable_ipv6");
    std::fs::read(all).is_ok_and(|value| value.first() == Some(&b'0'))
}

/// The files below `/proc/sys/net` that are 0 for an interface whose link pods share. A pod can
/// send what only a router should send. Without this, the node and the other pods would take
/// routes, addresses and DNS servers from its advertisements, and would follow its redirects.
fn refused(interface: &str) -> [String; 3] {
    [
        format!("ipv6/conf/{interface}/accept_ra"),
        format!("ipv6/conf/{interface}/accept_redirects"),
        format!("ipv4/conf/{interface}/accept_redirects"),
    ]
}

/// Makes `interface`, which is the node's, refuse router advertisements and redirects. It sends no
/// redirects either, because pods refuse them. Must be called while the interface is down: what
/// arrives earlier is accepted.
pub(crate) fn refuse_routers(interface: &str) -> Result<(), NetworkError> {
    let refused = refused(interface);
    refused.iter().try_for_each(|name| clear(name))?;
    clear(&format!("ipv4/conf/{interface}/send_redirects"))
}

/// Whether `interface` accepts router advertisements, or would if it did not forward.
pub(crate) fn accepts_advertisements(interface: &str) -> bool {
    is_set(path(&format!("ipv6/conf/{interface}/accept_ra")))
}

/// Makes a pod's interface, and its loopback, refuse router advertisements and redirects. Acts on
/// the network namespace of the calling thread, which is the pod's.
pub(crate) fn refuse_routers_in_pod(interface: &str) -> Result<(), NetworkError> {
    let all = all_refused_in_pod(interface);
    all.iter().try_for_each(|name| clear(name))
}

fn all_refused_in_pod(interface: &str) -> Vec<String> {
    let mut all = Vec::from(refused(interface));
    all.extend(refused("lo"));
    // On a host that does not forward, the kernel follows a redirect if either the interface or
    // `all` accepts redirects.
    all.push("ipv4/conf/all/accept_redirects".to_owned());
    all
}

/// As [`refuse_routers_in_pod`], in a running pod. A value that is neither 0 nor the kernel's
/// default was set on purpose and stays.
pub(crate) fn refuse_routers_in_running_pod(interface: &str) -> Result<(), NetworkError> {
    let all = all_refused_in_pod(interface);
    let mut defaults = all.iter().filter(|name| is(path(name), "1"));
    defaults.try_for_each(|name| clear(name))
}

fn path(name: &str) -> String {
    format!("/proc/sys/net/{name}")
}

/// Writes 0. The file does not exist if the kernel lacks IPv6, or if the interface's MTU is too
/// small for it.
fn clear(name: &str) -> Result<(), NetworkError> {
    let path = path(name);
    match set(&path, "0") {
        Err(NetworkError::Sysctl { source, .. }) if source.kind() == ErrorKind::NotFound => Ok(()),
        Err(_) if is(&path, "0") => Ok(()),
        result => result,
    }
}

pub(crate) fn is_on(ipv6: bool) -> bool {
    is_set(if ipv6 { IPV6 } else { IPV4 })
}

/// Makes the node forward packets. The node's other interfaces accept router advertisements if they
/// did so before, and refuse them otherwise.
///
/// A router follows no redirects: for IPv6 the kernel refuses them on every interface that
/// forwards, and for IPv4 it clears `conf/all/accept_redirects`. rrun-cri does not change that.
pub(crate) fn turn_on(ipv6: bool) -> Result<(), NetworkError> {
    if is_on(ipv6) {
        return Ok(());
    }
    if ipv6 {
        // Interfaces that appear later copy this value. Earlier ones are in the listing below.
        keep_advertisements(&Path::new(IPV6_INTERFACES).join("default"))?;
        let interfaces = std::fs::read_dir(IPV6_INTERFACES);
        for interface in interfaces.into_iter().flatten().flatten() {
            // `all/accept_ra` affects neither existing nor new interfaces.
            if interface.file_name() != "all" {
                keep_advertisements(&interface.path())?;
            }
        }
        return set(IPV6, "1");
    }
    set(IPV4, "1")
}

/// Lets an interface that accepts router advertisements accept them while it forwards, too. With 1
/// in `accept_ra` an interface accepts them only if it does not forward, with 2 always. Without
/// this, a node with an address by SLAAC would lose the address and its default route. An interface
/// that already forwards refuses advertisements with 1, and keeps refusing them.
fn keep_advertisements(interface: &Path) -> Result<(), NetworkError> {
    let path = interface.join("accept_ra");
    if is_set(interface.join("forwarding")) || !is_set(&path) || is(&path, "2") {
        return Ok(());
    }
    match set(&path, "2") {
        // The interface is gone.
        Err(_) if !path.exists() => Ok(()),
        result => result,
    }
}

/// Has what comes from 127.0.0.1 leave by the bridge, for host ports.
pub(crate) fn route_localnet(bridge: &str) -> Result<(), NetworkError> {
    let path = format!("/proc/sys/net/ipv4/conf/{bridge}/route_localnet");
    if is(&path, "1") {
        return Ok(());
    }
    set(path, "1")
}

/// Whether answers of pods can come back to ::1. Where br_netfilter is on for IPv6, they are
/// translated while they are still on the bridge, and what comes in from there for ::1 the kernel
/// drops.
pub(crate) fn can_translate_loopback6() -> bool {
    !is("/proc/sys/net/bridge/bridge-nf-call-ip6tables", "1")
}

/// Whether the file exists and holds a number other than 0.
fn is_set(path: impl AsRef<Path>) -> bool {
    std::fs::read_to_string(path).is_ok_and(|value| value.trim_end() != "0")
}

fn is(path: impl AsRef<Path>, wanted: &str) -> bool {
    std::fs::read_to_string(path).is_ok_and(|value| value.trim_end() == wanted)
}

fn set(path: impl AsRef<Path>, value: &'static str) -> Result<(), NetworkError> {
    let path = path.as_ref();
    std::fs::write(path, value).map_err(|source| NetworkError::Sysctl {
        path: path.display().to_string(),
        value,
        source,
    })
}
