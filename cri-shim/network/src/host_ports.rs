//! Host ports, and the pods that own them. A host port is a port of the node. The kernel forwards
//! the packets for this port to a pod.
//!
//! [`super::nftables`] generates the nftables rules for host ports from the data in this module. A
//! pod in the node's network namespace needs no rules for its host ports. The host ports of such a
//! pod are recorded nevertheless, so that no other pod can reserve the same ports.

use std::collections::BTreeMap;
use std::fmt;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};

use rrun_proto::v1::{PortMapping, Protocol as CriProtocol};
use serde::{Deserialize, Serialize};

/// A transport protocol that has ports.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Protocol {
    Tcp,
    Udp,
    Sctp,
}

impl Protocol {
    /// Returns the protocol's number in the IP header.
    pub(crate) fn number(self) -> u8 {
        match self {
            Protocol::Tcp => 6,
            Protocol::Udp => 17,
            Protocol::Sctp => 132,
        }
    }

    /// Returns the protocol with the number `number` in the IP header.
    pub(crate) fn from_number(number: u8) -> Option<Self> {
        let mut all = [Protocol::Tcp, Protocol::Udp, Protocol::Sctp].into_iter();
        all.find(|protocol| protocol.number() == number)
    }
}

impl fmt::Display for Protocol {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        formatter.write_str(match self {
            Protocol::Tcp => "TCP",
            Protocol::Udp => "UDP",
            Protocol::Sctp => "SCTP",
        })
    }
}

/// A host port, which is a port of the node. The kernel forwards the packets for this port to a
/// port of the pod.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct HostPort {
    pub protocol: Protocol,
    /// The address of the node at which the port is open. `None` means every address of both
    /// address families. The unspecified address (0.0.0.0 or ::) means every address of its address
    /// family.
    pub address: Option<IpAddr>,
    pub host: u16,
    pub container: u16,
}

impl HostPort {
    /// Returns whether the host port is open at 127.0.0.1.
    fn is_on_loopback4(&self) -> bool {
        match self.address {
            None => true,
            Some(IpAddr::V4(address)) => address.is_unspecified() || address.is_loopback(),
            Some(IpAddr::V6(_)) => false,
        }
    }
}

impl fmt::Display for HostPort {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        let HostPort { protocol, host, .. } = self;
        match self.address {
            None => write!(formatter, "{protocol} port {host}"),
            Some(address) => write!(formatter, "{protocol} port {host} at {address}"),
        }
    }
}

/// A TCP socket on which the server itself listens. The nftables rules never translate the
/// destination of connections to this socket, even if a pod has the same host port.
#[derive(Clone, Copy, Debug)]
pub struct Listener {
    /// The configuration key of the socket's address.
    pub key: &'static str,
    /// The address to which the socket is bound. The unspecified address means every address of the
    /// node, and :: means IPv4 addresses, too.
    pub address: SocketAddr,
}

impl Listener {
    /// Returns the addresses of the node at which the socket receives connections. The unspecified
    /// address means every address of its address family.
    pub(crate) fn destinations(&self) -> Vec<IpAddr> {
        match self.address.ip().to_canonical() {
            IpAddr::V6(Ipv6Addr::UNSPECIFIED) => {
                vec![Ipv6Addr::UNSPECIFIED.into(), Ipv4Addr::UNSPECIFIED.into()]
            }
            address => vec![address],
        }
    }

    /// Returns whether a client can connect to the socket at an address of `port`.
    pub(crate) fn shares(&self, port: &HostPort) -> bool {
        self.is_at(port, |own, address| {
            own == address || own.is_unspecified() || address.is_unspecified()
        })
    }

    /// Returns whether the socket receives all connections to `port` in an address family.
    pub(crate) fn covers(&self, port: &HostPort) -> bool {
        self.is_at(port, |own, address| own == address || own.is_unspecified())
    }

    /// Returns whether `matches` is true for an address of the socket and an address of `port` in
    /// the same address family.
    fn is_at(&self, port: &HostPort, matches: impl Fn(IpAddr, IpAddr) -> bool) -> bool {
        let is_same = port.protocol == Protocol::Tcp && port.host == self.address.port();
        is_same
            && self.destinations().into_iter().any(|own| {
                let any: IpAddr = match own {
                    IpAddr::V4(_) => Ipv4Addr::UNSPECIFIED.into(),
                    IpAddr::V6(_) => Ipv6Addr::UNSPECIFIED.into(),
                };
                let address = port.address.unwrap_or(any);
                own.is_ipv4() == address.is_ipv4() && matches(own, address)
            })
    }
}

