//! The bridge as a network device: found or made, with its addresses and its MTU.

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};

use nix::errno::Errno;

use super::pair;
use crate::address::Range;
use crate::config::NetworkConfig;
use crate::error::NetworkError;
use crate::forwarding;
use crate::link::{self, Link};
use crate::netlink::{Batch, Socket};

/// Addresses that nobody has, of RFC 5737 and RFC 3849: the way to them is the default route.
const UNASSIGNED: [IpAddr; 2] = [
    IpAddr::V4(Ipv4Addr::new(203, 0, 113, 1)),
    IpAddr::V6(Ipv6Addr::new(0x2001, 0xdb8, 0, 0, 0, 0, 0, 1)),
];

/// Ethernet's, for a node without a default route.
const DEFAULT_MTU: u32 = 1500;

/// The smallest MTU with which an interface has IPv6.
const IPV6_MIN_MTU: u32 = 1280;

/// The bridge, as configured.
pub(super) struct BridgeDevice<'a> {
    pub name: &'a str,
    /// What new pods get addresses of.
    pub ranges: &'a [Range],
    /// `None`: the uplink's.
    pub mtu: Option<u32>,
}

/// A bridge that is there and has all its addresses.
pub(super) struct Repaired {
    pub index: u32,
    pub mtu: u32,
    /// The ranges that there are pods of.
    pub ranges: Vec<Range>,
}

/// Whether an interface gets IPv6 by this change of its MTU.
pub(super) fn gets_ipv6(from: u32, to: u32) -> bool {
    from < IPV6_MIN_MTU && to >= IPV6_MIN_MTU
}

