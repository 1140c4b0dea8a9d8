//! The assignment of addresses to pods.
//!
//! Addresses are assigned in ascending order. A freed address is therefore assigned again as late
//! as possible. Connections and DNS cache entries can still refer to the address of a deleted pod.
//! With this order, the connections and cache entries expire before another pod gets the address.
//! This module keeps the assignments only in memory. The caller writes every change of an
//! assignment to the server's store.

use std::collections::{BTreeMap, HashMap};
use std::fmt;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};
use std::str::FromStr;

use serde::{Deserialize, Serialize};

/// An IPv4 or IPv6 range in CIDR notation. The first address after the network address is the
/// gateway's address. The last address is not assigned to pods, because in an IPv4 range it is the
/// broadcast address. The addresses between the gateway's address and the last address are for
/// pods.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub struct Range {
    network: IpAddr,
    prefix: u8,
}

#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("{text:?} is not a valid pod range: {why}")]
pub struct RangeError {
    text: String,
    why: &'static str,
}

/// Returns an address as a number.
fn bits(address: IpAddr) -> u128 {
    match address {
        IpAddr::V4(address) => address.to_bits().into(),
        IpAddr::V6(address) => address.to_bits(),
    }
}

/// Returns `number` as an address of the same address family as `like`.
fn address(like: IpAddr, number: u128) -> IpAddr {
    match like {
        // The upper 96 bits of an IPv4 address's number are 0.
        IpAddr::V4(_) => Ipv4Addr::from_bits(number as u32).into(),
        IpAddr::V6(_) => Ipv6Addr::from_bits(number).into(),
    }
}

impl Range {
    /// The default IPv4 range of pods, 10.88.0.0/16.
    pub(crate) const DEFAULT: Range = Range {
        network: IpAddr::V4(Ipv4Addr::new(10, 88, 0, 0)),
        prefix: 16,
    };

    /// The default IPv6 range of pods, fd72:7275:6e30::/64. The range is one of the unique local
    /// address ranges of RFC 4193. Its bytes after `fd` spell "rrun0" in ASCII.
    pub(crate) const DEFAULT6: Range = Range {
        network: IpAddr::V6(Ipv6Addr::new(0xfd72, 0x7275, 0x6e30, 0, 0, 0, 0, 0)),
        prefix: 64,
    };

    pub(crate) fn is_ipv6(self) -> bool {
        self.network.is_ipv6()
    }

    pub(crate) fn gateway(self) -> IpAddr {
        address(self.network, bits(self.network) + 1)
    }

    pub(crate) fn network(self) -> IpAddr {
        self.network
    }

    /// Returns the broadcast address, or `None` for IPv6, which has no broadcasts.
    pub(crate) fn broadcast(self) -> Option<IpAddr> {
        (!self.is_ipv6()).then(|| address(self.network, self.last()))
    }

    pub(crate) fn mask(self) -> IpAddr {
        let all = match self.network {
            IpAddr::V4(_) => u32::MAX.into(),
            IpAddr::V6(_) => u128::MAX,
        };
        address(self.network, all & !self.host_bits())
    }

    /// Returns the length of the prefix in bits.
    pub(crate) fn prefix(self) -> u8 {
        self.prefix
    }

    /// Returns the mask of the host part. In this mask, all bits after the prefix are set.
    fn host_bits(self) -> u128 {
        let width = if self.is_ipv6() { 128 } else { 32 };
        (1_u128 << (width - u32::from(self.prefix))) - 1
    }

    fn last(self) -> u128 {
        bits(self.network) | self.host_bits()
    }

    fn first_pod(self) -> u128 {
        bits(self.network) + 2
    }

    fn last_pod(self) -> u128 {
        self.last() - 1
    }

    pub(crate) fn contains(self, other: IpAddr) -> bool {
        self.is_ipv6() == other.is_ipv6()
            && (bits(self.network)..=self.last()).contains(&bits(other))
    }

    /// Returns the range with the gateway `gateway` and the prefix length `prefix`.
    pub(crate) fn of_gateway(gateway: IpAddr, prefix: u8) -> Option<Range> {
        let network = address(gateway, bits(gateway).checked_sub(1)?);
        format!("{network}/{prefix}").parse().ok()
    }

    /// Returns whether this range and the range `network`/`prefix` have an address in common.
    pub(crate) fn overlaps(self, network: IpAddr, prefix: u8) -> bool {
        let width = if self.is_ipv6() { 128 } else { 32 };
        let behind = width - u32::from(prefix.min(self.prefix));
        let front = |address| bits(address).checked_shr(behind).unwrap_or(0);
        self.is_ipv6() == network.is_ipv6() && front(network) == front(self.network)
    }
}

