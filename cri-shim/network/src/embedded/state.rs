//! What pods have of the embedded network: addresses and host ports, in memory and in the store,
//! and the bridge that is made from them.

use std::collections::{BTreeMap, HashSet};
use std::net::IpAddr;
use std::path::PathBuf;
use std::sync::{Arc, Mutex};

use serde::{Deserialize, Serialize};

use super::pod_lock::{PodLock, PodLocks};
use crate::address::Addresses;
use crate::bridge::{Bridge, Desired};
use crate::config::NetworkConfig;
use crate::error::NetworkError;
use crate::host_ports::{self, HostPort, Mapping, PortReservation, PortReservations};
use crate::link;
use rrun_calls::lock::lock;
use rrun_calls::wait::blocking;
use rrun_store::{Change, Store, Table};

/// An entry of [`Table::ADDRESSES`]. The key of a `Given` is the address.
#[derive(Serialize, Deserialize)]
#[serde(untagged)]
enum AddressRecord {
    Ports {
        pod: String,
        #[serde(rename = "claim")]
        reservation: PortReservation,
    },
    Given {
        pod: String,
    },
    Last {
        last: IpAddr,
    },
}

/// The key of the address that was given last.
fn last_key(address: IpAddr) -> &'static str {
    match address {
        IpAddr::V4(_) => "last",
        IpAddr::V6(_) => "last6",
    }
}

/// The key of a pod's host ports.
fn ports_key(pod: &str) -> String {
    format!("ports/{pod}")
}

pub(super) struct EmbeddedState {
    store: Store,
    bridge: Bridge,
    /// One for each family, the primary one first.
    addresses: Mutex<Vec<Addresses>>,
    /// Never locked together with the addresses.
    ports: Mutex<PortReservations>,
    /// Pods that the store knew when it was opened and nobody asked for since.
    inherited: Mutex<HashSet<String>>,
    locks: Arc<PodLocks>,
}

impl EmbeddedState {
    /// Reads the store.
    pub(super) fn load(store: Store, config: NetworkConfig) -> Result<Self, NetworkError> {
        config.validate()?;
        let mut given = Vec::new();
        let mut last = Vec::new();
        let mut ports = PortReservations::default();
        for (key, record) in store.load(Table::ADDRESSES)? {
            match record {
                AddressRecord::Last { last: address } => last.push(address),
                AddressRecord::Ports { pod, reservation } => ports.remember(pod, reservation),
                AddressRecord::Given { pod } => match key.parse::<IpAddr>() {
                    Ok(address) => given.push((address, pod)),
                    Err(_) => return Err(NetworkError::Record { key }),
                },
            }
        }
        let mut inherited: HashSet<String> = given.iter().map(|(_, pod)| pod.clone()).collect();
        inherited.extend(ports.pods().map(str::to_owned));
        let ranges = config.ranges()?;
        let mut addresses = Vec::new();
        for range in &ranges {
            let mut last = last.iter();
            let last = last.find(|last| last.is_ipv6() == range.is_ipv6());
            addresses.push(Addresses::new(*range, given.clone(), last.copied()));
        }
        Ok(EmbeddedState {
            addresses: Mutex::new(addresses),
            ports: Mutex::new(ports),
            bridge: Bridge::new(config, ranges),
            store,
            inherited: Mutex::new(inherited),
            locks: Arc::default(),
        })
    }

    pub(super) fn bridge(&self) -> &Bridge {
        &self.bridge
    }

    /// Waits for the right to work on the pod. From then on the pod is not inherited any more.
    pub(super) async fn lock(&self, pod: &str) -> PodLock {
        let locked = self.locks.lock(pod).await;
        lock(&self.inherited).remove(pod);
        locked
    }

    /// Whether a call waits for the pod's lock.
    pub(super) fn is_awaited(&self, pod: &str) -> bool {
        self.locks.is_awaited(pod)
    }

    /// Takes the inherited pods out that are not among `live`; the others are not inherited any
    /// more.
    pub(super) fn take_inherited_except(&self, live: &HashSet<String>) -> Vec<String> {
        lock(&self.inherited)
            .drain()
            .filter(|pod| !live.contains(pod))
            .collect()
    }

    /// How many pods have addresses, and how many host ports.
    pub(super) fn given(&self) -> (usize, usize) {
        let addresses = lock(&self.addresses)
            .first()
            .map_or(0, |family| family.all().count());
        (addresses, lock(&self.ports).pods().count())
    }

    /// The gateway of the primary family.
    pub(super) fn primary_gateway(&self) -> Option<IpAddr> {
        let families = lock(&self.addresses);
        families.first().map(|family| family.range().gateway())
    }

