//! The state of the embedded network. The state consists of the bridge and of the pods' addresses
//! and host ports. The addresses and host ports are in memory and in the server's store.

use std::collections::{BTreeMap, HashMap, HashSet};
use std::net::IpAddr;
use std::path::PathBuf;
use std::sync::atomic::AtomicBool;
use std::sync::{Arc, Mutex};

use serde::{Deserialize, Serialize};

use super::pod_lock::{PodLock, PodLocks};
use crate::address::Addresses;
use crate::bridge::{Bridge, Desired, DesiredPod, Pods, host_interface};
use crate::config::NetworkConfig;
use crate::error::NetworkError;
use crate::host_ports::{self, HostPort, Mapping, PortReservation, PortReservations};
use crate::link;
use crate::nftables::{Elements, PodPort};
use rrun_calls::lock::lock;
use rrun_calls::wait::blocking;
use rrun_store::{Change, Store, Table};

/// An entry of [`Table::ADDRESSES`]. The key of a `Given` entry is the assigned address.
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

/// Returns the key of the entry in [`Table::ADDRESSES`] that contains the most recently assigned
/// address. There is one such entry for IPv4 addresses, and another for IPv6 addresses.
fn last_key(address: IpAddr) -> &'static str {
    match address {
        IpAddr::V4(_) => "last",
        IpAddr::V6(_) => "last6",
    }
}

/// Returns the key of the entry in [`Table::ADDRESSES`] that contains the host ports of `pod`.
fn ports_key(pod: &str) -> String {
    format!("ports/{pod}")
}

pub(super) struct EmbeddedState {
    store: Store,
    bridge: Bridge,
    /// The assigned addresses. The vector has one element for each address family, beginning with
    /// the primary family.
    addresses: Mutex<Vec<Addresses>>,
    /// The reserved host ports. A thread never locks this mutex and `addresses` at the same time,
    /// so the two mutexes can't cause a deadlock.
    ports: Mutex<PortReservations>,
    /// The ids of the pods that an earlier server process stored. An id is removed from this set
    /// when a call of this server process locks the pod. `reconcile` removes the networks of the
    /// remaining pods if the pods no longer exist.
    inherited: Mutex<HashSet<String>>,
    /// The addresses from earlier configurations for which the configuration no longer contains a
    /// range of the same address family. Running pods still have these addresses.
    old_addresses: Mutex<HashMap<String, Vec<IpAddr>>>,
    /// False if every pod can send packets from all addresses.
    spoof_protection: bool,
    /// The ids of the pods that can send packets from all addresses.
    unfiltered: Mutex<HashSet<String>>,
    /// True if a task watches the nftables tables.
    pub(super) is_watched: AtomicBool,
    locks: Arc<PodLocks>,
}

impl EmbeddedState {
    /// Loads the pods' addresses and host ports from the store.
    pub(super) fn load(store: Store, config: NetworkConfig) -> Result<Self, NetworkError> {
        config.validate()?;
        let mut given = Vec::new();
        let mut last = Vec::new();
        let mut reserved = Vec::new();
        for (key, record) in store.load(Table::ADDRESSES)? {
            match record {
                AddressRecord::Last { last: address } => last.push(address),
                AddressRecord::Ports { pod, reservation } => reserved.push((pod, reservation)),
                AddressRecord::Given { pod } => match key.parse::<IpAddr>() {
                    Ok(address) => given.push((address, pod)),
                    Err(_) => return Err(NetworkError::Record { key }),
                },
            }
        }
        let mut inherited: HashSet<String> = given.iter().map(|(_, pod)| pod.clone()).collect();
        let mut ports = PortReservations::default();
        for (pod, reservation) in reserved {
            ports.remember(&pod, reservation, inherited.contains(&pod));
        }
        inherited.extend(ports.pods().map(str::to_owned));
        let ranges = config.ranges()?;
        let mut old_addresses: HashMap<String, Vec<IpAddr>> = HashMap::new();
        for (address, pod) in &given {
            let mut ranges = ranges.iter();
            if !ranges.any(|range| range.is_ipv6() == address.is_ipv6()) {
                old_addresses.entry(pod.clone()).or_default().push(*address);
            }
        }
        let mut addresses = Vec::new();
        for range in &ranges {
            let mut last = last.iter();
            let last = last.find(|last| last.is_ipv6() == range.is_ipv6());
            addresses.push(Addresses::new(*range, given.clone(), last.copied()));
        }
        Ok(EmbeddedState {
            addresses: Mutex::new(addresses),
            ports: Mutex::new(ports),
            spoof_protection: config.spoof_protection,
            bridge: Bridge::new(config, ranges),
            store,
            inherited: Mutex::new(inherited),
            old_addresses: Mutex::new(old_addresses),
            unfiltered: Mutex::default(),
            is_watched: AtomicBool::new(false),
            locks: Arc::default(),
        })
    }

    pub(super) fn bridge(&self) -> &Bridge {
        &self.bridge
    }