impl FromStr for Range {
    type Err = RangeError;

    fn from_str(text: &str) -> Result<Self, RangeError> {
        let error = |why| RangeError {
            text: text.to_owned(),
            why,
        };
        let (network, prefix) = text
            .split_once('/')
            .ok_or_else(|| error("it needs a prefix length, as in 10.88.0.0/16"))?;
        let network: IpAddr = network
            .parse()
            .map_err(|_| error("it does not begin with an IP address"))?;
        let (lengths, why) = match network {
            IpAddr::V4(_) => (8..=30, "its prefix length has to be from 8 to 30"),
            IpAddr::V6(_) => (16..=126, "its prefix length has to be from 16 to 126"),
        };
        let prefix: u8 = prefix
            .parse()
            .ok()
            .filter(|prefix| lengths.contains(prefix))
            .ok_or_else(|| error(why))?;
        let range = Range { network, prefix };
        if bits(network) & range.host_bits() != 0 {
            return Err(error("its address has bits set after the prefix"));
        }
        let reserved = match network {
            IpAddr::V4(address) => address.octets()[0] == 0,
            IpAddr::V6(address) => address.is_unicast_link_local() || address.to_ipv4().is_some(),
        };
        if network.is_loopback() || network.is_multicast() || reserved {
            return Err(error("these addresses are reserved for another purpose"));
        }
        Ok(range)
    }
}

impl TryFrom<String> for Range {
    type Error = RangeError;

    fn try_from(text: String) -> Result<Self, RangeError> {
        text.parse()
    }
}

impl From<Range> for String {
    fn from(range: Range) -> String {
        range.to_string()
    }
}

impl fmt::Display for Range {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(formatter, "{}/{}", self.network(), self.prefix)
    }
}

/// The error for an assignment from a range without a free address.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Exhausted {
    pub range: Range,
}

/// The assigned addresses of a range, and the pods that own the addresses.
pub(crate) struct Addresses {
    range: Range,
    by_address: BTreeMap<u128, String>,
    by_pod: HashMap<String, u128>,
    /// The address at which the search for the next free address begins.
    next: u128,
}

impl Addresses {
    /// Restores the assignments from the entries in the server's store. `given` contains the
    /// assigned addresses with their pods, and `last` is the most recently assigned address.
    /// Addresses of the other address family in `given` are ignored.
    pub(crate) fn new(
        range: Range,
        given: impl IntoIterator<Item = (IpAddr, String)>,
        last: Option<IpAddr>,
    ) -> Self {
        let mut addresses = Addresses {
            range,
            by_address: BTreeMap::new(),
            by_pod: HashMap::new(),
            next: last.map_or(range.first_pod(), |last| bits(last).saturating_add(1)),
        };
        for (address, pod) in given {
            // An address in `given` can be outside the range, because the configuration can change
            // after the assignment. The pod keeps this address.
            if address.is_ipv6() == range.is_ipv6() {
                addresses.by_address.insert(bits(address), pod.clone());
                addresses.by_pod.insert(pod, bits(address));
            }
        }
        addresses
    }

    pub(crate) fn range(&self) -> Range {
        self.range
    }

    pub(crate) fn of(&self, pod: &str) -> Option<IpAddr> {
        let number = self.by_pod.get(pod)?;
        Some(address(self.range.network, *number))
    }

    /// Returns every pod with its address.
    pub(crate) fn all(&self) -> impl Iterator<Item = (&str, IpAddr)> {
        let entries = self.by_address.iter();
        entries.map(|(number, pod)| (pod.as_str(), address(self.range.network, *number)))
    }

    /// Assigns a free address to `pod`, which must not have an address yet.
    pub(crate) fn take(&mut self, pod: &str) -> Result<IpAddr, Exhausted> {
        let (first, last) = (self.range.first_pod(), self.range.last_pod());
        let begin = match self.next {
            next if (first..=last).contains(&next) => next,
            _ => first,
        };
        let number = (begin..=last)
            .chain(first..begin)
            .find(|number| !self.by_address.contains_key(number))
            .ok_or(Exhausted { range: self.range })?;
        self.next = number + 1;
        self.by_address.insert(number, pod.to_owned());
        self.by_pod.insert(pod.to_owned(), number);
        Ok(address(self.range.network, number))
    }

