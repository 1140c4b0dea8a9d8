//! The embedded network's nftables tables, which are configured over the netlink protocol of
//! nf_tables. See nft(8) and the kernel's `linux/netfilter/nf_tables.h`. In the syntax of nft(8),
//! the tables are:
//!
//! ```text
//! table inet rrun0 {
//!     map host_ports4 { type inet_proto . ipv4_addr . inet_service : ipv4_addr . inet_service }
//!     map host_ports6 { type inet_proto . ipv6_addr . inet_service : ipv6_addr . inet_service }
//!     chain guard {
//!         type filter hook prerouting priority raw;
//!         iifname "lo" accept
//!         iifname != "rrun0" ip daddr 10.88.0.0/16 drop   (only without direct routing)
//!         iifname "rrun0" ip daddr 127.0.0.0/8 drop
//!         iifname "rrun0" ip saddr 127.0.0.0/8 drop
//!     }
//!     chain host_ports {
//!         ip daddr 127.0.0.1 tcp dport 40000 return   (for each socket on which rrun-cri listens)
//!         ip6 daddr ::1 return   (only if the kernel would drop replies to ::1)
//!         ip saddr 10.88.0.0/16 (and an entry in host_ports4) ct mark set ct mark | 0x1000
//!         dnat ip to meta l4proto . ip daddr . th dport map @host_ports4
//!         dnat ip to meta l4proto . 0.0.0.0 . th dport map @host_ports4
//!         (and the same rules for ip6)
//!     }
//!     chain prerouting {
//!         type nat hook prerouting priority dstnat;
//!         ip daddr 127.0.0.0/8 return
//!         fib daddr type local jump host_ports
//!     }
//!     chain output {
//!         type nat hook output priority dstnat;
//!         fib daddr type local jump host_ports
//!     }
//!     chain postrouting {
//!         type nat hook postrouting priority srcnat;
//!         ip saddr 10.88.0.0/16 ip daddr != 10.88.0.0/16 oifname != "rrun0"
//!             ip daddr != 224.0.0.0/4 masquerade fully-random
//!         oifname "rrun0" ip saddr 127.0.0.0/8 masquerade
//!         oifname "rrun0" ip6 saddr ::1 masquerade
//!         oifname "rrun0" ip saddr 10.88.0.0/16 ct status dnat ct mark & 0x1000 != 0 masquerade
//!         (and the same rules for ip6)
//!     }
//! }
//! table bridge rrun0 { (see the module `sources`) }
//! ```
//!
//! A pod can connect to its own host port, or to a host port of another pod on this node. The rules
//! masquerade such a connection. As a result, the replies return through the node instead of
//! directly over the bridge. The rules set the mark 0x1000 on a connection to a host port, and
//! masquerade only connections with this mark. Other connections are not masqueraded, because
//! another program may have changed their destination address. For example, kube-proxy changes the
//! destination of connections to a Service. A Service can have the same port number as a host port.
//! A program that changes the destination of a connection must itself masquerade the connection.
//!
//! A process on the node can connect to a host port at 127.0.0.1 or ::1. The rules masquerade such
//! a connection, because in the pod these addresses refer to the pod itself. The replies to the
//! process need two settings of the bridge: the sysctl route_localnet and a local route to ::1. The
//! chain `guard` prevents pods from using route_localnet to reach sockets that listen only at
//! 127.0.0.1 of the node. A filter at each bridge port does the same while the table does not exist
//! ([`crate::traffic_control`]). The kernel itself drops the packets that pods send to ::1. Other
//! machines can also send packets to 127.0.0.1. These packets are not for a host port, so the chain
//! `prerouting` ignores them. The kernel then drops them.
//!
//! The server's own listeners take precedence over host ports. A pod could otherwise receive the
//! connections of clients of exec and attach, because it can request every port.
//!
//! Without direct routing, other machines can reach a pod only through its host ports. A machine in
//! the node's network could otherwise add a route to the pod range through the node. The packets of
//! such a machine have a pod's address as their destination before any rule changes it. The packets
//! to a host port and the replies to a pod's masqueraded packets have the node's address.
//!
//! To open or close a host port, rrun adds or removes elements of the maps. To change the rules,
//! rrun replaces a whole table in one transaction. Every packet is therefore processed by either
//! the old or the new table. The transaction changes no other table. If one netlink message cannot
//! contain all elements, the remaining elements follow in further transactions.

mod events;
mod expression;
mod sets;
mod sources;
mod transaction;

use nix::errno::Errno;