    /// Waits for the pod's lock, and removes the pod from `inherited`. `reconcile` then does not
    /// remove the pod's network.
    pub(super) async fn lock(&self, pod: &str) -> PodLock {
        let locked = self.locks.lock(pod).await;
        lock(&self.inherited).remove(pod);
        locked
    }

    /// Returns whether a call waits for the pod's lock.
    pub(super) fn is_awaited(&self, pod: &str) -> bool {
        self.locks.is_awaited(pod)
    }

    /// Frees the host ports of the pods in `inherited` that are not in `live`, only in memory. An
    /// earlier server process may have given a dead pod's host ports to another pod, and died before
    /// it deleted the dead pod's entries from the store. Then both pods have the same host ports.
    pub(super) fn free_ports_except(&self, live: &HashSet<String>) {
        let inherited = lock(&self.inherited);
        lock(&self.ports).free_dead(inherited.difference(live));
    }

    /// Returns the ids in `inherited` that are not in `live`, and removes all ids from `inherited`.
    pub(super) fn take_inherited_except(&self, live: &HashSet<String>) -> Vec<String> {
        lock(&self.inherited)
            .drain()
            .filter(|pod| !live.contains(pod))
            .collect()
    }

    /// Returns two numbers, namely how many pods have addresses, and how many pods have host ports.
    pub(super) fn pod_counts(&self) -> (usize, usize) {
        let addresses = lock(&self.addresses)
            .first()
            .map_or(0, |family| family.all().count());
        (addresses, lock(&self.ports).pods().count())
    }

    /// Returns the gateway's address in the pod range of the primary address family.
    pub(super) fn primary_gateway(&self) -> Option<IpAddr> {
        let families = lock(&self.addresses);
        families.first().map(|family| family.range().gateway())
    }

    /// Allows the pod to send packets from all addresses. This function must be called before the
    /// pod is connected.
    pub(super) fn do_not_filter(&self, pod: &str) {
        lock(&self.unfiltered).insert(pod.to_owned());
    }

    /// Returns the pod's bridge port, or `None` if the pod can send packets from all addresses.
    fn port_of(&self, pod: &str, addresses: &[IpAddr]) -> Option<PodPort> {
        if !self.spoof_protection || lock(&self.unfiltered).contains(pod) {
            return None;
        }
        let mut addresses = addresses.to_vec();
        addresses.extend(lock(&self.old_addresses).get(pod).into_iter().flatten());
        Some(PodPort {
            interface: host_interface(pod),
            mac: link::mac_of(&addresses),
            addresses,
        })
    }

    /// Returns whether the pod has addresses or host ports.
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

