//! The packet and byte counters of pods' interfaces, which are read from /proc/net/dev. See
//! proc_net(5).

use std::cell::OnceCell;
use std::collections::HashMap;
use std::fs::File;
use std::io::Read;
use std::os::fd::AsFd;

use crate::choice::PodNetwork;
use crate::link::POD_INTERFACE;
use crate::{bridge, namespace};

const TABLE: &str = "/proc/thread-self/net/dev";

/// The number of lines of the table before the first interface.
const HEADER_LINES: usize = 2;

/// The maximum length of a line of the table: a name of 15 bytes, and 16 numbers of up to 20 digits
/// with separators.
const MAX_LINE_BYTES: usize = 384;

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

/// The counters of a pod's interfaces.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct PodCounters {
    /// The counters of all interfaces except the loopback. The first interface is eth0.
    pub interfaces: Vec<InterfaceCounters>,
    /// True if the pod has more interfaces than the limit.
    pub limited: bool,
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
    /// Returns the counters of at most `limit` interfaces of the pod. A pod with the capability
    /// NET_ADMIN can create any number of interfaces. If the pod is in the node's network namespace,
    /// the list is empty. This function reads small files and does not wait for a kernel lock.
    pub fn of(&self, pod: &str, limit: usize) -> PodCounters {
        if !self.network.uses_cni(pod) {
            let node = self.node.get_or_init(|| {
                let table = std::fs::read(TABLE).unwrap_or_default();
                let table = String::from_utf8_lossy(&table);
                parsed(&table).map(|one| (one.name.clone(), one)).collect()
            });
            let found = node.get(&bridge::host_interface(pod));
            return PodCounters {
                interfaces: found.map(from_pods_side).into_iter().collect(),
                limited: false,
            };
        }
        // The counters are read in the pod's network namespace. The pod's interfaces on the node
        // are not always known, because CNI plugins need not report them. The lines are those of
        // the loopback, of the reported interfaces, and of one interface above the limit.
        let path = self.network.namespace_of(pod);
        let read = || {
            let pinned = namespace::open(&path)?;
            namespace::on_own_thread(|| {
                namespace::enter(pinned.as_fd(), &path)?;
                Ok(read_lines(limit.saturating_add(HEADER_LINES + 2)))
            })
        };
        limited(&read().unwrap_or_default(), limit)
    }
}

/// Reads the beginning of the table in the calling thread's network namespace, which contains at
/// least `lines` lines unless the table is shorter. The kernel lists the interfaces in the order in
/// which they entered the namespace, so eth0 is one of the first.
fn read_lines(lines: usize) -> Vec<u8> {
    let most = lines.saturating_mul(MAX_LINE_BYTES);
    let most = u64::try_from(most).unwrap_or(u64::MAX);
    let mut table = Vec::new();
    // The kernel's: this is a file of procfs.
    let opened = File::open(TABLE);
    if opened.is_ok_and(|file| file.take(most).read_to_end(&mut table).is_err()) {
        table.clear();
    }
    // The last line can be incomplete.
    let end = table.iter().rposition(|byte| *byte == b'\n');
    table.truncate(end.map_or(0, |end| end + 1));
    table
}

/// Returns the counters in a table of a pod's network namespace. An interface's name need not be
/// UTF-8, and the names in the result are unique. Clients of the metrics refuse two metrics with the
/// same name and labels.
fn limited(table: &[u8], limit: usize) -> PodCounters {
    let mut counters = PodCounters::default();
    let all = &mut counters.interfaces;
    for one in parsed(&String::from_utf8_lossy(table)) {
        if one.name == "lo" || all.iter().any(|other| other.name == one.name) {
            continue;
        }
        if one.name == POD_INTERFACE {
            all.insert(0, one);
        } else if all.len() <= limit {
            all.push(one);
        }
    }
    counters.limited = all.len() > limit;
    all.truncate(limit);
    counters
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

    /// Returns a table with the interfaces `names`.
    fn table(names: &[&[u8]]) -> Vec<u8> {
        let mut table = b"Inter-|   Receive |  Transmit\n face |bytes |bytes\n".to_vec();
        for name in names {
            table.extend_from_slice(name);
            table.extend_from_slice(b": 1 2 3 4 0 0 0 0 5 6 7 8 0 0 0 0\n");
        }
        table
    }

    #[test]
    fn the_number_of_reported_interfaces_is_limited_and_their_names_are_unique() {
        let names: &[&[u8]] = &[b"lo", b"net1", b"\xff", b"\xfe", b"a\xff", b"eth0", b"net2"];
        for (limit, expected) in [
            (9, &["eth0", "net1", "\u{fffd}", "a\u{fffd}", "net2"][..]),
            (5, &["eth0", "net1", "\u{fffd}", "a\u{fffd}", "net2"]),
            (4, &["eth0", "net1", "\u{fffd}", "a\u{fffd}"]),
            (1, &["eth0"]),
        ] {
            let counted = limited(&table(names), limit);
            let names: Vec<&str> = counted
                .interfaces
                .iter()
                .map(|one| one.name.as_str())
                .collect();
            assert_eq!(names, expected);
            assert_eq!(counted.limited, limit < 5, "limit {limit}");
        }
    }

    #[test]
    fn only_whole_lines_of_the_table_are_read() {
        let part = read_lines(HEADER_LINES);
        assert!(part.starts_with(b"Inter-") && part.ends_with(b"\n"));
        assert!(part.len() <= HEADER_LINES * MAX_LINE_BYTES);
        assert!(parsed(&String::from_utf8_lossy(&read_lines(10_000))).any(|one| one.name == "lo"));
    }

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
