//! Deletes stale flows to host ports from the kernel's connection-tracking table, over ctnetlink.
//! The kernel's header `linux/netfilter/nfnetlink_conntrack.h` defines the messages. The module
//! [`crate::flows`] decides when flows are deleted.
//!
//! The first packet of a flow determines the destination of all packets of the flow. For a protocol
//! without connections, such as UDP, a flow lasts as long as the peer keeps sending packets. When a
//! host port is opened or closed, old flows can still exist. The kernel sends the packets of an old
//! flow to the previous destination. The previous destination can be the address of another pod, or
//! an address that no pod has. For this reason, stale flows are deleted when a host port is opened
//! or closed. TCP flows are not deleted. A TCP connection ends together with its pod, and every new
//! connection is a new flow.
//!
//! A pod can fill the table with hundreds of thousands of flows. The functions of this module
//! therefore need seconds in the worst case, and end at the latest when the caller's time is over.

use std::collections::{BTreeSet, HashMap, HashSet};
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};
use std::ops::ControlFlow;
use std::time::Instant;

use nix::errno::Errno;

use crate::error::NetworkError;
use crate::host_ports::Protocol;
use crate::link;
use crate::netlink::{Attributes, Batch, Body, NLM_F_ACK, NLM_F_DUMP, Reply, Socket};

const NFNL_SUBSYS_CTNETLINK: u16 = 1;
const IPCTNL_MSG_CT_GET: u16 = 1;
const IPCTNL_MSG_CT_DELETE: u16 = 2;

const CTA_TUPLE_ORIG: u16 = 1;
const CTA_TUPLE_REPLY: u16 = 2;
const CTA_STATUS: u16 = 3;
const CTA_ID: u16 = 12;
const CTA_ZONE: u16 = 18;
const CTA_FILTER: u16 = 25;
const CTA_STATUS_MASK: u16 = 26;
/// The bit in the status of a flow whose destination the kernel translates.
const IPS_DST_NAT: u32 = 1 << 5;
const CTA_TUPLE_IP: u16 = 1;
const CTA_TUPLE_PROTO: u16 = 2;
const CTA_IP_V4_SRC: u16 = 1;
const CTA_IP_V4_DST: u16 = 2;
const CTA_IP_V6_SRC: u16 = 3;
const CTA_IP_V6_DST: u16 = 4;
const CTA_PROTO_NUM: u16 = 1;
const CTA_PROTO_SRC_PORT: u16 = 2;
const CTA_PROTO_DST_PORT: u16 = 3;
const CTA_FILTER_ORIG_FLAGS: u16 = 1;
const CTA_FILTER_REPLY_FLAGS: u16 = 2;
/// The flags of a filter of flows. The bits select the source address, the destination address, the
/// protocol number and the destination port. The kernel compares only the selected parts of a flow's tuple.
const FILTER_BY_SOURCE: u32 = 1;
const FILTER_BY_DESTINATION: u32 = 1 << 1;
const FILTER_BY_PROTOCOL: u32 = 1 << 3;
const FILTER_BY_PORT: u32 = 1 << 5;

/// The maximum number of host ports whose flows are listed separately. For each list, the kernel
/// searches through all flows of the node, but copies only the flows of the port. For more host
/// ports, the flows of all ports of a protocol are listed together.
const LISTS: usize = 8;

/// The maximum number of bytes of the messages that delete flows in one `send` call. They are about
/// 200 messages. If all of them fail, the error messages fit into the socket's receive buffer.
const DELETION_BYTES: usize = 24 << 10;

/// The number of stale flows to the same port and address after which the server asks the kernel to
/// delete all of them. This request searches through all flows of the node.
const MANY: usize = 2000;

/// The size of the `struct nfgenmsg` that precedes the attributes.
const HEADER_BYTES: usize = 4;

/// A host port at an address of the node. The unspecified address means every address of its address
/// family.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(crate) struct Port {
    pub protocol: Protocol,
    pub number: u16,
    pub address: IpAddr,
}

/// The result of a deletion.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Progress {
    Complete,
    /// The caller's time was over before all flows were deleted.
    OutOfTime,
}