    /// Frees all addresses of `pod`.
    pub(crate) fn free(&mut self, pod: &str) {
        self.by_pod.remove(pod);
        self.by_address.retain(|_, owner| owner != pod);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn v4(a: u8, b: u8, c: u8, d: u8) -> IpAddr {
        Ipv4Addr::new(a, b, c, d).into()
    }

    fn range(text: &str) -> Range {
        text.parse().unwrap_or_else(|error| panic!("{error}"))
    }

    #[test]
    fn a_range_has_a_gateway_a_broadcast_address_and_a_mask() {
        let range = range("10.88.0.0/16");
        assert_eq!(range.gateway(), v4(10, 88, 0, 1));
        assert_eq!(range.broadcast(), Some(v4(10, 88, 255, 255)));
        assert_eq!(range.mask(), v4(255, 255, 0, 0));
        assert_eq!(range.to_string(), "10.88.0.0/16");
    }

    #[test]
    fn a_broken_range_is_refused_with_the_reason() {
        for (text, why) in [
            ("10.88.0.0", "needs a prefix length"),
            ("10.88.0.0/31", "from 8 to 30"),
            ("10.88.0.0/7", "from 8 to 30"),
            ("10.88.0.0/x", "from 8 to 30"),
            ("10.88.0.1/16", "bits set after"),
            ("fd00::1/64", "bits set after"),
            ("fd00::/8", "from 16 to 126"),
            ("fe80::/64", "another purpose"),
            ("web/8", "IP address"),
            ("127.0.0.0/8", "another purpose"),
            ("224.0.0.0/8", "another purpose"),
            ("", "needs a prefix length"),
        ] {
            let error = text.parse::<Range>().unwrap_err().to_string();
            assert!(
                error.contains(why),
                "wrong error for the range {text:?}: {error}"
            );
        }
    }

    #[test]
    fn ranges_overlap_if_one_contains_the_other() {
        let range = range("10.88.0.0/16");
        assert!(range.overlaps(v4(10, 88, 3, 0), 24));
        assert!(range.overlaps(v4(10, 0, 0, 0), 8));
        assert!(range.overlaps(v4(0, 0, 0, 0), 0));
        assert!(!range.overlaps(v4(10, 89, 0, 0), 16));
        assert!(!range.overlaps(v4(192, 168, 0, 1), 32));
    }

    #[test]
    fn a_freed_address_is_assigned_again_last() {
        let mut addresses = Addresses::new(range("10.0.0.0/29"), [], None);
        let first = addresses.take("a");
        assert_eq!(first, Ok(v4(10, 0, 0, 2)));
        addresses.free("a");
        for (pod, last) in [("b", 3), ("c", 4), ("d", 5), ("e", 6), ("f", 2)] {
            assert_eq!(addresses.take(pod), Ok(v4(10, 0, 0, last)));
        }
        assert!(addresses.take("g").is_err());
        addresses.free("d");
        assert_eq!(addresses.take("g"), Ok(v4(10, 0, 0, 5)));
        assert_eq!(addresses.of("g"), Some(v4(10, 0, 0, 5)));
        assert_eq!(addresses.of("d"), None);
    }

    #[test]
    fn the_last_assigned_address_and_the_owners_are_restored() {
        let last = v4(10, 0, 0, 5);
        let given = [(v4(10, 0, 0, 6), "kept".to_owned())];
        let mut addresses = Addresses::new(range("10.0.0.0/29"), given, Some(last));
        assert_eq!(addresses.take("a"), Ok(v4(10, 0, 0, 2)));
        assert_eq!(addresses.of("kept"), Some(v4(10, 0, 0, 6)));
    }

    #[test]
    fn pods_keep_their_addresses_when_the_range_changes() {
        let old = v4(10, 9, 0, 2);
        let mut addresses =
            Addresses::new(range("10.0.0.0/30"), [(old, "old".to_owned())], Some(old));
        assert_eq!(addresses.take("a"), Ok(v4(10, 0, 0, 2)));
        assert!(addresses.take("b").is_err());
        assert_eq!(addresses.of("old"), Some(old));
    }

    #[test]
    fn an_ipv6_range_works_like_an_ipv4_range() {
        let range = range("fd00:1::/126");
        let address = |last| IpAddr::from(Ipv6Addr::new(0xfd00, 1, 0, 0, 0, 0, 0, last));
        assert_eq!(range.gateway(), address(1));
        assert_eq!(range.broadcast(), None);
        assert!(range.contains(address(3)) && !range.contains(address(4)));
        assert!(range.overlaps(address(0), 0) && !range.overlaps(v4(0, 0, 0, 0), 0));
        assert_eq!(Range::of_gateway(address(1), 126), Some(range));
        let given = [(v4(10, 0, 0, 2), "old".to_owned())];
        let mut addresses = Addresses::new(range, given, None);
        assert_eq!(addresses.of("old"), None);
        assert_eq!(addresses.take("a"), Ok(address(2)));
        assert!(addresses.take("b").is_err());
    }
}
