//! The sysctls that a node and its pods need: ip-sysctl in the kernel's documentation.

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

pub(super) fn is_on(ipv6: bool) -> bool {
    is(if ipv6 { IPV6 } else { IPV4 }, "1")
}

/// Has the node pass packets on.
pub(super) fn turn_on(ipv6: bool) -> Result<(), NetworkError> {
    if is_on(ipv6) {
        return Ok(());
    }
    if ipv6 {
        keep_advertisements();
        return set(IPV6, "1");
    }
    set(IPV4, "1")
}

/// A node that passes packets on listens to no router any more, unless it is told to: without this
/// one with an address by SLAAC would lose it, and its default route.
fn keep_advertisements() {
    for interface in std::fs::read_dir(IPV6_INTERFACES)
        .into_iter()
        .flatten()
        .flatten()
    {
        let path = interface.path().join("accept_ra");
        if is(&path, "1")
            && let Err(error) = set(&path, "2")
        {
            log::warn!("{error}");
        }
    }
}

/// Pods get no addresses and routes from whoever is on the bridge. Acts on the network namespace
/// of the calling thread.
pub(super) fn take_no_advertisements(interface: &str) -> Result<(), NetworkError> {
    let path = Path::new(IPV6_INTERFACES).join(interface).join("accept_ra");
    set(&path, "0")
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
