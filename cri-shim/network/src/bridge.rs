//! What the embedded network has in the kernel: the bridge, the rules, a veth pair for each pod.
//! Everything here blocks, for microseconds to a few milliseconds.

use std::collections::HashSet;
use std::net::{IpAddr, Ipv6Addr};
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Mutex, MutexGuard, PoisonError};

use nix::errno::Errno;
use sha2::{Digest, Sha256};

use super::address::Range;
use super::conntrack::{self, Stale};
use super::forwarding;
use super::host_ports::Mapping;
use super::netlink::{Batch, Socket};
use super::nftables::{self, Generation};
use super::{NetworkConfig, NetworkError, POD_INTERFACE, link, namespace};

/// Addresses that nobody has, of RFC 5737 and RFC 3849: the way to them is the default route.
const ELSEWHERE: [IpAddr; 2] = [
    IpAddr::V4(std::net::Ipv4Addr::new(203, 0, 113, 1)),
    IpAddr::V6(std::net::Ipv6Addr::new(0x2001, 0xdb8, 0, 0, 0, 0, 0, 1)),
];

/// Ethernet's, for a node without a default route.
const DEFAULT_MTU: u32 = 1500;

/// The smallest MTU with which an interface has IPv6.
const IPV6_MIN_MTU: u32 = 1280;

/// IFALIASZ, with its NUL.
const ALIAS_BYTES: usize = 255;

/// The bridge and its rules, as configured.
pub(super) struct Bridge {
    config: NetworkConfig,
    /// What new pods get addresses of.
    ranges: Vec<Range>,
    /// What was found or made last.
    standing: Mutex<Option<Standing>>,
    /// Whether this server has made the table: an older one's may be of another shape.
    made_table: AtomicBool,
}

/// What is to be there for pods.
pub(super) struct Live {
    /// Those that have an interface.
    pub pods: Vec<String>,
    pub addresses: Vec<IpAddr>,
    pub mappings: Vec<Mapping>,
}

/// Tells what is to be there. Only a bridge or a table that is made anew asks.
type Pods<'a> = &'a dyn Fn() -> Live;

/// A bridge that was whole when it was looked at.
#[derive(Clone, Copy)]
struct Standing {
    index: u32,
    mtu: u32,
    /// Whether host ports are at ::1 too.
    loopback6: bool,
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
    pub(super) fn new(config: NetworkConfig, ranges: Vec<Range>) -> Self {
        Bridge {
            config,
            ranges,
            standing: Mutex::new(None),
            made_table: AtomicBool::new(false),
        }
    }

    /// Looks at everything, and makes what is missing. `pods` are those that have an interface: if
    /// the bridge had to be made anew, they are put back on it.
    pub(super) fn repair(&self, pods: Pods) -> Result<(), NetworkError> {
        self.repair_standing(&mut self.standing(), false, pods)
            .map(drop)
    }

    /// Makes the table anew, if there is a bridge or a pod that wants one.
    pub(super) fn renew(&self, pods: Pods) -> Result<(), NetworkError> {
        let there = link::find(&mut Socket::route()?, &self.config.bridge)?.is_some();
        if there || !pods().addresses.is_empty() {
            self.repair_standing(&mut self.standing(), true, pods)?;
        }
        Ok(())
    }

    /// Makes `pod`'s pair of interfaces, or finds it. It has no address yet.
    pub(super) fn connect(
        &self,
        pod: &str,
        mac: link::Mac,
        netns: &Path,
        pods: Pods,
    ) -> Result<Connected, NetworkError> {
        let connected = Connected {
            namespace: namespace::open(netns)?,
            netns: netns.to_owned(),
        };
        let standing = self.whole(pods)?;
        let mut socket = Socket::route()?;
        let standing = self.with_mtu_of_uplink(&mut socket, standing, pods)?;
        match self.make_pair(standing, &mut socket, pod, mac, &connected) {
            // Nothing tells that somebody deleted the bridge, but that it is not there.
            Err(_) if self.is_gone(&mut socket, standing) => {
                let standing = self.repair_standing(&mut self.standing(), false, pods)?;
                self.make_pair(standing, &mut socket, pod, mac, &connected)?;
            }
            result => result?,
        }
        Ok(connected)
    }

