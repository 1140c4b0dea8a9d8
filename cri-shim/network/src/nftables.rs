//! The embedded network's nftables table, which is configured over the netlink protocol of
//! nf_tables. See nft(8) and the kernel's `linux/netfilter/nf_tables.h`. In the syntax of nft(8),
//! the table is:
//!
//! ```text
//! table inet rrun0 {
//!     map host_ports4 { type inet_proto . ipv4_addr . inet_service : ipv4_addr . inet_service }
//!     map host_ports6 { type inet_proto . ipv6_addr . inet_service : ipv6_addr . inet_service }
//!     chain guard {
//!         type filter hook prerouting priority raw;
//!         iifname "rrun0" ip daddr 127.0.0.0/8 drop
//!     }
//!     chain host_ports {
//!         ip6 daddr ::1 return   (only if the kernel would drop replies to ::1)
//!         ip saddr 10.88.0.0/16 (and an entry in host_ports4) ct mark set ct mark | 0x1000
//!         dnat ip to meta l4proto . ip daddr . th dport map @host_ports4
//!         dnat ip to meta l4proto . 0.0.0.0 . th dport map @host_ports4
//!         (and the same rules for ip6)
//!     }
//!     chain prerouting {
//!         type nat hook prerouting priority dstnat;
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
//! 127.0.0.1 of the node. The kernel itself drops the packets that pods send to ::1.
//!
//! To open or close a host port, rrun adds or removes elements of the maps. To change the rules,
//! rrun replaces the whole table in one transaction. Every packet is therefore processed by either
//! the old or the new table. The transaction changes no other table.

mod expression;

use nix::errno::Errno;

use crate::address::Range;
use crate::error::NetworkError;
use crate::host_ports::Mapping;
use expression::{IpFamily, Rule};

use crate::netlink::{Batch, Body, NLM_F_ACK, NLM_F_APPEND, NLM_F_CREATE, NLM_F_DUMP, Socket};

const NFNL_SUBSYS_NFTABLES: u16 = 10;
const NFNL_MSG_BATCH_BEGIN: u16 = 0x10;
const NFNL_MSG_BATCH_END: u16 = 0x11;

const NFT_MSG_NEWTABLE: u16 = 0;
const NFT_MSG_DELTABLE: u16 = 2;
const NFT_MSG_NEWCHAIN: u16 = 3;
const NFT_MSG_NEWRULE: u16 = 6;
const NFT_MSG_GETRULE: u16 = 7;
const NFT_MSG_NEWSET: u16 = 9;
const NFT_MSG_NEWSETELEM: u16 = 12;
const NFT_MSG_GETSETELEM: u16 = 13;
const NFT_MSG_DELSETELEM: u16 = 14;
const NFT_MSG_GETGEN: u16 = 16;

const NFPROTO_UNSPEC: u8 = 0;
const NFPROTO_INET: u8 = 1;

const NFTA_TABLE_NAME: u16 = 1;

const NFTA_CHAIN_TABLE: u16 = 1;
const NFTA_CHAIN_NAME: u16 = 3;
const NFTA_CHAIN_HOOK: u16 = 4;
const NFTA_CHAIN_POLICY: u16 = 5;
const NFTA_CHAIN_TYPE: u16 = 7;
const NFTA_HOOK_HOOKNUM: u16 = 1;
const NFTA_HOOK_PRIORITY: u16 = 2;
const NF_INET_PRE_ROUTING: u32 = 0;
const NF_INET_LOCAL_OUT: u32 = 3;
const NF_INET_POST_ROUTING: u32 = 4;
/// The chain priorities with the names `raw`, `dstnat` and `srcnat` in nft(8).
const NF_IP_PRI_RAW: i32 = -300;
const NF_IP_PRI_NAT_DST: i32 = -100;
const NF_IP_PRI_NAT_SRC: i32 = 100;
const NF_ACCEPT: u32 = 1;

