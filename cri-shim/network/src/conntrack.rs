//! Deletes stale flows to host ports from the kernel's connection-tracking table, over ctnetlink.
//! The kernel's header `linux/netfilter/nfnetlink_conntrack.h` defines the messages.
//!
//! The first packet of a flow determines the destination of all packets of the flow. For a protocol
//! without connections, such as UDP, a flow lasts as long as the peer keeps sending packets. When a
//! host port is opened or closed, old flows can still exist. The kernel sends the packets of an old
//! flow to the previous destination. The previous destination can be the address of another pod, or
//! an address that no pod has. For this reason, stale flows are deleted when a host port is opened
//! or closed.

use std::net::{IpAddr, SocketAddr};

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
/// The flags of a filter for a dump of flows. The two bits select the protocol number and the
/// destination port. The kernel compares only these two parts of a flow's tuple.
const FILTER_BY_PROTOCOL_AND_PORT: u32 = 1 << 3 | 1 << 5;

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

/// A flow to a host port.
struct Flow<'a> {
    /// The destination address of the flow's first packet.
    destination: IpAddr,
    /// The address and port to which the flow's packets are sent.
    to: SocketAddr,
    attributes: Attributes<'a>,
}

/// Deletes the flows that would direct packets for the host ports in `mappings` to the wrong
/// destination. TCP flows are not deleted. A TCP connection ends together with its pod, and every
/// new connection is a new flow.
pub(crate) fn forget(mappings: &[Mapping], stale: Stale) -> Result<(), NetworkError> {
    let mut socket = None;
    for mapping in mappings {
        if mapping.protocol == Protocol::Tcp {
            continue;
        }
        let socket = match &mut socket {
            Some(socket) => socket,
            none => none.insert(Socket::netfilter()?),
        };
        let found = flows(socket, mapping)?;
        let mut deletions = Batch::default();
        let mut own = None;
        for flow in found.iter().filter_map(Flow::parse) {
            let is_stale = match stale {
                Stale::ToThePod => flow.to == mapping.to,
                Stale::Elsewhere => {
                    flow.to != mapping.to && is_for_port(mapping, flow.destination, &mut own)?
                }
            };
            if is_stale {
                flow.delete(&mut deletions, mapping);
            }
        }
        match socket.execute(&deletions) {
            // ENOENT means that the flow expired after it was listed.
            Err(error) if error.is(Errno::ENOENT) => {}
            result => drop(result?),
        }
    }
    Ok(())
}

/// Returns whether `destination` is an address at which the host port of `mapping` is open. A
/// packet to another address is for the port with the same number on another machine. `own` caches
/// the addresses of this node.
fn is_for_port(
    mapping: &Mapping,
    destination: IpAddr,
    own: &mut Option<Vec<IpAddr>>,
) -> Result<bool, NetworkError> {
    if !mapping.address.is_unspecified() {
        return Ok(destination == mapping.address);
    }
    if destination.is_loopback() {
        return Ok(true);
    }
    let own = match own {
        Some(own) => own,
        none => none.insert(link::own_addresses(&mut Socket::route()?)?),
    };
    Ok(own.contains(&destination))
}

fn flows(socket: &mut Socket, mapping: &Mapping) -> Result<Vec<Reply>, NetworkError> {
    let mut batch = Batch::default();
    let Mapping { protocol, port, .. } = mapping;
    let action = format!("list the connection-tracking entries of {protocol} port {port}");
    let kind = subsystem(IPCTNL_MSG_CT_GET);
    batch.message(action, kind, NLM_F_DUMP, |body| {
        body.header(&family(mapping));
        body.nest(CTA_TUPLE_ORIG, |tuple| {
            tuple.nest(CTA_TUPLE_PROTO, |proto| {
                proto.bytes(CTA_PROTO_NUM, &[protocol.number()]);
                proto.bytes(CTA_PROTO_DST_PORT, &port.to_be_bytes());
            });
        });
        body.nest(CTA_FILTER, |filter| {
            filter.u32(CTA_FILTER_ORIG_FLAGS, FILTER_BY_PROTOCOL_AND_PORT);
        });
    });
    socket.execute(&batch)
}

impl<'a> Flow<'a> {
    fn parse(reply: &'a Reply) -> Option<Flow<'a>> {
        let attributes = reply.attributes(HEADER_BYTES);
        let original = attributes.nest(CTA_TUPLE_ORIG).nest(CTA_TUPLE_IP);
        let answers = attributes.nest(CTA_TUPLE_REPLY);
        let (from, proto) = (answers.nest(CTA_TUPLE_IP), answers.nest(CTA_TUPLE_PROTO));
        let port = u16::from_be_bytes(proto.array(CTA_PROTO_SRC_PORT)?);
        Some(Flow {
            destination: address(&original, CTA_IP_V4_DST, CTA_IP_V6_DST)?,
            to: SocketAddr::new(address(&from, CTA_IP_V4_SRC, CTA_IP_V6_SRC)?, port),
            attributes,
        })
    }

    fn delete(&self, batch: &mut Batch, mapping: &Mapping) {
        let action = format!(
            "delete the connection-tracking entry of a flow to {}",
            self.to
        );
        let kind = subsystem(IPCTNL_MSG_CT_DELETE);
        batch.message(action, kind, NLM_F_ACK, |body: &mut Body| {
            body.header(&family(mapping));
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

/// Returns a `struct nfgenmsg` with the address family of `mapping`.
fn family(mapping: &Mapping) -> [u8; HEADER_BYTES] {
    let family = match mapping.address {
        IpAddr::V4(_) => libc::AF_INET,
        IpAddr::V6(_) => libc::AF_INET6,
    };
    [family as u8, 0, 0, 0]
}
