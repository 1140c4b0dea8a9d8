//! The rtnetlink messages for links, addresses and routes. See rtnetlink(7) and the kernel's
//! `linux/if_link.h`.

pub(crate) mod neighbour;

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};
use std::os::fd::{AsRawFd, BorrowedFd};
use std::path::Path;

use libc::{
    IFA_ADDRESS, IFA_BROADCAST, IFA_LOCAL, IFLA_ADDRESS, IFLA_AF_SPEC, IFLA_GROUP, IFLA_IFALIAS,
    IFLA_IFNAME, IFLA_INFO_DATA, IFLA_INFO_KIND, IFLA_INFO_SLAVE_DATA, IFLA_INFO_SLAVE_KIND,
    IFLA_LINKINFO, IFLA_MASTER, IFLA_MTU, IFLA_NET_NS_FD, RTA_DST, RTA_GATEWAY, RTA_OIF,
    RTA_PRIORITY, RTM_DELADDR, RTM_DELLINK, RTM_DELROUTE, RTM_GETADDR, RTM_GETLINK, RTM_GETROUTE,
    RTM_NEWADDR, RTM_NEWLINK, RTM_NEWROUTE,
};
use nix::errno::Errno;

use crate::error::NetworkError;
use crate::netlink::{
    Batch, Body, NLM_F_ACK, NLM_F_CREATE, NLM_F_DUMP, NLM_F_EXCL, NLM_F_REPLACE, Reply, Socket,
};

/// The name of a pod's interface in the pod's network namespace.
pub(crate) const POD_INTERFACE: &str = "eth0";

/// The first characters in the name of the node's end of a pod's veth pair.
pub(crate) const HOST_PREFIX: &str = "rr";

const VETH_INFO_PEER: u16 = 1;
const IFLA_BR_FORWARD_DELAY: u16 = 1;
const IFLA_BR_MCAST_SNOOPING: u16 = 23;
const IFLA_BRPORT_HAIRPIN: u16 = 4;
const IFLA_BRPORT_GROUP_FWD_MASK: u16 = 31;
/// The frames that a pod's bridge port forwards like other frames. The bits are the last numbers of
/// the destination addresses 01:80:c2:00:00:00 to 01:80:c2:00:00:0f. By default, a bridge port passes
/// these frames to the node without any check of their source addresses, and learns the source
/// addresses. The kernel always drops the frames to 01:80:c2:00:00:01, whose bit must be 0.
pub(crate) const FORWARDED_GROUPS: u16 = 0xfffd;
const IFLA_INET6_ADDR_GEN_MODE: u16 = 8;
const IN6_ADDR_GEN_MODE_NONE: u8 = 1;

/// The device group of links that are going to be deleted. The bytes of this number are "rrun" in
/// ASCII. Other programs are not likely to use this group.
const DELETION_GROUP: u32 = 0x7272_756e;

/// The metric of the bridge's route to ::1. The loopback's route to ::1 has the lower metric 0. The
/// loopback's route therefore takes precedence.
const LOOPBACK_METRIC: u32 = 1024;

/// The protocol number of routes from router advertisements. See rtnetlink(7).
const RTPROT_RA: u8 = 9;

const LINK_HEADER_BYTES: usize = 16;
const ADDRESS_HEADER_BYTES: usize = 8;
const ROUTE_HEADER_BYTES: usize = 12;

const AF_UNSPEC: u8 = libc::AF_UNSPEC as u8;
const AF_INET: u8 = libc::AF_INET as u8;
const AF_INET6: u8 = libc::AF_INET6 as u8;
const IFA_F_NODAD: u8 = libc::IFA_F_NODAD as u8;
const IFF_UP: u32 = libc::IFF_UP as u32;

/// A hardware address of an Ethernet interface.
pub(crate) type Mac = [u8; 6];

