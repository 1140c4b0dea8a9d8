//! The host ports whose flows can be stale, and the deletion of stale flows.
//!
//! A pod decides how many flows to its host ports exist. All pods need the lock on the nftables rules
//! when they start and stop, so this module deletes flows only after the caller has released that
//! lock. Nevertheless, a flow of a host port's previous owner does not remain:
//!
//! * A pod starts only after the flows to its host ports that are sent elsewhere are deleted. It
//!   does not matter whether the previous owner has already deleted its flows.
//! * A pod that stops deletes the flows to its own addresses. Its addresses are free only
//!   afterwards, so the flows of another pod are never deleted.
//! * A replacement of the nftables tables can affect the flows of all host ports. A thread in the
//!   background deletes them. It compares each flow with the owner that the port has at that
//!   moment, because the port can meanwhile have moved to another pod.

use std::collections::{BTreeSet, HashMap};
use std::net::{IpAddr, SocketAddr};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use crate::conntrack::{self, Port, Progress, Search};
use crate::error::NetworkError;
use crate::host_ports::{Mapping, Protocol};
use rrun_calls::lock::lock;

/// The maximum time for which the start or the stop of a pod waits for the deletion of its flows.
const WAIT: Duration = Duration::from_secs(10);
/// The maximum time of a deletion in the background.
const WAIT_IN_BACKGROUND: Duration = Duration::from_secs(300);

/// The open host ports of protocols without connections.
#[derive(Default)]
pub(crate) struct Flows {
    owners: Mutex<Owners>,
    background: Mutex<Background>,
}

/// The address and port of the pod to which each open host port belongs.
type Owners = HashMap<Port, SocketAddr>;

/// The state of the thread that deletes the stale flows of all host ports.
#[derive(Default)]
struct Background {
    is_running: bool,
    /// True if the thread must begin again, because the host ports have changed.
    is_wanted_again: bool,
}

impl Flows {
    /// Records the owners of host ports. The caller holds the lock on the nftables rules, and opens
    /// the host ports afterwards. A flow to the new owner is therefore never deleted.
    pub(crate) fn open(&self, mappings: &[Mapping]) {
        lock(&self.owners).extend(owners(mappings));
    }

    /// Records that the host ports have no owner. The caller holds the lock on the nftables rules.
    pub(crate) fn close(&self, mappings: &[Mapping]) {
        let mut known = lock(&self.owners);
        for (port, to) in owners(mappings) {
            // A repair of the rules can already have opened the port for the next pod.
            if known.get(&port) == Some(&to) {
                known.remove(&port);
            }
        }
    }

    /// Records the owners of all host ports. The caller holds the lock on the nftables rules, and
    /// replaces the rules afterwards.
    pub(crate) fn replace(&self, mappings: &[Mapping]) {
        *lock(&self.owners) = owners(mappings).collect();
    }

    /// Deletes the flows to the opened host ports in `mappings` that are sent elsewhere than to the
    /// pod. The caller does not hold the lock on the nftables rules. No other call changes the
    /// pod's host ports meanwhile. After ten seconds, the deletion continues in the background.
    pub(crate) fn direct_to_the_pod(self: &Arc<Self>, mappings: &[Mapping]) {
        let owners: Owners = owners(mappings).collect();
        if owners.is_empty() {
            return;
        }
        let owner = |port| owners.get(&port).copied();
        let ports: Vec<Port> = owners.keys().copied().collect();
        let until = Instant::now() + WAIT;
        let result = conntrack::forget_elsewhere(&ports, &mut Search::new(&owner), until);
        if matches!(result, Ok(Progress::OutOfTime)) {
            self.check_all_soon();
        }
        report(result, WAIT, "the deletion continues in the background");
    }

    /// Deletes the flows that are sent to the pod of the closed host ports in `mappings`. The caller
    /// does not hold the lock on the nftables rules, and the pod's addresses are not free yet.
    pub(crate) fn forget_the_pod(&self, mappings: &[Mapping]) {
        let pods: BTreeSet<(Protocol, IpAddr)> = without_connections(mappings)
            .map(|mapping| (mapping.protocol, mapping.to.ip()))
            .collect();
        let until = Instant::now() + WAIT;
        for (protocol, pod) in pods {
            let result = conntrack::forget_pod(protocol, pod, until);
            report(
                result,
                WAIT,
                "the next pod with the host ports deletes them",
            );
        }
    }

    /// Deletes the stale flows of all host ports on a thread in the background.
    pub(crate) fn check_all_soon(self: &Arc<Self>) {
        if lock(&self.owners).is_empty() {
            return;
        }
        let mut background = lock(&self.background);
        if background.is_running {
            background.is_wanted_again = true;
            return;
        }
        let flows = Arc::clone(self);
        let thread = std::thread::Builder::new().name("flows".to_owned());
        match thread.spawn(move || flows.check_all()) {
            Ok(_) => background.is_running = true,
            Err(error) => report(Err(NetworkError::Thread(error)), WAIT, ""),
        }
    }

    /// Deletes the stale flows of all host ports until no call has requested it again.
    fn check_all(&self) {
        loop {
            let owner = |port| lock(&self.owners).get(&port).copied();
            let ports: Vec<Port> = lock(&self.owners).keys().copied().collect();
            let until = Instant::now() + WAIT_IN_BACKGROUND;
            let result = conntrack::forget_elsewhere(&ports, &mut Search::new(&owner), until);
            report(result, WAIT_IN_BACKGROUND, "the server gives up");
            let mut background = lock(&self.background);
            background.is_running = std::mem::take(&mut background.is_wanted_again);
            if !background.is_running {
                return;
            }
        }
    }
}

fn without_connections(mappings: &[Mapping]) -> impl Iterator<Item = &Mapping> {
    let mappings = mappings.iter();
    mappings.filter(|mapping| mapping.protocol != Protocol::Tcp)
}

fn owners(mappings: &[Mapping]) -> impl Iterator<Item = (Port, SocketAddr)> {
    without_connections(mappings).map(|mapping| {
        let port = Port {
            protocol: mapping.protocol,
            number: mapping.port,
            address: mapping.address,
        };
        (port, mapping.to)
    })
}

/// Logs that stale flows remain. They affect only peers that have already sent packets to a host
/// port, so the pod starts or stops nevertheless.
fn report(result: Result<Progress, NetworkError>, limit: Duration, next: &str) {
    match result {
        Ok(Progress::Complete) => {}
        Ok(Progress::OutOfTime) => log::warn!(
            "packets for host ports may still be sent to their previous destination: the deletion of \
             connection-tracking entries was not complete after {} s; {next}",
            limit.as_secs()
        ),
        Err(error) => log::warn!(
            "packets for host ports may still be sent to their previous destination: {error}"
        ),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn mapping(protocol: Protocol, to: &str) -> Mapping {
        Mapping {
            protocol,
            address: "127.0.0.1".parse().unwrap(),
            port: 53,
            to: to.parse().unwrap(),
        }
    }

    #[test]
    fn a_closed_port_keeps_its_next_owner() {
        let flows = Flows::default();
        let first = [mapping(Protocol::Udp, "10.88.0.2:53")];
        let next = [
            mapping(Protocol::Udp, "10.88.0.3:53"),
            mapping(Protocol::Tcp, "10.88.0.3:53"),
        ];
        flows.open(&first);
        flows.replace(&next);
        flows.close(&first);
        let known: Vec<SocketAddr> = lock(&flows.owners).values().copied().collect();
        assert_eq!(
            known,
            [next[0].to],
            "the owners of ports without connections"
        );
        flows.close(&next);
        assert!(lock(&flows.owners).is_empty());
    }
}
