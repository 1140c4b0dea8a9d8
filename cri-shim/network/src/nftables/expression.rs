//! The rules of the nftables table, as sequences of the expressions that nf_tables executes. An
//! expression loads a value into registers, compares the value of a register, or acts on the
//! packet. `nft --debug=netlink list ruleset` shows the expressions of all rules.

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};

use super::sets::Set;
use crate::address::Range;
use crate::host_ports::Protocol;
use crate::netlink::Body;

const NFPROTO_IPV4: u8 = 2;
const NFPROTO_IPV6: u8 = 10;

pub(super) const LIST_ELEMENT: u16 = 1;
const NFTA_EXPR_NAME: u16 = 1;
const NFTA_EXPR_DATA: u16 = 2;
const NFTA_DATA_VALUE: u16 = 1;
const NFTA_DATA_VERDICT: u16 = 2;
const NFTA_VERDICT_CODE: u16 = 1;
const NFTA_VERDICT_CHAIN: u16 = 2;
const NF_DROP: i32 = 0;
const NF_ACCEPT: i32 = 1;
const NFT_JUMP: i32 = -3;
const NFT_RETURN: i32 = -5;

const NFTA_META_DREG: u16 = 1;
const NFTA_META_KEY: u16 = 2;
const NFT_META_PROTOCOL: u32 = 1;
const NFT_META_IIFNAME: u32 = 6;
const NFT_META_OIFNAME: u32 = 7;
const NFT_META_NFPROTO: u32 = 15;
const NFT_META_L4PROTO: u32 = 16;

const NFTA_PAYLOAD_DREG: u16 = 1;
const NFTA_PAYLOAD_BASE: u16 = 2;
const NFTA_PAYLOAD_OFFSET: u16 = 3;
const NFTA_PAYLOAD_LEN: u16 = 4;
const NFT_PAYLOAD_LL_HEADER: u32 = 0;
const NFT_PAYLOAD_NETWORK_HEADER: u32 = 1;
const NFT_PAYLOAD_TRANSPORT_HEADER: u32 = 2;

const NFTA_BITWISE_SREG: u16 = 1;
const NFTA_BITWISE_DREG: u16 = 2;
const NFTA_BITWISE_LEN: u16 = 3;
const NFTA_BITWISE_MASK: u16 = 4;
const NFTA_BITWISE_XOR: u16 = 5;

const NFTA_CMP_SREG: u16 = 1;
const NFTA_CMP_OP: u16 = 2;
const NFTA_CMP_DATA: u16 = 3;
const NFT_CMP_EQ: u32 = 0;
const NFT_CMP_NEQ: u32 = 1;

const NFTA_IMMEDIATE_DREG: u16 = 1;
const NFTA_IMMEDIATE_DATA: u16 = 2;

const NFTA_LOOKUP_SET: u16 = 1;
const NFTA_LOOKUP_SREG: u16 = 2;
const NFTA_LOOKUP_DREG: u16 = 3;

const NFTA_FIB_DREG: u16 = 1;
const NFTA_FIB_RESULT: u16 = 2;
const NFTA_FIB_FLAGS: u16 = 3;
const NFT_FIB_RESULT_ADDRTYPE: u32 = 3;
const NFTA_FIB_F_DADDR: u32 = 1 << 1;

const NFTA_CT_DREG: u16 = 1;
const NFTA_CT_KEY: u16 = 2;
const NFTA_CT_SREG: u16 = 4;
const NFT_CT_STATUS: u32 = 2;
const NFT_CT_MARK: u32 = 3;
const IPS_DST_NAT: u32 = 1 << 5;

/// The bit of a connection's mark that identifies a connection from a pod to a host port. This bit
/// does not conflict with Kubernetes. Kubernetes uses the bits 0x2000 to 0x8000 of packet marks,
/// but no bits of connection marks.
const HAIRPIN_MARK: u32 = 0x1000;

const NFTA_NAT_TYPE: u16 = 1;
const NFTA_NAT_FAMILY: u16 = 2;
const NFTA_NAT_REG_ADDR_MIN: u16 = 3;
const NFTA_NAT_REG_PROTO_MIN: u16 = 5;
const NFT_NAT_DNAT: u32 = 1;

const NFTA_MASQ_FLAGS: u16 = 1;
const NF_NAT_RANGE_PROTO_RANDOM_FULLY: u32 = 1 << 4;