use crate::address::Range;
use crate::error::NetworkError;
use crate::host_ports::{Listener, Mapping};
use crate::link::Mac;
use crate::netlink::{Batch, Body, NLM_F_ACK, NLM_F_DUMP, Socket};
pub(crate) use events::{Change, Watch};
use expression::{IpFamily, Rule};
use sets::{Operation, Set};
use transaction::{ENTRIES, TABLE, Transaction, attribute, message};

/// The family of a table. The kernel runs the rules of the two families for different packets. The
/// family `Inet` gets IPv4 and IPv6 packets. The family `Bridge` gets all frames that arrive at a
/// port of a bridge.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) enum TableFamily {
    Inet,
    Bridge,
}

/// The chain priorities with the names `raw`, `dstnat` and `srcnat` in nft(8).
const NF_IP_PRI_RAW: i32 = -300;
const NF_IP_PRI_NAT_DST: i32 = -100;
const NF_IP_PRI_NAT_SRC: i32 = 100;

const NF_INET_PRE_ROUTING: u32 = 0;
const NF_INET_LOCAL_OUT: u32 = 3;
const NF_INET_POST_ROUTING: u32 = 4;

const GUARD: &str = "guard";
const HOST_PORTS: &str = "host_ports";
const PREROUTING: &str = "prerouting";
const OUTPUT: &str = "output";
const POSTROUTING: &str = "postrouting";

/// The hook at which the kernel runs a chain.
#[derive(Clone, Copy)]
struct Hook {
    /// The type of the chain.
    kind: &'static str,
    number: u32,
    priority: i32,
}

const fn hook(kind: &'static str, number: u32, priority: i32) -> Option<Hook> {
    Some(Hook {
        kind,
        number,
        priority,
    })
}

/// The chains of a table, in the order of their creation. A chain without a hook runs only when a
/// rule jumps to it.
type Chains = &'static [(&'static str, Option<Hook>)];

const INET_CHAINS: Chains = &[
    (GUARD, hook("filter", NF_INET_PRE_ROUTING, NF_IP_PRI_RAW)),
    (HOST_PORTS, None),
    (
        PREROUTING,
        hook("nat", NF_INET_PRE_ROUTING, NF_IP_PRI_NAT_DST),
    ),
    (OUTPUT, hook("nat", NF_INET_LOCAL_OUT, NF_IP_PRI_NAT_DST)),
    (
        POSTROUTING,
        hook("nat", NF_INET_POST_ROUTING, NF_IP_PRI_NAT_SRC),
    ),
];

/// The data from which the nftables tables are created.
pub(crate) struct Tables<'a> {
    /// The name of the tables, which is also the name of the bridge.
    pub name: &'a str,
    /// The ranges that contain the addresses of pods.
    pub ranges: Vec<Range>,
    /// The ranges whose addresses other machines can reach only through host ports.
    pub hidden: Vec<Range>,
    pub masquerade: bool,
    /// True if host ports are also open at ::1.
    pub loopback6: bool,
    /// The sockets on which the server itself listens.
    pub listeners: &'a [Listener],
    /// True if the table of the family [`TableFamily::Bridge`] exists.
    pub filters_sources: bool,
    pub elements: Elements,
}

/// The elements of the maps and sets.
#[derive(Clone, Default)]
pub(crate) struct Elements {
    /// The entries of the maps with host ports.
    pub mappings: Vec<Mapping>,
    /// The bridge ports at which only packets from the pod's own addresses are accepted.
    pub ports: Vec<PodPort>,
}

/// The port of the bridge at which a pod is connected, and the addresses of the pod.
#[derive(Clone)]
pub(crate) struct PodPort {
    pub interface: String,
    pub mac: Mac,
    /// The pod's addresses without its link-local address.
    pub addresses: Vec<std::net::IpAddr>,
}

/// A number that the kernel increments whenever any nftables table of this network namespace
/// changes.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) struct Generation(u32);

impl Generation {
    /// Returns the generation after `changes` further changes.
    pub(crate) fn after(self, changes: u32) -> Generation {
        (0..changes).fold(self, |Generation(id), _| {
            // The kernel never uses the number 0.
            Generation(id.checked_add(1).unwrap_or(1))
        })
    }
}

/// Reads the current generation of the nftables tables from the kernel.
pub(crate) fn generation(socket: &mut Socket) -> Result<Generation, NetworkError> {
    let mut batch = Batch::default();
    let action = "read the generation number of the nftables tables";
    batch.message(action, message::GETGEN, NLM_F_ACK, |body| {
        body.header(&[0; 4]);
    });
    let replies = socket.execute(&batch).map_err(explained)?;
    let id = replies
        .iter()
        .find_map(|reply| reply.attributes(4).array(attribute::GEN_ID));
    Ok(Generation(u32::from_be_bytes(id.unwrap_or_default())))
}

