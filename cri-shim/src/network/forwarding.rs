//! The sysctls that a node and its pods need: ip-sysctl in the kernel's documentation.

use std::io::ErrorKind;
use std::path::Path;

use super::NetworkError;

const IPV4: &str = "/proc/sys/net/ipv4/ip_forward";
const IPV6: &str = "/proc/sys/net/ipv6/conf/all/forwarding";
const IPV6_INTERFACES: &str = "/proc/sys/net/ipv6/conf";

/// Whether the kernel has IPv6 and it is not turned off.
pub(super) fn has_ipv6() -> bool {
    let all = format!("{IPV6_INTERFACES}/all/disable_ipv6");
    std::fs::read(all).is_ok_and(|value| value.first() == Some(&b'0'))
}

/// What an interface that pods share a link with refuses, as files below `/proc/sys/net`. A pod may
/// send what only a router of the link should: without this the node and the other pods would take
/// its advertisements as routes, addresses and DNS servers, and would follow its redirects.
fn refused(interface: &str) -> [String; 3] {
    [
        format!("ipv6/conf/{interface}/accept_ra"),
        format!("ipv6/conf/{interface}/accept_redirects"),
        format!("ipv4/conf/{interface}/accept_redirects"),
    ]
}

/// Makes `interface`, of the node, refuse router advertisements and redirects, and send no redirects
/// to pods, which refuse them, too. To be called while the interface is down: what arrives before is
/// accepted.
pub(super) fn refuse_routers(interface: &str) -> Result<(), NetworkError> {
    let refused = refused(interface);
    refused.iter().try_for_each(|name| clear(name))?;
    clear(&format!("ipv4/conf/{interface}/send_redirects"))
}

/// Whether `interface` accepts router advertisements, or would if it did not forward.
pub(super) fn accepts_advertisements(interface: &str) -> bool {
    is_set(path(&format!("ipv6/conf/{interface}/accept_ra")))
}

/// Makes a pod's interface, and its loopback, refuse router advertisements and redirects. Acts on
/// the network namespace of the calling thread, which is the pod's.
pub(super) fn refuse_routers_in_pod(interface: &str) -> Result<(), NetworkError> {
    let all = all_refused_in_pod(interface);
    all.iter().try_for_each(|name| clear(name))
}

fn all_refused_in_pod(interface: &str) -> Vec<String> {
    let mut all = Vec::from(refused(interface));
    all.extend(refused("lo"));
    // Where a host does not forward, the kernel follows a redirect if the interface or `all` accepts
    // it.
    all.push("ipv4/conf/all/accept_redirects".to_owned());
    all
}

/// As [`refuse_routers_in_pod`], in a pod that runs already. What is neither 0 nor the kernel's
/// default is somebody's choice and stays.
pub(super) fn refuse_routers_in_running_pod(interface: &str) -> Result<(), NetworkError> {
    let all = all_refused_in_pod(interface);
    let mut defaults = all.iter().filter(|name| is(path(name), "1"));
    defaults.try_for_each(|name| clear(name))
}

fn path(name: &str) -> String {
    format!("/proc/sys/net/{name}")
}

/// Writes 0. A family that the kernel lacks, or that the interface is too small for, has no such file.
fn clear(name: &str) -> Result<(), NetworkError> {
    let path = path(name);
    match set(&path, "0") {
        Err(NetworkError::Sysctl { source, .. }) if source.kind() == ErrorKind::NotFound => Ok(()),
        Err(_) if is(&path, "0") => Ok(()),
        result => result,
    }
}

pub(super) fn is_on(ipv6: bool) -> bool {
    is_set(if ipv6 { IPV6 } else { IPV4 })
}

/// Makes the node forward packets. Other interfaces accept the router advertisements that they
/// accepted before, and no others.
///
/// The redirects that a host follows, a router does not: the kernel refuses them for IPv6 on every
/// interface that forwards, and for IPv4 by clearing `conf/all/accept_redirects`. That stays so.
pub(super) fn turn_on(ipv6: bool) -> Result<(), NetworkError> {
    if is_on(ipv6) {
        return Ok(());
    }
    if ipv6 {
        // Interfaces that appear from here on copy it. Those that appeared before are in the listing.
        keep_advertisements(&Path::new(IPV6_INTERFACES).join("default"))?;
        let interfaces = std::fs::read_dir(IPV6_INTERFACES);
        for interface in interfaces.into_iter().flatten().flatten() {
            // The kernel asks `all` neither for what an interface accepts nor for what a new one
            // begins with.
            if interface.file_name() != "all" {
                keep_advertisements(&interface.path())?;
            }
        }
        return set(IPV6, "1");
    }
    set(IPV4, "1")
}

/// Lets an interface that accepts router advertisements accept them when it forwards, too: with 1 an
/// interface accepts them only as long as it does not forward, with 2 always. Without this a node
/// with an address by SLAAC would lose the address and its default route. An interface that forwards
/// already refuses advertisements with 1, and goes on refusing them.
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
pub(super) fn route_localnet(bridge: &str) -> Result<(), NetworkError> {
    let path = format!("/proc/sys/net/ipv4/conf/{bridge}/route_localnet");
    if is(&path, "1") {
        return Ok(());
    }
    set(path, "1")
}

/// Whether answers of pods can come back to ::1. Where br_netfilter is on for IPv6, they are
/// translated while they are still on the bridge, and what comes in from there for ::1 the kernel
/// drops.
pub(super) fn can_translate_loopback6() -> bool {
    !is("/proc/sys/net/bridge/bridge-nf-call-ip6tables", "1")
}

/// Whether a number is there that is not 0.
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
