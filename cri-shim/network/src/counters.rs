//! The packet and byte counters of pods' interfaces, which are read from /proc/net/dev. See
//! proc_net(5).

use std::cell::OnceCell;
use std::collections::HashMap;
use std::os::fd::AsFd;

use crate::choice::PodNetwork;
use crate::link::POD_INTERFACE;
use crate::{bridge, namespace};

const TABLE: &str = "/proc/thread-self/net/dev";

/// The counters of a pod's interface. The `rx` fields count what the pod received, and the `tx`
/// fields count what the pod sent.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct InterfaceCounters {
    pub name: String,
    pub rx_bytes: u64,
    pub rx_packets: u64,
    pub rx_errors: u64,
    pub rx_dropped: u64,
    pub tx_bytes: u64,
    pub tx_packets: u64,
    pub tx_errors: u64,
    pub tx_dropped: u64,
}

/// A reader of interface counters. The node's /proc/net/dev has a line for each pod of the embedded
/// network. The reader reads /proc/net/dev only once, for any number of pods.
pub struct Counters<'a> {
    network: &'a PodNetwork,
    node: OnceCell<HashMap<String, InterfaceCounters>>,
}

impl PodNetwork {
    /// Returns a reader of the pods' current interface counters.
    pub fn counters(&self) -> Counters<'_> {
        Counters {
            network: self,
            node: OnceCell::new(),
        }
    }
}

impl Counters<'_> {
    /// Returns the counters of the pod's interfaces except the loopback. The first interface in the
    /// list is eth0. If the pod is in the node's network namespace, the list is empty. This
    /// function reads small files and does not wait for a kernel lock.
    pub fn of(&self, pod: &str) -> Vec<InterfaceCounters> {
        if !self.network.uses_cni(pod) {
            let node = self.node.get_or_init(|| {
                let table = std::fs::read_to_string(TABLE).unwrap_or_default();
                parsed(&table).map(|one| (one.name.clone(), one)).collect()
            });
            let found = node.get(&bridge::host_interface(pod));
            return found.map(from_pods_side).into_iter().collect();
        }
        // The counters are read in the pod's network namespace. The pod's interfaces on the node
        // are not always known, because CNI plugins need not report them.
        let path = self.network.namespace_of(pod);
        let read = || {
            let pinned = namespace::open(&path)?;
            namespace::on_own_thread(|| {
                namespace::enter(pinned.as_fd(), &path)?;
                Ok(std::fs::read_to_string(TABLE).unwrap_or_default())
            })
        };
        let table = read().unwrap_or_default();
        let mut all: Vec<InterfaceCounters> =
            parsed(&table).filter(|one| one.name != "lo").collect();
        all.sort_by_key(|one| one.name != POD_INTERFACE);
        all
    }
}

pub(crate) fn parsed(table: &str) -> impl Iterator<Item = InterfaceCounters> {
    table.lines().filter_map(|line| {
        let (name, counters) = line.split_once(':')?;
        let mut counters = counters.split_ascii_whitespace().map(str::parse);
        let mut next = |skip| counters.nth(skip)?.ok();
        // The first eight columns are for received packets: bytes packets errs drop fifo frame
        // compressed multicast. The other eight columns are for sent packets.
        Some(InterfaceCounters {
            name: name.trim().to_owned(),
            rx_bytes: next(0)?,
            rx_packets: next(0)?,
            rx_errors: next(0)?,
            rx_dropped: next(0)?,
            tx_bytes: next(4)?,
            tx_packets: next(0)?,
            tx_errors: next(0)?,
            tx_dropped: next(0)?,
        })
    })
}

/// Converts the counters of the node's end of a veth pair to the counters of the pod's end. The
/// receive and transmit counters are swapped, because the node's end receives the pod's transmitted
/// bytes.
fn from_pods_side(node: &InterfaceCounters) -> InterfaceCounters {
    InterfaceCounters {
        name: POD_INTERFACE.to_owned(),
        rx_bytes: node.tx_bytes,
        rx_packets: node.tx_packets,
        rx_errors: node.tx_errors,
        rx_dropped: node.tx_dropped,
        tx_bytes: node.rx_bytes,
        tx_packets: node.rx_packets,
        tx_errors: node.rx_errors,
        tx_dropped: node.rx_dropped,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_counters_of_the_pod_are_those_of_the_node_with_swapped_directions() {
        let table = "Inter-|   Receive |  Transmit\n face |bytes packets errs drop fifo frame \
                     compressed multicast|bytes packets errs drop fifo colls carrier compressed\n\
                     rr0123456789ab:     100      2    3    4    0     0          0         0   \
                     200       5    6    0    0     0       0          0\n";
        let expected = InterfaceCounters {
            name: "eth0".to_owned(),
            rx_bytes: 200,
            rx_packets: 5,
            rx_errors: 6,
            rx_dropped: 0,
            tx_bytes: 100,
            tx_packets: 2,
            tx_errors: 3,
            tx_dropped: 4,
        };
        let all: Vec<InterfaceCounters> = parsed(table).collect();
        assert_eq!(all.len(), 1);
        assert_eq!(all.first().map(from_pods_side), Some(expected));
    }
}
