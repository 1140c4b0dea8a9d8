//! Deletes stale flows to host ports from the kernel's connection-tracking table, over ctnetlink.
//! The kernel's header `linux/netfilter/nfnetlink_conntrack.h` defines the messages.
//!
//! The first packet of a flow determines the destination of all packets of the flow. For a protocol
//! without connections, such as UDP, a flow lasts as long as the peer keeps sending packets. When a
//! host port is opened or closed, old flows can still exist. The kernel sends the packets of an old
//! flow to the previous destination. The previous destination can be the address of another pod, or
//! an address that no pod has. For this reason, stale flows are deleted when a host port is opened
//! or closed.

use std::collections::{BTreeSet, HashMap, HashSet};
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};

use nix::errno::Errno;

use crate::error::NetworkError;
use crate::host_ports::{Mapping, Protocol};
use crate::link;
use crate::netlink::{Attributes, Batch, Body, NLM_F_ACK, NLM_F_DUMP, Reply, Socket};

const NFNL_SUBSYS_CTNETLINK: u16 = 1;
const IPCTNL_MSG_CT_GET: u16 = 1;
const IPCTNL_MSG_CT_DELETE: u16 = 2;

const CTA_TUPLE_ORIG: u16 = 1;
const CTA_TUPLE_REPLY: u16 = 2;
const CTA_ID: u16 = 12;
const CTA_ZONE: u16 = 18;
const CTA_FILTER: u16 = 25;
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
/// The flags of a filter for a dump of flows. The bits select the protocol number and the destination
/// port. The kernel compares only the selected parts of a flow's tuple.
const FILTER_BY_PROTOCOL: u32 = 1 << 3;
const FILTER_BY_PORT: u32 = 1 << 5;

/// The maximum number of host ports whose flows are listed separately. For each list, the kernel
/// searches through all flows of the node. For more host ports, the flows of all ports of a protocol
/// are listed together.
const LISTS: usize = 8;

/// The size of the `struct nfgenmsg` that precedes the attributes.
const HEADER_BYTES: usize = 4;

/// Specifies which flows to a host port must be deleted.
#[derive(Clone, Copy, PartialEq, Eq)]
pub(crate) enum Stale {
    /// The flows whose packets are sent to a destination other than the host port's pod. After a
    /// host port is opened, these flows are stale.
    Elsewhere,
    /// The flows whose packets are sent to the host port's pod. After a host port is closed, these
    /// flows are stale.
    ToThePod,
}

/// Deletes the flows that would direct packets for the host ports in `mappings` to the wrong
/// destination. TCP flows are not deleted. A TCP connection ends together with its pod, and every
/// new connection is a new flow.
pub(crate) fn forget(mappings: &[Mapping], stale: Stale) -> Result<(), NetworkError> {
    let without_connections = |mapping: &&Mapping| mapping.protocol != Protocol::Tcp;
    let mappings: Vec<&Mapping> = mappings.iter().filter(without_connections).collect();
    if mappings.is_empty() {
        return Ok(());
    }
    let mut search = Search::new(&mappings, stale);
    let mut socket = Socket::netfilter()?;
    for list in lists(&mappings) {
        let mut batch = Batch::default();
        list.write(&mut batch);
        // The error of a look-up inside `is_stale` is returned after the dump.
        let mut failure = None;
        let deletions = socket.fold(&batch, |deletions: &mut Batch, reply| {
            let Some(flow) = Flow::parse(&reply) else {
                return;
            };
            match search.is_stale(&flow) {
                Ok(true) => flow.delete(deletions),
                Ok(false) => {}
                Err(error) => failure = Some(error),
            }
        })?;
        failure.map_or(Ok(()), Err)?;
        match socket.execute(&deletions) {
            // ENOENT means that the flow expired after it was listed.
            Err(error) if error.is(Errno::ENOENT) => {}
            result => drop(result?),
        }
    }
    Ok(())
}

/// A search for stale flows.
struct Search<'a> {
    /// The host ports, by protocol number, port number and address of the node.
    by_port: HashMap<(u8, u16, IpAddr), &'a Mapping>,
    stale: Stale,
    /// The addresses of this node. `None` until a flow requires them.
    own: Option<HashSet<IpAddr>>,
}

impl<'a> Search<'a> {
    fn new(mappings: &[&'a Mapping], stale: Stale) -> Self {
        let keyed = mappings.iter().map(|mapping| {
            let key = (mapping.protocol.number(), mapping.port, mapping.address);
            (key, *mapping)
        });
        Search {
            by_port: keyed.collect(),
            stale,
            own: None,
        }
    }

    fn is_stale(&mut self, flow: &Flow) -> Result<bool, NetworkError> {
        let any = match flow.destination {
            IpAddr::V4(_) => Ipv4Addr::UNSPECIFIED.into(),
            IpAddr::V6(_) => Ipv6Addr::UNSPECIFIED.into(),
        };
        let at = |address| self.by_port.get(&(flow.protocol, flow.port, address));
        let Some(mapping) = at(flow.destination).or_else(|| at(any)) else {
            return Ok(false);
        };
        match self.stale {
            Stale::ToThePod => Ok(flow.to == mapping.to),
            Stale::Elsewhere if flow.to == mapping.to => Ok(false),
            Stale::Elsewhere if !mapping.address.is_unspecified() => Ok(true),
            Stale::Elsewhere => self.is_of_this_node(flow.destination),
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

/// A request for a list of flows.
#[derive(PartialEq, Eq, PartialOrd, Ord)]
struct List {
    family: u8,
    protocol: Protocol,
    /// The destination port of the flows. `None` means all ports.
    port: Option<u16>,
}

fn lists(mappings: &[&Mapping]) -> BTreeSet<List> {
    let separately = mappings.len() <= LISTS;
    let lists = mappings.iter().map(|mapping| List {
        family: family(mapping.address),
        protocol: mapping.protocol,
        port: separately.then_some(mapping.port),
    });
    lists.collect()
}

impl List {
    fn write(&self, batch: &mut Batch) {
        let protocol = self.protocol;
        let action = match self.port {
            Some(port) => format!("list the connection-tracking entries of {protocol} port {port}"),
            None => format!("list the connection-tracking entries of {protocol}"),
        };
        let kind = subsystem(IPCTNL_MSG_CT_GET);
        batch.message(action, kind, NLM_F_DUMP, |body| {
            body.header(&header(self.family));
            body.nest(CTA_TUPLE_ORIG, |tuple| {
                tuple.nest(CTA_TUPLE_PROTO, |proto| {
                    proto.bytes(CTA_PROTO_NUM, &[protocol.number()]);
                    if let Some(port) = self.port {
                        proto.bytes(CTA_PROTO_DST_PORT, &port.to_be_bytes());
                    }
                });
            });
            body.nest(CTA_FILTER, |filter| {
                let flags = match self.port {
                    Some(_) => FILTER_BY_PROTOCOL | FILTER_BY_PORT,
                    None => FILTER_BY_PROTOCOL,
                };
                filter.u32(CTA_FILTER_ORIG_FLAGS, flags);
            });
        });
    }
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
        let action = format!(
            "delete the connection-tracking entry of a flow to {}",
            self.to
        );
        let kind = subsystem(IPCTNL_MSG_CT_DELETE);
        batch.message(action, kind, NLM_F_ACK, |body: &mut Body| {
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
