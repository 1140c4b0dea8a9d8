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
mod config;
mod conntrack;
mod counters;
mod error;
mod forwarding;
pub mod host_ports;
mod link;
pub mod namespace;
mod netlink;
mod nftables;
mod teardown;

use std::collections::{BTreeMap, HashMap, HashSet};
use std::net::IpAddr;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use serde::{Deserialize, Serialize};
use tokio::sync::OwnedMutexGuard;

pub use address::{Range, RangeError};
pub use choice::{Mode, PodNetwork};
pub use config::{Family, NetworkConfig, OptionalRange};
pub use counters::{Counters, Interface};
pub use error::NetworkError;

use address::Addresses;
use bridge::{Bridge, Live};
use host_ports::{Claim, Claims, HostPort};
use rrun_store::{Change, Store, Table};
use teardown::Teardown;

/// The name of a pod's interface inside its namespace.
pub const POD_INTERFACE: &str = "eth0";

/// What a pod got: to be kept with the pod's record and shown in its status.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Attachment {
    /// The pod's addresses, the primary one first.
    pub addresses: Vec<IpAddr>,
    /// The interface's name inside the pod.
    pub interface: String,
    /// The interface's hardware address.
    pub mac: [u8; 6],
    /// Where the pod's default route leads, of the primary family.
    pub gateway: Option<IpAddr>,
}

/// An entry of [`Table::ADDRESSES`]. The key of a `Given` is the address.
#[derive(Serialize, Deserialize)]
#[serde(untagged)]
enum Record {
    Ports { pod: String, claim: Claim },
    Given { pod: String },
    Last { last: IpAddr },
}

/// Where the address that was given last is kept.
fn last_key(address: IpAddr) -> &'static str {
    match address {
        IpAddr::V4(_) => "last",
        IpAddr::V6(_) => "last6",
    }
}

/// Where a pod's host ports are kept.
fn ports_key(pod: &str) -> String {
    format!("ports/{pod}")
}

/// The embedded network; clones share one state.
#[derive(Clone)]
pub struct Network {
    inner: Arc<Inner>,
}