/// Deletes the flows to the host ports `ports` whose packets are sent elsewhere than to the pod that
/// has the port. Ends at the time `until`.
pub(crate) fn forget_elsewhere(
    ports: &[Port],
    search: &mut Search,
    until: Instant,
) -> Result<Progress, NetworkError> {
    let mut deletions = Deletions::new()?;
    for list in lists(ports) {
        let progress = deletions.delete(&list, |flow| search.is_stale(flow), until)?;
        if progress == Progress::OutOfTime {
            return Ok(progress);
        }
    }
    Ok(Progress::Complete)
}

/// Deletes all flows of `protocol` whose packets are sent to the address `pod`. Ends at the time
/// `until`. Linux 6.12 and later delete the flows with one message.
pub(crate) fn forget_pod(
    protocol: Protocol,
    pod: IpAddr,
    until: Instant,
) -> Result<Progress, NetworkError> {
    let list = List {
        family: family(pod),
        protocol,
        by: By::Pod(pod),
    };
    let mut batch = Batch::default();
    list.flush(&mut batch);
    // Older kernels return an error and delete nothing, because they search for a single flow, and
    // the tuple in the message is not complete.
    if Socket::netfilter()?.execute(&batch).is_ok() {
        return Ok(Progress::Complete);
    }
    let is_to_pod = |flow: &Flow| Ok(flow.protocol == protocol.number() && flow.to.ip() == pod);
    Deletions::new()?.delete(&list, is_to_pod, until)
}

/// Deletes single flows. The messages are collected, and many of them are sent together.
struct Deletions {
    socket: Socket,
    waiting: Batch,
    /// How many flows that the kernel does not translate were deleted, by destination.
    untranslated: HashMap<(u8, SocketAddr), usize>,
}

impl Deletions {
    fn new() -> Result<Self, NetworkError> {
        Ok(Deletions {
            socket: Socket::netfilter()?,
            waiting: Batch::default(),
            untranslated: HashMap::new(),
        })
    }

    /// Deletes the flows in `list` for which `is_stale` returns true. The flows are deleted while
    /// they are listed, so that the server never stores the whole list.
    fn delete(
        &mut self,
        list: &List,
        mut is_stale: impl FnMut(&Flow) -> Result<bool, NetworkError>,
        until: Instant,
    ) -> Result<Progress, NetworkError> {
        let mut batch = Batch::default();
        list.write(&mut batch);
        // The list needs a separate socket, because the answers to the deletions would otherwise be
        // mixed with the list.
        let mut socket = Socket::netfilter()?;
        let mut progress: Result<_, NetworkError> = Ok(Progress::Complete);
        socket.dump(&batch, |reply| {
            let result = Flow::parse(&reply).map_or(Ok(()), |flow| {
                if is_stale(&flow)? {
                    self.add(&flow)?;
                }
                Ok(())
            });
            progress = match result {
                Err(error) => Err(error),
                Ok(()) if Instant::now() >= until => Ok(Progress::OutOfTime),
                Ok(()) => return ControlFlow::Continue(()),
            };
            ControlFlow::Break(())
        })?;
        let progress = progress?;
        self.send()?;
        Ok(progress)
    }

    fn add(&mut self, flow: &Flow) -> Result<(), NetworkError> {
        flow.delete(&mut self.waiting);
        self.count(flow);
        if self.waiting.bytes() < DELETION_BYTES {
            return Ok(());
        }
        self.send()
    }

    /// Deletes all untranslated flows to the destination of `flow` if there are many. No pod had the
    /// host port when these flows began, so all of them are stale.
    fn count(&mut self, flow: &Flow) {
        let destination = SocketAddr::new(flow.destination, flow.port);
        if flow.to != destination {
            return;
        }
        let count = self.untranslated.entry((flow.protocol, destination));
        let count = count.or_default();
        *count += 1;
        if *count == MANY
            && let Some(protocol) = Protocol::from_number(flow.protocol)
        {
            let mut batch = Batch::default();
            let list = List {
                family: family(flow.destination),
                protocol,
                by: By::Untranslated(destination),
            };
            list.flush(&mut batch);
            // An error is ignored, because older kernels cannot do this, see `forget_pod`. The flows
            // are then deleted singly.
            let _ = self.socket.execute(&batch);
        }
    }

