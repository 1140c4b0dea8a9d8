//! The network sysctls of the node and of its pods. See Documentation/networking/ip-sysctl.rst of
//! the kernel.

use std::io::ErrorKind;
use std::path::Path;

use crate::error::NetworkError;

const IPV4: &str = "/proc/sys/net/ipv4/ip_forward";
const IPV6: &str = "/proc/sys/net/ipv6/conf/all/forwarding";
const IPV6_INTERFACES: &str = "/proc/sys/net/ipv6/conf";

/// Returns whether the kernel supports IPv6 and IPv6 is not disabled.
pub(crate) fn has_ipv6() -> Result<bool, NetworkError> {
    is(format!("{IPV6_INTERFACES}/all/disable_ipv6"), "0")
}

/// Returns the names of the sysctls that must be 0 on `interface`, which receives packets from
/// pods. A pod can send router advertisements and redirects, which only a router should send. If
/// these sysctls were not 0, the node and the other pods would accept routes, addresses and DNS
/// servers from a pod's router advertisements. They would also follow a pod's redirects.
fn refused(interface: &str) -> [String; 3] {
    [
        format!("ipv6/conf/{interface}/accept_ra"),
        format!("ipv6/conf/{interface}/accept_redirects"),
        format!("ipv4/conf/{interface}/accept_redirects"),
    ]
}

/// Configures `interface`, an interface of the node, to refuse router advertisements and redirects.
/// The interface also stops sending redirects, because pods would ignore the redirects. This
/// function must be called before the interface is set up. If the interface is already up, it
/// accepts router advertisements and redirects until this call.
pub(crate) fn refuse_routers(interface: &str) -> Result<(), NetworkError> {
    let refused = refused(interface);
    refused.iter().try_for_each(|name| clear(name))?;
    clear(&format!("ipv4/conf/{interface}/send_redirects"))
}

/// Returns whether `accept_ra` allows router advertisements on `interface`. If `accept_ra` is 1,
/// the interface nevertheless refuses router advertisements while it forwards packets.
pub(crate) fn accepts_advertisements(interface: &str) -> Result<bool, NetworkError> {
    is_set(path(&format!("ipv6/conf/{interface}/accept_ra")))
}

/// Configures a pod's interface and its loopback to refuse router advertisements and redirects. The
/// calling thread must be in the pod's network namespace.
pub(crate) fn refuse_routers_in_pod(interface: &str) -> Result<(), NetworkError> {
    let all = all_refused_in_pod(interface);
    all.iter().try_for_each(|name| clear(name))
}

fn all_refused_in_pod(interface: &str) -> Vec<String> {
    let mut all = Vec::from(refused(interface));
    all.extend(refused("lo"));
    // `accept_redirects` must be 0 both for the interface and for `all`. If forwarding is disabled,
    // the kernel follows an IPv4 redirect if either the interface or `all` accepts redirects.
    all.push("ipv4/conf/all/accept_redirects".to_owned());
    all
}

/// Configures a running pod in the same way as [`refuse_routers_in_pod`], but changes only sysctls
/// with the kernel's default value 1. Any other value was set on purpose.
pub(crate) fn refuse_routers_in_running_pod(interface: &str) -> Result<(), NetworkError> {
    let all = all_refused_in_pod(interface);
    for name in &all {
        if is(path(name), "1")? {
            clear(name)?;
        }
    }
    Ok(())
}

fn path(name: &str) -> String {
    format!("/proc/sys/net/{name}")
}

/// Writes 0 to the file of the sysctl `name`. If the file does not exist, this function does
/// nothing. For example, an interface has no files for IPv6 sysctls if its MTU is too small for
/// IPv6. A kernel without IPv6 has no such files at all.
fn clear(name: &str) -> Result<(), NetworkError> {
    let path = path(name);
    match set(&path, "0") {
        Err(NetworkError::Sysctl { source, .. }) if source.kind() == ErrorKind::NotFound => Ok(()),
        Err(_) if is(&path, "0").is_ok_and(|is_clear| is_clear) => Ok(()),
        result => result,
    }
}

pub(crate) fn is_on(ipv6: bool) -> Result<bool, NetworkError> {
    is_set(if ipv6 { IPV6 } else { IPV4 })
}