const NFTA_RULE_TABLE: u16 = 1;
const NFTA_RULE_CHAIN: u16 = 2;
const NFTA_RULE_EXPRESSIONS: u16 = 4;
const NFTA_GEN_ID: u16 = 1;

const NFTA_SET_TABLE: u16 = 1;
const NFTA_SET_NAME: u16 = 2;
const NFTA_SET_FLAGS: u16 = 3;
const NFTA_SET_KEY_TYPE: u16 = 4;
const NFTA_SET_KEY_LEN: u16 = 5;
const NFTA_SET_DATA_TYPE: u16 = 6;
const NFTA_SET_DATA_LEN: u16 = 7;
const NFTA_SET_ID: u16 = 10;
const NFT_SET_MAP: u32 = 8;

const NFTA_SET_ELEM_LIST_TABLE: u16 = 1;
const NFTA_SET_ELEM_LIST_SET: u16 = 2;
const NFTA_SET_ELEM_LIST_ELEMENTS: u16 = 3;
const NFTA_SET_ELEM_KEY: u16 = 1;
const NFTA_SET_ELEM_DATA: u16 = 2;

/// The maximum number of elements in one message. An attribute with more elements could be too
/// long, because netlink stores the length of an attribute in 16 bits.
const ELEMENTS_AT_ONCE: usize = 256;

/// The number of elements in one transaction if the socket's send buffer is too small for a
/// transaction with all elements.
const ELEMENTS_OF_A_PIECE: usize = 1024;

const GUARD: &str = "guard";
const HOST_PORTS: &str = "host_ports";
const PREROUTING: &str = "prerouting";
const OUTPUT: &str = "output";
const POSTROUTING: &str = "postrouting";

/// The hook at which the kernel runs a chain. The tuple contains the chain's type, the number of
/// the hook, and the priority.
type Hook = (&'static str, u32, i32);

/// All chains of the table. A chain without a hook runs only when a rule jumps to it.
const CHAINS: [(&str, Option<Hook>); 5] = [
    (GUARD, Some(("filter", NF_INET_PRE_ROUTING, NF_IP_PRI_RAW))),
    (HOST_PORTS, None),
    (
        PREROUTING,
        Some(("nat", NF_INET_PRE_ROUTING, NF_IP_PRI_NAT_DST)),
    ),
    (OUTPUT, Some(("nat", NF_INET_LOCAL_OUT, NF_IP_PRI_NAT_DST))),
    (
        POSTROUTING,
        Some(("nat", NF_INET_POST_ROUTING, NF_IP_PRI_NAT_SRC)),
    ),
];

/// The data from which the nftables table is created.
pub(crate) struct NftTable<'a> {
    /// The name of the table, which is also the name of the bridge.
    pub name: &'a str,
    /// The ranges that contain the addresses of pods.
    pub ranges: Vec<Range>,
    pub masquerade: bool,
    /// True if host ports are also open at ::1.
    pub loopback6: bool,
    /// The entries of the table's maps, which contain the host ports of all pods.
    pub mappings: Vec<Mapping>,
}

/// A number that the kernel increments whenever any nftables table of this network namespace
/// changes.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) struct Generation(u32);

impl Generation {
    /// Returns whether the nftables tables were changed exactly once since the generation `before`.
    pub(crate) fn follows(self, before: Generation) -> bool {
        self.0 == before.0.wrapping_add(1)
    }
}

/// Reads the current generation of the nftables tables from the kernel.
pub(crate) fn generation(socket: &mut Socket) -> Result<Generation, NetworkError> {
    let mut batch = Batch::default();
    let kind = subsystem(NFT_MSG_GETGEN);
    let action = "read the generation number of the nftables tables";
    batch.message(action, kind, NLM_F_ACK, |body| {
        body.header(&family(NFPROTO_UNSPEC));
    });
    let replies = socket.execute(&batch).map_err(explained)?;
    let id = replies
        .iter()
        .find_map(|reply| reply.attributes(4).array(NFTA_GEN_ID));
    Ok(Generation(u32::from_be_bytes(id.unwrap_or_default())))
}

