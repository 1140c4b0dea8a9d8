//! The veth pair of a pod. One end is a port of the bridge, and the other end is in the pod's
//! network namespace.

use std::net::IpAddr;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::path::{Path, PathBuf};

use nix::errno::Errno;
use sha2::{Digest, Sha256};

use super::DesiredPod;
use crate::address::Range;
use crate::error::NetworkError;
use crate::link::{self, BridgePort, HOST_PREFIX, POD_INTERFACE, VethPair, neighbour};
use crate::netlink::{Batch, Socket};
use crate::{forwarding, namespace};

/// The maximum length of an interface's alias, which is IFALIASZ without the terminating NUL.
const ALIAS_BYTES: usize = 255;

const HOST_HASH_BYTES: usize = 6;

/// Returns the name of the node's end of a pod's veth pair. The name has 14 bytes. The kernel's
/// maximum is 15.
pub(crate) fn host_interface(pod: &str) -> String {
    let hash = Sha256::digest(pod.as_bytes());
    let mut name = HOST_PREFIX.to_owned();
    for byte in hash.iter().take(HOST_HASH_BYTES) {
        name.push_str(&format!("{byte:02x}"));
    }
    name
}

pub(super) fn is_host_interface(name: &str) -> bool {
    name.strip_prefix(HOST_PREFIX).is_some_and(|hash| {
        hash.len() == 2 * HOST_HASH_BYTES && hash.bytes().all(|byte| byte.is_ascii_hexdigit())
    })
}

/// Returns the alias of the node's end of a pod's veth pair. The command `ip link` shows the alias.
pub(super) fn alias(bridge: &str, pod: &str) -> String {
    let mut alias = format!("{bridge} pod {pod}");
    let end = alias.floor_char_boundary(ALIAS_BYTES);
    alias.truncate(end);
    alias
}

/// The network namespace of a pod.
pub(crate) struct PodNamespace {
    namespace: OwnedFd,
    /// The path at which the namespace is pinned. The path is used only in error messages.
    path: PathBuf,
    /// The hardware address of the gateway for a permanent neighbour entry in the pod, or `None` if
    /// the pod gets no such entry.
    pub(super) gateway: Option<link::Mac>,
}

impl PodNamespace {
    pub(super) fn open(path: &Path) -> Result<Self, NetworkError> {
        Ok(PodNamespace {
            namespace: namespace::open(path)?,
            path: path.to_owned(),
            gateway: None,
        })
    }

    /// Calls `request` with a netlink socket in the pod's network namespace.
    fn inside<T: Send>(
        &self,
        request: impl FnOnce(&mut Socket) -> Result<T, NetworkError> + Send,
    ) -> Result<T, NetworkError> {
        namespace::on_own_thread(|| {
            namespace::enter(self.namespace.as_fd(), &self.path)?;
            request(&mut Socket::route()?)
        })
    }
}

/// Creates the veth pair, unless it already exists. [`configure`] adds the addresses to the pod's
/// end.
pub(super) fn ensure(
    socket: &mut Socket,
    pair: &VethPair,
    namespace: &PodNamespace,
) -> Result<(), NetworkError> {
    let inside = namespace.namespace.as_fd();
    match create(socket, pair, inside) {
        Err(error) if error.is(Errno::EEXIST) => {}
        result => return result,
    }
    if link::find(socket, pair.port.name)?.is_none() {
        return Err(NetworkError::InterfaceTaken {
            netns: namespace.path.clone(),
        });
    }
    let found = namespace.inside(|socket| link::find(socket, POD_INTERFACE))?;
    if found.and_then(|link| link.mac) == Some(pair.port.mac) {
        forwarding::refuse_routers(pair.port.name)?;
        return link::join_bridge(socket, pair.port);
    }
    // The pod's end of the existing veth pair is in the pod's previous network namespace, not in
    // `namespace`. For this reason, the pair is created again.
    link::delete(socket, pair.port.name)?;
    create(socket, pair, inside)
}