    /// Gives the pod's interface its addresses and the pod its default routes. Done again it
    /// changes nothing.
    pub(super) fn configure(
        &self,
        connected: &Connected,
        addresses: &[IpAddr],
        mac: link::Mac,
    ) -> Result<(), NetworkError> {
        connected.inside(|socket| {
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
                let Some(range) = self.range_for(*address) else {
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

    /// The range that new pods get addresses like this one of.
    fn range_for(&self, address: IpAddr) -> Option<Range> {
        let mut ranges = self.ranges.iter();
        ranges
            .find(|range| range.is_ipv6() == address.is_ipv6())
            .copied()
    }

    /// Opens host ports. What a foreign hand took away is made anew with it.
    pub(super) fn publish(&self, mappings: &[Mapping], pods: Pods) -> Result<(), NetworkError> {
        let known = &mut self.standing();
        let name = &self.config.bridge;
        match known
            .as_ref()
            .map(|standing| (standing.index, standing.loopback6))
        {
            Some((index, loopback6)) if loopback6 == forwarding::can_translate_loopback6() => {
                self.route_loopbacks(&mut Socket::route()?, index, loopback6, mappings)?;
                self.change_rules(known, |socket| nftables::publish(socket, name, mappings))
                    .or_else(|_| self.repair_standing(known, true, pods).map(drop))?;
            }
            _ => drop(self.repair_standing(known, true, pods)?),
        }
        forget_flows(mappings, Stale::Elsewhere);
        Ok(())
    }

    /// Has what host ports at 127.0.0.1 and ::1 are answered with find its way.
    fn route_loopbacks(
        &self,
        socket: &mut Socket,
        index: u32,
        loopback6: bool,
        mappings: &[Mapping],
    ) -> Result<(), NetworkError> {
        if mappings.iter().any(|mapping| mapping.address.is_ipv4()) {
            forwarding::route_localnet(&self.config.bridge)?;
        }
        let mut batch = Batch::default();
        if loopback6 && mappings.iter().any(|mapping| mapping.address.is_ipv6()) {
            link::add_loopback_route(&mut batch, index);
        }
        socket.execute(&batch).map(drop)
    }

    /// Closes host ports. `forget` makes them nobody's: until then no other pod gets them, and
    /// what is published after that comes after this.
    pub(super) fn withdraw(
        &self,
        mappings: &[Mapping],
        forget: impl FnOnce(),
        pods: Pods,
    ) -> Result<(), NetworkError> {
        let known = &mut self.standing();
        forget();
        let name = &self.config.bridge;
        self.change_rules(known, |socket| nftables::withdraw(socket, name, mappings))
            .or_else(|_| self.repair_standing(known, true, pods).map(drop))?;
        forget_flows(mappings, Stale::ToThePod);
        Ok(())
    }

    /// A change of our own is none that makes anybody look at the table again.
    fn change_rules(
        &self,
        known: &mut Option<Standing>,
        change: impl FnOnce(&mut Socket) -> Result<(), NetworkError>,
    ) -> Result<(), NetworkError> {
        let mut socket = Socket::netfilter()?;
        let before = nftables::generation(&mut socket)?;
        change(&mut socket)?;
        let after = nftables::generation(&mut socket)?;
        if let Some(standing) = known
            && standing.rules == before
            && after.follows(before)
        {
            standing.rules = after;
        }
        Ok(())
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

    /// Deletes every interface of rrun's but those in `keep`, and makes those refuse router
    /// advertisements and redirects.
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
            if !ours {
                continue;
            }
            if !keep.contains(&link.name) {
                link::delete(&mut socket, &link.name)?;
            } else if let Err(error) = forwarding::refuse_routers(&link.name) {
                // The interface may be an earlier version's, so this can be its first refusal.
                log::error!("{error}");
            }
        }
        Ok(())
    }

    /// Makes the interfaces of running pods refuse router advertisements and redirects. After a
    /// failure for one pod, the others still follow; the error is the last one.
    pub(super) fn refuse_routers(&self, netns: &[PathBuf]) -> Result<(), NetworkError> {
        let refuse = |path: &PathBuf| {
            namespace::enter(namespace::open(path)?.as_fd(), path)?;
            forwarding::refuse_routers_in_running_pod(POD_INTERFACE)
        };
        namespace::on_own_thread(|| {
            let mut last = Ok(());
            for path in netns {
                last = refuse(path).and(last);
            }
            last
        })
    }

    /// The bridge, made or repaired if need be. If nothing has changed since the last time this is
    /// one question to the kernel and one file read.
    fn whole(&self, pods: Pods) -> Result<Standing, NetworkError> {
        let known = *self.standing();
        if let Some(standing) = known
            && nftables::generation(&mut Socket::netfilter()?)? == standing.rules
            && self.forwards()
        {
            return Ok(standing);
        }
        self.repair_standing(&mut self.standing(), false, pods)
    }

    /// Follows the uplink's MTU, unless one is configured. Pods that are there keep theirs.
    fn with_mtu_of_uplink(
        &self,
        socket: &mut Socket,
        standing: Standing,
        pods: Pods,
    ) -> Result<Standing, NetworkError> {
        let mtu = self.mtu(socket, Some(standing.index))?;
        if mtu == standing.mtu {
            return Ok(standing);
        }
        if standing.mtu < IPV6_MIN_MTU && mtu >= IPV6_MIN_MTU {
            // The bridge gets IPv6 again, but the kernel has forgotten its IPv6 addresses and routes.
            return self.repair_standing(&mut self.standing(), false, pods);
        }
        self.set_mtu(socket, standing.index, standing.mtu, mtu)?;
        if let Some(known) = self.standing().as_mut() {
            known.mtu = mtu;
        }
        Ok(Standing { mtu, ..standing })
    }

    /// Sets the bridge's MTU. Below IPv6's minimum the bridge has no IPv6. When the MTU rises above
    /// it, IPv6 begins with the node's default sysctls. So the bridge is down until it refuses
    /// router advertisements.
    fn set_mtu(
        &self,
        socket: &mut Socket,
        index: u32,
        from: u32,
        to: u32,
    ) -> Result<(), NetworkError> {
        let name = &self.config.bridge;
        let gets_ipv6 = from < IPV6_MIN_MTU && to >= IPV6_MIN_MTU;
        let mut batch = Batch::default();
        if gets_ipv6 {
            link::set_down(&mut batch, index, name);
        }
        link::set_mtu(&mut batch, index, to);
        socket.execute(&batch)?;
        if gets_ipv6 {
            forwarding::refuse_routers(name)?;
            let mut batch = Batch::default();
            link::set_up(&mut batch, index, name);
            socket.execute(&batch)?;
        }
        Ok(())
    }

    /// The MTU of new pods: the configured one, or that of the link to everywhere else.
    fn mtu(&self, socket: &mut Socket, bridge: Option<u32>) -> Result<u32, NetworkError> {
        if let Some(mtu) = self.config.mtu {
            return Ok(mtu);
        }
        for elsewhere in ELSEWHERE {
            let uplink = link::way_to(socket, elsewhere)?;
            if let Some(index) = uplink.filter(|index| Some(*index) != bridge)
                && let Some(link) = link::at(socket, index)?
            {
                // The loopback's is higher than any veth's.
                return Ok(link.mtu.min(*NetworkConfig::MTU.end()));
            }
        }
        Ok(DEFAULT_MTU)
    }

    /// Whether the node passes packets on, of each family that pods have.
    fn forwards(&self) -> bool {
        let mut ranges = self.ranges.iter();
        ranges.all(|range| forwarding::is_on(range.is_ipv6()))
    }

    /// The lock is held while the kernel is asked, against the custom of this crate: ten first
    /// pods need one bridge, and none can go on before it is there.
    fn repair_standing(
        &self,
        known: &mut Option<Standing>,
        renew: bool,
        pods: Pods,
    ) -> Result<Standing, NetworkError> {
        *known = None;
        let mut socket = Socket::route()?;
        let live = pods();
        let (index, mtu, ranges) = self.repair_bridge(&mut socket, &live)?;
        for range in &self.ranges {
            forwarding::turn_on(range.is_ipv6())?;
        }
        let loopback6 = forwarding::can_translate_loopback6();
        self.route_loopbacks(&mut socket, index, loopback6, &live.mappings)?;
        let rules = self.repair_rules(renew, ranges, loopback6, live.mappings)?;
        let standing = Standing {
            index,
            mtu,
            loopback6,
            rules,
        };
        *known = Some(standing);
        Ok(standing)
    }

    /// Gives the bridge, its MTU, and the ranges that there are pods of.
    fn repair_bridge(
        &self,
        socket: &mut Socket,
        live: &Live,
    ) -> Result<(u32, u32, Vec<Range>), NetworkError> {
        let bridge = &self.config.bridge;
        let found = link::find(socket, bridge)?;
        let index = found.as_ref().map(|link| link.index);
        let has = match index {
            Some(index) => link::addresses(socket, index)?,
            None => Vec::new(),
        };
        let missing: Vec<Range> = self
            .ranges
            .iter()
            .filter(|range| !has.contains(&(range.gateway(), range.prefix())))
            .copied()
            .collect();
        // Before anything is made: a bridge that can't have its address is of no use.
        for range in &missing {
            let routes = link::routes(socket, range.network())?;
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
        let mtu = self.mtu(socket, index)?;
        let link = match found {
            Some(link) if !self.is_bridge(&link) => {
                return Err(NetworkError::NotABridge {
                    name: bridge.clone(),
                    kind: link.kind.unwrap_or_else(|| "physical".to_owned()),
                });
            }
            Some(link) => {
                // An earlier version of rrun, or another program, may have made it.
                let has_accepted = forwarding::accepts_advertisements(bridge);
                forwarding::refuse_routers(bridge)?;
                if has_accepted {
                    forget_advertisements(socket, link.index, &has)?;
                }
                link
            }
            None => {
                let gateways: Vec<IpAddr> = self.ranges.iter().map(|one| one.gateway()).collect();
                link::create_bridge(socket, bridge, link::mac_of(&gateways), mtu)?;
                let made = link::find(socket, bridge)?
                    .ok_or_else(|| NetworkError::kernel(bridge, Errno::ENODEV))?;
                // The bridge is not up and has no ports yet.
                forwarding::refuse_routers(bridge)?;
                self.rejoin(socket, made.index, &live.pods);
                made
            }
        };
        if link.mtu != mtu {
            self.set_mtu(socket, link.index, link.mtu, mtu)?;
        }
        let mut batch = Batch::default();
        if !link.up {
            link::set_up(&mut batch, link.index, bridge);
        }
        for range in missing {
            let (gateway, prefix) = (range.gateway(), range.prefix());
            let broadcast = range.broadcast();
            link::add_address(&mut batch, link.index, bridge, gateway, prefix, broadcast);
        }
        // Without one the kernel does not look for the neighbours that it passes packets on to.
        if let Some(mac) = link.mac
            && self.ranges.iter().any(|range| range.is_ipv6())
        {
            let own = link::link_local_of(mac).into();
            link::add_address(&mut batch, link.index, bridge, own, 64, None);
        }
        // Of a configuration before this one: as long as there are pods of it.
        let mut ranges = self.ranges.clone();
        for (gateway, prefix) in has {
            match Range::of_gateway(gateway, prefix) {
                Some(range) if ranges.contains(&range) => {}
                Some(range) if live.addresses.iter().any(|one| range.contains(*one)) => {
                    ranges.push(range);
                }
                _ => link::delete_address(&mut batch, link.index, gateway, prefix),
            }
        }
        socket.execute(&batch)?;
        Ok((link.index, mtu, ranges))
    }

    /// Puts the pods that lost their bridge on the new one.
    fn rejoin(&self, socket: &mut Socket, bridge: u32, pods: &[String]) {
        for pod in pods {
            let host = host_interface(pod);
            // A pod whose pair is not there is attached or detached right now, or after this.
            let _ = forwarding::refuse_routers(&host)
                .and_then(|()| link::join_bridge(socket, &host, &self.alias(pod), bridge));
        }
    }

    fn repair_rules(
        &self,
        renew: bool,
        ranges: Vec<Range>,
        loopback6: bool,
        mappings: Vec<Mapping>,
    ) -> Result<Generation, NetworkError> {
        let table = nftables::Table {
            name: &self.config.bridge,
            ranges,
            masquerade: self.config.masquerade,
            loopback6,
            mappings,
        };
        let mut socket = Socket::netfilter()?;
        // Read first: a change while the table is looked at is seen the next time.
        let before = nftables::generation(&mut socket)?;
        let old = renew || !self.made_table.load(Ordering::Relaxed);
        if !old && nftables::is_there(&mut socket, &table)? {
            return Ok(before);
        }
        nftables::replace(&mut socket, &table)?;
        forget_flows(&table.mappings, Stale::Elsewhere);
        self.made_table.store(true, Ordering::Relaxed);
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
        match self.create_pair(socket, &pair, namespace) {
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
            forwarding::refuse_routers(&host)?;
            return link::join_bridge(socket, &host, pair.alias, standing.index);
        }
        // The pair leads elsewhere: to a namespace that was lost.
        link::delete(socket, &host)?;
        self.create_pair(socket, &pair, namespace)
    }

    /// Makes a pair of interfaces. The node's end refuses router advertisements, too: if somebody
    /// deletes the bridge, packets that arrive at that end are for the node itself.
    fn create_pair(
        &self,
        socket: &mut Socket,
        pair: &link::VethPair,
        namespace: BorrowedFd,
    ) -> Result<(), NetworkError> {
        link::create_veth(socket, pair, namespace)?;
        forwarding::refuse_routers(pair.host)?;
        link::set_up_port(socket, pair.host, pair.alias)
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

/// Deletes the routes that pods may have advertised while the bridge accepted advertisements. The
/// kernel would keep them for as long as the pods chose. `index` is the bridge and `has` are its
/// addresses. The routes of these addresses stay: deleting an address deletes its route.
fn forget_advertisements(
    socket: &mut Socket,
    index: u32,
    has: &[(IpAddr, u8)],
) -> Result<(), NetworkError> {
    let any = Ipv6Addr::UNSPECIFIED.into();
    for route in link::routes(socket, any)? {
        let of_an_address = |(address, prefix): &(IpAddr, u8)| {
            Range::of_gateway(*address, *prefix)
                .is_some_and(|range| range.overlaps(route.destination, route.prefix))
        };
        let advertised = route.link == Some(index)
            && route.is_advertised()
            && (route.prefix == 0 || !has.iter().any(of_an_address));
        if advertised {
            link::delete_route(socket, index, &route)?;
        }
    }
    Ok(())
}

/// Host ports work without this, but for those who have sent to the port before.
fn forget_flows(mappings: &[Mapping], stale: Stale) {
    if let Err(error) = conntrack::forget(mappings, stale) {
        log::warn!("packets for host ports may go on to where they went before: {error}");
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