impl NftTable<'_> {
    /// Returns the address families in which pods have addresses.
    fn families(&self) -> Vec<IpFamily> {
        let mut families = vec![IpFamily::V4, IpFamily::V6];
        families.retain(|family| {
            let mut ranges = self.ranges.iter();
            ranges.any(|range| IpFamily::of(range.network()) == *family)
        });
        families
    }

    /// Returns all rules of the table, each with the name of its chain.
    fn rules(&self) -> Vec<(&'static str, Rule)> {
        let mut rules = vec![(GUARD, Rule::guard(self.name))];
        if !self.loopback6 {
            rules.push((HOST_PORTS, Rule::not_for_loopback6()));
        }
        for range in &self.ranges {
            rules.push((HOST_PORTS, Rule::mark_hairpin(*range, true)));
            rules.push((HOST_PORTS, Rule::mark_hairpin(*range, false)));
        }
        for family in self.families() {
            rules.push((HOST_PORTS, Rule::host_port(family, true)));
            rules.push((HOST_PORTS, Rule::host_port(family, false)));
        }
        for chain in [PREROUTING, OUTPUT] {
            rules.push((chain, Rule::jump_if_local(HOST_PORTS)));
        }
        for range in &self.ranges {
            if self.masquerade {
                rules.push((POSTROUTING, Rule::masquerade(self.name, *range)));
            }
            rules.push((POSTROUTING, Rule::hairpin(self.name, *range)));
        }
        for family in self.families() {
            rules.push((POSTROUTING, Rule::masquerade_loopback(self.name, family)));
        }
        rules
    }
}

/// Returns whether the table exists and has the expected numbers of rules and of map elements.
pub(crate) fn is_complete(socket: &mut Socket, table: &NftTable) -> Result<bool, NetworkError> {
    let action = format!("look up the nftables table {}", table.name);
    let count = |socket: &mut Socket, kind, body: &dyn Fn(&mut Body)| {
        let mut batch = Batch::default();
        batch.message(&action, subsystem(kind), NLM_F_DUMP, |message| {
            message.header(&family(NFPROTO_INET));
            body(message);
        });
        match socket.execute(&batch) {
            Err(error) if error.is(Errno::ENOENT) => Ok(Vec::new()),
            result => result,
        }
    };
    let rules = count(socket, NFT_MSG_GETRULE, &|body| {
        body.string(NFTA_RULE_TABLE, table.name);
    })?;
    if rules.len() != table.rules().len() {
        return Ok(false);
    }
    for of in table.families() {
        let elements = count(socket, NFT_MSG_GETSETELEM, &|body| {
            body.string(NFTA_SET_ELEM_LIST_TABLE, table.name);
            body.string(NFTA_SET_ELEM_LIST_SET, of.map());
        })?;
        let found: usize = elements
            .iter()
            .map(|reply| {
                reply
                    .attributes(4)
                    .nest(NFTA_SET_ELEM_LIST_ELEMENTS)
                    .count()
            })
            .sum();
        let expected = table.mappings.iter().filter(|one| of.has(one)).count();
        if found != expected {
            return Ok(false);
        }
    }
    Ok(true)
}

/// Creates the table, or replaces it if it exists.
pub(crate) fn replace(socket: &mut Socket, table: &NftTable) -> Result<(), NetworkError> {
    let name = table.name;
    let begin = || {
        let mut transaction = Transaction::begin();
        transaction.empty_table(name);
        for family in table.families() {
            transaction.map(name, family);
        }
        for (chain, hook) in CHAINS {
            transaction.chain(name, chain, hook);
        }
        for (chain, rule) in table.rules() {
            transaction.rule(name, chain, &rule);
        }
        transaction
    };
    let families = table.families();
    let mut mappings = table.mappings.clone();
    mappings.retain(|one| families.iter().any(|family| family.has(one)));
    commit(socket, name, NFT_MSG_NEWSETELEM, begin, &mappings).map_err(explained)
}

