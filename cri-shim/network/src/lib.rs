//! Pod networks.
//!
//! [`PodNetwork`] chooses between CNI plugins ([`Cni`]) and the embedded network
//! ([`EmbeddedNetwork`]). [`namespace`] creates, pins and removes network namespaces.

mod address;
mod bridge;
mod choice;
mod cni;
mod config;
mod conntrack;
mod counters;
mod embedded;
mod error;
mod flows;
mod forwarding;
#[cfg(feature = "fuzz")]
pub mod fuzz;
mod host_ports;
mod link;
pub mod namespace;
mod netlink;
mod nftables;
mod traffic_control;

pub use address::{Range, RangeError};
pub use choice::PodNetwork;
pub use cni::{Cni, CniSettings, DetachOutcome, RetryBy};
pub use config::{Family, Mode, NetworkConfig, OptionalRange};
pub use counters::{Counters, InterfaceCounters, PodCounters};
pub use embedded::{Attachment, EmbeddedNetwork};
pub use error::NetworkError;
pub use host_ports::{HostPort, Listener, Protocol};