/// Enables packet forwarding on the node. Forwarding alone would stop some of the node's interfaces
/// from accepting router advertisements. `turn_on` ensures that these interfaces continue to accept
/// router advertisements.
///
/// A node that forwards packets ignores ICMP redirects. For IPv6, the kernel refuses redirects on
/// every interface that forwards packets. For IPv4, the kernel clears `conf/all/accept_redirects`
/// when forwarding is enabled. `turn_on` leaves these settings for redirects unchanged.
pub(crate) fn turn_on(ipv6: bool) -> Result<(), NetworkError> {
    if is_on(ipv6)? {
        return Ok(());
    }
    if ipv6 {
        // Interfaces that are created later copy the value in `default`. The loop below changes the
        // interfaces that already exist.
        keep_advertisements(&Path::new(IPV6_INTERFACES).join("default"))?;
        let failed = |source| NetworkError::Sysctl {
            action: "read the directory".to_owned(),
            path: IPV6_INTERFACES.to_owned(),
            source,
        };
        for interface in std::fs::read_dir(IPV6_INTERFACES).map_err(failed)? {
            let interface = interface.map_err(failed)?;
            // The sysctl `all/accept_ra` has no effect on existing or new interfaces.
            if interface.file_name() != "all" {
                keep_advertisements(&interface.path())?;
            }
        }
        return set(IPV6, "1");
    }
    set(IPV4, "1")
}

/// Ensures that an interface continues to accept router advertisements when forwarding is enabled.
/// If `accept_ra` is 1, an interface accepts advertisements only while it does not forward packets.
/// If `accept_ra` is 2, an interface always accepts advertisements. A node can have got its address
/// by SLAAC. Without this function, the node would lose the address and its default route. If an
/// interface already forwards packets, it is not changed. With `accept_ra` 1, such an interface
/// already refuses advertisements.
fn keep_advertisements(interface: &Path) -> Result<(), NetworkError> {
    let path = interface.join("accept_ra");
    if is_set(interface.join("forwarding"))? || !is_set(&path)? || is(&path, "2")? {
        return Ok(());
    }
    match set(&path, "2") {
        // The interface was deleted after the directory was listed.
        Err(_) if path.try_exists().is_ok_and(|exists| !exists) => Ok(()),
        result => result,
    }
}

fn localnet(bridge: &str) -> String {
    path(&format!("ipv4/conf/{bridge}/route_localnet"))
}

/// Returns whether the kernel routes packets from and to 127.0.0.0/8 through the bridge. The node's
/// processes need this to reach host ports at 127.0.0.1.
pub(crate) fn routes_localnet(bridge: &str) -> Result<bool, NetworkError> {
    is_set(localnet(bridge))
}

pub(crate) fn set_route_localnet(bridge: &str, on: bool) -> Result<(), NetworkError> {
    set(localnet(bridge), if on { "1" } else { "0" })
}

/// Returns whether replies from host ports at ::1 reach the node's processes. If br_netfilter is
/// enabled for IPv6, the replies do not reach the processes. In this case, the kernel translates
/// the destination of a reply back to ::1 while the reply is still on the bridge. The kernel then
/// drops the reply, because it drops every packet that comes from a bridge with the destination
/// ::1.
pub(crate) fn can_translate_loopback6() -> Result<bool, NetworkError> {
    is("/proc/sys/net/bridge/bridge-nf-call-ip6tables", "1").map(|filters| !filters)
}

/// Returns whether the sysctl file `path` exists and contains a number other than 0.
fn is_set(path: impl AsRef<Path>) -> Result<bool, NetworkError> {
    Ok(value(path.as_ref())?.is_some_and(|value| value != "0"))
}

/// Returns whether the sysctl file `path` exists and contains `expected`.
fn is(path: impl AsRef<Path>, expected: &str) -> Result<bool, NetworkError> {
    Ok(value(path.as_ref())?.is_some_and(|value| value == expected))
}

/// Returns the value in a sysctl file, or `None` if the file does not exist. Any other error must
/// not count as a missing file, because the caller would then skip a setting.
fn value(path: &Path) -> Result<Option<String>, NetworkError> {
    match std::fs::read_to_string(path) {
        Ok(text) => Ok(Some(text.trim_end().to_owned())),
        Err(source) if source.kind() == ErrorKind::NotFound => Ok(None),
        Err(source) => Err(NetworkError::Sysctl {
            action: "read".to_owned(),
            path: path.display().to_string(),
            source,
        }),
    }
}

fn set(path: impl AsRef<Path>, value: &'static str) -> Result<(), NetworkError> {
    let path = path.as_ref();
    std::fs::write(path, value).map_err(|source| NetworkError::Sysctl {
        action: format!("write {value} to"),
        path: path.display().to_string(),
        source,
    })
}