    /// Reserves host ports for the pod. `mapped` is true if packets for the host ports are
    /// forwarded to the pod's own addresses. The kernel can forward packets only to a pod address
    /// of the same address family. If `mapped` is true and pods have no addresses of a host port's
    /// address family, this function therefore refuses the host port.
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
        if mapped {
            self.check_listeners(&reservation)?;
        }
        let taken = lock(&self.ports).take(pod, reservation, mapped);
        taken.map_err(|conflict| NetworkError::PortTaken {
            port: conflict.port,
            by: conflict.owner,
        })
    }

    /// Refuses host ports of which the server itself receives all connections. If the server
    /// receives only the connections to some addresses of a host port, this is only logged.
    fn check_listeners(&self, reservation: &PortReservation) -> Result<(), NetworkError> {
        for listener in self.bridge.listeners() {
            let mut ports = reservation.ports.iter();
            let Some(port) = ports.find(|port| listener.shares(port)) else {
                continue;
            };
            if listener.covers(port) {
                return Err(NetworkError::of_listener(*port, listener));
            }
            log::warn!(
                "pod {}: connections to its host port, {port}, do not reach the pod if they are for {listener}",
                reservation.name
            );
        }
        Ok(())
    }

    /// Returns the numbers of all TCP host ports.
    pub(super) fn tcp_ports(&self) -> HashSet<u16> {
        lock(&self.ports).tcp_ports().collect()
    }

    /// Frees the pod's addresses in memory. Other pods can then get these addresses.
    pub(super) fn free_addresses(&self, pod: &str) {
        let mut families = lock(&self.addresses);
        families.iter_mut().for_each(|family| family.free(pod));
    }

    /// Frees the pod's host ports in memory. Other pods can then reserve these ports.
    pub(super) fn free_ports(&self, pod: &str) {
        lock(&self.ports).free(pod);
    }

    /// Closes the pod's host ports. The node then no longer forwards packets for these ports, and
    /// other pods can reserve the ports.
    pub(super) async fn close_ports(self: &Arc<Self>, pod: &str) -> Result<(), NetworkError> {
        let mappings = self.mappings(pod);
        if mappings.is_empty() {
            self.free_ports(pod);
            return Ok(());
        }
        let (state, pod) = (Arc::clone(self), pod.to_owned());
        blocking(format!("pod {pod}: close its host ports"), move || {
            let free = || state.free_ports(&pod);
            state.bridge.withdraw(mappings, free, &*state)
        })
        .await
    }

    /// Returns the nftables map entries for the pod's host ports.
    fn mappings(&self, pod: &str) -> Vec<Mapping> {
        let addresses = self.addresses_of(pod);
        let ports = lock(&self.ports);
        ports.of(pod).map_or(Vec::new(), |reservation| {
            host_ports::mappings(&reservation.ports, &addresses)
        })
    }

    /// Writes the pod's addresses and host ports to the store, and returns when they are on the
    /// disk.
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

    /// Deletes the entries of `pods` from the store, and then frees the addresses of these pods.
    /// The interfaces of these pods must already be deleted.
    pub(super) async fn forget(self: &Arc<Self>, pods: Vec<String>) -> Result<(), NetworkError> {
        let mut bridge_ports = Vec::new();
        for pod in &pods {
            bridge_ports.extend(self.port_of(pod, &self.addresses_of(pod)));
        }
        let deletions = pods.iter().flat_map(|pod| self.deletions(pod)).collect();
        self.store.commit(deletions).await?;
        let state = Arc::clone(self);
        let what = format!("remove the bridge ports of the pods {}", pods.join(", "));
        blocking(what, move || {
            let free = || {
                for pod in &pods {
                    state.free_addresses(pod);
                    lock(&state.old_addresses).remove(pod);
                    lock(&state.unfiltered).remove(pod);
                }
            };
            state.bridge.retire(bridge_ports, free, &*state)
        })
        .await
    }

    /// Frees the pod's addresses and host ports after a failed [`EmbeddedState::commit`]. Parts of
    /// a failed commit can nevertheless be in the store, so the entries are deleted.
    pub(super) fn abandon(&self, pod: &str) {
        drop(self.store.commit_soon(self.deletions(pod)));
        self.free_addresses(pod);
        self.free_ports(pod);
    }

    /// Returns the changes that delete the entries of the pod from the store.
    fn deletions(&self, pod: &str) -> Vec<Change> {
        let mut addresses = self.addresses_of(pod);
        addresses.extend(lock(&self.old_addresses).get(pod).into_iter().flatten());
        let keys = addresses.into_iter().map(|address| address.to_string());
        keys.chain([ports_key(pod)])
            .map(|key| Change::delete(Table::ADDRESSES, &key))
            .collect()
    }

    /// Creates the pod's interface with its addresses and host ports. If `committed` is false, the
    /// store does not contain the addresses yet. This function then commits the addresses to the
    /// store while it creates the veth pair. The interface gets the addresses after the commit, so
    /// no interface has an address without a store entry.
    pub(super) async fn connect(
        self: &Arc<Self>,
        pod: &str,
        addresses: &[IpAddr],
        netns: PathBuf,
        committed: bool,
    ) -> Result<link::Mac, NetworkError> {
        let mac = link::mac_of(addresses);
        let port = self.port_of(pod, addresses);
        let (state, name) = (Arc::clone(self), pod.to_owned());
        let created = blocking(format!("pod {pod}: create its interface"), move || {
            state.bridge.connect(&name, mac, port, &netns, &*state)
        });
        let (created, committed) = tokio::join!(created, async {
            if committed {
                Ok(())
            } else {
                self.commit(pod).await
            }
        });
        committed?;
        let (state, namespace, addresses) = (Arc::clone(self), created?, addresses.to_vec());
        let mappings = self.mappings(pod);
        blocking(format!("pod {pod}: configure its interface"), move || {
            state.bridge.configure(&namespace, &addresses, mac)?;
            if mappings.is_empty() {
                Ok(())
            } else {
                state.bridge.publish(mappings, &*state)
            }
        })
        .await?;
        Ok(mac)
    }
}

impl Pods for EmbeddedState {
    fn desired(&self) -> Desired {
        let mut desired = Desired {
            pods: Vec::new(),
            addresses: Vec::new(),
            elements: Elements::default(),
        };
        let mut by_pod: BTreeMap<String, Vec<IpAddr>> = BTreeMap::new();
        for addresses in lock(&self.addresses).iter() {
            for (pod, address) in addresses.all() {
                by_pod.entry(pod.to_owned()).or_default().push(address);
            }
        }
        let ports = lock(&self.ports);
        let Elements {
            mappings,
            ports: bridge_ports,
        } = &mut desired.elements;
        for (pod, addresses) in by_pod {
            if let Some(reservation) = ports.of(&pod) {
                mappings.extend(host_ports::mappings(&reservation.ports, &addresses));
            }
            let port = self.port_of(&pod, &addresses);
            bridge_ports.extend(port.clone());
            desired.pods.push(DesiredPod { id: pod, port });
            desired.addresses.extend(addresses);
        }
        desired
    }

    fn has_port_on_loopback4(&self) -> bool {
        lock(&self.ports).is_any_on_loopback4()
    }
}
