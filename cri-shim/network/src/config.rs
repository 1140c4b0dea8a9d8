//! The `[network]` table of the configuration: what the embedded network is made from.

use serde::{Deserialize, Serialize};

use crate::address::{Range, RangeError};
use crate::error::NetworkError;
use crate::forwarding;

/// What the `[network]` table of the configuration sets.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct NetworkConfig {
    /// The bridge's interface name, and the name of the nftables table.
    pub bridge: String,
    /// The IPv4 range of the pods; its first address is the gateway's.
    pub range: OptionalRange,
    /// Their IPv6 range, likewise.
    pub range6: OptionalRange,
    /// Which of a pod's addresses is told first.
    pub primary: Family,
    /// Whether traffic that leaves the range takes the node's address.
    pub masquerade: bool,
    /// The MTU of the pods' interfaces in bytes; by default that of the node's uplink.
    pub mtu: Option<u32>,
    /// Whether pods get it, or CNI's.
    pub mode: Mode,
}

impl Default for NetworkConfig {
    fn default() -> Self {
        NetworkConfig {
            bridge: "rrun0".to_owned(),
            range: OptionalRange::Of(Range::DEFAULT),
            range6: OptionalRange::Of(Range::DEFAULT6),
            primary: Family::Ipv4,
            masquerade: true,
            mtu: None,
            mode: Mode::Auto,
        }
    }
}

/// `network.mode`.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Mode {
    /// CNI if there is a configuration, else the embedded network.
    #[default]
    Auto,
    /// CNI; with no configuration the node is not ready.
    Cni,
    /// The embedded network; configurations are not looked at.
    Embedded,
}

/// Whether, and of which range, pods have addresses of a family.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub enum OptionalRange {
    /// By an empty string.
    Off,
    Of(Range),
}

impl TryFrom<String> for OptionalRange {
    type Error = RangeError;

    fn try_from(text: String) -> Result<Self, RangeError> {
        match text.as_str() {
            "" => Ok(OptionalRange::Off),
            text => Ok(OptionalRange::Of(text.parse()?)),
        }
    }
}

impl From<OptionalRange> for String {
    fn from(range: OptionalRange) -> String {
        match range {
            OptionalRange::Off => String::new(),
            OptionalRange::Of(range) => range.to_string(),
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
    pub(crate) const MTU: std::ops::RangeInclusive<u32> = 68..=65535;
    /// IFNAMSIZ without its NUL.
    const NAME_BYTES: usize = 15;

    /// Refuses what the kernel would not take: the key of the configuration, and what is wrong with
    /// its value.
    pub fn check(&self) -> Result<(), (&'static str, String)> {
        self.validate().map_err(|error| match error {
            NetworkError::Config {
                field,
                value,
                wanted,
            } => {
                let key = match field {
                    "bridge" => "network.bridge",
                    "range" => "network.range",
                    "range6" => "network.range6",
                    "primary" => "network.primary",
                    "mtu" => "network.mtu",
                    _ => "network",
                };
                (key, format!("is {value:?}; it has to be {wanted}"))
            }
            other => ("network", other.to_string()),
        })
    }

    /// Refuses what the kernel would not take, by the field.
    pub(crate) fn validate(&self) -> Result<(), NetworkError> {
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
        self.validate_ranges()?;
        match self.mtu {
            Some(mtu) if !Self::MTU.contains(&mtu) => Err(NetworkError::Config {
                field: "mtu",
                value: mtu.to_string(),
                wanted: "68 to 65535 bytes",
            }),
            _ => Ok(()),
        }
    }

    /// Refuses a range of the other family, no range at all, and a primary family without a range.
    fn validate_ranges(&self) -> Result<(), NetworkError> {
        for (field, range, ipv6, wanted) in [
            (
                "range",
                self.range,
                false,
                "an IPv4 range, or empty for none; network.range6 is for IPv6",
            ),
            (
                "range6",
                self.range6,
                true,
                "an IPv6 range, or empty for none",
            ),
        ] {
            if let OptionalRange::Of(range) = range
                && range.is_ipv6() != ipv6
            {
                return Err(NetworkError::Config {
                    field,
                    value: range.to_string(),
                    wanted,
                });
            }
        }
        if self.range6 == OptionalRange::Off {
            if self.range == OptionalRange::Off {
                return Err(NetworkError::Config {
                    field: "range",
                    value: String::new(),
                    wanted: "a range where network.range6 is empty",
                });
            }
            if self.primary == Family::Ipv6 {
                return Err(NetworkError::Config {
                    field: "primary",
                    value: "ipv6".to_owned(),
                    wanted: "ipv4 where network.range6 is empty",
                });
            }
        }
        Ok(())
    }

    /// What pods get an address each of, the primary family first.
    pub(crate) fn ranges(&self) -> Result<Vec<Range>, NetworkError> {
        let mut ranges = Vec::new();
        if let OptionalRange::Of(range) = self.range {
            ranges.push(range);
        }
        match self.range6 {
            OptionalRange::Of(range) if forwarding::has_ipv6() => ranges.push(range),
            OptionalRange::Of(_) if ranges.is_empty() => {
                return Err(NetworkError::Config {
                    field: "range",
                    value: String::new(),
                    wanted: "a range on this node, which has no IPv6",
                });
            }
            OptionalRange::Of(_) => log::info!("the node has no IPv6, and so have pods none"),
            OptionalRange::Off => {}
        }
        if self.primary == Family::Ipv6 {
            ranges.reverse();
        }
        Ok(ranges)
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
        let config = |range, range6| NetworkConfig {
            range,
            range6,
            ..NetworkConfig::default()
        };
        let (v4, v6) = (
            OptionalRange::Of(Range::DEFAULT),
            OptionalRange::Of(Range::DEFAULT6),
        );
        assert!(config(OptionalRange::Off, v6).validate().is_ok());
        assert!(config(v4, OptionalRange::Off).validate().is_ok());
        for wrong in [
            config(OptionalRange::Off, OptionalRange::Off),
            config(v6, v6),
            config(v4, v4),
        ] {
            assert!(wrong.validate().is_err(), "{wrong:?}");
        }
        assert!(NetworkConfig::default().validate().is_ok());
    }
}