impl fmt::Display for Listener {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(formatter, "rrun-cri at {} ({})", self.address, self.key)
    }
}

/// An error in a pod's `port_mappings`. The display text of the error is a sentence.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("port_mappings[{index}]{field}: {why}")]
pub(crate) struct PortError {
    index: usize,
    field: &'static str,
    why: String,
}

/// Returns the host ports in a pod's port mappings. A mapping without a host port is ignored,
/// because it only documents a port of the container.
pub(crate) fn parse(mappings: &[PortMapping]) -> Result<Vec<HostPort>, PortError> {
    let mut ports: Vec<HostPort> = Vec::new();
    let mut known: PortIndex<HostPort> = PortIndex::default();
    for (index, mapping) in mappings.iter().enumerate() {
        let error = |field, why| PortError { index, field, why };
        let port = |field, value: i32| {
            let port = u16::try_from(value).ok().filter(|port| *port > 0);
            port.ok_or_else(|| {
                error(
                    field,
                    format!("{value} is not a port, which is a number from 1 to 65535"),
                )
            })
        };
        if mapping.host_port == 0 {
            continue;
        }
        let host = port(".host_port", mapping.host_port)?;
        let container = port(".container_port", mapping.container_port)?;
        let protocol = match CriProtocol::try_from(mapping.protocol) {
            Ok(CriProtocol::Tcp) => Protocol::Tcp,
            Ok(CriProtocol::Udp) => Protocol::Udp,
            Ok(CriProtocol::Sctp) => Protocol::Sctp,
            Err(_) => {
                let why = format!("{} is not the number of TCP, UDP or SCTP", mapping.protocol);
                return Err(error(".protocol", why));
            }
        };
        let address = node_address(&mapping.host_ip).map_err(|why| error(".host_ip", why))?;
        let new = HostPort {
            protocol,
            address,
            host,
            container,
        };
        let known_port = known.conflicts(&new).next().copied();
        match known_port {
            // A repeated mapping is ignored, because two containers of the pod can declare the same
            // host port.
            Some(same) if same == new => {}
            Some(other) => {
                let to = other.container;
                let why = format!("the pod already maps {other} to the pod's port {to}");
                return Err(error("", why));
            }
            None => {
                known.insert(&new, new);
                ports.push(new);
            }
        }
    }
    Ok(ports)
}

/// Returns the host port of a mapping that a CNI plugin interprets. If the field `host_ip` does not
/// contain an address, the plugin can interpret the text in its own way, so the result means every
/// address.
pub(crate) fn for_plugins(mapping: &PortMapping) -> Option<HostPort> {
    Some(HostPort {
        protocol: match mapping.protocol() {
            CriProtocol::Tcp => Protocol::Tcp,
            CriProtocol::Udp => Protocol::Udp,
            CriProtocol::Sctp => Protocol::Sctp,
        },
        address: node_address(&mapping.host_ip).unwrap_or(None),
        host: u16::try_from(mapping.host_port).ok()?,
        container: u16::try_from(mapping.container_port).unwrap_or(0),
    })
}

/// Returns the address in the field `host_ip`, or `None` if the field is empty.
fn node_address(text: &str) -> Result<Option<IpAddr>, String> {
    if text.is_empty() {
        return Ok(None);
    }
    match text.parse::<IpAddr>() {
        Ok(address) if !address.is_multicast() => Ok(Some(address.to_canonical())),
        _ => Err(format!("{text:?} is not a unicast IP address")),
    }
}

/// An entry of the nftables maps. An entry maps the protocol, address and port of a host port to an
/// address and port of a pod.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Mapping {
    pub protocol: Protocol,
    /// The address of the node at which the port is open. The unspecified address (0.0.0.0 or ::)
    /// means every address of its address family.
    pub address: IpAddr,
    pub port: u16,
    pub to: SocketAddr,
}

/// The host ports of a pod, as they are recorded in the store and in memory.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct PortReservation {
    /// The pod's name. If another pod requests one of the ports, the error message contains this
    /// name.
    pub name: String,
    pub ports: Vec<HostPort>,
}

/// The error for the reservation of another pod's host port.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct PortConflict {
    pub port: HostPort,
    /// The name of the pod that owns the port.
    pub owner: String,
}

/// An index of host ports, with a value for each host port. The index finds conflicts without a
/// search through all host ports. Two host ports conflict if the same packet can be addressed to
/// both. The keys of a protocol and a port number have this order: `None`, 0.0.0.0, the other IPv4
/// addresses, ::, the other IPv6 addresses.
struct PortIndex<T>(BTreeMap<(Protocol, u16, Option<IpAddr>), T>);