/// Returns a hardware address for a pod with the IP addresses `addresses`. The hardware address is
/// derived from the first IPv4 address, or from the first address if there is no IPv4 address. If
/// an IP address is later assigned to another pod, the other pod gets the same hardware address.
/// Neighbour cache entries for this IP address therefore remain correct. The bit `02` of the first
/// byte marks a locally administered address. Kubernetes networks traditionally use `0a:58` as the
/// first bytes of the hardware addresses of pods.
pub(crate) fn mac_of(addresses: &[IpAddr]) -> Mac {
    let mut all = addresses.iter();
    let like = all.find(|one| one.is_ipv4()).or(addresses.first());
    let [a, b, c, d] = match like {
        Some(IpAddr::V4(address)) => address.octets(),
        Some(IpAddr::V6(address)) => {
            let [.., a, b, c, d] = address.octets();
            [a, b, c, d]
        }
        None => [0; 4],
    };
    [0x0a, 0x58, a, b, c, d]
}

/// Returns the link-local address that is derived from a hardware address. See RFC 4291, appendix
/// A.
pub(crate) fn link_local_of([a, b, c, d, e, f]: Mac) -> Ipv6Addr {
    let mut octets = [0; 16];
    octets[..2].copy_from_slice(&[0xfe, 0x80]);
    octets[8..].copy_from_slice(&[a ^ 2, b, c, 0xff, 0xfe, d, e, f]);
    octets.into()
}

/// The properties of a network link, as the kernel reports them. The type contains only the
/// properties that this crate needs.
pub(crate) struct Link {
    pub index: u32,
    pub name: String,
    pub up: bool,
    pub mtu: u32,
    pub master: Option<u32>,
    /// The kind of link, such as `veth` or `bridge`. A physical link has no kind.
    pub kind: Option<String>,
    pub alias: Option<String>,
    pub mac: Option<Mac>,
}

impl Link {
    pub(crate) fn parse(reply: &Reply) -> Option<Link> {
        let [_, _, _, _, i0, i1, i2, i3, f0, f1, f2, f3, ..] =
            reply.header::<LINK_HEADER_BYTES>()?;
        let attributes = reply.attributes(LINK_HEADER_BYTES);
        let info = attributes.nest(IFLA_LINKINFO);
        Some(Link {
            index: u32::from_ne_bytes([i0, i1, i2, i3]),
            name: attributes.string(IFLA_IFNAME)?.to_owned(),
            up: u32::from_ne_bytes([f0, f1, f2, f3]) & IFF_UP != 0,
            mtu: attributes.u32(IFLA_MTU)?,
            master: attributes.u32(IFLA_MASTER),
            kind: info.string(IFLA_INFO_KIND).map(str::to_owned),
            alias: attributes.string(IFLA_IFALIAS).map(str::to_owned),
            mac: attributes.array(IFLA_ADDRESS),
        })
    }
}

/// Returns the link with the name `name`, if it exists.
pub(crate) fn find(socket: &mut Socket, name: &str) -> Result<Option<Link>, NetworkError> {
    let action = format!("look up the interface {name}");
    query(socket, action, 0, Some(name))
}

/// Returns the link with the index `index`, if it exists.
pub(crate) fn at(socket: &mut Socket, index: u32) -> Result<Option<Link>, NetworkError> {
    query(socket, format!("look up interface {index}"), index, None)
}

fn query(
    socket: &mut Socket,
    action: String,
    index: u32,
    name: Option<&str>,
) -> Result<Option<Link>, NetworkError> {
    let mut batch = Batch::default();
    batch.message(action, RTM_GETLINK, NLM_F_ACK, |body| {
        body.header(&link_header(index, 0));
        if let Some(name) = name {
            body.string(IFLA_IFNAME, name);
        }
    });
    match socket.execute(&batch) {
        Ok(replies) => Ok(replies.iter().find_map(Link::parse)),
        Err(error) if error.is(Errno::ENODEV) => Ok(None),
        Err(error) => Err(error),
    }
}

/// Lists all links of the network namespace.
pub(crate) fn list(socket: &mut Socket) -> Result<Vec<Link>, NetworkError> {
    let mut batch = Batch::default();
    batch.message("list the interfaces", RTM_GETLINK, NLM_F_DUMP, |body| {
        body.header(&link_header(0, 0));
    });
    Ok(socket
        .execute(&batch)?
        .iter()
        .filter_map(Link::parse)
        .collect())
}