    /// What should be in the kernel.
    pub(super) fn desired(&self) -> Desired {
        let mut desired = Desired {
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
        let ports = lock(&self.ports);
        for (pod, addresses) in by_pod {
            if let Some(reservation) = ports.of(&pod) {
                let mappings = host_ports::mappings(&reservation.ports, &addresses);
                desired.mappings.extend(mappings);
            }
            desired.addresses.extend(addresses);
            desired.pods.push(pod);
        }
        desired
    }

    /// Whether the pod has addresses or host ports.
    pub(super) fn has_reserved(&self, pod: &str) -> bool {
        !self.addresses_of(pod).is_empty() || lock(&self.ports).of(pod).is_some()
    }

    pub(super) fn addresses_of(&self, pod: &str) -> Vec<IpAddr> {
        let families = lock(&self.addresses);
        families
            .iter()
            .filter_map(|family| family.of(pod))
            .collect()
    }

    pub(super) fn take_addresses(&self, pod: &str) -> Result<Vec<IpAddr>, NetworkError> {
        let mut families = lock(&self.addresses);
        let taken: Result<Vec<IpAddr>, _> =
            families.iter_mut().map(|family| family.take(pod)).collect();
        taken.map_err(|exhausted| {
            families.iter_mut().for_each(|family| family.free(pod));
            let range = exhausted.range;
            NetworkError::Exhausted { range }
        })
    }

    /// `mapped`: the ports lead to the pod's addresses, which have to be of their families.
    pub(super) fn take_ports(
        &self,
        pod: &str,
        reservation: PortReservation,
        mapped: bool,
    ) -> Result<(), NetworkError> {
        let has = |address: IpAddr| {
            lock(&self.addresses)
                .iter()
                .any(|family| family.range().is_ipv6() == address.is_ipv6())
        };
        let is_lacking = |port: &&HostPort| port.address.is_some_and(|address| !has(address));
        if let Some(port) = reservation.ports.iter().find(is_lacking)
            && mapped
        {
            return Err(NetworkError::no_family(*port));
        }
        let taken = lock(&self.ports).take(pod, reservation);
        taken.map_err(|conflict| NetworkError::PortTaken {
            port: conflict.port,
            by: conflict.owner,
        })
    }

    /// Gives the pod's addresses back.
    pub(super) fn free_addresses(&self, pod: &str) {
        let mut families = lock(&self.addresses);
        families.iter_mut().for_each(|family| family.free(pod));
    }

    /// Gives the pod's host ports back.
    pub(super) fn free_ports(&self, pod: &str) {
        lock(&self.ports).free(pod);
    }

    /// Closes the pod's host ports and gives them back.
    pub(super) async fn close_ports(self: &Arc<Self>, pod: &str) -> Result<(), NetworkError> {
        let mappings = self.mappings(pod);
        if mappings.is_empty() {
            self.free_ports(pod);
            return Ok(());
        }
        let (state, pod) = (Arc::clone(self), pod.to_owned());
        blocking(format!("pod {pod}: close its host ports"), move || {
            let free = || state.free_ports(&pod);
            state.bridge.withdraw(&mappings, free, &|| state.desired())
        })
        .await
    }

    /// The host ports that lead to the pod.
    fn mappings(&self, pod: &str) -> Vec<Mapping> {
        let addresses = self.addresses_of(pod);
        let ports = lock(&self.ports);
        ports.of(pod).map_or(Vec::new(), |reservation| {
            host_ports::mappings(&reservation.ports, &addresses)
        })
    }

    /// Returns when the store knows of the pod's addresses and host ports.
    pub(super) async fn commit(&self, pod: &str) -> Result<(), NetworkError> {
        let mut changes = Vec::new();
        for address in self.addresses_of(pod) {
            let record = AddressRecord::Given {
                pod: pod.to_owned(),
            };
            let last = AddressRecord::Last { last: address };
            changes.push(Change::put(
                Table::ADDRESSES,
                &address.to_string(),
                &record,
            )?);
            changes.push(Change::put(Table::ADDRESSES, last_key(address), &last)?);
        }
        if let Some(reservation) = lock(&self.ports).of(pod) {
            let record = AddressRecord::Ports {
                pod: pod.to_owned(),
                reservation: reservation.clone(),
            };
            changes.push(Change::put(Table::ADDRESSES, &ports_key(pod), &record)?);
        }
        if changes.is_empty() {
            return Ok(());
        }
        Ok(self.store.commit(changes).await?)
    }

    /// Forgets the addresses and host ports of pods whose interfaces are gone, first in the store.
    pub(super) async fn forget(&self, pods: &[String]) -> Result<(), NetworkError> {
        let mut gone = Vec::new();
        for pod in pods {
            for address in self.addresses_of(pod) {
                gone.push(Change::delete(Table::ADDRESSES, &address.to_string()));
            }
            gone.push(Change::delete(Table::ADDRESSES, &ports_key(pod)));
        }
        self.store.commit(gone).await?;
        for pod in pods {
            self.free_addresses(pod);
        }
        Ok(())
    }

    /// Makes the pod's interface, with its addresses and host ports. The pair is made while the
    /// store writes the addresses, unless it is `committed`; they are not used before it has.
    pub(super) async fn connect(
        self: &Arc<Self>,
        pod: &str,
        addresses: &[IpAddr],
        netns: PathBuf,
        committed: bool,
    ) -> Result<link::Mac, NetworkError> {
        let mac = link::mac_of(addresses);
        let (state, name) = (Arc::clone(self), pod.to_owned());
        let making = blocking(format!("pod {pod}: make its interface"), move || {
            state
                .bridge
                .connect(&name, mac, &netns, &|| state.desired())
        });
        let (made, committed) = tokio::join!(making, async {
            if committed {
                Ok(())
            } else {
                self.commit(pod).await
            }
        });
        committed?;
        let (state, made, addresses) = (Arc::clone(self), made?, addresses.to_vec());
        let mappings = self.mappings(pod);
        blocking(format!("pod {pod}: configure its interface"), move || {
            state.bridge.configure(&made, &addresses, mac)?;
            if mappings.is_empty() {
                Ok(())
            } else {
                state.bridge.publish(&mappings, &|| state.desired())
            }
        })
        .await?;
        Ok(mac)
    }
}