    fn send(&mut self) -> Result<(), NetworkError> {
        let mut batch = std::mem::take(&mut self.waiting);
        if batch.bytes() == 0 {
            return Ok(());
        }
        batch.acknowledge_last();
        match self.socket.execute_whole(&batch) {
            // ENOENT means that the flow expired after it was listed.
            Err(error) if error.is(Errno::ENOENT) => Ok(()),
            result => result,
        }
    }
}

/// A search for stale flows.
pub(crate) struct Search<'a> {
    /// Returns the address and port of the pod to which a host port belongs now.
    owner: &'a dyn Fn(Port) -> Option<SocketAddr>,
    /// The addresses of this node. `None` until a flow requires them.
    own: Option<HashSet<IpAddr>>,
}

impl<'a> Search<'a> {
    pub(crate) fn new(owner: &'a dyn Fn(Port) -> Option<SocketAddr>) -> Self {
        Search { owner, own: None }
    }

    fn is_stale(&mut self, flow: &Flow) -> Result<bool, NetworkError> {
        let Some(protocol) = Protocol::from_number(flow.protocol) else {
            return Ok(false);
        };
        self.is_elsewhere(protocol, flow.destination, flow.port, flow.to)
    }

    /// Returns whether a flow to the port `number` at `destination`, whose packets are sent to `to`,
    /// does not reach the pod that has this host port.
    fn is_elsewhere(
        &mut self,
        protocol: Protocol,
        destination: IpAddr,
        number: u16,
        to: SocketAddr,
    ) -> Result<bool, NetworkError> {
        let at = |address| {
            (self.owner)(Port {
                protocol,
                number,
                address,
            })
        };
        let any = match destination {
            IpAddr::V4(_) => Ipv4Addr::UNSPECIFIED.into(),
            IpAddr::V6(_) => Ipv6Addr::UNSPECIFIED.into(),
        };
        // A host port can have an address that the node does not have.
        match at(destination).or_else(|| at(any)) {
            Some(owner) if owner != to => self.is_of_this_node(destination),
            _ => Ok(false),
        }
    }

    /// Returns whether `destination` is an address of this node. A packet to another address is for
    /// the port with the same number on another machine.
    fn is_of_this_node(&mut self, destination: IpAddr) -> Result<bool, NetworkError> {
        if destination.is_loopback() {
            return Ok(true);
        }
        let own = match &self.own {
            Some(own) => own,
            None => {
                let all = link::own_addresses(&mut Socket::route()?)?;
                self.own.insert(all.into_iter().collect())
            }
        };
        Ok(own.contains(&destination))
    }
}

/// Flows that the kernel selects.
struct List {
    family: u8,
    protocol: Protocol,
    by: By,
}

enum By {
    Protocol,
    /// The destination port of a flow's first packet.
    Port(u16),
    /// The address to which a flow's packets are sent. The kernel's answers come from it.
    Pod(IpAddr),
    /// The destination of a flow's first packet, if the kernel does not translate it.
    Untranslated(SocketAddr),
}

/// Returns the lists that contain all flows to `ports`. The kernel filters a list only if the list
/// contains a single address family.
fn lists(ports: &[Port]) -> Vec<List> {
    let collect = |separately: bool| -> BTreeSet<(u8, Protocol, Option<u16>)> {
        let keys = ports.iter().map(|port| {
            let number = separately.then_some(port.number);
            (family(port.address), port.protocol, number)
        });
        keys.collect()
    };
    let mut lists = collect(true);
    if lists.len() > LISTS {
        lists = collect(false);
    }
    let list = |(family, protocol, port): (u8, Protocol, Option<u16>)| List {
        family,
        protocol,
        by: port.map_or(By::Protocol, By::Port),
    };
    lists.into_iter().map(list).collect()
}