/// Creates the bridge `name` with the hardware address `mac`. If the bridge were created without
/// `mac`, its hardware address could change whenever it gets a port.
pub(crate) fn create_bridge(
    socket: &mut Socket,
    name: &str,
    mac: Mac,
    mtu: u32,
) -> Result<(), NetworkError> {
    let mut batch = Batch::default();
    let action = format!("create the bridge {name}");
    let flags = NLM_F_ACK | NLM_F_CREATE | NLM_F_EXCL;
    batch.message(action, RTM_NEWLINK, flags, |body| {
        body.header(&link_header(0, 0));
        body.string(IFLA_IFNAME, name);
        body.bytes(IFLA_ADDRESS, &mac);
        body.u32(IFLA_MTU, mtu);
        body.nest(IFLA_LINKINFO, |info| {
            info.string(IFLA_INFO_KIND, "bridge");
            info.nest(IFLA_INFO_DATA, |data| {
                data.u32(IFLA_BR_FORWARD_DELAY, 0);
                data.bytes(IFLA_BR_MCAST_SNOOPING, &[0]);
            });
        });
    });
    socket.execute(&batch).map(drop)
}

/// Switches multicast snooping of an existing bridge off. With multicast snooping, the bridge
/// believes every IGMP or MLD query, PIM hello and multicast router advertisement from a pod. The
/// pod could then determine which pods receive the frames to a multicast address. Neighbour
/// solicitations of IPv6 are such frames, so the pod could cut off another pod. Without a query, the
/// bridge forwards multicast frames to all ports, with and without snooping.
pub(crate) fn stop_snooping(
    socket: &mut Socket,
    index: u32,
    name: &str,
) -> Result<(), NetworkError> {
    let mut batch = Batch::default();
    let action = format!("switch multicast snooping of the bridge {name} off");
    batch.message(action, RTM_NEWLINK, NLM_F_ACK, |body| {
        body.header(&link_header(index, 0));
        body.nest(IFLA_LINKINFO, |info| {
            info.string(IFLA_INFO_KIND, "bridge");
            info.nest(IFLA_INFO_DATA, |data| {
                data.bytes(IFLA_BR_MCAST_SNOOPING, &[0])
            });
        });
    });
    socket.execute(&batch).map(drop)
}

/// Sets a link up, and prevents the kernel from assigning an IPv6 address to the link.
pub(crate) fn set_up(batch: &mut Batch, index: u32, name: &str) {
    no_ipv6_address(batch, name, |body| body.header(&link_header(index, 0)));
    set_flag_up(batch, index, name);
}

/// Sets the loopback link up. The kernel then assigns the addresses 127.0.0.1 and ::1 to the link.
pub(crate) fn set_loopback_up(batch: &mut Batch, index: u32) {
    set_flag_up(batch, index, "lo");
}

fn set_flag_up(batch: &mut Batch, index: u32, name: &str) {
    let action = format!("set the interface {name} up");
    batch.message(action, RTM_NEWLINK, NLM_F_ACK, |body| {
        body.header(&link_header(index, IFF_UP));
    });
}

/// Prevents the kernel from assigning an IPv6 address to the link. Without this setting, the kernel
/// would assign a link-local address. The kernel would then check for a second whether another
/// machine has the same address. `link` writes the part of the message that identifies the link.
///
/// This setting needs a separate message. If one message contained the setting and also set the
/// link up, the kernel would first set the link up. If the link already has a carrier, the kernel
/// would then assign an address before it applies the setting.
fn no_ipv6_address(batch: &mut Batch, name: &str, link: impl FnOnce(&mut Body)) {
    // A kernel without IPv6 assigns no IPv6 address, so no message is needed. Such a kernel would
    // also reject a message with IFLA_INET6_ADDR_GEN_MODE.
    // If the check itself fails, the message is sent, so that the setting is never skipped.
    let has_ipv6 = Path::new("/proc/sys/net/ipv6").try_exists();
    if has_ipv6.is_ok_and(|has_ipv6| !has_ipv6) {
        return;
    }
    let action = format!("prevent the kernel from giving {name} an IPv6 address");
    batch.message(action, RTM_NEWLINK, NLM_F_ACK, |body| {
        link(body);
        body.nest(IFLA_AF_SPEC, |families| {
            families.nest(AF_INET6.into(), |inet6| {
                inet6.bytes(IFLA_INET6_ADDR_GEN_MODE, &[IN6_ADDR_GEN_MODE_NONE]);
            });
        });
    });
}

