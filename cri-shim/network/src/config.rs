//! The `[network]` table of the configuration, which configures the embedded network.

use serde::{Deserialize, Serialize};

use crate::address::{Range, RangeError};
use crate::error::NetworkError;
use crate::forwarding;

/// The settings of the configuration's `[network]` table.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct NetworkConfig {
    /// The name of the bridge. The nftables table has the same name.
    pub bridge: String,
    /// The IPv4 range from which pods get addresses. The first address after the network address is
    /// the gateway's address.
    pub range: OptionalRange,
    /// The IPv6 range from which pods get addresses. The first address after the network address is
    /// the gateway's address.
    pub range6: OptionalRange,
    /// The address family of a pod's primary address, which is the first address in the pod's
    /// status.
    pub primary: Family,
    /// True if packets from pods to destinations outside the pod range get the node's address as
    /// their source address.
    pub masquerade: bool,
    /// True if a pod can send packets only from its own hardware address and IP addresses. Privileged
    /// pods can nevertheless send packets from all addresses.
    pub spoof_protection: bool,
    /// True if other machines can send packets directly to pods' addresses. If the value is false,
    /// they can reach pods only through host ports. By default, the value is true for a range other
    /// than the default range, or if `masquerade` is false.
    pub allow_direct_routing: Option<bool>,
    /// The MTU of the pods' interfaces in bytes. The default is the MTU of the node's uplink.
    pub mtu: Option<u32>,
    /// The kind of network for pods: the embedded network, or networks from CNI plugins.
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
            spoof_protection: true,
            allow_direct_routing: None,
            mtu: None,
            mode: Mode::Auto,
        }
    }
}

/// The value of the key `network.mode`.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Mode {
    /// Pods get networks from CNI plugins if a CNI configuration exists, and otherwise the embedded
    /// network.
    #[default]
    Auto,
    /// Pods get networks from CNI plugins. Without a CNI configuration, the node is not ready.
    Cni,
    /// Pods get the embedded network. CNI configurations are ignored.
    Embedded,
}

/// The pod range of an address family, or `Off` if pods get no addresses of this family.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub enum OptionalRange {
    /// Pods get no addresses of the address family. In the configuration, this value is an empty
    /// string.
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

/// An address family.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Family {
    #[default]
    Ipv4,
    Ipv6,
}

impl NetworkConfig {
    /// The valid MTUs, from the smallest MTU that IPv4 allows to the largest MTU of a veth
    /// interface.
    pub(crate) const MTU: std::ops::RangeInclusive<u32> = 68..=65535;
    /// The maximum length of an interface name, which is IFNAMSIZ without the terminating NUL.
    const NAME_BYTES: usize = 15;

    /// Refuses values that the kernel would reject. The error consists of the configuration key and
    /// a description of the problem with the key's value.
    pub fn check(&self) -> Result<(), (&'static str, String)> {
        self.validate().map_err(|error| match error {
            NetworkError::Config {
                field,
                value,
                expected,
            } => {
                let key = match field {
                    "bridge" => "network.bridge",
                    "range" => "network.range",
                    "range6" => "network.range6",
                    "primary" => "network.primary",
                    "mtu" => "network.mtu",
                    _ => "network",
                };
                (key, format!("is {value:?}; it has to be {expected}"))
            }
            other => ("network", other.to_string()),
        })
    }

    /// Refuses values that the kernel would reject. The error contains the name of the invalid
    /// field.
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
                expected: "an interface name: 1 to 15 visible characters without / : % or \"",
            });
        }
        self.validate_ranges()?;
        match self.mtu {
            Some(mtu) if !Self::MTU.contains(&mtu) => Err(NetworkError::Config {
                field: "mtu",
                value: mtu.to_string(),
                expected: "68 to 65535 bytes",
            }),
            _ => Ok(()),
        }
    }

    /// Refuses a range of the wrong address family, a configuration without any range, and a
    /// primary family without a range.
    fn validate_ranges(&self) -> Result<(), NetworkError> {
        for (field, range, ipv6, expected) in [
            (
                "range",
                self.range,
                false,
                "an IPv4 range, or an empty string for no IPv4 addresses (network.range6 is for IPv6)",
            ),
            (
                "range6",
                self.range6,
                true,
                "an IPv6 range, or an empty string for no IPv6 addresses",
            ),
        ] {
            if let OptionalRange::Of(range) = range
                && range.is_ipv6() != ipv6
            {
                return Err(NetworkError::Config {
                    field,
                    value: range.to_string(),
                    expected,
                });
            }
        }
        if self.range6 == OptionalRange::Off {
            if self.range == OptionalRange::Off {
                return Err(NetworkError::Config {
                    field: "range",
                    value: String::new(),
                    expected: "a range, because network.range6 is empty",
                });
            }
            if self.primary == Family::Ipv6 {
                return Err(NetworkError::Config {
                    field: "primary",
                    value: "ipv6".to_owned(),
                    expected: "ipv4, because network.range6 is empty",
                });
            }
        }
        Ok(())
    }

    /// Returns the ranges in `ranges` that other machines cannot reach directly.
    ///
    /// Several nodes cannot have the same range if they route packets to each other's pods. The
    /// administrator of such nodes has therefore changed the ranges. For the default ranges, nobody
    /// needs routes from other machines.
    pub(crate) fn hidden(&self, ranges: &[Range]) -> Vec<Range> {
        let is_default = |range: &Range| [Range::DEFAULT, Range::DEFAULT6].contains(range);
        let is_hidden = |range: &&Range| match self.allow_direct_routing {
            Some(allowed) => !allowed,
            None => self.masquerade && is_default(range),
        };
        ranges.iter().filter(is_hidden).copied().collect()
    }

    /// Returns the pod ranges. Each pod gets one address from each range. The first range is the
    /// range of the primary address family.
    pub(crate) fn ranges(&self) -> Result<Vec<Range>, NetworkError> {
        let mut ranges = Vec::new();
        if let OptionalRange::Of(range) = self.range {
            ranges.push(range);
        }
        match self.range6 {
            OptionalRange::Of(range) if forwarding::has_ipv6()? => ranges.push(range),
            OptionalRange::Of(_) if ranges.is_empty() => {
                return Err(NetworkError::Config {
                    field: "range",
                    value: String::new(),
                    expected: "an IPv4 range, because this node has no IPv6 and pods would get no address",
                });
            }
            OptionalRange::Of(_) => log::info!("the node has no IPv6, so pods get no IPv6 address"),
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
    fn a_configuration_that_the_kernel_would_reject_is_refused() {
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

    #[test]
    fn only_default_ranges_behind_masquerading_are_hidden_by_default() -> Result<(), RangeError> {
        let (v4, v6) = (Range::DEFAULT, Range::DEFAULT6);
        let other: Range = "10.77.0.0/16".parse()?;
        let all = [v4, v6, other];
        let mut config = NetworkConfig::default();
        assert_eq!(config.hidden(&all), [v4, v6]);
        config.allow_direct_routing = Some(false);
        assert_eq!(config.hidden(&all), all);
        config.allow_direct_routing = Some(true);
        assert_eq!(config.hidden(&all), []);
        config.allow_direct_routing = None;
        config.masquerade = false;
        assert_eq!(config.hidden(&all), []);
        Ok(())
    }
}
