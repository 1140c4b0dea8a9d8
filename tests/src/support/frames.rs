//! Link-layer frames and packets that tests send through raw sockets, for example with forged source
//! addresses.

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};

pub(crate) type Mac = [u8; 6];

pub(crate) const IPV4: u16 = 0x0800;
pub(crate) const ARP: u16 = 0x0806;
pub(crate) const IPV6: u16 = 0x86dd;

const UDP: u8 = 17;
const ICMPV6: u8 = 58;

/// Returns the hardware address of the pod with the address `address` in the embedded network.
pub(crate) fn mac_of_pod(address: Ipv4Addr) -> Mac {
    let [a, b, c, d] = address.octets();
    [0x0a, 0x58, a, b, c, d]
}

/// Returns the link-local address that belongs to a hardware address.
pub(crate) fn link_local_of([a, b, c, d, e, f]: Mac) -> Ipv6Addr {
    let [g, h, i, j] = [a ^ 2, b, c, 0xff].map(u16::from);
    let [k, l, m, n] = [0xfe, d, e, f].map(u16::from);
    Ipv6Addr::new(
        0xfe80,
        0,
        0,
        0,
        g << 8 | h,
        i << 8 | j,
        k << 8 | l,
        m << 8 | n,
    )
}

pub(crate) fn ethernet(to: Mac, from: Mac, ethertype: u16, content: &[u8]) -> Vec<u8> {
    let mut frame = to.to_vec();
    frame.extend(from);
    frame.extend(ethertype.to_be_bytes());
    frame.extend(content);
    frame
}

/// Adds a VLAN tag with the VLAN id 0 to `frame`. A receiver without VLANs ignores the tag.
pub(crate) fn tagged(frame: &[u8]) -> Vec<u8> {
    let (addresses, rest) = frame.split_at(12);
    [addresses, &[0x81, 0, 0, 0], rest].concat()
}

/// Returns an IP packet with the UDP datagram `content`.
pub(crate) fn udp(from: SocketAddr, to: SocketAddr, content: &str) -> Vec<u8> {
    let mut datagram = from.port().to_be_bytes().to_vec();
    datagram.extend(to.port().to_be_bytes());
    datagram.extend((8 + content.len() as u16).to_be_bytes());
    datagram.extend([0, 0]);
    datagram.extend(content.as_bytes());
    match (from.ip(), to.ip()) {
        (IpAddr::V4(from), IpAddr::V4(to)) => ipv4(from, to, UDP, &datagram),
        (IpAddr::V6(from), IpAddr::V6(to)) => {
            set_checksum(from, to, UDP, &mut datagram, 6);
            ipv6(from, to, UDP, &datagram)
        }
        _ => Vec::new(),
    }
}

pub(crate) fn ipv4(from: Ipv4Addr, to: Ipv4Addr, protocol: u8, content: &[u8]) -> Vec<u8> {
    let mut packet = vec![0x45, 0];
    packet.extend((20 + content.len() as u16).to_be_bytes());
    packet.extend([0, 1, 0, 0, 64, protocol, 0, 0]);
    packet.extend(from.octets());
    packet.extend(to.octets());
    let sum = checksum(&packet);
    packet[10..12].copy_from_slice(&sum.to_be_bytes());
    packet.extend(content);
    packet
}

pub(crate) fn ipv6(from: Ipv6Addr, to: Ipv6Addr, protocol: u8, content: &[u8]) -> Vec<u8> {
    let mut packet = vec![0x60, 0, 0, 0];
    packet.extend((content.len() as u16).to_be_bytes());
    packet.extend([protocol, 255]);
    packet.extend(from.octets());
    packet.extend(to.octets());
    packet.extend(content);
    packet
}

/// Returns an IPv6 packet with an ICMPv6 message, whose checksum is still missing.
pub(crate) fn icmpv6(from: Ipv6Addr, to: Ipv6Addr, mut message: Vec<u8>) -> Vec<u8> {
    set_checksum(from, to, ICMPV6, &mut message, 2);
    ipv6(from, to, ICMPV6, &message)
}

