//! Which pod has which address.
//!
//! Addresses are given in turn, so that one that was freed is the last to be given again: what
//! remembers its old owner, a peer's connection or a resolver's cache, has the longest time to
//! forget. The caller writes every change to the store; this is the state in memory.

use std::collections::{BTreeMap, HashMap};
use std::fmt;
use std::net::Ipv4Addr;
use std::str::FromStr;

use serde::{Deserialize, Serialize};

/// An IPv4 range in CIDR notation. Its first address is the gateway's, its last one is for
/// broadcasts, the others are for pods.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub struct Ipv4Range {
    network: u32,
    prefix: u8,
}

#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("{text:?} is not a range for pods: {why}")]
pub struct RangeError {
    text: String,
    why: &'static str,
}

impl Ipv4Range {
    /// 10.88.0.0/16.
    pub const DEFAULT: Ipv4Range = Ipv4Range {
        network: Ipv4Addr::new(10, 88, 0, 0).to_bits(),
        prefix: 16,
    };

    pub const fn gateway(self) -> Ipv4Addr {
        Ipv4Addr::from_bits(self.network + 1)
    }

    pub const fn network(self) -> Ipv4Addr {
        Ipv4Addr::from_bits(self.network)
    }

    pub const fn broadcast(self) -> Ipv4Addr {
        Ipv4Addr::from_bits(self.network | !self.mask_bits())
    }

    pub const fn mask(self) -> Ipv4Addr {
        Ipv4Addr::from_bits(self.mask_bits())
    }

    /// The length of the prefix in bits.
    pub const fn prefix(self) -> u8 {
        self.prefix
    }

    const fn mask_bits(self) -> u32 {
        // The prefix is 8 to 30.
        u32::MAX << (32 - self.prefix as u32)
    }

    const fn first_pod(self) -> u32 {
        self.network + 2
    }

    const fn last_pod(self) -> u32 {
        self.broadcast().to_bits() - 1
    }

    /// Whether `network`/`prefix` and this range have an address in common.
    pub fn overlaps(self, network: Ipv4Addr, prefix: u8) -> bool {
        let shorter = u32::from(prefix.min(self.prefix));
        let mask = u32::MAX.checked_shl(32 - shorter).unwrap_or(0);
        network.to_bits() & mask == self.network & mask
    }
}

impl FromStr for Ipv4Range {
    type Err = RangeError;

    fn from_str(text: &str) -> Result<Self, RangeError> {
        let error = |why| RangeError {
            text: text.to_owned(),
            why,
        };
        let (address, prefix) = text
            .split_once('/')
            .ok_or_else(|| error("it needs a prefix length, as in 10.88.0.0/16"))?;
        let network: Ipv4Addr = address
            .parse()
            .map_err(|_| error("it does not begin with an IPv4 address"))?;
        let prefix: u8 = prefix
            .parse()
            .ok()
            .filter(|prefix| (8..=30).contains(prefix))
            .ok_or_else(|| error("its prefix length has to be from 8 to 30"))?;
        let range = Ipv4Range {
            network: network.to_bits(),
            prefix,
        };
        if range.network & !range.mask_bits() != 0 {
            return Err(error("its address has bits set behind the prefix"));
        }
        if network.is_loopback() || network.is_multicast() || network.octets()[0] == 0 {
            return Err(error("these addresses have another meaning"));
        }
        Ok(range)
    }
}

impl TryFrom<String> for Ipv4Range {
    type Error = RangeError;

    fn try_from(text: String) -> Result<Self, RangeError> {
        text.parse()
    }
}

impl From<Ipv4Range> for String {
    fn from(range: Ipv4Range) -> String {
        range.to_string()
    }
}

impl fmt::Display for Ipv4Range {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(formatter, "{}/{}", self.network(), self.prefix)
    }
}

/// Every address of the range is taken.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Exhausted;

/// The addresses of a range and who has them.
pub(super) struct Addresses {
    range: Ipv4Range,
    by_address: BTreeMap<u32, String>,
    by_pod: HashMap<String, u32>,
    /// Where the search for the next one begins.
    next: u32,
}

impl Addresses {
    /// `given` is what the store remembers, `last` the address that was given last.
    pub(super) fn new(
        range: Ipv4Range,
        given: impl IntoIterator<Item = (Ipv4Addr, String)>,
        last: Option<Ipv4Addr>,
    ) -> Self {
        let mut addresses = Addresses {
            range,
            by_address: BTreeMap::new(),
            by_pod: HashMap::new(),
            next: last.map_or(range.first_pod(), |last| last.to_bits().saturating_add(1)),
        };
        for (address, pod) in given {
            // An address outside of the range is one from before the configuration changed. Its
            // pod keeps it.
            addresses.by_address.insert(address.to_bits(), pod.clone());
            addresses.by_pod.insert(pod, address.to_bits());
        }
        addresses
    }

    pub(super) fn of(&self, pod: &str) -> Option<Ipv4Addr> {
        self.by_pod.get(pod).copied().map(Ipv4Addr::from_bits)
    }

