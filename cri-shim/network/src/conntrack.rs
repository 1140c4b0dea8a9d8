//! What connection tracking remembers of host ports, by ctnetlink: the kernel's
//! `linux/netfilter/nfnetlink_conntrack.h`.
//!
//! Where the packets of a flow go is decided by its first one. For a protocol without connections
//! a flow lasts as long as somebody goes on sending, and so do answers of the past: to the pod that
//! had the port before, or to nobody. Those flows have to be forgotten when a port comes or goes.

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
/// Which parts of the tuple a dump is held against; the kernel's bits for the protocol's number
/// and the port of the destination.
const FILTER_BY_PROTOCOL_AND_PORT: u32 = 1 << 3 | 1 << 5;

/// A `struct nfgenmsg` is before the attributes.
const HEADER_BYTES: usize = 4;

/// What is to be forgotten of a host port.
#[derive(Clone, Copy, PartialEq, Eq)]
pub(crate) enum Stale {
    /// The port has come to its pod: whatever goes elsewhere.
    Elsewhere,
    /// The port was taken from its pod: whatever goes there.
    ToThePod,
}

/// A flow to a host port.
struct Flow<'a> {
    /// The destination of its first packet.
    destination: IpAddr,
    /// Where its packets go.
    to: SocketAddr,
    attributes: Attributes<'a>,
}

/// Has the kernel forget the flows by which packets for these host ports would go on to the wrong
/// place. TCP is left out: its connections end with their pod, and a new one is a new flow.
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
        let mut doomed = Batch::default();
        let mut own = None;
        for flow in found.iter().filter_map(Flow::parse) {
            let is_stale = match stale {
                Stale::ToThePod => flow.to == mapping.to,
                Stale::Elsewhere => {
                    flow.to != mapping.to && is_for_port(mapping, flow.destination, &mut own)?
                }
            };
            if is_stale {
                flow.delete(&mut doomed, mapping);
            }
        }
        match socket.execute(&doomed) {
            // It ended by itself meanwhile.
            Err(error) if error.is(Errno::ENOENT) => {}
            result => drop(result?),
        }
    }
    Ok(())
}

/// Whether a packet to `destination` is meant for the host port, and not forwarded to the same port
/// of another machine.
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
    let action = format!("look for what connection tracking has of {protocol} port {port}");
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
        let action = format!("have connection tracking forget a flow to {}", self.to);
        let kind = subsystem(IPCTNL_MSG_CT_DELETE);
        batch.message(action, kind, NLM_F_ACK, |body: &mut Body| {
            body.header(&family(mapping));
            // As they came: the inside of a nest is its value.
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

/// A `struct nfgenmsg`.
fn family(mapping: &Mapping) -> [u8; HEADER_BYTES] {
    let family = match mapping.address {
        IpAddr::V4(_) => libc::AF_INET,
        IpAddr::V6(_) => libc::AF_INET6,
    };
    [family as u8, 0, 0, 0]
}