/// The node's end of a pod's veth pair, which is a port of the bridge.
#[derive(Clone, Copy)]
pub(crate) struct BridgePort<'a> {
    pub name: &'a str,
    /// The alias of the interface. The command `ip link` shows the alias.
    pub alias: &'a str,
    pub bridge: u32,
    /// The frames that the port forwards, see [`FORWARDED_GROUPS`].
    pub forwarded_groups: u16,
    /// The hardware address of the pod's interface.
    pub mac: Mac,
    /// The pod's addresses for which the node gets permanent neighbour entries.
    pub neighbours: &'a [IpAddr],
}

/// The parameters of a pod's veth pair, which has one interface on the node and one interface in
/// the pod.
pub(crate) struct VethPair<'a> {
    pub port: BridgePort<'a>,
    pub mtu: u32,
}

/// Creates a veth pair. The pod's end is created in the pod's namespace with its final name. The
/// node's end is created as a port of the bridge. Neither end must be moved or renamed later. For a
/// move or a new name, the kernel would wait for an RCU grace period. After this call, both ends
/// are still down.
pub(crate) fn create_veth(
    socket: &mut Socket,
    pair: &VethPair,
    netns: BorrowedFd,
) -> Result<(), NetworkError> {
    let mut batch = Batch::default();
    let action = format!("create the veth pair {}", pair.port.name);
    let flags = NLM_F_ACK | NLM_F_CREATE | NLM_F_EXCL;
    batch.message(action, RTM_NEWLINK, flags, |body| {
        body.header(&link_header(0, 0));
        body.string(IFLA_IFNAME, pair.port.name);
        body.u32(IFLA_MTU, pair.mtu);
        body.u32(IFLA_MASTER, pair.port.bridge);
        body.nest(IFLA_LINKINFO, |info| {
            info.string(IFLA_INFO_KIND, "veth");
            info.nest(IFLA_INFO_DATA, |data| {
                data.nest(VETH_INFO_PEER, |peer| {
                    peer.header(&link_header(0, 0));
                    peer.string(IFLA_IFNAME, POD_INTERFACE);
                    peer.bytes(IFLA_NET_NS_FD, &netns.as_raw_fd().to_ne_bytes());
                    peer.bytes(IFLA_ADDRESS, &pair.port.mac);
                    peer.u32(IFLA_MTU, pair.mtu);
                });
            });
        });
    });
    socket.execute(&batch).map(drop)
}

/// Configures the node's end of a veth pair and sets it up. The node's end must already be a port
/// of the bridge.
pub(crate) fn set_up_port(socket: &mut Socket, port: BridgePort) -> Result<(), NetworkError> {
    let mut batch = Batch::default();
    port_message(&mut batch, port);
    socket.execute(&batch).map(drop)
}

/// Adds the node's end of a veth pair to the bridge as a port, after the bridge was created again.
pub(crate) fn join_bridge(socket: &mut Socket, port: BridgePort) -> Result<(), NetworkError> {
    let mut batch = Batch::default();
    let action = format!("make the interface {} a port of the bridge", port.name);
    batch.message(action, RTM_NEWLINK, NLM_F_ACK, |body| {
        body.header(&link_header(0, 0));
        body.string(IFLA_IFNAME, port.name);
        body.u32(IFLA_MASTER, port.bridge);
    });
    port_message(&mut batch, port);
    socket.execute(&batch).map(drop)
}

