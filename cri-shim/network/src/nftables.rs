//! The embedded network's own nftables table, over nf_tables' netlink. See nft(8) and the
//! kernel's `linux/netfilter/nf_tables.h`.
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
//!         ip6 daddr ::1 return, where answers could not come back
//!         ip saddr 10.88.0.0/16 and host_ports4 has an entry (as below): ct mark set ct mark | 0x1000
//!         dnat ip to meta l4proto . ip daddr . th dport map @host_ports4
//!         dnat ip to meta l4proto . 0.0.0.0 . th dport map @host_ports4
//!         the same for ip6
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
//!         the same for ip6
//!     }
//! }
//! ```
//!
//! A pod that calls a host port of its own, or of another pod of this node, is masqueraded so that
//! the answer comes back by the node and not straight over the bridge. The mark of its connection
//! distinguishes it from what others translate, kube-proxy for a Service with the same port: their
//! business. A process of the node that calls 127.0.0.1 or ::1 is masqueraded, because these
//! addresses have no meaning in the pod; for it the bridge routes local addresses (route_localnet,
//! and for ::1 a local route of the bridge's), and `guard` keeps pods from using that to reach what
//! listens at the node's 127.0.0.1 only; what they send to ::1 the kernel drops.
//!
//! Host ports come and go as elements of the maps. The table itself is replaced as a whole in one
//! transaction: no packet sees half of it, and nothing of anybody else's is ever named.

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
/// The priorities that nft calls `raw`, `dstnat` and `srcnat`.
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

/// How many elements go into one message: the length of an attribute has 16 bits.
const ELEMENTS_AT_ONCE: usize = 256;

const GUARD: &str = "guard";
const HOST_PORTS: &str = "host_ports";
const PREROUTING: &str = "prerouting";
const OUTPUT: &str = "output";
const POSTROUTING: &str = "postrouting";

/// Where the kernel calls a chain: the chain's type, the hook's number, its priority.
type Hook = (&'static str, u32, i32);

/// All chains. One without a hook is only reached by a jump.
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

/// What the table is made from.
pub(crate) struct NftTable<'a> {
    /// Its name, and that of the bridge.
    pub name: &'a str,
    /// The ranges that pods have addresses of.
    pub ranges: Vec<Range>,
    pub masquerade: bool,
    /// Whether host ports are at ::1 too.
    pub loopback6: bool,
    /// All host ports.
    pub mappings: Vec<Mapping>,
}

/// A number that changes with every change of any table of this network namespace.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) struct Generation(u32);

impl Generation {
    /// Whether there was one change in between.
    pub(crate) fn follows(self, before: Generation) -> bool {
        self.0 == before.0.wrapping_add(1)
    }
}

/// The generation of the rules now.
pub(crate) fn generation(socket: &mut Socket) -> Result<Generation, NetworkError> {
    let mut batch = Batch::default();
    let kind = subsystem(NFT_MSG_GETGEN);
    batch.message("read the generation of nftables", kind, NLM_F_ACK, |body| {
        body.header(&family(NFPROTO_UNSPEC));
    });
    let replies = socket.execute(&batch).map_err(explained)?;
    let id = replies
        .iter()
        .find_map(|reply| reply.attributes(4).array(NFTA_GEN_ID));
    Ok(Generation(u32::from_be_bytes(id.unwrap_or_default())))
}

impl NftTable<'_> {
    /// Those that pods have.
    fn families(&self) -> Vec<IpFamily> {
        let mut families = vec![IpFamily::V4, IpFamily::V6];
        families.retain(|family| {
            let mut ranges = self.ranges.iter();
            ranges.any(|range| IpFamily::of(range.network()) == *family)
        });
        families
    }

    /// Every rule, with its chain.
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
            rules.push((chain, Rule::local_goes_to(HOST_PORTS)));
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

