//! The sets and maps of the nftables tables, and their elements.

use std::net::IpAddr;

use super::expression::{
    ETHER_ADDR, IFNAME, INET_PROTO, INET_SERVICE, INTERFACE_NAME_BYTES, IpFamily, LIST_ELEMENT,
    interface, octets, value,
};
use super::{Elements, PodPort, TableFamily};
use crate::host_ports::Mapping;
use crate::link;
use crate::netlink::Body;

const NFTA_SET_ELEM_KEY: u16 = 1;
const NFTA_SET_ELEM_DATA: u16 = 2;

/// The maximum number of elements in one message. An attribute with more elements could be too
/// long, because netlink stores the length of an attribute in 16 bits.
const ELEMENTS_AT_ONCE: usize = 256;

/// The type of a set's keys or of a map's data. The kernel uses only the type's length in bytes. The
/// program nft(8) also uses the type's number.
pub(super) struct NftType {
    pub number: u32,
    pub bytes: u32,
}

/// A set or a map.
#[derive(Clone, Copy, PartialEq, Eq)]
pub(super) enum Set {
    /// The map with the host ports of an address family.
    HostPorts(IpFamily),
    /// The set of the bridge ports at which only packets from the pods' own addresses are accepted.
    Ports,
    /// The set with the allowed source addresses of each bridge port. An element consists of the
    /// name of the bridge port, a hardware address and an IP address.
    Sources(IpFamily),
}

impl Set {
    /// The sets of the table of the family [`TableFamily::Bridge`].
    pub(super) const OF_SOURCES: [Set; 3] = [
        Set::Ports,
        Set::Sources(IpFamily::V4),
        Set::Sources(IpFamily::V6),
    ];

    pub(super) const ALL: [Set; 5] = [
        Set::HostPorts(IpFamily::V4),
        Set::HostPorts(IpFamily::V6),
        Set::Ports,
        Set::Sources(IpFamily::V4),
        Set::Sources(IpFamily::V6),
    ];

    pub(super) fn name(self) -> &'static str {
        match self {
            Set::HostPorts(IpFamily::V4) => "host_ports4",
            Set::HostPorts(IpFamily::V6) => "host_ports6",
            Set::Ports => "ports",
            Set::Sources(IpFamily::V4) => "sources4",
            Set::Sources(IpFamily::V6) => "sources6",
        }
    }

    /// Returns the family of the table that contains the set.
    pub(super) fn family(self) -> TableFamily {
        match self {
            Set::HostPorts(_) => TableFamily::Inet,
            Set::Ports | Set::Sources(_) => TableFamily::Bridge,
        }
    }

    /// Returns a number for the set. The transaction that creates the set refers to the set by this
    /// number.
    pub(super) fn id(self) -> u32 {
        match self {
            Set::HostPorts(IpFamily::V4) => 1,
            Set::HostPorts(IpFamily::V6) => 2,
            Set::Ports => 3,
            Set::Sources(IpFamily::V4) => 4,
            Set::Sources(IpFamily::V6) => 5,
        }
    }

    /// Returns the type of the keys and, for a map, the type of the data. Each part of a key or of
    /// the data is padded to a multiple of four bytes.
    pub(super) fn types(self) -> (NftType, Option<NftType>) {
        match self {
            Set::HostPorts(family) => {
                let data = NftType {
                    number: family.address_type() << 6 | INET_SERVICE,
                    bytes: family.address_bytes() + 4,
                };
                let key = NftType {
                    number: INET_PROTO << 12 | data.number,
                    bytes: 4 + data.bytes,
                };
                (key, Some(data))
            }
            Set::Ports => {
                let key = NftType {
                    number: IFNAME,
                    bytes: INTERFACE_NAME_BYTES,
                };
                (key, None)
            }
            Set::Sources(family) => {
                let key = NftType {
                    number: IFNAME << 12 | ETHER_ADDR << 6 | family.address_type(),
                    bytes: INTERFACE_NAME_BYTES + 8 + family.address_bytes(),
                };
                (key, None)
            }
        }
    }

    /// Returns the elements of `all` that belong to this set.
    pub(super) fn elements(self, all: &Elements) -> Vec<Element> {
        match self {
            Set::HostPorts(family) => {
                let mappings = all.mappings.iter().filter(|one| family.has(one.address));
                mappings.map(host_port).collect()
            }
            Set::Ports => {
                let ports = all.ports.iter();
                ports
                    .map(|port| Element {
                        key: interface(&port.interface),
                        data: None,
                    })
                    .collect()
            }
            Set::Sources(family) => all
                .ports
                .iter()
                .flat_map(|port| sources(port, family))
                .collect(),
        }
    }
}

/// An element of a set, or an element of a map with its data.
#[derive(Clone)]
pub(super) struct Element {
    key: Vec<u8>,
    data: Option<Vec<u8>>,
}

fn host_port(mapping: &Mapping) -> Element {
    let mut key = vec![mapping.protocol.number(), 0, 0, 0];
    key.extend(octets(mapping.address));
    key.extend(mapping.port.to_be_bytes());
    key.extend([0, 0]);
    let mut data = octets(mapping.to.ip());
    data.extend(mapping.to.port().to_be_bytes());
    data.extend([0, 0]);
    Element {
        key,
        data: Some(data),
    }
}

/// Returns the elements with the pod's addresses of the address family `family`. In the family
/// IPv6, the link-local address is one of the addresses.
fn sources(port: &PodPort, family: IpFamily) -> Vec<Element> {
    let link_local: IpAddr = link::link_local_of(port.mac).into();
    let all = port.addresses.iter().copied().chain([link_local]);
    all.filter(|address| family.has(*address))
        .map(|address| {
            let mut key = interface(&port.interface);
            key.extend(port.mac);
            key.extend([0, 0]);
            key.extend(octets(address));
            Element { key, data: None }
        })
        .collect()
}

/// The change of a set.
#[derive(Clone, Copy, PartialEq, Eq)]
pub(super) enum Operation {
    Add,
    Remove,
}

/// Elements of one set that fit into one netlink message.
pub(super) struct ElementList {
    pub set: Set,
    pub operation: Operation,
    elements: Vec<Element>,
}

impl ElementList {
    /// Writes the list of elements.
    pub(super) fn write(&self, list: &mut Body) {
        for Element { key, data } in &self.elements {
            list.nest(LIST_ELEMENT, |element| {
                value(element, NFTA_SET_ELEM_KEY, key);
                if let Some(data) = data {
                    value(element, NFTA_SET_ELEM_DATA, data);
                }
            });
        }
    }
}

/// Returns the messages for the elements of `all` that belong to one of `sets`.
pub(super) fn messages(sets: &[Set], operation: Operation, all: &Elements) -> Vec<ElementList> {
    let mut messages = Vec::new();
    for set in sets {
        for some in set.elements(all).chunks(ELEMENTS_AT_ONCE) {
            messages.push(ElementList {
                set: *set,
                operation,
                elements: some.to_vec(),
            });
        }
    }
    messages
}
