//! Pod networks.
//!
//! [`PodNetwork`] chooses between plugins ([`cni`]) and the embedded network.
//! [`namespace`] makes, pins and removes network namespaces. [`Network`] is the embedded network,
//! which needs no plugin: a bridge on the node, one veth pair and one address a pod, and an
//! nftables table of our own that masquerades what leaves the pods' range. Everything goes over
//! netlink, from short-lived threads; no program is run.
//!
//! A host firewall whose `forward` hook drops keeps dropping: in nftables a packet must be accepted
//! by every base chain, so no table of ours could let it through. Such a firewall has to accept
//! what comes from and goes to the bridge.

mod address;
mod bridge;
mod choice;
pub mod cni;
mod error;
mod link;
pub mod namespace;
mod netlink;
mod nftables;
mod teardown;

use std::collections::{HashMap, HashSet};
use std::net::{IpAddr, Ipv4Addr};
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use serde::{Deserialize, Serialize};
use tokio::sync::OwnedMutexGuard;

pub use address::{Ipv4Range, RangeError};
pub use choice::{Mode, PodNetwork};
pub use error::NetworkError;

use crate::store::{Change, Store, Table};
use address::Addresses;
use bridge::Bridge;
use teardown::Teardown;

/// The name of a pod's interface inside its namespace.
pub const POD_INTERFACE: &str = "eth0";

/// What the embedded network is made from.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct NetworkConfig {
    /// The bridge's interface name, and the name of the nftables table.
    pub bridge: String,
    /// The IPv4 range of the pods; its first address is the gateway's.
    pub range: Ipv4Range,
    /// Whether traffic that leaves the range takes the node's address.
    pub masquerade: bool,
    /// The MTU of the pods' interfaces in bytes; by default that of the node's uplink.
    pub mtu: Option<u32>,
}

impl Default for NetworkConfig {
    fn default() -> Self {
        NetworkConfig {
            bridge: "rrun0".to_owned(),
            range: Ipv4Range::DEFAULT,
            masquerade: true,
            mtu: None,
        }
    }
}

impl NetworkConfig {
    /// The least that IPv4 works with, and the most that the kernel's veth takes.
    const MTU: std::ops::RangeInclusive<u32> = 68..=65535;
    /// IFNAMSIZ without its NUL.
    const NAME_BYTES: usize = 15;

    fn validate(&self) -> Result<(), NetworkError> {
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
        match self.mtu {
            Some(mtu) if !Self::MTU.contains(&mtu) => Err(NetworkError::Config {
                field: "mtu",
                value: mtu.to_string(),
                wanted: "68 to 65535 bytes",
            }),
            _ => Ok(()),
        }
    }
}

/// What a pod got: to be kept with the pod's record and shown in its status.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
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
    pub rx_packets: u64,
    pub rx_errors: u64,
    pub rx_dropped: u64,
    pub tx_bytes: u64,
    pub tx_packets: u64,
    pub tx_errors: u64,
    pub tx_dropped: u64,
}

/// An entry of [`Table::ADDRESSES`]. The key of a `Given` is the address.
#[derive(Serialize, Deserialize)]
#[serde(untagged)]
enum Record {
    Given { pod: String },
    Last { last: Ipv4Addr },
}

const LAST_KEY: &str = "last";

/// The embedded network; clones share one state.
#[derive(Clone)]
pub struct Network {
    inner: Arc<Inner>,
}

struct Inner {
    config: NetworkConfig,
    store: Store,
    bridge: Bridge,
    addresses: Mutex<Addresses>,
    /// Pods that the store knew when it was opened and nobody asked for since.
    inherited: Mutex<HashSet<String>>,
    /// One at a time for a pod; the entry is there while somebody has it or waits.
    turns: Mutex<HashMap<String, Arc<tokio::sync::Mutex<()>>>>,
    teardown: Teardown,
}

impl Network {
    /// Reads the addresses that are given out. The kernel is not touched until the first pod.
    pub fn open(store: Store, config: NetworkConfig) -> Result<Network, NetworkError> {
        config.validate()?;
        let mut given = Vec::new();
        let mut last = None;
        for (key, record) in store.load(Table::ADDRESSES)? {
            match record {
                Record::Last { last: address } => last = Some(address),
                Record::Given { pod } => match key.parse() {
                    Ok(address) => given.push((address, pod)),
                    Err(_) => return Err(NetworkError::Record { key }),
                },
            }
        }
        let inherited = given.iter().map(|(_, pod)| pod.clone()).collect();
        Ok(Network {
            inner: Arc::new(Inner {
                addresses: Mutex::new(Addresses::new(config.range, given, last)),
                bridge: Bridge::new(config.clone()),
                config,
                store,
                inherited: Mutex::new(inherited),
                turns: Mutex::default(),
                teardown: Teardown::default(),
            }),
        })
    }