impl BridgeDevice<'_> {
    pub(super) fn is_bridge(&self, link: &Link) -> bool {
        link.name == self.name && link.kind.as_deref() == Some("bridge")
    }

    /// Finds or makes the bridge, and gives it what it lacks. A bridge that had to be made gets
    /// `pods` as its ports again. `addresses` are those of pods.
    pub(super) fn repair(
        &self,
        socket: &mut Socket,
        pods: &[String],
        addresses: &[IpAddr],
    ) -> Result<Repaired, NetworkError> {
        let found = link::find(socket, self.name)?;
        let index = found.as_ref().map(|link| link.index);
        let has = match index {
            Some(index) => link::addresses(socket, index)?,
            None => Vec::new(),
        };
        let is_missing = |range: &&Range| !has.contains(&(range.gateway(), range.prefix()));
        let missing: Vec<Range> = self.ranges.iter().filter(is_missing).copied().collect();
        // Before anything is made: a bridge that can't have its address is of no use.
        for range in &missing {
            refuse_overlap(socket, index, *range)?;
        }
        let mtu = self.mtu_of_pods(socket, index)?;
        let link = match found {
            Some(link) => self.adopt(socket, link, &has)?,
            None => self.create(socket, mtu, pods)?,
        };
        if link.mtu != mtu {
            self.set_mtu(socket, link.index, link.mtu, mtu)?;
        }
        let mut batch = Batch::default();
        if !link.up {
            link::set_up(&mut batch, link.index, self.name);
        }
        self.add_addresses(&mut batch, &link, &missing);
        let ranges = self.drop_old_addresses(&mut batch, link.index, has, addresses);
        socket.execute(&batch)?;
        Ok(Repaired {
            index: link.index,
            mtu,
            ranges,
        })
    }

    /// Takes the bridge that is there, which an earlier version of rrun, or another program, may
    /// have made. `has` are its addresses.
    fn adopt(
        &self,
        socket: &mut Socket,
        link: Link,
        has: &[(IpAddr, u8)],
    ) -> Result<Link, NetworkError> {
        if !self.is_bridge(&link) {
            return Err(NetworkError::NotABridge {
                name: self.name.to_owned(),
                kind: link.kind.unwrap_or_else(|| "physical".to_owned()),
            });
        }
        let has_accepted = forwarding::accepts_advertisements(self.name);
        forwarding::refuse_routers(self.name)?;
        if has_accepted {
            forget_advertisements(socket, link.index, has)?;
        }
        Ok(link)
    }

    fn create(&self, socket: &mut Socket, mtu: u32, pods: &[String]) -> Result<Link, NetworkError> {
        let gateways: Vec<IpAddr> = self.ranges.iter().map(|one| one.gateway()).collect();
        link::create_bridge(socket, self.name, link::mac_of(&gateways), mtu)?;
        let made = link::find(socket, self.name)?
            .ok_or_else(|| NetworkError::kernel(self.name, Errno::ENODEV))?;
        // The bridge is not up and has no ports yet.
        forwarding::refuse_routers(self.name)?;
        pair::rejoin(socket, self.name, made.index, pods);
        Ok(made)
    }

    fn add_addresses(&self, batch: &mut Batch, link: &Link, missing: &[Range]) {
        for range in missing {
            let (gateway, prefix) = (range.gateway(), range.prefix());
            let broadcast = range.broadcast();
            link::add_address(batch, link.index, self.name, gateway, prefix, broadcast);
        }
        // Without one the kernel does not look for the neighbours that it passes packets on to.
        if let Some(mac) = link.mac
            && self.ranges.iter().any(|range| range.is_ipv6())
        {
            let own = link::link_local_of(mac).into();
            link::add_address(batch, link.index, self.name, own, 64, None);
        }
    }

    /// Deletes the addresses of earlier configurations that no pod needs any more. Returns the
    /// ranges of the others, and those of this configuration.
    fn drop_old_addresses(
        &self,
        batch: &mut Batch,
        index: u32,
        has: Vec<(IpAddr, u8)>,
        pods: &[IpAddr],
    ) -> Vec<Range> {
        let mut ranges = self.ranges.to_vec();
        for (gateway, prefix) in has {
            match Range::of_gateway(gateway, prefix) {
                Some(range) if ranges.contains(&range) => {}
                Some(range) if pods.iter().any(|one| range.contains(*one)) => ranges.push(range),
                _ => link::delete_address(batch, index, gateway, prefix),
            }
        }
        ranges
    }

    /// Sets the bridge's MTU. Below IPv6's minimum the bridge has no IPv6. When the MTU rises above
    /// it, IPv6 begins with the node's default sysctls. So the bridge is down until it refuses
    /// router advertisements.
    pub(super) fn set_mtu(
        &self,
        socket: &mut Socket,
        index: u32,
        from: u32,
        to: u32,
    ) -> Result<(), NetworkError> {
        let gets_ipv6 = gets_ipv6(from, to);
        let mut batch = Batch::default();
        if gets_ipv6 {
            link::set_down(&mut batch, index, self.name);
        }
        link::set_mtu(&mut batch, index, to);
        socket.execute(&batch)?;
        if gets_ipv6 {
            forwarding::refuse_routers(self.name)?;
            let mut batch = Batch::default();
            link::set_up(&mut batch, index, self.name);
            socket.execute(&batch)?;
        }
        Ok(())
    }

    /// The MTU of new pods: the configured one, or that of the uplink. `bridge` is the bridge's
    /// index, if it is there.
    pub(super) fn mtu_of_pods(
        &self,
        socket: &mut Socket,
        bridge: Option<u32>,
    ) -> Result<u32, NetworkError> {
        if let Some(mtu) = self.mtu {
            return Ok(mtu);
        }
        for address in UNASSIGNED {
            let uplink = link::way_to(socket, address)?;
            if let Some(index) = uplink.filter(|index| Some(*index) != bridge)
                && let Some(link) = link::at(socket, index)?
            {
                // The loopback's is higher than any veth's.
                return Ok(link.mtu.min(*NetworkConfig::MTU.end()));
            }
        }
        Ok(DEFAULT_MTU)
    }
}

/// Refuses a range that this node has a route into, other than by the bridge, whose index is
/// `bridge` if it is there.
fn refuse_overlap(
    socket: &mut Socket,
    bridge: Option<u32>,
    range: Range,
) -> Result<(), NetworkError> {
    let routes = link::routes(socket, range.network())?;
    let clash = routes.iter().find(|route| {
        route.prefix > 0
            && (bridge.is_none() || route.link != bridge)
            && range.overlaps(route.destination, route.prefix)
    });
    match clash {
        Some(route) => Err(NetworkError::RangeInUse {
            range,
            route: format!("{}/{}", route.destination, route.prefix),
        }),
        None => Ok(()),
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