struct Inner {
    store: Store,
    bridge: Bridge,
    /// One for each family, the primary one first.
    addresses: Mutex<Vec<Addresses>>,
    /// Never locked together with the addresses.
    claims: Mutex<Claims>,
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
        let mut last = Vec::new();
        let mut claims = Claims::default();
        for (key, record) in store.load(Table::ADDRESSES)? {
            match record {
                Record::Last { last: address } => last.push(address),
                Record::Ports { pod, claim } => claims.remember(pod, claim),
                Record::Given { pod } => match key.parse::<IpAddr>() {
                    Ok(address) => given.push((address, pod)),
                    Err(_) => return Err(NetworkError::Record { key }),
                },
            }
        }
        let mut inherited: HashSet<String> = given.iter().map(|(_, pod)| pod.clone()).collect();
        inherited.extend(claims.pods().map(str::to_owned));
        let ranges = config.ranges()?;
        let mut addresses = Vec::new();
        for range in &ranges {
            let mut last = last.iter();
            let last = last.find(|last| last.is_ipv6() == range.is_ipv6());
            addresses.push(Addresses::new(*range, given.clone(), last.copied()));
        }
        Ok(Network {
            inner: Arc::new(Inner {
                addresses: Mutex::new(addresses),
                claims: Mutex::new(claims),
                bridge: Bridge::new(config, ranges),
                store,
                inherited: Mutex::new(inherited),
                turns: Mutex::default(),
                teardown: Teardown::default(),
            }),
        })
    }

    /// Gives the pod its addresses, ahead of [`Network::attach`], which would do it otherwise, and
    /// the host ports that it asks for; only these if it is in the node's network. They last as
    /// long as a commit to the store, which shares its transaction with a commit of the caller's
    /// that is under way. `name` is the pod's for others that want the same port.
    pub async fn reserve(
        &self,
        pod: &str,
        name: &str,
        ports: Vec<HostPort>,
        own_network: bool,
    ) -> Result<(), NetworkError> {
        let (inner, pod, name) = (Arc::clone(&self.inner), pod.to_owned(), name.to_owned());
        finish(async move {
            let _turn = Inner::turn(&inner, &pod).await;
            lock(&inner.inherited).remove(&pod);
            if !inner.addresses_of(&pod).is_empty() || lock(&inner.claims).of(&pod).is_some() {
                return Ok(());
            }
            let reserved = async {
                inner.take_ports(&pod, Claim { name, ports }, own_network)?;
                if own_network {
                    inner.take_addresses(&pod)?;
                }
                inner.commit(&pod).await
            };
            let reserved = reserved.await;
            if reserved.is_err() {
                inner.free(&pod);
                lock(&inner.claims).free(&pod);
            }
            reserved
        })
        .await
    }

    /// Connects the namespace pinned at `netns`. For a pod that is connected, gives the same
    /// answer again. A caller that goes away does not stop it half-way; if it fails, nothing of it
    /// stays but what was reserved before.
    pub async fn attach(&self, pod: &str, netns: &Path) -> Result<Attachment, NetworkError> {
        let (inner, pod, netns) = (Arc::clone(&self.inner), pod.to_owned(), netns.to_owned());
        finish(async move {
            let turn = Inner::turn(&inner, &pod).await;
            lock(&inner.inherited).remove(&pod);
            let known = inner.addresses_of(&pod);
            let reserved = !known.is_empty();
            let addresses = if reserved {
                known
            } else {
                inner.take_addresses(&pod)?
            };
            match inner.connect(&pod, &addresses, netns, reserved).await {
                Ok(mac) => Ok(Attachment {
                    gateway: lock(&inner.addresses)
                        .first()
                        .map(|family| family.range().gateway()),
                    addresses,
                    interface: POD_INTERFACE.to_owned(),
                    mac,
                }),
                Err(error) => {
                    if !reserved {
                        Teardown::add(&inner, turn);
                    }
                    Err(error)
                }
            }
        })
        .await
    }

    /// Takes the pod's host ports, interface and addresses away. Right also when nothing is there,
    /// when only half of it is, and when the namespace, which the embedded network does not need
    /// for this, is lost.
    ///
    /// The host ports are free when it returns; the rest goes after that: for 10 to 20 ms the kernel waits until no processor has the interface in
    /// hand, and nobody has to wait with it. [`Network::settled`] does; an attach of the same pod
    /// does; and if the server dies meanwhile, [`Network::reconcile`] completes it.
    pub async fn detach(&self, pod: &str, _netns: Option<&Path>) -> Result<(), NetworkError> {
        let (inner, pod) = (Arc::clone(&self.inner), pod.to_owned());
        finish(async move {
            // If it goes already, and nobody waits to attach it again, all is done.
            if inner.is_awaited(&pod) || !inner.teardown.has(&pod) {
                let turn = Inner::turn(&inner, &pod).await;
                lock(&inner.inherited).remove(&pod);
                let closed = inner.close_ports(&pod).await;
                Teardown::add(&inner, turn);
                return closed;
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
        for pod in &dead {
            // The table is made anew below; theirs may be another pod's by now.
            lock(&self.inner.claims).free(pod);
        }
        for pod in dead {
            self.detach(&pod, None).await?;
        }
        self.settled().await;
        let inner = Arc::clone(&self.inner);
        let mut keep = live_pods.clone();
        blocking(move || {
            keep.extend(inner.live().pods);
            inner.bridge.sweep(&keep)?;
            inner.bridge.renew(&|| inner.live())
        })
        .await
    }

    /// Makes the interfaces of connected pods refuse router advertisements and redirects, as those
    /// of new pods do from the beginning. `netns` are the paths of the pods' network namespaces.
    pub async fn refuse_routers(&self, netns: Vec<PathBuf>) -> Result<(), NetworkError> {
        let inner = Arc::clone(&self.inner);
        blocking(move || inner.bridge.refuse_routers(&netns)).await
    }

    /// How many pods have addresses, and how many host ports.
    pub fn given(&self) -> (usize, usize) {
        let addresses = lock(&self.inner.addresses)
            .first()
            .map_or(0, |family| family.all().count());
        (addresses, lock(&self.inner.claims).pods().count())
    }

    /// Makes the rules anew, whatever somebody has done to them; without pods or a bridge there
    /// are none.
    pub async fn renew(&self) -> Result<(), NetworkError> {
        let inner = Arc::clone(&self.inner);
        blocking(move || inner.bridge.renew(&|| inner.live())).await
    }

    /// For the CRI's condition NetworkReady; brings bridge and rules right if somebody removed
    /// them, also for the pods that are there.
    pub async fn ready(&self) -> Result<(), String> {
        let inner = Arc::clone(&self.inner);
        blocking(move || inner.bridge.repair(&|| inner.live()))
            .await
            .map_err(|error| error.to_string())
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

    /// What is to be in the kernel.
    fn live(&self) -> Live {
        let mut live = Live {
            pods: Vec::new(),
            addresses: Vec::new(),
            mappings: Vec::new(),
        };
        let mut by_pod: BTreeMap<String, Vec<IpAddr>> = BTreeMap::new();
        for addresses in lock(&self.addresses).iter() {
            for (pod, address) in addresses.all() {
                by_pod.entry(pod.to_owned()).or_default().push(address);
            }
        }
        let claims = lock(&self.claims);
        for (pod, addresses) in by_pod {
            if let Some(claim) = claims.of(&pod) {
                let mappings = host_ports::mappings(&claim.ports, &addresses);
                live.mappings.extend(mappings);
            }
            live.addresses.extend(addresses);
            live.pods.push(pod);
        }
        live
    }

    fn addresses_of(&self, pod: &str) -> Vec<IpAddr> {
        let families = lock(&self.addresses);
        families
            .iter()
            .filter_map(|family| family.of(pod))
            .collect()
    }

    fn take_addresses(&self, pod: &str) -> Result<Vec<IpAddr>, NetworkError> {
        let mut families = lock(&self.addresses);
        let taken: Result<Vec<IpAddr>, _> =
            families.iter_mut().map(|family| family.take(pod)).collect();
        taken.map_err(|exhausted| {
            families.iter_mut().for_each(|family| family.free(pod));
            let range = exhausted.range;
            NetworkError::Exhausted { range }
        })
    }

    fn take_ports(&self, pod: &str, claim: Claim, mapped: bool) -> Result<(), NetworkError> {
        let has = |address: IpAddr| {
            lock(&self.addresses)
                .iter()
                .any(|family| family.range().is_ipv6() == address.is_ipv6())
        };
        let is_lacking = |port: &&HostPort| port.address.is_some_and(|address| !has(address));
        if let Some(port) = claim.ports.iter().find(is_lacking)
            && mapped
        {
            return Err(NetworkError::no_family(*port));
        }
        let taken = lock(&self.claims).take(pod, claim);
        taken.map_err(|taken| NetworkError::PortTaken {
            port: taken.port,
            by: taken.by,
        })
    }

    /// Gives the pod's addresses back.
    fn free(&self, pod: &str) {
        let mut families = lock(&self.addresses);
        families.iter_mut().for_each(|family| family.free(pod));
    }

    /// Closes the pod's host ports and gives them back.
    async fn close_ports(self: &Arc<Self>, pod: &str) -> Result<(), NetworkError> {
        let mappings = self.mappings(pod);
        if mappings.is_empty() {
            lock(&self.claims).free(pod);
            return Ok(());
        }
        let (inner, pod) = (Arc::clone(self), pod.to_owned());
        blocking(move || {
            let forget = || lock(&inner.claims).free(&pod);
            inner.bridge.withdraw(&mappings, forget, &|| inner.live())
        })
        .await
    }

    /// What leads to the pod.
    fn mappings(&self, pod: &str) -> Vec<host_ports::Mapping> {
        let addresses = self.addresses_of(pod);
        let claims = lock(&self.claims);
        let claim = claims.of(pod);
        claim.map_or(Vec::new(), |claim| {
            host_ports::mappings(&claim.ports, &addresses)
        })
    }

    /// Returns when the store knows of the pod's addresses and host ports.
    async fn commit(&self, pod: &str) -> Result<(), NetworkError> {
        let mut changes = Vec::new();
        for address in self.addresses_of(pod) {
            let record = Record::Given {
                pod: pod.to_owned(),
            };
            let last = Record::Last { last: address };
            changes.push(Change::put(
                Table::ADDRESSES,
                &address.to_string(),
                &record,
            )?);
            changes.push(Change::put(Table::ADDRESSES, last_key(address), &last)?);
        }
        if let Some(claim) = lock(&self.claims).of(pod) {
            let record = Record::Ports {
                pod: pod.to_owned(),
                claim: claim.clone(),
            };
            changes.push(Change::put(Table::ADDRESSES, &ports_key(pod), &record)?);
        }
        if changes.is_empty() {
            return Ok(());
        }
        Ok(self.store.commit(changes).await?)
    }

    /// The pair is made while the store writes; the addresses are not used before it has.
    async fn connect(
        self: &Arc<Self>,
        pod: &str,
        addresses: &[IpAddr],
        netns: PathBuf,
        committed: bool,
    ) -> Result<link::Mac, NetworkError> {
        let mac = link::mac_of(addresses);
        let (inner, name) = (Arc::clone(self), pod.to_owned());
        let making = blocking(move || inner.bridge.connect(&name, mac, &netns, &|| inner.live()));
        let (made, committed) = tokio::join!(making, async {
            if committed {
                Ok(())
            } else {
                self.commit(pod).await
            }
        });
        committed?;
        let (inner, made, addresses) = (Arc::clone(self), made?, addresses.to_vec());
        let mappings = self.mappings(pod);
        blocking(move || {
            inner.bridge.configure(&made, &addresses, mac)?;
            if mappings.is_empty() {
                Ok(())
            } else {
                inner.bridge.publish(&mappings, &|| inner.live())
            }
        })
        .await?;
        Ok(mac)
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
