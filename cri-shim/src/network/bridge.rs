//! What the embedded network has in the kernel: the bridge, the rules, a veth pair for each pod.
//! Everything here blocks, for microseconds to a few milliseconds.

use std::collections::HashSet;
use std::net::Ipv4Addr;
use std::os::fd::{AsFd, OwnedFd};
use std::path::{Path, PathBuf};
use std::sync::{Mutex, MutexGuard, PoisonError};

use nix::errno::Errno;
use sha2::{Digest, Sha256};

use super::netlink::{Batch, Socket};
use super::nftables::{self, Generation};
use super::{NetworkConfig, NetworkError, POD_INTERFACE, link, namespace};

const IP_FORWARD: &str = "/proc/sys/net/ipv4/ip_forward";

/// Ethernet's, for a node without a default route.
const DEFAULT_MTU: u32 = 1500;

/// IFALIASZ, with its NUL.
const ALIAS_BYTES: usize = 255;

/// The bridge and its rules, as configured.
pub(super) struct Bridge {
    config: NetworkConfig,
    /// What was found or made last.
    standing: Mutex<Option<Standing>>,
}

/// Tells which pods have an interface. Only a bridge that is made anew asks.
type Pods<'a> = &'a dyn Fn() -> Vec<String>;

/// A bridge that was whole when it was looked at.
#[derive(Clone, Copy)]
struct Standing {
    index: u32,
    mtu: u32,
    rules: Generation,
}

/// A pod whose interface is there.
pub(super) struct Connected {
    namespace: OwnedFd,
    /// Where it is pinned, for errors.
    netns: PathBuf,
}

impl Connected {
    /// Asks the kernel from inside the pod's namespace.
    fn inside<T: Send>(
        &self,
        ask: impl FnOnce(&mut Socket) -> Result<T, NetworkError> + Send,
    ) -> Result<T, NetworkError> {
        namespace::on_own_thread(|| {
            namespace::enter(self.namespace.as_fd(), &self.netns)?;
            ask(&mut Socket::route()?)
        })
    }
}

impl Bridge {
    pub(super) fn new(config: NetworkConfig) -> Self {
        Bridge {
            config,
            standing: Mutex::new(None),
        }
    }

    /// Looks at everything, and makes what is missing. `pods` are those that have an interface: if
    /// the bridge had to be made anew, they are put back on it.
    pub(super) fn repair(&self, pods: Pods) -> Result<(), NetworkError> {
        self.repair_standing(&mut self.standing(), pods).map(drop)
    }

    /// Makes `pod`'s pair of interfaces, or finds it. It has no address yet.
    pub(super) fn connect(
        &self,
        pod: &str,
        address: Ipv4Addr,
        netns: &Path,
        pods: Pods,
    ) -> Result<Connected, NetworkError> {
        let connected = Connected {
            namespace: namespace::open(netns)?,
            netns: netns.to_owned(),
        };
        let standing = self.whole(pods)?;
        let mut socket = Socket::route()?;
        let mac = link::mac_of(address);
        match self.make_pair(standing, &mut socket, pod, mac, &connected) {
            // Nothing tells that somebody deleted the bridge, but that it is not there.
            Err(_) if self.is_gone(&mut socket, standing) => {
                let standing = self.repair_standing(&mut self.standing(), pods)?;
                self.make_pair(standing, &mut socket, pod, mac, &connected)?;
            }
            result => result?,
        }
        Ok(connected)
    }

    /// Gives the pod's interface its address and the pod its default route. Done again it changes
    /// nothing.
    pub(super) fn configure(
        &self,
        connected: &Connected,
        address: Ipv4Addr,
    ) -> Result<(), NetworkError> {
        let range = self.config.range;
        connected.inside(|socket| {
            let index = rustix::net::netdevice::name_to_index(socket.fd(), POD_INTERFACE);
            let index = index.map_err(|errno| {
                let action = format!("look for {POD_INTERFACE} in a pod's network namespace");
                NetworkError::kernel(action, Errno::from_raw(errno.raw_os_error()))
            })?;
            let mut batch = Batch::default();
            link::set_up(&mut batch, index, POD_INTERFACE);
            link::add_address(&mut batch, index, POD_INTERFACE, address, range);
            link::add_default_route(&mut batch, index, range.gateway());
            socket.execute(&batch).map(drop)
        })
    }