    /// Gives the pod its address, ahead of [`Network::attach`], which would do it otherwise. It
    /// lasts as long as a commit to the store, and shares its transaction with a commit of the
    /// caller's that is under way.
    pub async fn reserve(&self, pod: &str) -> Result<(), NetworkError> {
        let (inner, pod) = (Arc::clone(&self.inner), pod.to_owned());
        finish(async move {
            let _turn = Inner::turn(&inner, &pod).await;
            lock(&inner.inherited).remove(&pod);
            let known = lock(&inner.addresses).of(&pod);
            if known.is_some() {
                return Ok(());
            }
            inner.take_address(&pod)?;
            let committed = inner.commit_address(&pod).await;
            if committed.is_err() {
                lock(&inner.addresses).free(&pod);
            }
            committed
        })
        .await
    }

    /// Connects the namespace pinned at `netns`. For a pod that is connected, gives the same
    /// answer again. A caller that goes away does not stop it half-way; if it fails, nothing of it
    /// stays but an address that was reserved before.
    pub async fn attach(&self, pod: &str, netns: &Path) -> Result<Attachment, NetworkError> {
        let (inner, pod, netns) = (Arc::clone(&self.inner), pod.to_owned(), netns.to_owned());
        finish(async move {
            let turn = Inner::turn(&inner, &pod).await;
            lock(&inner.inherited).remove(&pod);
            let known = lock(&inner.addresses).of(&pod);
            let address = match known {
                Some(address) => address,
                None => inner.take_address(&pod)?,
            };
            match inner.connect(&pod, address, netns, known.is_some()).await {
                Ok(()) => Ok(Attachment {
                    addresses: vec![address.into()],
                    interface: POD_INTERFACE.to_owned(),
                    mac: link::mac_of(address),
                    gateway: Some(inner.config.range.gateway()),
                }),
                Err(error) => {
                    if known.is_none() {
                        Teardown::add(&inner, turn);
                    }
                    Err(error)
                }
            }
        })
        .await
    }

    /// Takes the pod's interface and address away. Right also when nothing is there, when only
    /// half of it is, and when the namespace, which the embedded network does not need for this,
    /// is lost.
    ///
    /// Returns at once: for 10 to 20 ms the kernel waits until no processor has the interface in
    /// hand, and nobody has to wait with it. [`Network::settled`] does; an attach of the same pod
    /// does; and if the server dies meanwhile, [`Network::reconcile`] completes it.
    pub async fn detach(&self, pod: &str, _netns: Option<&Path>) -> Result<(), NetworkError> {
        let (inner, pod) = (Arc::clone(&self.inner), pod.to_owned());
        finish(async move {
            // If it goes already, and nobody waits to attach it again, all is done.
            if inner.is_awaited(&pod) || !inner.teardown.has(&pod) {
                let turn = Inner::turn(&inner, &pod).await;
                lock(&inner.inherited).remove(&pod);
                Teardown::add(&inner, turn);
            }
            Ok(())
        })
        .await
    }

    /// Waits until everything that was detached is gone from the kernel and the store.
    pub async fn settled(&self) {
        self.inner.teardown.settled().await;
    }

    /// After a start: removes interfaces and addresses of pods that are not in `live_pods`, only
    /// ever our own. Pods attached since [`Network::open`] are left alone. To be called before
    /// the first attach: an interface that is being made has no owner yet.
    pub async fn reconcile(&self, live_pods: &HashSet<String>) -> Result<(), NetworkError> {
        let dead: Vec<String> = lock(&self.inner.inherited)
            .drain()
            .filter(|pod| !live_pods.contains(pod))
            .collect();
        for pod in dead {
            self.detach(&pod, None).await?;
        }
        self.settled().await;
        let inner = Arc::clone(&self.inner);
        let mut keep = live_pods.clone();
        blocking(move || {
            keep.extend(inner.pods());
            inner.bridge.sweep(&keep)
        })
        .await
    }

    /// For the CRI's condition NetworkReady; brings bridge and rules right if somebody removed
    /// them, also for the pods that are there.
    pub async fn ready(&self) -> Result<(), String> {
        let inner = Arc::clone(&self.inner);
        blocking(move || inner.bridge.repair(&|| inner.pods()))
            .await
            .map_err(|error| error.to_string())
    }

    /// The counters of the pod's interface; `None` if it has none. One small file is read, no
    /// kernel lock is waited for.
    pub fn interface_stats(&self, pod: &str) -> Option<InterfaceStats> {
        let table = std::fs::read_to_string("/proc/thread-self/net/dev").ok()?;
        node_counters(&table, &bridge::host_interface(pod))
    }
}

impl Inner {
    async fn turn(self: &Arc<Self>, pod: &str) -> Turn {
        let turn = Arc::clone(lock(&self.turns).entry(pod.to_owned()).or_default());
        Turn {
            inner: Arc::clone(self),
            pod: pod.to_owned(),
            held: Some(turn.lock_owned().await),
        }
    }