impl<T> Default for PortIndex<T> {
    fn default() -> Self {
        PortIndex(BTreeMap::new())
    }
}

impl<T> PortIndex<T> {
    fn insert(&mut self, port: &HostPort, value: T) {
        self.0
            .insert((port.protocol, port.host, port.address), value);
    }

    fn remove(&mut self, port: &HostPort) {
        self.0.remove(&(port.protocol, port.host, port.address));
    }

    /// Returns the values of all host ports that conflict with `port`.
    fn conflicts(&self, port: &HostPort) -> impl Iterator<Item = &T> {
        let key = |address| (port.protocol, port.host, address);
        let last_v6 = Ipv6Addr::from_bits(u128::MAX).into();
        let (any, last): (Option<IpAddr>, IpAddr) = match port.address {
            None => (None, last_v6),
            Some(IpAddr::V4(_)) => (
                Some(Ipv4Addr::UNSPECIFIED.into()),
                Ipv4Addr::BROADCAST.into(),
            ),
            Some(IpAddr::V6(_)) => (Some(Ipv6Addr::UNSPECIFIED.into()), last_v6),
        };
        let first = port.address;
        let last = if first == any { Some(last) } else { first };
        // Host ports at every address also conflict with `port`. Their keys can be before the range.
        let wider = [None, any].into_iter().filter(move |wide| *wide < first);
        let wider = wider.filter_map(move |wide| self.0.get(&key(wide)));
        let range = self.0.range(key(first)..=key(last));
        wider.chain(range.map(|(_, value)| value))
    }
}

/// The reserved host ports of all pods.
#[derive(Default)]
pub(crate) struct PortReservations {
    by_pod: BTreeMap<String, Reserved>,
    /// The id of the pod that owns a host port.
    owners: PortIndex<String>,
    /// The number of host ports that the kernel forwards from 127.0.0.1 to a pod.
    on_loopback4: usize,
}

struct Reserved {
    reservation: PortReservation,
    /// True if the kernel forwards packets for the host ports to the pod's own addresses. False for
    /// a pod in the node's network namespace.
    is_mapped: bool,
}

impl PortReservations {
    /// Adds a reservation that was read from the store.
    pub(crate) fn remember(&mut self, pod: &str, reservation: PortReservation, is_mapped: bool) {
        self.free(pod);
        for port in &reservation.ports {
            self.owners.insert(port, pod.to_owned());
        }
        if is_mapped {
            self.on_loopback4 += count_on_loopback4(&reservation);
        }
        let reserved = Reserved {
            reservation,
            is_mapped,
        };
        self.by_pod.insert(pod.to_owned(), reserved);
    }

    /// Reserves the host ports for the pod. If another pod owns one of the ports, no port is
    /// reserved. `is_mapped` is true if the kernel forwards packets for the ports to the pod.
    pub(crate) fn take(
        &mut self,
        pod: &str,
        reservation: PortReservation,
        is_mapped: bool,
    ) -> Result<(), PortConflict> {
        for port in &reservation.ports {
            let mut owners = self.owners.conflicts(port);
            if let Some(owner) = owners.find(|owner| *owner != pod) {
                let owner = self.of(owner).map_or(owner, |other| &other.name);
                return Err(PortConflict {
                    port: *port,
                    owner: owner.clone(),
                });
            }
        }
        if !reservation.ports.is_empty() {
            self.remember(pod, reservation, is_mapped);
        }
        Ok(())
    }

    pub(crate) fn of(&self, pod: &str) -> Option<&PortReservation> {
        self.by_pod.get(pod).map(|reserved| &reserved.reservation)
    }

    pub(crate) fn pods(&self) -> impl Iterator<Item = &str> {
        self.by_pod.keys().map(String::as_str)
    }

    pub(crate) fn free(&mut self, pod: &str) {
        let Some(freed) = self.by_pod.remove(pod) else {
            return;
        };
        for port in &freed.reservation.ports {
            self.owners.remove(port);
        }
        if freed.is_mapped {
            self.on_loopback4 -= count_on_loopback4(&freed.reservation);
        }
    }

