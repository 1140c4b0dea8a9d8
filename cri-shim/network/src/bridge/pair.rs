//! A pod's pair of interfaces: one end on the bridge, the other in the pod's network namespace.

use std::net::IpAddr;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::path::{Path, PathBuf};

use nix::errno::Errno;
use sha2::{Digest, Sha256};

use crate::address::Range;
use crate::error::NetworkError;
use crate::link::{self, POD_INTERFACE, VethPair};
use crate::netlink::{Batch, Socket};
use crate::{forwarding, namespace};

/// IFALIASZ, with its NUL.
const ALIAS_BYTES: usize = 255;

const HOST_PREFIX: &str = "rr";
const HOST_HASH_BYTES: usize = 6;

/// The name of the node's end of a pod's pair: 14 of the 15 bytes that a name may have.
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

/// What `ip link` shows beside a pod's interface.
pub(super) fn alias(bridge: &str, pod: &str) -> String {
    let mut alias = format!("{bridge} pod {pod}");
    let end = alias.floor_char_boundary(ALIAS_BYTES);
    alias.truncate(end);
    alias
}

/// The network namespace of a pod.
pub(crate) struct PodNamespace {
    namespace: OwnedFd,
    /// Where it is pinned, for errors.
    path: PathBuf,
}

impl PodNamespace {
    pub(super) fn open(path: &Path) -> Result<Self, NetworkError> {
        Ok(PodNamespace {
            namespace: namespace::open(path)?,
            path: path.to_owned(),
        })
    }

    /// Asks the kernel from inside the namespace.
    fn inside<T: Send>(
        &self,
        ask: impl FnOnce(&mut Socket) -> Result<T, NetworkError> + Send,
    ) -> Result<T, NetworkError> {
        namespace::on_own_thread(|| {
            namespace::enter(self.namespace.as_fd(), &self.path)?;
            ask(&mut Socket::route()?)
        })
    }
}

/// Makes the pair, or finds it. The pod's end has no address yet.
pub(super) fn make(
    socket: &mut Socket,
    pair: &VethPair,
    namespace: &PodNamespace,
) -> Result<(), NetworkError> {
    let inside = namespace.namespace.as_fd();
    match create(socket, pair, inside) {
        Err(error) if error.is(Errno::EEXIST) => {}
        result => return result,
    }
    if link::find(socket, pair.host)?.is_none() {
        return Err(NetworkError::InterfaceTaken {
            netns: namespace.path.clone(),
        });
    }
    let found = namespace.inside(|socket| link::find(socket, POD_INTERFACE))?;
    if found.and_then(|link| link.mac) == Some(pair.mac) {
        forwarding::refuse_routers(pair.host)?;
        return link::join_bridge(socket, pair.host, pair.alias, pair.bridge);
    }
    // The pair leads elsewhere: to a namespace that was lost.
    link::delete(socket, pair.host)?;
    create(socket, pair, inside)
}

/// Makes a pair of interfaces. The node's end refuses router advertisements, too: if somebody
/// deletes the bridge, packets that arrive at that end are for the node itself.
fn create(socket: &mut Socket, pair: &VethPair, namespace: BorrowedFd) -> Result<(), NetworkError> {
    link::create_veth(socket, pair, namespace)?;
    forwarding::refuse_routers(pair.host)?;
    link::set_up_port(socket, pair.host, pair.alias)
}

/// Puts the pods that lost their bridge on the new one, whose index is `index`.
pub(super) fn rejoin(socket: &mut Socket, bridge: &str, index: u32, pods: &[String]) {
    for pod in pods {
        let host = host_interface(pod);
        // A pod whose pair is not there is attached or detached right now, or after this.
        let _ = forwarding::refuse_routers(&host)
            .and_then(|()| link::join_bridge(socket, &host, &alias(bridge, pod), index));
    }
}

/// Gives the pod's end its addresses and the pod its default routes. Done again it changes nothing.
pub(super) fn configure(
    namespace: &PodNamespace,
    addresses: &[IpAddr],
    mac: link::Mac,
    ranges: &[Range],
) -> Result<(), NetworkError> {
    namespace.inside(|socket| {
        let index = rustix::net::netdevice::name_to_index(socket.fd(), POD_INTERFACE);
        let index = index.map_err(|errno| {
            let action = format!("look for {POD_INTERFACE} in a pod's network namespace");
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
            // Only a pod of a configuration before this one has an address of no range.
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
        }
        socket.execute(&batch).map(drop)
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_host_interface_has_a_name_that_the_kernel_takes_and_we_know_again() {
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
