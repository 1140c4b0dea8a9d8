//! The `[network]` table of the configuration: what the embedded network is made from.

use serde::{Deserialize, Serialize};

use super::{NetworkError, Range, RangeError, forwarding};

/// What the embedded network is made from.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct NetworkConfig {
    /// The bridge's interface name, and the name of the nftables table.
    pub bridge: String,
    /// The IPv4 range of the pods; its first address is the gateway's.
    pub range: Range,
    /// Their IPv6 range, likewise.
    pub range6: Range6,
    /// Which of a pod's addresses is told first.
    pub primary: Family,
    /// Whether traffic that leaves the range takes the node's address.
    pub masquerade: bool,
    /// The MTU of the pods' interfaces in bytes; by default that of the node's uplink.
    pub mtu: Option<u32>,
}

impl Default for NetworkConfig {
    fn default() -> Self {
        NetworkConfig {
            bridge: "rrun0".to_owned(),
            range: Range::DEFAULT,
            range6: Range6::Of(Range::DEFAULT6),
            primary: Family::Ipv4,
            masquerade: true,
            mtu: None,
        }
    }
}

/// Whether, and of which range, pods have IPv6 addresses.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub enum Range6 {
    /// By an empty string.
    Off,
    Of(Range),
}

impl TryFrom<String> for Range6 {
    type Error = RangeError;

    fn try_from(text: String) -> Result<Self, RangeError> {
        match text.as_str() {
            "" => Ok(Range6::Off),
            text => Ok(Range6::Of(text.parse()?)),
        }
    }
}

impl From<Range6> for String {
    fn from(range: Range6) -> String {
        match range {
            Range6::Off => String::new(),
            Range6::Of(range) => range.to_string(),
        }
    }
}

/// A family of addresses.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Family {
    #[default]
    Ipv4,
    Ipv6,
}

impl NetworkConfig {
    /// The least that IPv4 works with, and the most that the kernel's veth takes.
    pub(super) const MTU: std::ops::RangeInclusive<u32> = 68..=65535;
    /// IFNAMSIZ without its NUL.
    const NAME_BYTES: usize = 15;

    /// Refuses what the kernel would not take, by the field.
    pub(super) fn validate(&self) -> Result<(), NetworkError> {
        let name = &self.bridge;
        let is_name = !name.is_empty()
            && name.len() <= Self::NAME_BYTES
            && name != "."
            && name != ".."
            && name
                .bytes()
                .all(|byte| byte.is_ascii_graphic() && !b"/:%\"".contains(&byte));
        if !is_name {
            return Err(NetworkError::Config {
                field: "bridge",
                value: name.clone(),
                wanted: "an interface name: 1 to 15 visible characters without / : % or \"",
            });
        }
        if self.range.is_ipv6() {
            return Err(NetworkError::Config {
                field: "range",
                value: self.range.to_string(),
                wanted: "an IPv4 range; network.range6 is for IPv6",
            });
        }
        match self.range6 {
            Range6::Of(range) if !range.is_ipv6() => {
                return Err(NetworkError::Config {
                    field: "range6",
                    value: range.to_string(),
                    wanted: "an IPv6 range, or empty for none",
                });
            }
            Range6::Off if self.primary == Family::Ipv6 => {
                return Err(NetworkError::Config {
                    field: "primary",
                    value: "ipv6".to_owned(),
                    wanted: "ipv4 where network.range6 is empty",
                });
            }
            _ => {}
        }
        match self.mtu {
            Some(mtu) if !Self::MTU.contains(&mtu) => Err(NetworkError::Config {
                field: "mtu",
                value: mtu.to_string(),
                wanted: "68 to 65535 bytes",
            }),
            _ => Ok(()),
        }
    }

    /// What pods get an address each of, the primary family first.
    pub(super) fn ranges(&self) -> Vec<Range> {
        let mut ranges = vec![self.range];
        match self.range6 {
            Range6::Of(range) if forwarding::has_ipv6() => ranges.push(range),
            Range6::Of(_) => log::info!("the node has no IPv6, and so have pods none"),
            Range6::Off => {}
        }
        if self.primary == Family::Ipv6 {
            ranges.reverse();
        }
        ranges
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_configuration_that_the_kernel_would_not_take_is_refused() {
        let long = "sixteen-letters-".to_owned();
        for bridge in [String::new(), "a/b".to_owned(), "a b".to_owned(), long] {
            let config = NetworkConfig {
                bridge,
                ..NetworkConfig::default()
            };
            assert!(config.validate().is_err(), "{}", config.bridge);
        }
        let config = NetworkConfig {
            mtu: Some(20),
            ..NetworkConfig::default()
        };
        assert!(config.validate().is_err());
        assert!(NetworkConfig::default().validate().is_ok());
    }
}