    /// Deletes the node's ends of the pods' pairs, and with them the pods'. They need not be
    /// there.
    pub(super) fn disconnect(&self, pods: &[String]) -> Result<(), NetworkError> {
        let mut socket = Socket::route()?;
        let names: Vec<String> = pods.iter().map(|pod| host_interface(pod)).collect();
        if let [name] = names.as_slice() {
            return link::delete(&mut socket, name);
        }
        link::delete_together(&mut socket, &names)
    }

    /// Deletes every interface of ours but those of `keep`.
    pub(super) fn sweep(&self, keep: &HashSet<String>) -> Result<(), NetworkError> {
        let mut socket = Socket::route()?;
        let links = link::list(&mut socket)?;
        let bridge = links.iter().find(|link| self.is_bridge(link));
        let bridge = bridge.map(|link| link.index);
        let keep: HashSet<String> = keep.iter().map(|pod| host_interface(pod)).collect();
        for link in &links {
            let on_bridge = bridge.is_some() && link.master == bridge;
            let alias = link.alias.as_deref().unwrap_or_default();
            let ours = link.kind.as_deref() == Some("veth")
                && is_host_interface(&link.name)
                && (on_bridge || alias.starts_with(&self.alias("")));
            if ours && !keep.contains(&link.name) {
                link::delete(&mut socket, &link.name)?;
            }
        }
        Ok(())
    }

    /// The bridge, made or repaired if need be. If nothing has changed since the last time this is
    /// one question to the kernel and one file read.
    fn whole(&self, pods: Pods) -> Result<Standing, NetworkError> {
        let known = *self.standing();
        if let Some(standing) = known
            && nftables::generation(&mut Socket::netfilter()?)? == standing.rules
            && forwards()
        {
            return Ok(standing);
        }
        self.repair_standing(&mut self.standing(), pods)
    }

    /// The lock is held while the kernel is asked, against the custom of this crate: ten first
    /// pods need one bridge, and none can go on before it is there.
    fn repair_standing(
        &self,
        known: &mut MutexGuard<Option<Standing>>,
        pods: Pods,
    ) -> Result<Standing, NetworkError> {
        **known = None;
        let mut socket = Socket::route()?;
        let (index, mtu) = self.repair_bridge(&mut socket, pods)?;
        if !forwards() {
            std::fs::write(IP_FORWARD, "1").map_err(|source| NetworkError::Sysctl {
                path: IP_FORWARD,
                value: "1",
                source,
            })?;
        }
        let rules = self.repair_rules()?;
        let standing = Standing { index, mtu, rules };
        **known = Some(standing);
        Ok(standing)
    }

    fn repair_bridge(&self, socket: &mut Socket, pods: Pods) -> Result<(u32, u32), NetworkError> {
        let NetworkConfig { bridge, range, .. } = &self.config;
        let routes = link::routes(socket)?;
        let found = link::find(socket, bridge)?;
        let index = found.as_ref().map(|link| link.index);
        let gateway = (range.gateway(), range.prefix());
        let has_address = match index {
            Some(index) => link::addresses(socket, index)?.contains(&gateway),
            None => false,
        };
        // Before anything is made: a bridge that can't have its address is of no use.
        if !has_address {
            let clash = routes.iter().find(|route| {
                route.prefix > 0
                    && (index.is_none() || route.link != index)
                    && range.overlaps(route.destination, route.prefix)
            });
            if let Some(route) = clash {
                return Err(NetworkError::RangeInUse {
                    range: *range,
                    route: format!("{}/{}", route.destination, route.prefix),
                });
            }
        }
        let mtu = match self.config.mtu {
            Some(mtu) => mtu,
            None => uplink_mtu(socket, &routes, index)?,
        };
        let link = match found {
            Some(link) if !self.is_bridge(&link) => {
                return Err(NetworkError::NotABridge {
                    name: bridge.clone(),
                    kind: link.kind.unwrap_or_else(|| "physical".to_owned()),
                });
            }
            Some(link) => link,
            None => {
                link::create_bridge(socket, bridge, link::mac_of(range.gateway()), mtu)?;
                let made = link::find(socket, bridge)?
                    .ok_or_else(|| NetworkError::kernel(bridge, Errno::ENODEV))?;
                self.rejoin(socket, made.index, pods);
                made
            }
        };
        let mut batch = Batch::default();
        if !link.up {
            link::set_up(&mut batch, link.index, bridge);
        }
        if !has_address {
            link::add_address(&mut batch, link.index, bridge, range.gateway(), *range);
        }
        socket.execute(&batch)?;
        Ok((link.index, mtu))
    }