    /// Frees the host ports of dead pods. In the store, a dead pod can have the same host port as a
    /// live pod. The live pod then becomes the port's owner.
    pub(crate) fn free_dead<'a>(&mut self, dead: impl Iterator<Item = &'a String>) {
        dead.for_each(|pod| self.free(pod));
        for (pod, reserved) in &self.by_pod {
            for port in &reserved.reservation.ports {
                self.owners.insert(port, pod.clone());
            }
        }
    }

    /// Returns the numbers of all TCP host ports.
    pub(crate) fn tcp_ports(&self) -> impl Iterator<Item = u16> {
        let all = self.by_pod.values();
        all.flat_map(|one| &one.reservation.ports)
            .filter(|port| port.protocol == Protocol::Tcp)
            .map(|port| port.host)
    }

    /// Returns whether the kernel forwards a host port at 127.0.0.1 to a pod.
    pub(crate) fn is_any_on_loopback4(&self) -> bool {
        self.on_loopback4 > 0
    }
}

fn count_on_loopback4(reservation: &PortReservation) -> usize {
    let ports = reservation.ports.iter();
    ports.filter(|port| port.is_on_loopback4()).count()
}

/// Returns the entries of the nftables maps for a pod's host ports. `addresses` contains the pod's
/// addresses. For a pod in the node's network namespace, `addresses` is empty, and the result
/// contains no entries. In an entry, the unspecified address (0.0.0.0 or ::) means every address of
/// its address family.
pub(crate) fn mappings(ports: &[HostPort], addresses: &[IpAddr]) -> Vec<Mapping> {
    let mut all = Vec::new();
    for port in ports {
        for to in addresses {
            let any: IpAddr = match to {
                IpAddr::V4(_) => Ipv4Addr::UNSPECIFIED.into(),
                IpAddr::V6(_) => Ipv6Addr::UNSPECIFIED.into(),
            };
            let address = port.address.unwrap_or(any);
            if address.is_ipv4() == to.is_ipv4() {
                all.push(Mapping {
                    protocol: port.protocol,
                    address,
                    port: port.host,
                    to: SocketAddr::new(*to, port.container),
                });
            }
        }
    }
    all
}

#[cfg(test)]
mod tests {
    use super::*;

    fn mapping(protocol: i32, host_ip: &str, host_port: i32, container_port: i32) -> PortMapping {
        PortMapping {
            protocol,
            container_port,
            host_port,
            host_ip: host_ip.to_owned(),
        }
    }

    #[test]
    fn an_invalid_port_mapping_is_refused_with_the_name_of_its_field() {
        for (bad, field) in [
            (mapping(0, "", -1, 80), "port_mappings[1].host_port"),
            (mapping(0, "", 65536, 80), "port_mappings[1].host_port"),
            (mapping(0, "", 81, 0), "port_mappings[1].container_port"),
            (mapping(7, "", 81, 80), "port_mappings[1].protocol"),
            (mapping(0, "node", 81, 80), "port_mappings[1].host_ip"),
            (mapping(0, "224.0.0.1", 81, 80), "port_mappings[1].host_ip"),
            (mapping(0, "127.0.0.1", 80, 81), "port_mappings[1]: the pod"),
        ] {
            let error = parse(&[mapping(0, "", 80, 80), bad]).map_err(|error| error.to_string());
            assert!(
                matches!(&error, Err(text) if text.starts_with(field)),
                "the error must begin with {field:?}; the result: {error:?}"
            );
        }
        let twice = [mapping(0, "", 80, 80), mapping(0, "", 80, 80)];
        assert_eq!(parse(&twice).map(|ports| ports.len()), Ok(1));
        assert_eq!(parse(&[mapping(0, "", 0, 80)]), Ok(Vec::new()));
        let both = [mapping(0, "", 53, 53), mapping(1, "", 53, 53)];
        assert_eq!(parse(&both).map(|ports| ports.len()), Ok(2));
    }

    #[test]
    fn a_listener_covers_the_host_ports_that_no_client_could_reach() -> Result<(), PortError> {
        for (listener, host_ip, shares, covers) in [
            ("127.0.0.1:80", "", true, false),
            ("127.0.0.1:80", "0.0.0.0", true, false),
            ("127.0.0.1:80", "::", false, false),
            ("127.0.0.1:80", "127.0.0.1", true, true),
            ("127.0.0.1:80", "::ffff:127.0.0.1", true, true),
            ("[::ffff:127.0.0.1]:80", "127.0.0.1", true, true),
            ("127.0.0.1:80", "192.0.2.1", false, false),
            ("127.0.0.1:81", "", false, false),
            ("0.0.0.0:80", "", true, true),
            ("0.0.0.0:80", "192.0.2.1", true, true),
            ("0.0.0.0:80", "::1", false, false),
            ("[::1]:80", "", true, false),
            ("[::1]:80", "::1", true, true),
            ("[::]:80", "127.0.0.1", true, true),
            ("[::]:80", "2001:db8::1", true, true),
        ] {
            let address = listener.parse().map_err(|_| PortError {
                index: 0,
                field: "",
                why: format!("{listener} is not an address"),
            })?;
            let key = "stream_listen";
            let server = Listener { key, address };
            for port in parse(&[mapping(0, host_ip, 80, 8080)])? {
                assert_eq!(server.shares(&port), shares, "{listener} {host_ip}");
                assert_eq!(server.covers(&port), covers, "{listener} {host_ip}");
            }
            for port in parse(&[mapping(1, host_ip, 80, 8080)])? {
                assert!(!server.shares(&port), "UDP {listener} {host_ip}");
            }
        }
        Ok(())
    }