/// Adds the messages that configure an existing bridge port and set it up. The messages enable
/// hairpin mode, which allows a pod to reach itself through the node. The kernel can enable this
/// mode only for an existing port. The messages also set the port's alias, and prevent the kernel
/// from assigning an IPv6 address to the port.
fn port_message(batch: &mut Batch, port: BridgePort) {
    let BridgePort { name, alias, .. } = port;
    no_ipv6_address(batch, name, |body| {
        body.header(&link_header(0, 0));
        body.string(IFLA_IFNAME, name);
    });
    let action = format!("set up the bridge port {name}");
    batch.message(action, RTM_NEWLINK, NLM_F_ACK, |body| {
        body.header(&link_header(0, IFF_UP));
        body.string(IFLA_IFNAME, name);
        body.bytes(IFLA_IFALIAS, alias.as_bytes());
        body.nest(IFLA_LINKINFO, |info| {
            info.string(IFLA_INFO_SLAVE_KIND, "bridge");
            info.nest(IFLA_INFO_SLAVE_DATA, |data| {
                data.bytes(IFLA_BRPORT_HAIRPIN, &[1]);
                let groups = port.forwarded_groups.to_ne_bytes();
                data.bytes(IFLA_BRPORT_GROUP_FWD_MASK, &groups);
            });
        });
    });
    for address in port.neighbours {
        neighbour::add(batch, port.bridge, *address, port.mac);
    }
}

/// Sets which frames a bridge port forwards, see [`FORWARDED_GROUPS`].
pub(crate) fn forward_groups(
    socket: &mut Socket,
    name: &str,
    groups: u16,
) -> Result<(), NetworkError> {
    let mut batch = Batch::default();
    let action = format!("configure the bridge port {name}");
    batch.message(action, RTM_NEWLINK, NLM_F_ACK, |body| {
        body.header(&link_header(0, 0));
        body.string(IFLA_IFNAME, name);
        body.nest(IFLA_LINKINFO, |info| {
            info.string(IFLA_INFO_SLAVE_KIND, "bridge");
            info.nest(IFLA_INFO_SLAVE_DATA, |data| {
                data.bytes(IFLA_BRPORT_GROUP_FWD_MASK, &groups.to_ne_bytes());
            });
        });
    });
    socket.execute(&batch).map(drop)
}

/// Deletes a link. The function also succeeds if the link does not exist. If the link is one end of
/// a veth pair, the kernel deletes the other end, too.
pub(crate) fn delete(socket: &mut Socket, name: &str) -> Result<(), NetworkError> {
    let mut batch = Batch::default();
    let action = format!("delete the interface {name}");
    batch.message(action, RTM_DELLINK, NLM_F_ACK, |body| {
        body.header(&link_header(0, 0));
        body.string(IFLA_IFNAME, name);
    });
    match socket.execute(&batch) {
        Err(error) if !error.is(Errno::ENODEV) => Err(error),
        _ => Ok(()),
    }
}

/// Deletes the links in `names`. The function also succeeds if some of the links do not exist. The
/// kernel waits for RCU only once for all links, instead of once for each link.
pub(crate) fn delete_together(socket: &mut Socket, names: &[String]) -> Result<(), NetworkError> {
    let mut batch = Batch::default();
    for name in names {
        let action = format!("mark the interface {name} for deletion");
        batch.message(action, RTM_NEWLINK, NLM_F_ACK, |body| {
            body.header(&link_header(0, 0));
            body.string(IFLA_IFNAME, name);
            body.u32(IFLA_GROUP, DELETION_GROUP);
        });
    }
    batch.message(
        "delete the interfaces of several pods",
        RTM_DELLINK,
        NLM_F_ACK,
        |body| {
            body.header(&link_header(0, 0));
            body.u32(IFLA_GROUP, DELETION_GROUP);
        },
    );
    // The batch also fails if one of the links does not exist. After a failure, each link is
    // deleted separately. For a link that does not exist, `delete` returns no error.
    if socket.execute(&batch).is_err() {
        for name in names {
            delete(socket, name)?;
        }
    }
    Ok(())
}