    /// Puts the pods that lost their bridge on the new one.
    fn rejoin(&self, socket: &mut Socket, bridge: u32, pods: Pods) {
        for pod in &pods() {
            // A pod whose pair is not there is attached or detached right now, or after this.
            let _ = link::join_bridge(socket, &host_interface(pod), &self.alias(pod), bridge);
        }
    }

    fn repair_rules(&self) -> Result<Generation, NetworkError> {
        let table = nftables::Table {
            name: &self.config.bridge,
            range: self.config.range,
            masquerade: self.config.masquerade,
        };
        let mut socket = Socket::netfilter()?;
        // Read first: a change while the table is looked at is seen the next time.
        let before = nftables::generation(&mut socket)?;
        if nftables::is_there(&mut socket, &table)? {
            return Ok(before);
        }
        nftables::replace(&mut socket, &table)?;
        nftables::generation(&mut socket)
    }

    fn make_pair(
        &self,
        standing: Standing,
        socket: &mut Socket,
        pod: &str,
        mac: link::Mac,
        connected: &Connected,
    ) -> Result<(), NetworkError> {
        let host = host_interface(pod);
        let pair = link::VethPair {
            host: &host,
            alias: &self.alias(pod),
            bridge: standing.index,
            mtu: standing.mtu,
            mac,
        };
        let namespace = connected.namespace.as_fd();
        match link::create_veth(socket, &pair, namespace) {
            Err(error) if error.is(Errno::EEXIST) => {}
            result => return result,
        }
        if link::find(socket, &host)?.is_none() {
            return Err(NetworkError::InterfaceTaken {
                netns: connected.netns.clone(),
            });
        }
        let inside = connected.inside(|socket| link::find(socket, POD_INTERFACE))?;
        if inside.and_then(|link| link.mac) == Some(mac) {
            return link::join_bridge(socket, &host, pair.alias, standing.index);
        }
        // The pair leads elsewhere: to a namespace that was lost.
        link::delete(socket, &host)?;
        link::create_veth(socket, &pair, namespace)
    }

    fn is_gone(&self, socket: &mut Socket, standing: Standing) -> bool {
        !matches!(
            link::find(socket, &self.config.bridge),
            Ok(Some(link)) if link.index == standing.index
        )
    }

    fn is_bridge(&self, link: &link::Link) -> bool {
        link.name == self.config.bridge && link.kind.as_deref() == Some("bridge")
    }

    /// What `ip link` shows beside a pod's interface.
    fn alias(&self, pod: &str) -> String {
        let mut alias = format!("{} pod {pod}", self.config.bridge);
        let end = alias.floor_char_boundary(ALIAS_BYTES);
        alias.truncate(end);
        alias
    }

    fn standing(&self) -> MutexGuard<'_, Option<Standing>> {
        self.standing.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

const HOST_PREFIX: &str = "rr";
const HOST_HASH_BYTES: usize = 6;

/// The name of the node's end of a pod's pair: 14 of the 15 bytes that a name may have.
pub(super) fn host_interface(pod: &str) -> String {
    let hash = Sha256::digest(pod.as_bytes());
    let mut name = HOST_PREFIX.to_owned();
    for byte in hash.iter().take(HOST_HASH_BYTES) {
        name.push_str(&format!("{byte:02x}"));
    }
    name
}

fn is_host_interface(name: &str) -> bool {
    name.strip_prefix(HOST_PREFIX).is_some_and(|hash| {
        hash.len() == 2 * HOST_HASH_BYTES && hash.bytes().all(|byte| byte.is_ascii_hexdigit())
    })
}

fn forwards() -> bool {
    std::fs::read(IP_FORWARD).is_ok_and(|value| value.first() == Some(&b'1'))
}

/// The MTU of the link that the best default route leads out of.
fn uplink_mtu(
    socket: &mut Socket,
    routes: &[link::Route],
    bridge: Option<u32>,
) -> Result<u32, NetworkError> {
    let uplink = routes
        .iter()
        .filter(|route| route.prefix == 0 && route.link != bridge)
        .min_by_key(|route| route.metric)
        .and_then(|route| route.link);
    let link = match uplink {
        Some(uplink) => link::at(socket, uplink)?,
        None => None,
    };
    Ok(link.map_or(DEFAULT_MTU, |link| link.mtu))
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