/// Inserts a header for destination options, which contains only padding, into an IPv6 packet.
pub(crate) fn with_options(packet: &[u8]) -> Vec<u8> {
    with_header(packet, 60, [1, 4, 0, 0, 0, 0])
}

/// Inserts an extension header, which contains `options`, into an IPv6 packet.
fn with_header(packet: &[u8], kind: u8, options: [u8; 6]) -> Vec<u8> {
    let (header, content) = packet.split_at(40);
    let protocol = header[6];
    let mut new = header.to_vec();
    new[4..6].copy_from_slice(&(content.len() as u16 + 8).to_be_bytes());
    new[6] = kind;
    new.extend([protocol, 0]);
    new.extend(options);
    new.extend(content);
    new
}

/// Returns a query of Multicast Listener Discovery (RFC 2710) with a maximum response delay of 1 ms.
/// The unspecified address as `group` makes a general query.
pub(crate) fn multicast_query(from: Ipv6Addr, to: Ipv6Addr, group: Ipv6Addr) -> Vec<u8> {
    let mut message = vec![130, 0, 0, 0, 0, 1, 0, 0];
    message.extend(group.octets());
    // A query must have the option for a router alert in a hop-by-hop header.
    with_header(&icmpv6(from, to, message), 0, [5, 2, 0, 0, 1, 0])
}

/// Returns an ARP request for `to`. A receiver stores `sender` with the hardware address `hardware`.
pub(crate) fn arp_request(sender: Ipv4Addr, hardware: Mac, to: Ipv4Addr) -> Vec<u8> {
    let mut packet = vec![0, 1, 8, 0, 6, 4, 0, 1];
    packet.extend(hardware);
    packet.extend(sender.octets());
    packet.extend([0; 6]);
    packet.extend(to.octets());
    packet
}

/// Returns a neighbour advertisement (RFC 4861). A receiver stores `target` with the hardware
/// address `hardware`.
pub(crate) fn advertisement(
    from: Ipv6Addr,
    to: Ipv6Addr,
    target: Ipv6Addr,
    hardware: Mac,
) -> Vec<u8> {
    // The flags are Solicited and Override. The option 2 contains the hardware address.
    let mut message = vec![136, 0, 0, 0, 0x60, 0, 0, 0];
    message.extend(target.octets());
    message.extend([2, 1]);
    message.extend(hardware);
    icmpv6(from, to, message)
}

/// Returns a neighbour solicitation (RFC 4861) for `to`. A receiver stores `from` with the hardware
/// address `hardware`.
pub(crate) fn solicitation(from: Ipv6Addr, to: Ipv6Addr, hardware: Mac) -> Vec<u8> {
    let mut message = vec![135, 0, 0, 0, 0, 0, 0, 0];
    message.extend(to.octets());
    message.extend([1, 1]);
    message.extend(hardware);
    icmpv6(from, to, message)
}

fn set_checksum(from: Ipv6Addr, to: Ipv6Addr, protocol: u8, content: &mut [u8], at: usize) {
    let mut pseudo = from.octets().to_vec();
    pseudo.extend(to.octets());
    pseudo.extend((content.len() as u32).to_be_bytes());
    pseudo.extend([0, 0, 0, protocol]);
    pseudo.extend(&*content);
    let sum = checksum(&pseudo);
    content[at..at + 2].copy_from_slice(&sum.to_be_bytes());
}

/// Returns the Internet checksum of `bytes` (RFC 1071).
pub(crate) fn checksum(bytes: &[u8]) -> u16 {
    let words = bytes.chunks(2).map(|pair| {
        u32::from(u16::from_be_bytes([
            pair[0],
            pair.get(1).copied().unwrap_or_default(),
        ]))
    });
    let mut sum: u32 = words.sum();
    while sum > 0xffff {
        sum = (sum & 0xffff) + (sum >> 16);
    }
    !(sum as u16)
}
