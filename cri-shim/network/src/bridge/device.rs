//! The bridge as a network device. The functions in this module create the bridge, and set its
//! addresses and its MTU.

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};

use nix::errno::Errno;

use super::{DesiredPod, pair};
use crate::address::Range;
use crate::config::NetworkConfig;
use crate::error::NetworkError;
use crate::forwarding;
use crate::link::{self, Link, Mac};
use crate::netlink::{Batch, Socket};

/// Addresses from RFC 5737 and RFC 3849, which are not assigned to any machine. For this reason,
/// the kernel's route lookup for one of these addresses returns the default route.
const UNASSIGNED: [IpAddr; 2] = [
    IpAddr::V4(Ipv4Addr::new(203, 0, 113, 1)),
    IpAddr::V6(Ipv6Addr::new(0x2001, 0xdb8, 0, 0, 0, 0, 0, 1)),
];

/// The MTU of new pods on a node that has no default route. The value is the MTU of Ethernet.
const DEFAULT_MTU: u32 = 1500;

/// The smallest MTU with which an interface supports IPv6.
const IPV6_MIN_MTU: u32 = 1280;

/// The bridge's settings from the configuration.
pub(super) struct BridgeDevice<'a> {
    pub name: &'a str,
    /// The ranges from which new pods get their addresses.
    pub ranges: &'a [Range],
    /// The MTU. `None` means the MTU of the uplink.
    pub mtu: Option<u32>,
}

/// The bridge's interface index, MTU and ranges after the bridge was repaired.
pub(super) struct Repaired {
    pub index: u32,
    pub mtu: u32,
    pub mac: Option<Mac>,
    /// The ranges in which pods can have addresses.
    pub ranges: Vec<Range>,
}

/// Returns whether the kernel enables IPv6 on an interface when the interface's MTU changes from
/// `from` to `to`.
pub(super) fn gets_ipv6(from: u32, to: u32) -> bool {
    from < IPV6_MIN_MTU && to >= IPV6_MIN_MTU
}

impl BridgeDevice<'_> {
    pub(super) fn is_bridge(&self, link: &Link) -> bool {
        link.name == self.name && link.kind.as_deref() == Some("bridge")
    }

    /// Creates the bridge if it does not exist, and adds missing addresses to it. If the bridge is
    /// created, the interfaces of `pods` become its ports. `addresses` are the assigned addresses
    /// of all pods.
    pub(super) fn repair(
        &self,
        socket: &mut Socket,
        pods: &[DesiredPod],
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
        // The check for overlapping routes is made before any change. If a pod range overlaps a
        // route, the bridge cannot get its address and must not be created.
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
            mac: link.mac,
            ranges,
        })
    }

    /// Checks and configures an existing bridge, which an earlier version of rrun or another
    /// program may have created. `has` contains the bridge's addresses.
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
        link::stop_snooping(socket, link.index, self.name)?;
        let has_accepted = forwarding::accepts_advertisements(self.name)?;
        forwarding::refuse_routers(self.name)?;
        if has_accepted {
            forget_advertisements(socket, link.index, has)?;
        }
        Ok(link)
    }

    fn create(
        &self,
        socket: &mut Socket,
        mtu: u32,
        pods: &[DesiredPod],
    ) -> Result<Link, NetworkError> {
        link::create_bridge(socket, self.name, self.mac(), mtu)?;
        let made = link::find(socket, self.name)?
            .ok_or_else(|| NetworkError::kernel(self.name, Errno::ENODEV))?;
        // The bridge is still down and has no ports. It therefore receives no router advertisement
        // before `refuse_routers` returns.
        forwarding::refuse_routers(self.name)?;
        pair::rejoin(socket, self.name, made.index, pods);
        Ok(made)
    }

    /// Returns the hardware address of a bridge that rrun creates.
    pub(super) fn mac(&self) -> Mac {
        let gateways: Vec<IpAddr> = self.ranges.iter().map(|one| one.gateway()).collect();
        link::mac_of(&gateways)
    }

    fn add_addresses(&self, batch: &mut Batch, link: &Link, missing: &[Range]) {
        for range in missing {
            let (gateway, prefix) = (range.gateway(), range.prefix());
            let broadcast = range.broadcast();
            link::add_address(batch, link.index, self.name, gateway, prefix, broadcast);
        }
        // The bridge needs a link-local address. Without it, the kernel cannot forward IPv6 packets
        // to pods, because it does not resolve the pods' link-layer addresses.
        if let Some(mac) = link.mac
            && self.ranges.iter().any(|range| range.is_ipv6())
        {
            let own = link::link_local_of(mac).into();
            link::add_address(batch, link.index, self.name, own, 64, None);
        }
    }

    /// Deletes the bridge's addresses from earlier configurations. An address is not deleted if a
    /// pod still needs it as its gateway. Returns the configured ranges and the ranges of the
    /// bridge's remaining addresses.
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

    /// Sets the bridge's MTU. The bridge has no IPv6 while its MTU is below the minimum for IPv6.
    /// When the MTU rises to this minimum, the kernel enables IPv6 on the bridge with the node's
    /// default sysctls. With these sysctls, the bridge may accept router advertisements. If the MTU
    /// rises to the minimum, this function therefore first sets the bridge down. It sets the bridge
    /// up again after the bridge refuses router advertisements.
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

    /// Returns the MTU of new pods, which is the configured MTU or the MTU of the uplink. `bridge`
    /// is the index of the bridge, if the bridge exists.
    pub(super) fn mtu_of_pods(
        &self,
        socket: &mut Socket,
        bridge: Option<u32>,
    ) -> Result<u32, NetworkError> {
        if let Some(mtu) = self.mtu {
            return Ok(mtu);
        }
        for address in UNASSIGNED {
            let uplink = link::outgoing_link(socket, address)?;
            if let Some(index) = uplink.filter(|index| Some(*index) != bridge)
                && let Some(link) = link::at(socket, index)?
            {
                // The result is limited to the largest MTU of a veth interface. The uplink can be
                // the loopback, and the loopback's MTU is larger.
                return Ok(link.mtu.min(*NetworkConfig::MTU.end()));
            }
        }
        Ok(DEFAULT_MTU)
    }
}

/// Refuses a pod range that overlaps the destination of a route of this node. Routes through the
/// bridge are ignored. `bridge` is the index of the bridge, if the bridge exists.
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

/// Deletes the routes from router advertisements. Pods may have advertised these routes while the
/// bridge accepted router advertisements. Without this deletion, the kernel would keep the routes
/// for the lifetime that the pods chose. `index` is the index of the bridge, and `has` contains the
/// bridge's addresses. The kernel created a route for each of these addresses. This function does
/// not delete those routes, because the kernel deletes each of them together with its address.
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