    /// Whether somebody waits for a turn at the pod.
    fn is_awaited(&self, pod: &str) -> bool {
        // The map has one, whoever has the turn another.
        lock(&self.turns)
            .get(pod)
            .is_some_and(|turn| Arc::strong_count(turn) > 2)
    }

    fn pods(&self) -> Vec<String> {
        lock(&self.addresses).pods().map(str::to_owned).collect()
    }

    fn take_address(&self, pod: &str) -> Result<Ipv4Addr, NetworkError> {
        let range = self.config.range;
        lock(&self.addresses)
            .take(pod)
            .map_err(|_| NetworkError::Exhausted { range })
    }

    /// Returns when the store knows of the pod's address.
    async fn commit_address(&self, pod: &str) -> Result<(), NetworkError> {
        let Some(address) = lock(&self.addresses).of(pod) else {
            return Ok(());
        };
        let record = Record::Given {
            pod: pod.to_owned(),
        };
        let changes = vec![
            Change::put(Table::ADDRESSES, &address.to_string(), &record)?,
            Change::put(Table::ADDRESSES, LAST_KEY, &Record::Last { last: address })?,
        ];
        Ok(self.store.commit(changes).await?)
    }

    /// The pair is made while the store writes; the address is not used before it has.
    async fn connect(
        self: &Arc<Self>,
        pod: &str,
        address: Ipv4Addr,
        netns: PathBuf,
        committed: bool,
    ) -> Result<(), NetworkError> {
        let (inner, of) = (Arc::clone(self), pod.to_owned());
        let making = blocking(move || inner.bridge.connect(&of, address, &netns, &|| inner.pods()));
        let (made, committed) = tokio::join!(making, async {
            match committed {
                true => Ok(()),
                false => self.commit_address(pod).await,
            }
        });
        committed?;
        let (inner, made) = (Arc::clone(self), made?);
        blocking(move || inner.bridge.configure(&made, address)).await
    }
}

/// The right to work on a pod.
struct Turn {
    inner: Arc<Inner>,
    pod: String,
    held: Option<OwnedMutexGuard<()>>,
}

impl Drop for Turn {
    fn drop(&mut self) {
        let mut turns = lock(&self.inner.turns);
        self.held = None;
        // The map has the only one: nobody waits.
        if turns
            .get(&self.pod)
            .is_some_and(|turn| Arc::strong_count(turn) == 1)
        {
            turns.remove(&self.pod);
        }
    }
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

/// Runs `work` to its end, whether or not the caller stays.
async fn finish<T: Send + 'static>(
    work: impl Future<Output = Result<T, NetworkError>> + Send + 'static,
) -> Result<T, NetworkError> {
    tokio::spawn(work)
        .await
        .unwrap_or(Err(NetworkError::ThreadDied))
}

async fn blocking<T: Send + 'static>(
    work: impl FnOnce() -> Result<T, NetworkError> + Send + 'static,
) -> Result<T, NetworkError> {
    tokio::task::spawn_blocking(work)
        .await
        .unwrap_or(Err(NetworkError::ThreadDied))
}

/// Finds `interface` in the text of /proc/net/dev, and turns its counters round: what the node's
/// end of a pair received is what the pod sent. See proc_net(5).
fn node_counters(table: &str, interface: &str) -> Option<InterfaceStats> {
    let (_, counters) = table
        .lines()
        .filter_map(|line| line.split_once(':'))
        .find(|(name, _)| name.trim() == interface)?;
    let mut counters = counters.split_ascii_whitespace().map(str::parse);
    let mut next = |skip| counters.nth(skip)?.ok();
    // bytes packets errs drop fifo frame compressed multicast, and again for sending.
    Some(InterfaceStats {
        tx_bytes: next(0)?,
        tx_packets: next(0)?,
        tx_errors: next(0)?,
        tx_dropped: next(0)?,
        rx_bytes: next(4)?,
        rx_packets: next(0)?,
        rx_errors: next(0)?,
        rx_dropped: next(0)?,
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_nodes_counters_are_the_pods_turned_round() {
        let table = "Inter-|   Receive |  Transmit\n face |bytes packets errs drop fifo frame \
                     compressed multicast|bytes packets errs drop fifo colls carrier compressed\n\
                     rr0123456789ab:     100      2    3    4    0     0          0         0   \
                     200       5    6    0    0     0       0          0\n";
        let stats = InterfaceStats {
            rx_bytes: 200,
            rx_packets: 5,
            rx_errors: 6,
            rx_dropped: 0,
            tx_bytes: 100,
            tx_packets: 2,
            tx_errors: 3,
            tx_dropped: 4,
        };
        assert_eq!(node_counters(table, "rr0123456789ab"), Some(stats));
        assert_eq!(node_counters(table, "rr0123456789ac"), None);
    }

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