impl List {
    /// Requests the list from the kernel.
    fn write(&self, batch: &mut Batch) {
        let protocol = self.protocol;
        let action = match self.by {
            By::Port(port) => {
                format!("list the connection-tracking entries of {protocol} port {port}")
            }
            By::Pod(pod) => format!("list the connection-tracking entries of {protocol} to {pod}"),
            By::Protocol | By::Untranslated(_) => {
                format!("list the connection-tracking entries of {protocol}")
            }
        };
        let kind = subsystem(IPCTNL_MSG_CT_GET);
        batch.message(action, kind, NLM_F_DUMP, |body| {
            body.header(&header(self.family));
            self.filter(body);
        });
    }

    /// Requests that the kernel deletes all flows of the list.
    fn flush(&self, batch: &mut Batch) {
        let protocol = self.protocol;
        let action = format!("delete the connection-tracking entries of {protocol}");
        let kind = subsystem(IPCTNL_MSG_CT_DELETE);
        batch.message(action, kind, NLM_F_ACK, |body| {
            body.header(&header(self.family));
            self.filter(body);
        });
    }

    /// Appends the attributes with which the kernel selects the flows.
    fn filter(&self, body: &mut Body) {
        let original = (CTA_TUPLE_ORIG, CTA_FILTER_ORIG_FLAGS);
        let reply = (CTA_TUPLE_REPLY, CTA_FILTER_REPLY_FLAGS);
        let ((tuple, flags), selected) = match self.by {
            By::Protocol => (original, 0),
            By::Port(_) => (original, FILTER_BY_PORT),
            By::Pod(_) => (reply, FILTER_BY_SOURCE),
            By::Untranslated(_) => (original, FILTER_BY_DESTINATION | FILTER_BY_PORT),
        };
        body.nest(tuple, |tuple| {
            match self.by {
                By::Pod(pod) => write_address(tuple, pod, CTA_IP_V4_SRC, CTA_IP_V6_SRC),
                By::Untranslated(to) => {
                    write_address(tuple, to.ip(), CTA_IP_V4_DST, CTA_IP_V6_DST);
                }
                By::Protocol | By::Port(_) => {}
            }
            tuple.nest(CTA_TUPLE_PROTO, |proto| {
                proto.bytes(CTA_PROTO_NUM, &[self.protocol.number()]);
                if let Some(port) = self.by.port() {
                    proto.bytes(CTA_PROTO_DST_PORT, &port.to_be_bytes());
                }
            });
        });
        body.nest(CTA_FILTER, |filter| {
            filter.u32(flags, FILTER_BY_PROTOCOL | selected);
        });
        if matches!(self.by, By::Untranslated(_)) {
            body.be32(CTA_STATUS, 0);
            body.be32(CTA_STATUS_MASK, IPS_DST_NAT);
        }
    }
}

impl By {
    fn port(&self) -> Option<u16> {
        match self {
            By::Port(port) => Some(*port),
            By::Untranslated(to) => Some(to.port()),
            By::Protocol | By::Pod(_) => None,
        }
    }
}

/// Appends an address to a tuple. `v4` and `v6` are the attribute's types for the address families.
fn write_address(tuple: &mut Body, address: IpAddr, v4: u16, v6: u16) {
    tuple.nest(CTA_TUPLE_IP, |ip| match address {
        IpAddr::V4(address) => ip.bytes(v4, &address.octets()),
        IpAddr::V6(address) => ip.bytes(v6, &address.octets()),
    });
}

/// A flow of packets.
struct Flow<'a> {
    /// The number of the transport protocol.
    protocol: u8,
    /// The destination address of the flow's first packet.
    destination: IpAddr,
    /// The destination port of the flow's first packet.
    port: u16,
    /// The address and port to which the flow's packets are sent.
    to: SocketAddr,
    attributes: Attributes<'a>,
}