impl Tables<'_> {
    /// Returns the address families in which pods have addresses.
    fn ip_families(&self) -> Vec<IpFamily> {
        let mut families = vec![IpFamily::V4, IpFamily::V6];
        families.retain(|family| {
            let mut ranges = self.ranges.iter();
            ranges.any(|range| IpFamily::of(range.network()) == *family)
        });
        families
    }

    /// Returns the families of the tables that should exist.
    fn families(&self) -> &'static [TableFamily] {
        if self.filters_sources {
            &[TableFamily::Inet, TableFamily::Bridge]
        } else {
            &[TableFamily::Inet]
        }
    }

    /// Returns the maps and sets of the table `family`.
    fn sets(&self, family: TableFamily) -> Vec<Set> {
        match family {
            TableFamily::Inet => self.ip_families().into_iter().map(Set::HostPorts).collect(),
            TableFamily::Bridge => Set::OF_SOURCES.to_vec(),
        }
    }

    /// Returns all rules of the table `family`, each with the name of its chain.
    fn rules(&self, family: TableFamily) -> Vec<(&'static str, Rule)> {
        match family {
            TableFamily::Inet => self.inet_rules(),
            TableFamily::Bridge => sources::rules(),
        }
    }

    fn inet_rules(&self) -> Vec<(&'static str, Rule)> {
        let mut rules = vec![(GUARD, Rule::accept_loopback())];
        for range in &self.hidden {
            rules.push((GUARD, Rule::hide(self.name, *range)));
        }
        rules.push((GUARD, Rule::guard(self.name, false)));
        rules.push((GUARD, Rule::guard(self.name, true)));
        for listener in self.listeners {
            let port = listener.address.port();
            for address in listener.destinations() {
                rules.push((HOST_PORTS, Rule::not_for_listener(address, port)));
            }
        }
        if !self.loopback6 {
            rules.push((HOST_PORTS, Rule::not_for_loopback6()));
        }
        for range in &self.ranges {
            rules.push((HOST_PORTS, Rule::mark_hairpin(*range, true)));
            rules.push((HOST_PORTS, Rule::mark_hairpin(*range, false)));
        }
        for family in self.ip_families() {
            rules.push((HOST_PORTS, Rule::host_port(family, true)));
            rules.push((HOST_PORTS, Rule::host_port(family, false)));
        }
        rules.push((PREROUTING, Rule::not_for_loopback4()));
        for chain in [PREROUTING, OUTPUT] {
            rules.push((chain, Rule::jump_if_local(HOST_PORTS)));
        }
        for range in &self.ranges {
            if self.masquerade {
                rules.push((POSTROUTING, Rule::masquerade(self.name, *range)));
            }
            rules.push((POSTROUTING, Rule::hairpin(self.name, *range)));
        }
        for family in self.ip_families() {
            rules.push((POSTROUTING, Rule::masquerade_loopback(self.name, family)));
        }
        rules
    }

    /// Returns a transaction that creates the table `family` without elements. If the table exists,
    /// the transaction replaces it.
    fn definition(&self, family: TableFamily) -> Transaction {
        let name = self.name;
        let mut transaction = Transaction::begin(None);
        transaction.delete_table(family, name);
        transaction.table(family, name);
        for set in self.sets(family) {
            transaction.set(name, set);
        }
        let chains = match family {
            TableFamily::Inet => INET_CHAINS,
            TableFamily::Bridge => sources::CHAINS,
        };
        for (chain, hook) in chains {
            transaction.chain(family, name, chain, *hook);
        }
        for (chain, rule) in self.rules(family) {
            transaction.rule(family, name, chain, &rule);
        }
        transaction
    }
}

/// Returns whether the tables exist and have the expected numbers of rules and of elements.
pub(crate) fn is_complete(socket: &mut Socket, tables: &Tables) -> Result<bool, NetworkError> {
    let name = tables.name;
    for family in tables.families() {
        let rules = count(socket, *family, name, message::GETRULE, |body| {
            body.string(TABLE, name);
        })?;
        if rules.messages != tables.rules(*family).len() {
            return Ok(false);
        }
        for set in tables.sets(*family) {
            let found = count(socket, *family, name, message::GETSETELEM, |body| {
                body.string(TABLE, name);
                body.string(attribute::ELEMENTS_SET, set.name());
            })?;
            if found.elements != set.elements(&tables.elements).len() {
                return Ok(false);
            }
        }
    }
    Ok(true)
}

/// The size of a dump.
#[derive(Default)]
struct Count {
    messages: usize,
    /// The number of elements of a set, if the messages contain elements.
    elements: usize,
}