const NFT_REG_VERDICT: u32 = 0;
/// The number of the first 4-byte register. nf_tables has sixteen such registers.
const NFT_REG32_00: u32 = 8;
/// The register into which a lookup writes its result.
const LOOKUP_RESULT: u32 = NFT_REG32_00 + 8;

/// The register after the registers that contain the name of an interface.
const AFTER_INTERFACE: u32 = NFT_REG32_00 + INTERFACE_NAME_BYTES / 4;
/// The register after the registers that contain the name of an interface and a hardware address.
const AFTER_HARDWARE_ADDRESS: u32 = AFTER_INTERFACE + 2;

/// The network 127.0.0.0/8 and its mask.
const LOOPBACK4: (IpAddr, IpAddr) = (
    IpAddr::V4(Ipv4Addr::new(127, 0, 0, 0)),
    IpAddr::V4(Ipv4Addr::new(255, 0, 0, 0)),
);
/// The address ::1 and a mask with all bits set.
const LOOPBACK6: (Ipv6Addr, Ipv6Addr) = (Ipv6Addr::LOCALHOST, Ipv6Addr::from_bits(u128::MAX));

/// The length of an interface name in an expression, IFNAMSIZ. Shorter names are padded with zero
/// bytes, because nf_tables also compares the padding.
pub(super) const INTERFACE_NAME_BYTES: u32 = 16;

/// The numbers that identify data types in nft(8). The type of a concatenated key contains one of
/// these 6-bit numbers for each part of the key.
const IPV4_ADDR: u32 = 7;
const IPV6_ADDR: u32 = 8;
pub(super) const ETHER_ADDR: u32 = 9;
pub(super) const INET_PROTO: u32 = 12;
pub(super) const INET_SERVICE: u32 = 13;
pub(super) const IFNAME: u32 = 41;

/// A field of a packet.
#[derive(Clone, Copy)]
pub(super) struct Payload {
    /// The header that contains the field.
    base: u32,
    offset: u32,
    bytes: u32,
}

impl Payload {
    pub(super) const fn link(offset: u32, bytes: u32) -> Payload {
        let base = NFT_PAYLOAD_LL_HEADER;
        Payload {
            base,
            offset,
            bytes,
        }
    }

    pub(super) const fn network(offset: u32, bytes: u32) -> Payload {
        let base = NFT_PAYLOAD_NETWORK_HEADER;
        Payload {
            base,
            offset,
            bytes,
        }
    }

    pub(super) const fn transport(offset: u32, bytes: u32) -> Payload {
        let base = NFT_PAYLOAD_TRANSPORT_HEADER;
        Payload {
            base,
            offset,
            bytes,
        }
    }
}

#[derive(Clone, Copy, PartialEq, Eq)]
pub(super) enum IpFamily {
    V4,
    V6,
}

impl IpFamily {
    pub(super) fn of(address: IpAddr) -> Self {
        match address {
            IpAddr::V4(_) => IpFamily::V4,
            IpAddr::V6(_) => IpFamily::V6,
        }
    }

    pub(super) fn has(self, address: IpAddr) -> bool {
        self == IpFamily::of(address)
    }

    fn number(self) -> u8 {
        match self {
            IpFamily::V4 => NFPROTO_IPV4,
            IpFamily::V6 => NFPROTO_IPV6,
        }
    }

    pub(super) fn address_bytes(self) -> u32 {
        match self {
            IpFamily::V4 => 4,
            IpFamily::V6 => 16,
        }
    }

    /// Returns the number of the data type for addresses of this family.
    pub(super) fn address_type(self) -> u32 {
        match self {
            IpFamily::V4 => IPV4_ADDR,
            IpFamily::V6 => IPV6_ADDR,
        }
    }

    pub(super) fn source_field(self) -> Payload {
        let offset = match self {
            IpFamily::V4 => 12,
            IpFamily::V6 => 8,
        };
        Payload::network(offset, self.address_bytes())
    }

    fn destination_field(self) -> Payload {
        let offset = match self {
            IpFamily::V4 => 16,
            IpFamily::V6 => 24,
        };
        Payload::network(offset, self.address_bytes())
    }
}

pub(super) fn octets(address: IpAddr) -> Vec<u8> {
    match address {
        IpAddr::V4(address) => address.octets().into(),
        IpAddr::V6(address) => address.octets().into(),
    }
}