/// Adds `mappings` to the maps of the table `name`. A mapping that a map already contains is not an
/// error.
pub(crate) fn publish(
    socket: &mut Socket,
    name: &str,
    mappings: &[Mapping],
) -> Result<(), NetworkError> {
    commit(
        socket,
        name,
        NFT_MSG_NEWSETELEM,
        Transaction::begin,
        mappings,
    )
}

/// Removes `mappings` from the maps of the table `name`. If one of the mappings is missing in the
/// maps, this function fails and removes no mapping.
pub(crate) fn withdraw(
    socket: &mut Socket,
    name: &str,
    mappings: &[Mapping],
) -> Result<(), NetworkError> {
    commit(
        socket,
        name,
        NFT_MSG_DELSETELEM,
        Transaction::begin,
        mappings,
    )
}

/// Commits the transaction that `begin` returns, with messages of the type `kind` for the elements
/// `mappings`. If the socket's send buffer is too small for one transaction, the elements are sent
/// in several transactions. Packets can then be processed before the last transaction.
fn commit(
    socket: &mut Socket,
    name: &str,
    kind: u16,
    begin: impl Fn() -> Transaction,
    mappings: &[Mapping],
) -> Result<(), NetworkError> {
    let mut whole = begin();
    whole.elements(name, kind, mappings);
    match whole.commit(socket) {
        Err(error) if error.is(Errno::EMSGSIZE) => {}
        result => return result,
    }
    let mut piece = begin();
    for some in mappings.chunks(ELEMENTS_OF_A_PIECE) {
        piece.elements(name, kind, some);
        piece.commit(socket)?;
        piece = Transaction::begin();
    }
    Ok(())
}

/// A list of messages that nf_tables executes atomically.
struct Transaction(Batch);

impl Transaction {
    fn begin() -> Self {
        let mut batch = Batch::default();
        let action = "begin an nftables transaction";
        batch.message(action, NFNL_MSG_BATCH_BEGIN, 0, |body| {
            body.header(&border())
        });
        Transaction(batch)
    }

    fn message(&mut self, action: &str, kind: u16, flags: u16, body: impl FnOnce(&mut Body)) {
        self.0.message(action, subsystem(kind), flags, |message| {
            message.header(&family(NFPROTO_INET));
            body(message);
        });
    }

    /// Adds messages that delete the table, if it exists, and then create an empty table.
    fn empty_table(&mut self, table: &str) {
        // The table is created before the deletion. Without the table, the deletion would fail.
        let make = format!("create the nftables table {table}");
        let name = |body: &mut Body| body.string(NFTA_TABLE_NAME, table);
        self.message(&make, NFT_MSG_NEWTABLE, NLM_F_CREATE, name);
        let delete = format!("replace the nftables table {table}");
        self.message(&delete, NFT_MSG_DELTABLE, 0, name);
        self.message(&make, NFT_MSG_NEWTABLE, NLM_F_CREATE, name);
    }

    /// Adds a message that creates the map for the host ports of an address family.
    fn map(&mut self, table: &str, family: IpFamily) {
        let map = family.map();
        let action = format!("create the map {map} of the nftables table {table}");
        self.message(&action, NFT_MSG_NEWSET, NLM_F_CREATE, |body| {
            let (key, data) = family.types();
            body.string(NFTA_SET_TABLE, table);
            body.string(NFTA_SET_NAME, map);
            body.be32(NFTA_SET_FLAGS, NFT_SET_MAP);
            body.be32(NFTA_SET_KEY_TYPE, key.number);
            body.be32(NFTA_SET_KEY_LEN, key.bytes);
            body.be32(NFTA_SET_DATA_TYPE, data.number);
            body.be32(NFTA_SET_DATA_LEN, data.bytes);
            body.be32(NFTA_SET_ID, family.id());
        });
    }