    pub(super) fn pods(&self) -> impl Iterator<Item = &str> {
        self.by_address.values().map(String::as_str)
    }

    /// Gives `pod`, which has none, an address.
    pub(super) fn take(&mut self, pod: &str) -> Result<Ipv4Addr, Exhausted> {
        let (first, last) = (self.range.first_pod(), self.range.last_pod());
        let begin = match self.next {
            next if (first..=last).contains(&next) => next,
            _ => first,
        };
        let address = (begin..=last)
            .chain(first..begin)
            .find(|address| !self.by_address.contains_key(address))
            .ok_or(Exhausted)?;
        self.next = address + 1;
        self.by_address.insert(address, pod.to_owned());
        self.by_pod.insert(pod.to_owned(), address);
        Ok(Ipv4Addr::from_bits(address))
    }

    /// Takes everything that `pod` has.
    pub(super) fn free(&mut self, pod: &str) {
        self.by_pod.remove(pod);
        self.by_address.retain(|_, owner| owner != pod);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn range(text: &str) -> Ipv4Range {
        text.parse().unwrap_or_else(|error| panic!("{error}"))
    }

    #[test]
    fn a_range_knows_its_addresses() {
        let range = range("10.88.0.0/16");
        assert_eq!(range.gateway(), Ipv4Addr::new(10, 88, 0, 1));
        assert_eq!(range.broadcast(), Ipv4Addr::new(10, 88, 255, 255));
        assert_eq!(range.mask(), Ipv4Addr::new(255, 255, 0, 0));
        assert_eq!(range.to_string(), "10.88.0.0/16");
    }

    #[test]
    fn a_broken_range_is_refused_with_the_reason() {
        for (text, why) in [
            ("10.88.0.0", "needs a prefix length"),
            ("10.88.0.0/31", "from 8 to 30"),
            ("10.88.0.0/7", "from 8 to 30"),
            ("10.88.0.0/x", "from 8 to 30"),
            ("10.88.0.1/16", "bits set behind"),
            ("fd00::/64", "IPv4 address"),
            ("127.0.0.0/8", "another meaning"),
            ("224.0.0.0/8", "another meaning"),
            ("", "needs a prefix length"),
        ] {
            let error = text.parse::<Ipv4Range>().unwrap_err().to_string();
            assert!(error.contains(why), "{text}: {error}");
        }
    }

    #[test]
    fn overlap_is_seen_from_both_sides() {
        let range = range("10.88.0.0/16");
        assert!(range.overlaps(Ipv4Addr::new(10, 88, 3, 0), 24));
        assert!(range.overlaps(Ipv4Addr::new(10, 0, 0, 0), 8));
        assert!(range.overlaps(Ipv4Addr::UNSPECIFIED, 0));
        assert!(!range.overlaps(Ipv4Addr::new(10, 89, 0, 0), 16));
        assert!(!range.overlaps(Ipv4Addr::new(192, 168, 0, 1), 32));
    }

    #[test]
    fn a_freed_address_is_given_again_last() {
        let mut addresses = Addresses::new(range("10.0.0.0/29"), [], None);
        let first = addresses.take("a");
        assert_eq!(first, Ok(Ipv4Addr::new(10, 0, 0, 2)));
        addresses.free("a");
        for (pod, last) in [("b", 3), ("c", 4), ("d", 5), ("e", 6), ("f", 2)] {
            assert_eq!(addresses.take(pod), Ok(Ipv4Addr::new(10, 0, 0, last)));
        }
        assert_eq!(addresses.take("g"), Err(Exhausted));
        addresses.free("d");
        assert_eq!(addresses.take("g"), Ok(Ipv4Addr::new(10, 0, 0, 5)));
        assert_eq!(addresses.of("g"), Some(Ipv4Addr::new(10, 0, 0, 5)));
        assert_eq!(addresses.of("d"), None);
    }

    #[test]
    fn the_turn_and_the_owners_are_remembered() {
        let last = Ipv4Addr::new(10, 0, 0, 5);
        let given = [(Ipv4Addr::new(10, 0, 0, 6), "kept".to_owned())];
        let mut addresses = Addresses::new(range("10.0.0.0/29"), given, Some(last));
        assert_eq!(addresses.take("a"), Ok(Ipv4Addr::new(10, 0, 0, 2)));
        assert_eq!(addresses.of("kept"), Some(Ipv4Addr::new(10, 0, 0, 6)));
    }

    #[test]
    fn addresses_from_before_a_change_of_the_range_stay_with_their_pods() {
        let old = Ipv4Addr::new(10, 9, 0, 2);
        let mut addresses =
            Addresses::new(range("10.0.0.0/30"), [(old, "old".to_owned())], Some(old));
        assert_eq!(addresses.take("a"), Ok(Ipv4Addr::new(10, 0, 0, 2)));
        assert_eq!(addresses.take("b"), Err(Exhausted));
        assert_eq!(addresses.of("old"), Some(old));
    }
}