/// Creates a veth pair. The pair's end on the node is configured to refuse router advertisements.
/// Without this setting, the node itself would process router advertisements after another program
/// deleted the bridge.
fn create(socket: &mut Socket, pair: &VethPair, namespace: BorrowedFd) -> Result<(), NetworkError> {
    link::create_veth(socket, pair, namespace)?;
    forwarding::refuse_routers(pair.port.name)?;
    link::set_up_port(socket, pair.port)
}

/// Adds the interfaces of `pods` to the new bridge as ports, after the previous bridge was deleted.
/// `index` is the interface index of the new bridge.
pub(super) fn rejoin(socket: &mut Socket, bridge: &str, index: u32, pods: &[DesiredPod]) {
    for pod in pods {
        let name = host_interface(&pod.id);
        let (mac, neighbours) = pod.neighbours();
        let port = BridgePort {
            name: &name,
            alias: &alias(bridge, &pod.id),
            bridge: index,
            forwarded_groups: forwarded_groups(pod.port.is_some()),
            mac,
            neighbours,
        };
        let joined =
            forwarding::refuse_routers(&name).and_then(|()| link::join_bridge(socket, port));
        match joined {
            // The pod has no veth pair at this time. Another call is attaching or detaching the
            // pod, or will do so soon.
            Err(error) if error.is(Errno::ENODEV) => {}
            Err(error) => {
                let pod = &pod.id;
                log::error!("pod {pod}: add its interface to the new bridge: {error}");
            }
            Ok(()) => {}
        }
    }
}

/// Returns which frames a pod's bridge port forwards. `is_filtered` is true if the pod can send
/// packets only from its own addresses. The filter must then get all frames.
pub(super) fn forwarded_groups(is_filtered: bool) -> u16 {
    if is_filtered {
        link::FORWARDED_GROUPS
    } else {
        0
    }
}

/// Adds the addresses to the pod's end of the veth pair, and adds the pod's default routes and a
/// permanent neighbour entry for the gateway. If this function is called again, it changes nothing.
pub(super) fn configure(
    namespace: &PodNamespace,
    addresses: &[IpAddr],
    mac: link::Mac,
    ranges: &[Range],
) -> Result<(), NetworkError> {
    namespace.inside(|socket| {
        let index = rustix::net::netdevice::name_to_index(socket.fd(), POD_INTERFACE);
        let index = index.map_err(|errno| {
            let action = format!("look up {POD_INTERFACE} in a pod's network namespace");
            NetworkError::kernel(action, Errno::from_raw(errno.raw_os_error()))
        })?;
        let v6 = addresses.iter().any(IpAddr::is_ipv6);
        forwarding::refuse_routers_in_pod(POD_INTERFACE)?;
        let mut batch = Batch::default();
        link::set_up(&mut batch, index, POD_INTERFACE);
        if v6 {
            let own = link::link_local_of(mac).into();
            link::add_address(&mut batch, index, POD_INTERFACE, own, 64, None);
        }
        for address in addresses {
            // An address whose family (IPv4 or IPv6) matches no pod range was assigned under an
            // earlier configuration. This loop skips such an address.
            let mut ranges = ranges.iter();
            let Some(range) = ranges.find(|range| range.is_ipv6() == address.is_ipv6()) else {
                continue;
            };
            let (prefix, broadcast) = (range.prefix(), range.broadcast());
            link::add_address(
                &mut batch,
                index,
                POD_INTERFACE,
                *address,
                prefix,
                broadcast,
            );
            link::add_default_route(&mut batch, index, range.gateway());
            if let Some(gateway) = namespace.gateway {
                neighbour::add(&mut batch, index, range.gateway(), gateway);
            }
        }
        socket.execute(&batch).map(drop)
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_name_of_a_host_interface_has_a_valid_length_and_is_recognised() {
        let name = host_interface("5d4f8c9a");
        assert_eq!(name.len(), 14);
        assert!(is_host_interface(&name));
        assert_ne!(name, host_interface("5d4f8c9b"));
        for other in [
            "rr",
            "rrun0",
            "rr0123456789ag",
            "veth01234567ab",
            "rr0123456789abc",
        ] {
            assert!(!is_host_interface(other), "{other}");
        }
    }
}
