//! What interfaces have counted, by /proc/net/dev: proc_net(5).

use std::cell::OnceCell;
use std::collections::HashMap;
use std::os::fd::AsFd;

use crate::choice::PodNetwork;
use crate::link::POD_INTERFACE;
use crate::{bridge, namespace};

const TABLE: &str = "/proc/thread-self/net/dev";

/// A pod's interface and its counters, as the pod sees them.
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

/// The counters of one moment: the node's table, which has a line for each pod of the embedded
/// network, is read once, whatever number of pods are asked for.
pub struct Counters<'a> {
    network: &'a PodNetwork,
    node: OnceCell<HashMap<String, InterfaceCounters>>,
}

impl PodNetwork {
    /// What the pods' interfaces have counted by now.
    pub fn counters(&self) -> Counters<'_> {
        Counters {
            network: self,
            node: OnceCell::new(),
        }
    }
}

impl Counters<'_> {
    /// The pod's interfaces but the loopback, eth0 first; none if it has no network of its own.
    /// Small files are read, no kernel lock is waited for.
    pub fn of(&self, pod: &str) -> Vec<InterfaceCounters> {
        if !self.network.keeps(pod) {
            let node = self.node.get_or_init(|| {
                let table = std::fs::read_to_string(TABLE).unwrap_or_default();
                parsed(&table).map(|one| (one.name.clone(), one)).collect()
            });
            let found = node.get(&bridge::host_interface(pod));
            return found.map(turned).into_iter().collect();
        }
        // Which interfaces of the node are their other ends, if any are, plugins need not say.
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

fn parsed(table: &str) -> impl Iterator<Item = InterfaceCounters> {
    table.lines().filter_map(|line| {
        let (name, counters) = line.split_once(':')?;
        let mut counters = counters.split_ascii_whitespace().map(str::parse);
        let mut next = |skip| counters.nth(skip)?.ok();
        // bytes packets errs drop fifo frame compressed multicast, and again for sending.
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

/// What the node's end of a pair received is what the pod sent.
fn turned(node: &InterfaceCounters) -> InterfaceCounters {
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
    fn the_nodes_counters_are_the_pods_turned_round() {
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
        assert_eq!(all.first().map(turned), Some(expected));
    }
}