    #[test]
    fn only_one_pod_can_reserve_a_host_port_at_an_address() -> Result<(), PortError> {
        let reservation = |name: &str, host_ip| {
            Ok(PortReservation {
                name: name.to_owned(),
                ports: parse(&[mapping(0, host_ip, 80, 8080)])?,
            })
        };
        let mut reservations = PortReservations::default();
        let mut take = |pod: &str, host_ip| -> Result<bool, PortError> {
            let taken = reservations.take(pod, reservation(&format!("pod {pod}"), host_ip)?, true);
            Ok(taken.is_ok())
        };
        assert!(take("a", "127.0.0.1")?);
        assert!(take("a", "127.0.0.1")?);
        assert!(take("b", "192.0.2.1")?);
        assert!(take("c", "::")?);
        for taken in ["", "0.0.0.0", "127.0.0.1", "::", "::1", "2001:db8::1"] {
            assert!(!take("d", taken)?, "{taken}");
        }
        reservations.free("c");
        let other = reservations.take("d", reservation("pod d", "::1")?, true);
        assert_eq!(other, Ok(()));
        let conflict = reservations.take("e", reservation("pod e", "::")?, true);
        assert_eq!(
            conflict.map_err(|conflict| conflict.owner),
            Err("pod d".to_owned())
        );
        Ok(())
    }

    #[test]
    fn a_pod_at_the_loopback_is_counted_until_its_ports_are_freed() -> Result<(), PortError> {
        let mut reservations = PortReservations::default();
        for (pod, host_ip, is_mapped, expected) in [
            ("other address", "192.0.2.1", true, false),
            ("ipv6", "::", true, false),
            ("node", "127.0.0.1", false, false),
            ("loopback", "127.0.0.2", true, true),
            ("every address", "", true, true),
        ] {
            let reservation = PortReservation {
                name: pod.to_owned(),
                ports: parse(&[mapping(0, host_ip, 80, 8080)])?,
            };
            let taken = reservations.take(pod, reservation, is_mapped);
            assert_eq!(taken, Ok(()));
            assert_eq!(reservations.is_any_on_loopback4(), expected, "{pod}");
            reservations.free(pod);
            assert!(!reservations.is_any_on_loopback4(), "{pod}");
        }
        assert!(reservations.pods().next().is_none());
        Ok(())
    }

    #[test]
    fn the_time_to_check_port_mappings_is_linear() -> Result<(), PortError> {
        // A search through all host ports for each host port would take hours.
        let address = |number: i32| Ipv4Addr::from_bits(0x0a00_0000 + number as u32).to_string();
        let ports = (1..=65_535).map(|port| mapping(port % 3, "", port, 80));
        let addresses = (1..200_000).map(|number| mapping(0, &address(number), 80, 80));
        for mappings in [ports.collect::<Vec<_>>(), addresses.collect()] {
            let ports = parse(&mappings)?;
            assert_eq!(ports.len(), mappings.len());
            let mut reservations = PortReservations::default();
            let name = "pod".to_owned();
            let reservation = PortReservation { name, ports };
            let taken = reservations.take("a", reservation.clone(), true);
            assert_eq!(taken, Ok(()));
            assert!(reservations.take("b", reservation, true).is_err());
        }
        Ok(())
    }

    #[test]
    fn a_host_port_without_an_address_has_an_entry_for_each_address_of_the_pod()
    -> Result<(), PortError> {
        let addresses = [
            [10, 88, 0, 2].into(),
            IpAddr::from([0xfd00, 0, 0, 0, 0, 0, 0, 2]),
        ];
        let any = parse(&[mapping(0, "", 80, 8080)])?;
        assert_eq!(mappings(&any, &addresses).len(), 2);
        let one = parse(&[mapping(0, "127.0.0.1", 80, 8080)])?;
        let made = mappings(&one, &addresses);
        assert_eq!(made.len(), 1);
        assert_eq!(
            made.first().map(|one| one.to.to_string()).as_deref(),
            Some("10.88.0.2:8080")
        );
        Ok(())
    }
}