    fn chain(&mut self, table: &str, chain: &str, hook: Option<Hook>) {
        let action = format!("create the chain {chain} of the nftables table {table}");
        self.message(&action, NFT_MSG_NEWCHAIN, NLM_F_CREATE, |body| {
            body.string(NFTA_CHAIN_TABLE, table);
            body.string(NFTA_CHAIN_NAME, chain);
            let Some((kind, hook, priority)) = hook else {
                return;
            };
            body.nest(NFTA_CHAIN_HOOK, |inside| {
                inside.be32(NFTA_HOOK_HOOKNUM, hook);
                inside.bytes(NFTA_HOOK_PRIORITY, &priority.to_be_bytes());
            });
            body.be32(NFTA_CHAIN_POLICY, NF_ACCEPT);
            body.string(NFTA_CHAIN_TYPE, kind);
        });
    }

    fn rule(&mut self, table: &str, chain: &str, rule: &Rule) {
        let action = format!("add a rule to the chain {chain} of the nftables table {table}");
        let flags = NLM_F_CREATE | NLM_F_APPEND;
        self.message(&action, NFT_MSG_NEWRULE, flags, |body| {
            body.string(NFTA_RULE_TABLE, table);
            body.string(NFTA_RULE_CHAIN, chain);
            body.nest(NFTA_RULE_EXPRESSIONS, |list| rule.write(list));
        });
    }

    /// Adds messages of the type `kind`, which add or delete elements of the maps.
    fn elements(&mut self, table: &str, kind: u16, mappings: &[Mapping]) {
        let flags = if kind == NFT_MSG_NEWSETELEM {
            NLM_F_CREATE
        } else {
            0
        };
        for of in [IpFamily::V4, IpFamily::V6] {
            let all: Vec<&Mapping> = mappings.iter().filter(|one| of.has(one)).collect();
            for some in all.chunks(ELEMENTS_AT_ONCE) {
                let action = format!("change the host ports of the nftables table {table}");
                self.message(&action, kind, flags, |body| {
                    body.string(NFTA_SET_ELEM_LIST_TABLE, table);
                    body.string(NFTA_SET_ELEM_LIST_SET, of.map());
                    body.nest(NFTA_SET_ELEM_LIST_ELEMENTS, |list| {
                        for mapping in some {
                            let (key, data) = expression::element(mapping);
                            list.nest(expression::NFTA_LIST_ELEM, |element| {
                                expression::value(element, NFTA_SET_ELEM_KEY, &key);
                                expression::value(element, NFTA_SET_ELEM_DATA, &data);
                            });
                        }
                    });
                });
            }
        }
    }

    fn commit(mut self, socket: &mut Socket) -> Result<(), NetworkError> {
        // The kernel answers the messages after it has committed the transaction. One
        // acknowledgement is enough, because the kernel also sends the errors of the other messages.
        // If the kernel sent many acknowledgements, they might not fit into the receive buffer.
        self.0.acknowledge_last();
        let action = "commit an nftables transaction";
        self.0
            .message(action, NFNL_MSG_BATCH_END, 0, |body| body.header(&border()));
        socket.execute_whole(&self.0)
    }
}

const fn subsystem(message: u16) -> u16 {
    NFNL_SUBSYS_NFTABLES << 8 | message
}

/// Returns a `struct nfgenmsg`, which is the fixed header of an nf_tables message.
const fn family(family: u8) -> [u8; 4] {
    [family, 0, 0, 0]
}

/// Returns the `struct nfgenmsg` of the messages that begin and end a transaction. This header
/// contains the number of the nftables subsystem.
const fn border() -> [u8; 4] {
    let [high, low] = NFNL_SUBSYS_NFTABLES.to_be_bytes();
    [NFPROTO_UNSPEC, 0, high, low]
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