/// Adds a message that adds `address` with the prefix length `prefix` to a link. The kernel accepts
/// the message even if the link already has the address. For IPv6, the message contains the flag
/// IFA_F_NODAD. This flag disables the detection of duplicate addresses, which would take a second.
pub(crate) fn add_address(
    batch: &mut Batch,
    index: u32,
    name: &str,
    address: IpAddr,
    prefix: u8,
    broadcast: Option<IpAddr>,
) {
    let action = format!("add the address {address}/{prefix} to the interface {name}");
    let flags = NLM_F_ACK | NLM_F_CREATE | NLM_F_REPLACE;
    batch.message(action, RTM_NEWADDR, flags, |body| {
        let [i0, i1, i2, i3] = index.to_ne_bytes();
        let (scope, no_dad) = match address {
            IpAddr::V6(address) if address.is_unicast_link_local() => {
                (libc::RT_SCOPE_LINK, IFA_F_NODAD)
            }
            IpAddr::V6(_) => (libc::RT_SCOPE_UNIVERSE, IFA_F_NODAD),
            IpAddr::V4(_) => (libc::RT_SCOPE_UNIVERSE, 0),
        };
        body.header(&[family(address), prefix, no_dad, scope, i0, i1, i2, i3]);
        body_address(body, IFA_LOCAL, address);
        body_address(body, IFA_ADDRESS, address);
        if let Some(broadcast) = broadcast {
            body_address(body, IFA_BROADCAST, broadcast);
        }
    });
}

/// Deletes an address from a link.
pub(crate) fn delete_address(batch: &mut Batch, index: u32, address: IpAddr, prefix: u8) {
    let action = format!("delete the address {address}/{prefix} from interface {index}");
    batch.message(action, RTM_DELADDR, NLM_F_ACK, |body| {
        let [i0, i1, i2, i3] = index.to_ne_bytes();
        body.header(&[family(address), prefix, 0, 0, i0, i1, i2, i3]);
        body_address(body, IFA_LOCAL, address);
        body_address(body, IFA_ADDRESS, address);
    });
}

/// Returns the addresses of the link `index` with their prefix lengths. Addresses without global
/// scope, such as link-local addresses, are omitted.
pub(crate) fn addresses(
    socket: &mut Socket,
    index: u32,
) -> Result<Vec<(IpAddr, u8)>, NetworkError> {
    let mut all = all_addresses(socket)?;
    all.retain(|one| one.link == index && one.scope == libc::RT_SCOPE_UNIVERSE);
    Ok(all
        .into_iter()
        .map(|one| (one.address, one.prefix))
        .collect())
}

/// Returns all addresses of the node.
pub(crate) fn own_addresses(socket: &mut Socket) -> Result<Vec<IpAddr>, NetworkError> {
    let all = all_addresses(socket)?;
    Ok(all.into_iter().map(|one| one.address).collect())
}

struct Assigned {
    link: u32,
    address: IpAddr,
    prefix: u8,
    scope: u8,
}

fn all_addresses(socket: &mut Socket) -> Result<Vec<Assigned>, NetworkError> {
    let mut batch = Batch::default();
    batch.message("list the addresses", RTM_GETADDR, NLM_F_DUMP, |body| {
        body.header(&[AF_UNSPEC, 0, 0, 0, 0, 0, 0, 0]);
    });
    let replies = socket.execute(&batch)?;
    Ok(replies
        .iter()
        .filter_map(|reply| {
            let [_, prefix, _, scope, i0, i1, i2, i3] = reply.header::<ADDRESS_HEADER_BYTES>()?;
            let attributes = reply.attributes(ADDRESS_HEADER_BYTES);
            // For IPv6, the kernel reports IFA_LOCAL only on point-to-point links. On other links,
            // IFA_ADDRESS contains the link's address.
            let local = attributes.get(IFA_LOCAL);
            Some(Assigned {
                link: u32::from_ne_bytes([i0, i1, i2, i3]),
                address: address(local.or_else(|| attributes.get(IFA_ADDRESS))?)?,
                prefix,
                scope,
            })
        })
        .collect())
}