/// Whether the table has all that it is made of.
pub(crate) fn is_there(socket: &mut Socket, table: &NftTable) -> Result<bool, NetworkError> {
    let action = format!("look for the nftables table {}", table.name);
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
        let wanted = table.mappings.iter().filter(|one| of.has(one)).count();
        if found != wanted {
            return Ok(false);
        }
    }
    Ok(true)
}

/// Makes the table, or makes it anew.
pub(crate) fn replace(socket: &mut Socket, table: &NftTable) -> Result<(), NetworkError> {
    let name = table.name;
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
    let families = table.families();
    let mut mappings = table.mappings.clone();
    mappings.retain(|one| families.iter().any(|family| family.has(one)));
    transaction.elements(name, NFT_MSG_NEWSETELEM, &mappings);
    transaction.commit(socket).map_err(explained)
}

/// Adds entries to the maps; those that are there may stay.
pub(crate) fn publish(
    socket: &mut Socket,
    name: &str,
    mappings: &[Mapping],
) -> Result<(), NetworkError> {
    let mut transaction = Transaction::begin();
    transaction.elements(name, NFT_MSG_NEWSETELEM, mappings);
    transaction.commit(socket)
}

/// Takes entries out of the maps, all or, if one is not there, none.
pub(crate) fn withdraw(
    socket: &mut Socket,
    name: &str,
    mappings: &[Mapping],
) -> Result<(), NetworkError> {
    let mut transaction = Transaction::begin();
    transaction.elements(name, NFT_MSG_DELSETELEM, mappings);
    transaction.commit(socket)
}

/// Messages that nf_tables carries out all or not at all.
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
        let (kind, flags) = (subsystem(kind), flags | NLM_F_ACK);
        self.0.message(action, kind, flags, |message| {
            message.header(&family(NFPROTO_INET));
            body(message);
        });
    }

    /// Makes the table, with nothing in it.
    fn empty_table(&mut self, table: &str) {
        // Deleting fails if there is nothing to delete: so it is made first.
        let make = format!("create the nftables table {table}");
        let name = |body: &mut Body| body.string(NFTA_TABLE_NAME, table);
        self.message(&make, NFT_MSG_NEWTABLE, NLM_F_CREATE, name);
        let delete = format!("replace the nftables table {table}");
        self.message(&delete, NFT_MSG_DELTABLE, 0, name);
        self.message(&make, NFT_MSG_NEWTABLE, NLM_F_CREATE, name);
    }

    /// Adds the map of a family's host ports.
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
        let action = format!("add a rule to {chain} of the nftables table {table}");
        let flags = NLM_F_CREATE | NLM_F_APPEND;
        self.message(&action, NFT_MSG_NEWRULE, flags, |body| {
            body.string(NFTA_RULE_TABLE, table);
            body.string(NFTA_RULE_CHAIN, chain);
            body.nest(NFTA_RULE_EXPRESSIONS, |list| rule.write(list));
        });
    }

    /// Adds or deletes elements of the maps.
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
        let action = "commit an nftables transaction";
        self.0
            .message(action, NFNL_MSG_BATCH_END, 0, |body| body.header(&border()));
        socket.execute(&self.0).map(drop)
    }
}

const fn subsystem(message: u16) -> u16 {
    NFNL_SUBSYS_NFTABLES << 8 | message
}

/// A `struct nfgenmsg`.
const fn family(family: u8) -> [u8; 4] {
    [family, 0, 0, 0]
}

/// The `struct nfgenmsg` at a transaction's begin and end: it names the subsystem.
const fn border() -> [u8; 4] {
    let [high, low] = NFNL_SUBSYS_NFTABLES.to_be_bytes();
    [NFPROTO_UNSPEC, 0, high, low]
}

/// Tells a kernel that lacks something from other failures.
fn explained(error: NetworkError) -> NetworkError {
    match error {
        NetworkError::Kernel {
            // ENOENT: of the chain type or the expression, the table being made just before.
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
