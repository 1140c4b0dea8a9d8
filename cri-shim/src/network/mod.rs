//! Pod networks.
//!
//! [`namespace`] makes, pins and removes network namespaces. [`Network`] is the embedded network,
//! which needs no plugin: a bridge on the node, one veth pair and one address a pod, and an
//! nftables table of our own that masquerades what leaves the pods' range. Everything goes over
//! netlink, from short-lived threads; no program is run.
//!
//! A host firewall whose `forward` hook drops keeps dropping: in nftables a packet must be accepted
//! by every base chain, so no table of ours could let it through. Such a firewall has to accept
//! what comes from and goes to the bridge.

pub mod namespace;

use std::collections::HashSet;
use std::net::{IpAddr, Ipv4Addr};
use std::path::{Path, PathBuf};

use crate::store::Store;

/// The name of a pod's interface inside its namespace.
pub const POD_INTERFACE: &str = "eth0";

#[derive(Debug, thiserror::Error)]
pub enum NetworkError {
    /// A system call on a network namespace or its pin failed.
    #[error("{action} {path}: {source}")]
    Namespace {
        action: &'static str,
        path: PathBuf,
        source: std::io::Error,
    },
    #[error("start a thread for {what}: {source}")]
    Thread {
        what: &'static str,
        source: std::io::Error,
    },
    #[error("{0}: the embedded network does not do that yet")]
    NotYet(&'static str),
}

/// What the embedded network is made from.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct NetworkConfig {
    /// The bridge's interface name, and the name of the nftables table.
    pub bridge: String,
    /// The IPv4 range of the pods, `10.88.0.0/16`; its first address is the gateway's.
    pub range: String,
    /// Whether traffic that leaves the range takes the node's address.
    pub masquerade: bool,
    /// The MTU of the pods' interfaces in bytes; by default that of the node's uplink.
    pub mtu: Option<u32>,
}

impl Default for NetworkConfig {
    fn default() -> Self {
        NetworkConfig {
            bridge: "rrun0".to_owned(),
            range: "10.88.0.0/16".to_owned(),
            masquerade: true,
            mtu: None,
        }
    }
}

/// What a pod got: to be kept with the pod's record and shown in its status.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Attachment {
    /// The pod's addresses, the primary one first.
    pub addresses: Vec<IpAddr>,
    /// The interface's name inside the pod.
    pub interface: String,
    /// The interface's hardware address.
    pub mac: [u8; 6],
    /// Where the pod's default route leads.
    pub gateway: Option<Ipv4Addr>,
}

/// Counters of a pod's interface, as the pod sees them.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct InterfaceStats {
    pub rx_bytes: u64,
    pub rx_errors: u64,
    pub tx_bytes: u64,
    pub tx_errors: u64,
}

/// The embedded network; clones share one state.
#[derive(Clone)]
pub struct Network {}

impl Network {
    /// Reads the addresses that are given out. The kernel is not touched until the first pod.
    pub fn open(_store: Store, _config: NetworkConfig) -> Result<Network, NetworkError> {
        Ok(Network {})
    }

    /// Connects the namespace pinned at `netns`. For a pod that is connected, gives the same
    /// answer again. A caller that goes away does not stop it half-way.
    pub async fn attach(&self, _pod: &str, _netns: &Path) -> Result<Attachment, NetworkError> {
        Err(NetworkError::NotYet("attach a pod"))
    }

    /// Takes the pod's interface and address away. Right also when nothing is there, when only
    /// half of it is, and when the namespace is lost.
    pub async fn detach(&self, _pod: &str, _netns: Option<&Path>) -> Result<(), NetworkError> {
        Ok(())
    }

    /// After a start: removes interfaces and addresses of pods that are not in `live_pods`, only
    /// ever our own. Pods attached since [`Network::open`] are left alone.
    pub async fn reconcile(&self, _live_pods: &HashSet<String>) -> Result<(), NetworkError> {
        Ok(())
    }

    /// For the CRI's condition NetworkReady; brings bridge and rules right if somebody removed
    /// them.
    pub async fn ready(&self) -> Result<(), String> {
        Ok(())
    }

    /// The counters of the pod's interface; `None` if it has none.
    pub fn interface_stats(&self, _pod: &str) -> Option<InterfaceStats> {
        None
    }
}