/// Adds a default route through `gateway`.
pub(crate) fn add_default_route(batch: &mut Batch, index: u32, gateway: IpAddr) {
    let action = format!("add the default route through {gateway}");
    // NLM_F_REPLACE is set because the route may already exist.
    let flags = NLM_F_ACK | NLM_F_CREATE | NLM_F_REPLACE;
    batch.message(action, RTM_NEWROUTE, flags, |body| {
        let mut header = [0; ROUTE_HEADER_BYTES];
        header[0] = family(gateway);
        header[4] = libc::RT_TABLE_MAIN;
        header[5] = libc::RTPROT_BOOT;
        header[6] = libc::RT_SCOPE_UNIVERSE;
        header[7] = libc::RTN_UNICAST;
        body.header(&header);
        body_address(body, RTA_GATEWAY, gateway);
        body.u32(RTA_OIF, index);
    });
}

/// Adds a local route to ::1 on a link. With this route, the kernel accepts packets that arrive on
/// the link if NAT has changed their destination to ::1. The kernel drops all other packets to ::1
/// that arrive on the link. For packets to 127.0.0.1, the sysctl route_localnet has the same
/// effect. The route does not change how processes of the node reach ::1. For their packets, the
/// kernel prefers the loopback's route to ::1, because the loopback's route has a lower metric.
pub(crate) fn add_loopback_route(batch: &mut Batch, index: u32) {
    let flags = NLM_F_ACK | NLM_F_CREATE | NLM_F_REPLACE;
    let action = format!("add a local route to ::1 on interface {index}");
    batch.message(action, RTM_NEWROUTE, flags, |body| {
        let mut header = [0; ROUTE_HEADER_BYTES];
        header[0] = AF_INET6;
        header[1] = 128;
        header[4] = libc::RT_TABLE_LOCAL;
        header[5] = libc::RTPROT_BOOT;
        header[6] = libc::RT_SCOPE_UNIVERSE;
        header[7] = libc::RTN_LOCAL;
        body.header(&header);
        body_address(body, RTA_DST, Ipv6Addr::LOCALHOST.into());
        body.u32(RTA_OIF, index);
        body.u32(RTA_PRIORITY, LOOPBACK_METRIC);
    });
}

/// A route of the main routing table.
pub(crate) struct Route {
    pub destination: IpAddr,
    pub prefix: u8,
    /// The index of the link through which the route leads. `None` if the route leads through
    /// several links.
    pub link: Option<u32>,
    protocol: u8,
}

impl Route {
    /// Returns whether a router advertisement may have created the route. A router advertisement
    /// creates default routes, and routes to the prefixes that it announces. The kernel also
    /// creates routes for an interface's addresses. For these routes, this function returns true
    /// too, because they have the same protocol number as routes to advertised prefixes.
    pub(crate) fn is_advertised(&self) -> bool {
        let link_local = matches!(self.destination, IpAddr::V6(to) if to.is_unicast_link_local());
        match self.protocol {
            RTPROT_RA => true,
            libc::RTPROT_KERNEL => !link_local,
            _ => false,
        }
    }
}

/// Returns the routes in the main routing table that have the address family of `like`.
pub(crate) fn routes(socket: &mut Socket, like: IpAddr) -> Result<Vec<Route>, NetworkError> {
    let any: IpAddr = match like {
        IpAddr::V4(_) => Ipv4Addr::UNSPECIFIED.into(),
        IpAddr::V6(_) => Ipv6Addr::UNSPECIFIED.into(),
    };
    let mut batch = Batch::default();
    batch.message("list the routes", RTM_GETROUTE, NLM_F_DUMP, |body| {
        let mut header = [0; ROUTE_HEADER_BYTES];
        header[0] = family(like);
        body.header(&header);
    });
    let replies = socket.execute(&batch)?;
    Ok(replies
        .iter()
        .filter_map(|reply| {
            let [_, prefix, _, _, table, protocol, ..] = reply.header::<ROUTE_HEADER_BYTES>()?;
            let attributes = reply.attributes(ROUTE_HEADER_BYTES);
            let destination = attributes.get(RTA_DST).and_then(address);
            (table == libc::RT_TABLE_MAIN).then(|| Route {
                destination: destination.unwrap_or(any),
                prefix,
                link: attributes.u32(RTA_OIF),
                protocol,
            })
        })
        .collect())
}