/// Appends an attribute of the type `kind` that contains `bytes` as a value.
pub(super) fn value(body: &mut Body, kind: u16, bytes: &[u8]) {
    body.nest(kind, |inside| inside.bytes(NFTA_DATA_VALUE, bytes));
}

/// The destination port, which is at the same offset in the headers of TCP, UDP and SCTP.
const DESTINATION_PORT: Payload = Payload::transport(2, 2);

type Expression = Box<dyn Fn(&mut Body)>;

/// A rule, as a list of its expressions in the order of their execution.
#[derive(Default)]
pub(super) struct Rule(Vec<(&'static str, Expression)>);

impl Rule {
    pub(super) fn write(&self, list: &mut Body) {
        for (name, data) in &self.0 {
            list.nest(LIST_ELEMENT, |element| {
                element.string(NFTA_EXPR_NAME, name);
                element.nest(NFTA_EXPR_DATA, data);
            });
        }
    }

    /// Creates a rule that accepts packets from the loopback.
    pub(super) fn accept_loopback() -> Rule {
        Rule::default()
            .interface(NFT_META_IIFNAME, NFT_CMP_EQ, interface("lo"))
            .accept()
    }

    /// Creates a rule that drops packets to addresses in `range` from other interfaces than the
    /// bridge.
    pub(super) fn hide(bridge: &str, range: Range) -> Rule {
        Rule::default()
            .interface(NFT_META_IIFNAME, NFT_CMP_NEQ, interface(bridge))
            .family(IpFamily::of(range.network()))
            .destination(NFT_CMP_EQ, range.network(), range.mask())
            .drop_packet()
    }

    /// Creates a rule that drops packets from pods to 127.0.0.0/8 of the node. If `sources` is true,
    /// the rule drops packets with a source address in 127.0.0.0/8 instead.
    pub(super) fn guard(bridge: &str, sources: bool) -> Rule {
        let rule = Rule::default()
            .interface(NFT_META_IIFNAME, NFT_CMP_EQ, interface(bridge))
            .family(IpFamily::V4);
        let (network, mask) = LOOPBACK4;
        let rule = if sources {
            rule.source(network, mask)
        } else {
            rule.destination(NFT_CMP_EQ, network, mask)
        };
        rule.drop_packet()
    }

    /// Creates a rule that passes packets for any address of the node to the chain `chain`.
    pub(super) fn jump_if_local(chain: &'static str) -> Rule {
        Rule::default()
            .add("fib", |data| {
                data.be32(NFTA_FIB_DREG, NFT_REG32_00);
                data.be32(NFTA_FIB_RESULT, NFT_FIB_RESULT_ADDRTYPE);
                data.be32(NFTA_FIB_FLAGS, NFTA_FIB_F_DADDR);
            })
            .compare(NFT_CMP_EQ, u32::from(libc::RTN_LOCAL).to_ne_bytes())
            .verdict(NFT_JUMP, Some(chain))
    }

    /// Creates a rule that ends the chain for packets to 127.0.0.0/8. The addresses of these packets
    /// are then not translated.
    pub(super) fn not_for_loopback4() -> Rule {
        let (network, mask) = LOOPBACK4;
        Rule::default()
            .family(IpFamily::V4)
            .destination(NFT_CMP_EQ, network, mask)
            .verdict(NFT_RETURN, None)
    }

    /// Creates a rule that ends the chain for packets to ::1. The addresses of these packets are
    /// then not translated.
    pub(super) fn not_for_loopback6() -> Rule {
        let (one, mask) = LOOPBACK6;
        Rule::default()
            .family(IpFamily::V6)
            .destination(NFT_CMP_EQ, one.into(), mask.into())
            .verdict(NFT_RETURN, None)
    }

    /// Creates a rule that ends the chain for packets to the TCP port `port` at `address`. The
    /// unspecified address means every address of its address family.
    pub(super) fn not_for_listener(address: IpAddr, port: u16) -> Rule {
        let family = IpFamily::of(address);
        let mut rule = Rule::default().family(family);
        if !address.is_unspecified() {
            rule = rule.field(family.destination_field(), &octets(address));
        }
        rule.l4_protocol(Protocol::Tcp.number())
            .field(DESTINATION_PORT, &port.to_be_bytes())
            .verdict(NFT_RETURN, None)
    }

    /// Creates a rule that sends packets for a host port to the port's pod. If `of_any` is true,
    /// the rule applies to the host ports that are open at every address. If `of_any` is false, the
    /// rule applies to the host ports that are open only at the packet's destination address.
    pub(super) fn host_port(family: IpFamily, of_any: bool) -> Rule {
        let bytes = family.address_bytes();
        Rule::default()
            .family(family)
            .look_up_host_port(family, of_any)
            .add("nat", move |data| {
                data.be32(NFTA_NAT_TYPE, NFT_NAT_DNAT);
                data.be32(NFTA_NAT_FAMILY, family.number().into());
                data.be32(NFTA_NAT_REG_ADDR_MIN, LOOKUP_RESULT);
                data.be32(NFTA_NAT_REG_PROTO_MIN, LOOKUP_RESULT + bytes / 4);
            })
    }

    /// Creates a rule that marks the connections from pods to host ports. If `of_any` is true, the
    /// rule applies to host ports that are open at every address. If `of_any` is false, the rule
    /// applies to host ports that are open only at the packet's destination address.
    pub(super) fn mark_hairpin(range: Range, of_any: bool) -> Rule {
        let family = IpFamily::of(range.network());
        Rule::default()
            .family(family)
            .source(range.network(), range.mask())
            .look_up_host_port(family, of_any)
            .ct(NFT_CT_MARK)
            .bitwise(
                (!HAIRPIN_MARK).to_ne_bytes().into(),
                HAIRPIN_MARK.to_ne_bytes().into(),
            )
            .add("ct", |data| {
                data.be32(NFTA_CT_KEY, NFT_CT_MARK);
                data.be32(NFTA_CT_SREG, NFT_REG32_00);
            })
    }

    /// Creates a rule that masquerades packets from pods to destinations outside the pod range. The
    /// source address of these packets becomes the node's address.
    pub(super) fn masquerade(bridge: &str, range: Range) -> Rule {
        let family = IpFamily::of(range.network());
        // The rule does not masquerade multicast packets. Masquerading ensures that replies are
        // sent to the node's address, but multicast packets get no replies.
        let (multicast, mask) = match family {
            IpFamily::V4 => (IpAddr::from([224, 0, 0, 0]), IpAddr::from([240, 0, 0, 0])),
            IpFamily::V6 => {
                let front = IpAddr::from([0xff00, 0, 0, 0, 0, 0, 0, 0]);
                (front, front)
            }
        };
        Rule::default()
            .family(family)
            .source(range.network(), range.mask())
            .destination(NFT_CMP_NEQ, range.network(), range.mask())
            .interface(NFT_META_OIFNAME, NFT_CMP_NEQ, interface(bridge))
            .destination(NFT_CMP_NEQ, multicast, mask)
            .masquerade_now()
    }

    /// Creates a rule that masquerades packets from the node's 127.0.0.0/8 or ::1 to a pod. The pod
    /// can then reply to these packets.
    pub(super) fn masquerade_loopback(bridge: &str, family: IpFamily) -> Rule {
        let (network, mask): (IpAddr, IpAddr) = match family {
            IpFamily::V4 => LOOPBACK4,
            IpFamily::V6 => (LOOPBACK6.0.into(), LOOPBACK6.1.into()),
        };
        Rule::default()
            .interface(NFT_META_OIFNAME, NFT_CMP_EQ, interface(bridge))
            .family(family)
            .source(network, mask)
            .masquerade_now()
    }

    /// Creates a rule that masquerades the packets from a pod to a host port of a pod on this node.
    pub(super) fn hairpin(bridge: &str, range: Range) -> Rule {
        Rule::default()
            .interface(NFT_META_OIFNAME, NFT_CMP_EQ, interface(bridge))
            .family(IpFamily::of(range.network()))
            .source(range.network(), range.mask())
            .ct(NFT_CT_STATUS)
            .mask(IPS_DST_NAT.to_ne_bytes().into())
            .compare(NFT_CMP_NEQ, [0; 4])
            .ct(NFT_CT_MARK)
            .mask(HAIRPIN_MARK.to_ne_bytes().into())
            .compare(NFT_CMP_NEQ, [0; 4])
            .masquerade_now()
    }

    /// Adds expressions that look up the packet's protocol, destination address and destination
    /// port in the map of `family`. If `of_any` is true, the expressions look up the unspecified
    /// address instead of the destination address. If the map has no entry for the packet, the
    /// kernel continues with the next rule.
    fn look_up_host_port(self, family: IpFamily, of_any: bool) -> Rule {
        let port = NFT_REG32_00 + 1 + family.address_bytes() / 4;
        let rule = self.meta(NFT_META_L4PROTO, NFT_REG32_00);
        let rule = if of_any {
            rule.any_address(family)
        } else {
            rule.payload(family.destination_field(), NFT_REG32_00 + 1)
        };
        rule.payload(DESTINATION_PORT, port)
            .look_up(Set::HostPorts(family), Some(LOOKUP_RESULT))
    }

    /// Adds expressions that compare the type of the packet's network protocol.
    pub(super) fn protocol(self, ethertype: u16) -> Rule {
        self.meta(NFT_META_PROTOCOL, NFT_REG32_00)
            .compare(NFT_CMP_EQ, ethertype.to_be_bytes())
    }

    /// Adds expressions that compare the number of the packet's transport protocol.
    pub(super) fn l4_protocol(self, number: u8) -> Rule {
        self.meta(NFT_META_L4PROTO, NFT_REG32_00)
            .compare(NFT_CMP_EQ, [number])
    }

    /// Adds expressions that compare a field of the packet with `value`.
    pub(super) fn field(self, field: Payload, value: &[u8]) -> Rule {
        self.payload(field, NFT_REG32_00).compare(NFT_CMP_EQ, value)
    }

    /// Adds expressions that check whether the name of the incoming interface does not begin with
    /// `prefix`.
    pub(super) fn interface_has_other_prefix(self, prefix: &str) -> Rule {
        self.interface(NFT_META_IIFNAME, NFT_CMP_NEQ, prefix.as_bytes().to_vec())
    }

    /// Adds expressions that look up the incoming interface in `set`.
    pub(super) fn look_up_interface(self, set: Set) -> Rule {
        self.meta(NFT_META_IIFNAME, NFT_REG32_00).look_up(set, None)
    }

    /// Adds expressions that look up the incoming interface, a hardware address and an IP address in
    /// `set`. The packet contains the two addresses in the fields `hardware` and `address`.
    pub(super) fn look_up_source(self, set: Set, hardware: Payload, address: Payload) -> Rule {
        self.meta(NFT_META_IIFNAME, NFT_REG32_00)
            .payload(hardware, AFTER_INTERFACE)
            .payload(address, AFTER_HARDWARE_ADDRESS)
            .look_up(set, None)
    }

    pub(super) fn accept(self) -> Rule {
        self.verdict(NF_ACCEPT, None)
    }

    pub(super) fn drop_packet(self) -> Rule {
        self.verdict(NF_DROP, None)
    }

    fn add(mut self, name: &'static str, data: impl Fn(&mut Body) + 'static) -> Rule {
        self.0.push((name, Box::new(data)));
        self
    }

    fn meta(self, key: u32, register: u32) -> Rule {
        self.add("meta", move |data| {
            data.be32(NFTA_META_DREG, register);
            data.be32(NFTA_META_KEY, key);
        })
    }

    fn payload(self, field: Payload, register: u32) -> Rule {
        self.add("payload", move |data| {
            data.be32(NFTA_PAYLOAD_DREG, register);
            data.be32(NFTA_PAYLOAD_BASE, field.base);
            data.be32(NFTA_PAYLOAD_OFFSET, field.offset);
            data.be32(NFTA_PAYLOAD_LEN, field.bytes);
        })
    }

    /// Adds an expression that loads a property of the packet's connection, such as its mark, into
    /// the first register.
    fn ct(self, key: u32) -> Rule {
        self.add("ct", move |data| {
            data.be32(NFTA_CT_DREG, NFT_REG32_00);
            data.be32(NFTA_CT_KEY, key);
        })
    }

    /// Adds an expression that compares the first register with the value `with`. If the comparison
    /// is false, the kernel continues with the next rule.
    fn compare(self, operator: u32, with: impl Into<Vec<u8>>) -> Rule {
        let with = with.into();
        self.add("cmp", move |data| {
            data.be32(NFTA_CMP_SREG, NFT_REG32_00);
            data.be32(NFTA_CMP_OP, operator);
            value(data, NFTA_CMP_DATA, &with);
        })
    }

    /// Adds an expression that computes the bitwise AND of the first register and `mask`.
    fn mask(self, mask: Vec<u8>) -> Rule {
        let nothing = vec![0; mask.len()];
        self.bitwise(mask, nothing)
    }

    /// Adds an expression that changes the first register. The expression first computes the
    /// bitwise AND of the register and `mask`. It then inverts the bits that are set in `inverted`.
    fn bitwise(self, mask: Vec<u8>, inverted: Vec<u8>) -> Rule {
        self.add("bitwise", move |data| {
            data.be32(NFTA_BITWISE_SREG, NFT_REG32_00);
            data.be32(NFTA_BITWISE_DREG, NFT_REG32_00);
            data.be32(NFTA_BITWISE_LEN, u32::try_from(mask.len()).unwrap_or(0));
            value(data, NFTA_BITWISE_MASK, &mask);
            value(data, NFTA_BITWISE_XOR, &inverted);
        })
    }

    fn family(self, family: IpFamily) -> Rule {
        self.meta(NFT_META_NFPROTO, NFT_REG32_00)
            .compare(NFT_CMP_EQ, [family.number()])
    }

    fn interface(self, key: u32, operator: u32, name: Vec<u8>) -> Rule {
        self.meta(key, NFT_REG32_00).compare(operator, name)
    }

    fn source(self, network: IpAddr, mask: IpAddr) -> Rule {
        let field = IpFamily::of(network).source_field();
        self.payload(field, NFT_REG32_00)
            .mask(octets(mask))
            .compare(NFT_CMP_EQ, octets(network))
    }

    fn destination(self, operator: u32, network: IpAddr, mask: IpAddr) -> Rule {
        let field = IpFamily::of(network).destination_field();
        self.payload(field, NFT_REG32_00)
            .mask(octets(mask))
            .compare(operator, octets(network))
    }

    /// Adds an expression that loads the unspecified address (0.0.0.0 or ::). In the keys of the
    /// maps, this address means every address of the node.
    fn any_address(self, family: IpFamily) -> Rule {
        let zeros = vec![0; if family == IpFamily::V4 { 4 } else { 16 }];
        self.add("immediate", move |data| {
            data.be32(NFTA_IMMEDIATE_DREG, NFT_REG32_00 + 1);
            value(data, NFTA_IMMEDIATE_DATA, &zeros);
        })
    }

    /// Adds an expression that reads a key from the first registers and looks it up in `set`. If the
    /// set does not contain the key, the kernel continues with the next rule. If `set` is a map, the
    /// expression writes the data of the element to the register `result`.
    fn look_up(self, set: Set, result: Option<u32>) -> Rule {
        self.add("lookup", move |data| {
            data.string(NFTA_LOOKUP_SET, set.name());
            data.be32(NFTA_LOOKUP_SREG, NFT_REG32_00);
            if let Some(register) = result {
                data.be32(NFTA_LOOKUP_DREG, register);
            }
        })
    }

    fn verdict(self, code: i32, chain: Option<&'static str>) -> Rule {
        self.add("immediate", move |data| {
            data.be32(NFTA_IMMEDIATE_DREG, NFT_REG_VERDICT);
            data.nest(NFTA_IMMEDIATE_DATA, |inside| {
                inside.nest(NFTA_DATA_VERDICT, |verdict| {
                    verdict.bytes(NFTA_VERDICT_CODE, &code.to_be_bytes());
                    if let Some(chain) = chain {
                        verdict.string(NFTA_VERDICT_CHAIN, chain);
                    }
                });
            });
        })
    }

    fn masquerade_now(self) -> Rule {
        // Two pods can open connections at the same time from the same source port. Without the
        // flag `fully-random`, the kernel could assign the same port of the node to both
        // connections.
        self.add("masq", |data| {
            data.be32(NFTA_MASQ_FLAGS, NF_NAT_RANGE_PROTO_RANDOM_FULLY);
        })
    }
}

/// Returns the name of an interface with its padding.
pub(super) fn interface(name: &str) -> Vec<u8> {
    let mut padded = name.as_bytes().to_vec();
    padded.resize(INTERFACE_NAME_BYTES as usize, 0);
    padded
}