impl<'a> Flow<'a> {
    fn parse(reply: &'a Reply) -> Option<Flow<'a>> {
        let attributes = reply.attributes(HEADER_BYTES);
        let original = attributes.nest(CTA_TUPLE_ORIG);
        let (to, original_proto) = (original.nest(CTA_TUPLE_IP), original.nest(CTA_TUPLE_PROTO));
        let answers = attributes.nest(CTA_TUPLE_REPLY);
        let (from, proto) = (answers.nest(CTA_TUPLE_IP), answers.nest(CTA_TUPLE_PROTO));
        let port = u16::from_be_bytes(proto.array(CTA_PROTO_SRC_PORT)?);
        let [protocol] = original_proto.array(CTA_PROTO_NUM)?;
        Some(Flow {
            protocol,
            destination: address(&to, CTA_IP_V4_DST, CTA_IP_V6_DST)?,
            port: u16::from_be_bytes(original_proto.array(CTA_PROTO_DST_PORT)?),
            to: SocketAddr::new(address(&from, CTA_IP_V4_SRC, CTA_IP_V6_SRC)?, port),
            attributes,
        })
    }

    fn delete(&self, batch: &mut Batch) {
        let action = "delete the connection-tracking entry of a host port";
        let kind = subsystem(IPCTNL_MSG_CT_DELETE);
        batch.message(action, kind, 0, |body: &mut Body| {
            body.header(&header(family(self.destination)));
            // The request contains the attributes that identify the flow, as the kernel has
            // reported them. `nested` encodes a nested attribute whose content is `value`.
            for (kind, value) in self.attributes.clone() {
                match kind {
                    CTA_TUPLE_ORIG => body.nested(kind, value),
                    CTA_ID | CTA_ZONE => body.bytes(kind, value),
                    _ => {}
                }
            }
        });
    }
}

fn address(of: &Attributes, v4: u16, v6: u16) -> Option<IpAddr> {
    let v4 = of.array::<4>(v4).map(IpAddr::from);
    v4.or_else(|| of.array::<16>(v6).map(IpAddr::from))
}

const fn subsystem(message: u16) -> u16 {
    NFNL_SUBSYS_CTNETLINK << 8 | message
}

/// Returns a `struct nfgenmsg`.
const fn header(family: u8) -> [u8; HEADER_BYTES] {
    [family, 0, 0, 0]
}

fn family(address: IpAddr) -> u8 {
    match address {
        IpAddr::V4(_) => libc::AF_INET as u8,
        IpAddr::V6(_) => libc::AF_INET6 as u8,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn port(number: u16, address: &str) -> Port {
        Port {
            protocol: Protocol::Udp,
            number,
            address: address.parse().unwrap(),
        }
    }

    #[test]
    fn a_flow_is_stale_unless_it_reaches_the_present_owner_of_the_port() {
        let [first, second] = ["10.88.0.2:53", "10.88.0.3:53"].map(|to| to.parse().unwrap());
        let owner = std::cell::Cell::new(first);
        let owner_of = |asked| (asked == port(53, "127.0.0.1")).then(|| owner.get());
        let mut search = Search::new(&owner_of);
        let node = "127.0.0.1".parse().unwrap();
        let mut is_stale = |to| search.is_elsewhere(Protocol::Udp, node, 53, to).unwrap();
        assert!(is_stale(second) && !is_stale(first));
        // The port moves to another pod while the flows are listed.
        owner.set(second);
        assert!(is_stale(first) && !is_stale(second));
    }

    #[test]
    fn a_flow_to_another_machine_is_not_stale() -> Result<(), NetworkError> {
        let to = "10.88.0.2:53".parse().unwrap();
        let ports = [port(53, "0.0.0.0"), port(55, "198.51.100.1")];
        let owner_of = |asked| ports.contains(&asked).then_some(to);
        let mut search = Search::new(&owner_of);
        let mut is_stale = |destination: &str, number| {
            let other = "198.51.100.1:53".parse().unwrap();
            search.is_elsewhere(Protocol::Udp, destination.parse().unwrap(), number, other)
        };
        assert!(!is_stale("198.51.100.1", 53)?);
        assert!(!is_stale("198.51.100.1", 55)?);
        assert!(is_stale("127.0.0.1", 53)?);
        assert!(!is_stale("127.0.0.1", 54)?);
        Ok(())
    }

    #[test]
    fn the_flows_of_many_ports_are_listed_together() {
        let few: Vec<Port> = (1..=8).map(|number| port(number, "::1")).collect();
        assert_eq!(lists(&few).len(), 8);
        let many: Vec<Port> = (1..=9)
            .flat_map(|number| [port(number, "::"), port(number, "0.0.0.0")])
            .collect();
        assert_eq!(lists(&many).len(), 2, "a list of each address family");
    }
}