/// Deletes a route through the link `index`. A route that does not exist is not an error.
pub(crate) fn delete_route(
    socket: &mut Socket,
    index: u32,
    route: &Route,
) -> Result<(), NetworkError> {
    let mut batch = Batch::default();
    let (destination, prefix) = (route.destination, route.prefix);
    let action = format!("delete the route to {destination}/{prefix}");
    batch.message(action, RTM_DELROUTE, NLM_F_ACK, |body| {
        let mut header = [0; ROUTE_HEADER_BYTES];
        header[0] = family(destination);
        header[1] = prefix;
        header[4] = libc::RT_TABLE_MAIN;
        header[5] = route.protocol;
        header[6] = libc::RT_SCOPE_NOWHERE;
        body.header(&header);
        if prefix > 0 {
            body_address(body, RTA_DST, destination);
        }
        body.u32(RTA_OIF, index);
    });
    match socket.execute(&batch) {
        Err(error) if !error.is(Errno::ESRCH) => Err(error),
        _ => Ok(()),
    }
}

/// Returns the index of the link through which the node sends packets to `destination`. Returns
/// `None` if the node has no route to `destination`.
pub(crate) fn outgoing_link(
    socket: &mut Socket,
    destination: IpAddr,
) -> Result<Option<u32>, NetworkError> {
    let mut batch = Batch::default();
    let action = "look up the node's uplink";
    batch.message(action, RTM_GETROUTE, NLM_F_ACK, |body| {
        let mut header = [0; ROUTE_HEADER_BYTES];
        header[0] = family(destination);
        header[1] = match destination {
            IpAddr::V4(_) => 32,
            IpAddr::V6(_) => 128,
        };
        body.header(&header);
        body_address(body, RTA_DST, destination);
    });
    match socket.execute(&batch) {
        Ok(replies) => Ok(replies
            .iter()
            .find_map(|reply| reply.attributes(ROUTE_HEADER_BYTES).u32(RTA_OIF))),
        // The destination is unreachable or prohibited, or the kernel does not support IPv6.
        Err(NetworkError::Kernel { .. }) => Ok(None),
        Err(error) => Err(error),
    }
}

/// Sets a link down.
pub(crate) fn set_down(batch: &mut Batch, index: u32, name: &str) {
    let action = format!("set the interface {name} down");
    batch.message(action, RTM_NEWLINK, NLM_F_ACK, |body| {
        let mut header = link_header(index, IFF_UP);
        // The bytes 8 to 11 contain the new flags. The bytes 12 to 15 contain the mask of the flags
        // to change. IFF_UP remains in the mask, and its new value is 0.
        header[8..12].fill(0);
        body.header(&header);
    });
}

/// Sets a link's MTU.
pub(crate) fn set_mtu(batch: &mut Batch, index: u32, mtu: u32) {
    let action = format!("set the MTU of interface {index} to {mtu}");
    batch.message(action, RTM_NEWLINK, NLM_F_ACK, |body| {
        body.header(&link_header(index, 0));
        body.u32(IFLA_MTU, mtu);
    });
}

fn family(address: IpAddr) -> u8 {
    match address {
        IpAddr::V4(_) => AF_INET,
        IpAddr::V6(_) => AF_INET6,
    }
}

fn body_address(body: &mut Body, kind: u16, address: IpAddr) {
    match address {
        IpAddr::V4(address) => body.bytes(kind, &address.octets()),
        IpAddr::V6(address) => body.bytes(kind, &address.octets()),
    }
}

fn address(octets: &[u8]) -> Option<IpAddr> {
    match octets.len() {
        4 => Some(Ipv4Addr::from_octets(octets.try_into().ok()?).into()),
        _ => Some(Ipv6Addr::from_octets(octets.try_into().ok()?).into()),
    }
}

/// Returns a `struct ifinfomsg` that sets the flags in `flags`.
fn link_header(index: u32, flags: u32) -> [u8; LINK_HEADER_BYTES] {
    let mut header = [0; LINK_HEADER_BYTES];
    header[0] = AF_UNSPEC;
    header[4..8].copy_from_slice(&index.to_ne_bytes());
    header[8..12].copy_from_slice(&flags.to_ne_bytes());
    header[12..16].copy_from_slice(&flags.to_ne_bytes());
    header
}