/// Counts the objects in a dump of the table `name`. If the table does not exist, the result is 0.
fn count(
    socket: &mut Socket,
    family: TableFamily,
    name: &str,
    kind: u16,
    body: impl FnOnce(&mut Body),
) -> Result<Count, NetworkError> {
    let mut batch = Batch::default();
    let action = format!("look up the nftables table {name}");
    batch.message(action, kind, NLM_F_DUMP, |message| {
        message.header(&family.header());
        body(message);
    });
    let counted = socket.fold(&batch, |count: &mut Count, reply| {
        count.messages += 1;
        count.elements += reply.attributes(4).nest(ENTRIES).count();
    });
    match counted {
        Err(error) if error.is(Errno::ENOENT) => Ok(Count::default()),
        result => result,
    }
}

/// Creates the table `family`, or replaces it if it exists.
pub(crate) fn replace(
    socket: &mut Socket,
    tables: &Tables,
    family: TableFamily,
) -> Result<(), NetworkError> {
    let begin = || tables.definition(family);
    let sets = tables.sets(family);
    let elements = sets::messages(&sets, Operation::Add, &tables.elements);
    commit(socket, tables.name, None, begin, &elements)
        .map(drop)
        .map_err(explained)
}

/// Deletes the table `family`. A table that does not exist is not an error.
pub(crate) fn delete(
    socket: &mut Socket,
    name: &str,
    family: TableFamily,
) -> Result<(), NetworkError> {
    let mut transaction = Transaction::begin(None);
    transaction.delete_table(family, name);
    transaction.commit(socket).map_err(explained)
}

/// Adds `elements` to the tables with the name `name`. An element that already exists is not an
/// error. If `generation` is not the current generation, this function changes nothing and returns
/// the error ERESTART. Returns the number of transactions.
pub(crate) fn add(
    socket: &mut Socket,
    name: &str,
    elements: &Elements,
    generation: Option<Generation>,
) -> Result<u32, NetworkError> {
    let messages = sets::messages(&Set::ALL, Operation::Add, elements);
    let begin = || Transaction::begin(generation);
    commit(socket, name, generation, begin, &messages)
}

/// Removes `elements` from the tables with the name `name`. An element that does not exist is not
/// an error. The parameter `generation` and the result are as in [`add`].
pub(crate) fn remove(
    socket: &mut Socket,
    name: &str,
    elements: &Elements,
    generation: Option<Generation>,
) -> Result<u32, NetworkError> {
    // An element that does not exist cannot be deleted. The elements are therefore added first.
    let messages = sets::messages(&Set::ALL, Operation::Remove, elements);
    let begin = || Transaction::begin(generation);
    commit(socket, name, generation, begin, &messages)
}

/// Commits the transaction that `begin` returns, with the messages `elements`. If the socket's send
/// buffer is too small for one transaction, the messages are sent in several transactions. Packets
/// can then be processed before the last transaction. Returns the number of transactions.
fn commit(
    socket: &mut Socket,
    name: &str,
    generation: Option<Generation>,
    begin: impl Fn() -> Transaction,
    elements: &[sets::ElementList],
) -> Result<u32, NetworkError> {
    let mut whole = begin();
    elements
        .iter()
        .for_each(|message| whole.elements(name, message));
    match whole.commit(socket) {
        Err(error) if error.is(Errno::EMSGSIZE) => {}
        result => return result.map(|()| 1),
    }
    let mut transactions = 0;
    let mut piece = begin();
    for message in elements {
        if piece.is_full() {
            piece.commit(socket)?;
            transactions += 1;
            piece = Transaction::begin(generation.map(|before| before.after(transactions)));
        }
        piece.elements(name, message);
    }
    piece.commit(socket)?;
    Ok(transactions + 1)
}

/// Converts errors that indicate a missing kernel feature into [`NetworkError::Feature`].
fn explained(error: NetworkError) -> NetworkError {
    match error {
        NetworkError::Kernel {
            // ENOENT means that the kernel lacks the chain type or the expression. The table can't
            // be missing, because the same transaction creates the table.
            errno: Errno::EPROTONOSUPPORT | Errno::EOPNOTSUPP | Errno::EINVAL | Errno::ENOENT,
            action,
            detail,
        } => NetworkError::Feature {
            action,
            detail,
            feature: "nf_tables with NAT and masquerading for the inet family \
                      (CONFIG_NF_TABLES_INET, CONFIG_NFT_NAT, CONFIG_NFT_MASQ, CONFIG_NFT_CT, \
                      CONFIG_NFT_FIB_INET)",
        },
        other => other,
    }
}
