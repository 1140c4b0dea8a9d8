//! The embedded network's own nftables table, over nf_tables' netlink. See nft(8) and the
//! kernel's `linux/netfilter/nf_tables.h`.
//!
//! ```text
//! table inet rrun0 {
//!     chain postrouting {
//!         type nat hook postrouting priority srcnat; policy accept;
//!         meta nfproto ipv4 ip saddr 10.88.0.0/16 ip daddr != 10.88.0.0/16 oifname != "rrun0"
//!             ip daddr != 224.0.0.0/4 masquerade fully-random
//!     }
//! }
//! ```
//!
//! The table is replaced as a whole in one transaction: no packet sees half of it, and nothing of
//! anybody else's is ever named.

use nix::errno::Errno;

use super::NetworkError;
use super::address::Ipv4Range;
use super::netlink::{Batch, Body, NLM_F_ACK, NLM_F_APPEND, NLM_F_CREATE, Socket};

const NFNL_SUBSYS_NFTABLES: u16 = 10;
const NFNL_MSG_BATCH_BEGIN: u16 = 0x10;
const NFNL_MSG_BATCH_END: u16 = 0x11;

const NFT_MSG_NEWTABLE: u16 = 0;
const NFT_MSG_DELTABLE: u16 = 2;
const NFT_MSG_NEWCHAIN: u16 = 3;
const NFT_MSG_GETCHAIN: u16 = 4;
const NFT_MSG_NEWRULE: u16 = 6;
const NFT_MSG_GETRULE: u16 = 7;
const NFT_MSG_GETGEN: u16 = 16;

const NFPROTO_UNSPEC: u8 = 0;
const NFPROTO_INET: u8 = 1;
const NFPROTO_IPV4: u8 = 2;

const NFTA_TABLE_NAME: u16 = 1;

const NFTA_CHAIN_TABLE: u16 = 1;
const NFTA_CHAIN_NAME: u16 = 3;
const NFTA_CHAIN_HOOK: u16 = 4;
const NFTA_CHAIN_POLICY: u16 = 5;
const NFTA_CHAIN_TYPE: u16 = 7;
const NFTA_HOOK_HOOKNUM: u16 = 1;
const NFTA_HOOK_PRIORITY: u16 = 2;
const NF_INET_POST_ROUTING: u32 = 4;
/// The priority that nft calls `srcnat`.
const NF_IP_PRI_NAT_SRC: u32 = 100;
const NF_ACCEPT: u32 = 1;

const NFTA_RULE_TABLE: u16 = 1;
const NFTA_RULE_CHAIN: u16 = 2;
const NFTA_RULE_EXPRESSIONS: u16 = 4;
const NFTA_LIST_ELEM: u16 = 1;
const NFTA_EXPR_NAME: u16 = 1;
const NFTA_EXPR_DATA: u16 = 2;
const NFTA_DATA_VALUE: u16 = 1;

const NFTA_META_DREG: u16 = 1;
const NFTA_META_KEY: u16 = 2;
const NFT_META_OIFNAME: u32 = 7;
const NFT_META_NFPROTO: u32 = 15;

const NFTA_PAYLOAD_DREG: u16 = 1;
const NFTA_PAYLOAD_BASE: u16 = 2;
const NFTA_PAYLOAD_OFFSET: u16 = 3;
const NFTA_PAYLOAD_LEN: u16 = 4;
const NFT_PAYLOAD_NETWORK_HEADER: u32 = 1;

const NFTA_BITWISE_SREG: u16 = 1;
const NFTA_BITWISE_DREG: u16 = 2;
const NFTA_BITWISE_LEN: u16 = 3;
const NFTA_BITWISE_MASK: u16 = 4;
const NFTA_BITWISE_XOR: u16 = 5;

const NFTA_CMP_SREG: u16 = 1;
const NFTA_CMP_OP: u16 = 2;
const NFTA_CMP_DATA: u16 = 3;
const NFT_CMP_EQ: u32 = 0;
const NFT_CMP_NEQ: u32 = 1;

const NFTA_MASQ_FLAGS: u16 = 1;
const NF_NAT_RANGE_PROTO_RANDOM_FULLY: u32 = 1 << 4;

const NFTA_GEN_ID: u16 = 1;

/// The one register that the rules need.
const REGISTER: u32 = 1;
/// IFNAMSIZ: interface names are compared with their padding.
const INTERFACE_NAME_BYTES: usize = 16;
const IPV4_SOURCE_OFFSET: u32 = 12;
const IPV4_DESTINATION_OFFSET: u32 = 16;

const POSTROUTING: &str = "postrouting";

/// What the table is made from.
pub(super) struct Table<'a> {
    /// Its name, and that of the bridge.
    pub name: &'a str,
    pub range: Ipv4Range,
    pub masquerade: bool,
}

/// A number that changes with every change of any table of this network namespace.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(super) struct Generation(u32);

/// The generation of the rules now.
pub(super) fn generation(socket: &mut Socket) -> Result<Generation, NetworkError> {
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

/// Whether the table has all that it is made of.
pub(super) fn is_there(socket: &mut Socket, table: &Table) -> Result<bool, NetworkError> {
    let mut chain = Batch::default();
    let action = format!("look for the nftables table {}", table.name);
    chain.message(&action, subsystem(NFT_MSG_GETCHAIN), NLM_F_ACK, |body| {
        body.header(&family(NFPROTO_INET));
        body.string(NFTA_CHAIN_TABLE, table.name);
        body.string(NFTA_CHAIN_NAME, POSTROUTING);
    });
    match socket.execute(&chain) {
        Ok(_) => {}
        Err(error) if error.is(Errno::ENOENT) => return Ok(false),
        Err(error) => return Err(error),
    }
    let mut rules = Batch::default();
    let flags = super::netlink::NLM_F_DUMP;
    rules.message(action, subsystem(NFT_MSG_GETRULE), flags, |body| {
        body.header(&family(NFPROTO_INET));
        body.string(NFTA_RULE_TABLE, table.name);
        body.string(NFTA_RULE_CHAIN, POSTROUTING);
    });
    let wanted = usize::from(table.masquerade);
    Ok(socket.execute(&rules)?.len() == wanted)
}

/// Makes the table, or makes it anew.
pub(super) fn replace(socket: &mut Socket, table: &Table) -> Result<(), NetworkError> {
    let name = table.name;
    let mut transaction = Transaction::begin();
    // Deleting fails if there is nothing to delete: so it is made first.
    let make = format!("create the nftables table {name}");
    let table_name = |body: &mut Body| body.string(NFTA_TABLE_NAME, name);
    transaction.message(&make, NFT_MSG_NEWTABLE, NLM_F_CREATE, table_name);
    let delete = format!("replace the nftables table {name}");
    transaction.message(&delete, NFT_MSG_DELTABLE, 0, table_name);
    transaction.message(&make, NFT_MSG_NEWTABLE, NLM_F_CREATE, table_name);
    let action = format!("create the chain {POSTROUTING} of the nftables table {name}");
    transaction.message(&action, NFT_MSG_NEWCHAIN, NLM_F_CREATE, |body| {
        body.string(NFTA_CHAIN_TABLE, name);
        body.string(NFTA_CHAIN_NAME, POSTROUTING);
        body.nest(NFTA_CHAIN_HOOK, |hook| {
            hook.be32(NFTA_HOOK_HOOKNUM, NF_INET_POST_ROUTING);
            hook.be32(NFTA_HOOK_PRIORITY, NF_IP_PRI_NAT_SRC);
        });
        body.be32(NFTA_CHAIN_POLICY, NF_ACCEPT);
        body.string(NFTA_CHAIN_TYPE, "nat");
    });
    if table.masquerade {
        let action = format!("add the masquerade rule to the nftables table {name}");
        let flags = NLM_F_CREATE | NLM_F_APPEND;
        transaction.message(&action, NFT_MSG_NEWRULE, flags, |body| {
            body.string(NFTA_RULE_TABLE, name);
            body.string(NFTA_RULE_CHAIN, POSTROUTING);
            body.nest(NFTA_RULE_EXPRESSIONS, |rule| masquerade(rule, table));
        });
    }
    transaction.commit(socket).map_err(explained)
}

fn masquerade(rule: &mut Body, table: &Table) {
    let (network, mask) = (table.range.network().octets(), table.range.mask().octets());
    let mut bridge = [0; INTERFACE_NAME_BYTES];
    for (to, from) in bridge.iter_mut().zip(table.name.bytes()) {
        *to = from;
    }
    meta(rule, NFT_META_NFPROTO);
    compare(rule, NFT_CMP_EQ, &[NFPROTO_IPV4]);
    ipv4_address(rule, IPV4_SOURCE_OFFSET, mask);
    compare(rule, NFT_CMP_EQ, &network);
    ipv4_address(rule, IPV4_DESTINATION_OFFSET, mask);
    compare(rule, NFT_CMP_NEQ, &network);
    meta(rule, NFT_META_OIFNAME);
    compare(rule, NFT_CMP_NEQ, &bridge);
    // Multicast has no answers that would need the way back.
    ipv4_address(rule, IPV4_DESTINATION_OFFSET, [240, 0, 0, 0]);
    compare(rule, NFT_CMP_NEQ, &[224, 0, 0, 0]);
    // Two connections that begin at once from the same port of two pods would otherwise race for
    // the same port of the node.
    expression(rule, "masq", |data| {
        data.be32(NFTA_MASQ_FLAGS, NF_NAT_RANGE_PROTO_RANDOM_FULLY);
    });
}

fn meta(rule: &mut Body, key: u32) {
    expression(rule, "meta", |data| {
        data.be32(NFTA_META_DREG, REGISTER);
        data.be32(NFTA_META_KEY, key);
    });
}

fn compare(rule: &mut Body, operator: u32, value: &[u8]) {
    expression(rule, "cmp", |data| {
        data.be32(NFTA_CMP_SREG, REGISTER);
        data.be32(NFTA_CMP_OP, operator);
        data.nest(NFTA_CMP_DATA, |inside| inside.bytes(NFTA_DATA_VALUE, value));
    });
}

/// Loads the IPv4 address at `offset` of the header, masked.
fn ipv4_address(rule: &mut Body, offset: u32, mask: [u8; 4]) {
    expression(rule, "payload", |data| {
        data.be32(NFTA_PAYLOAD_DREG, REGISTER);
        data.be32(NFTA_PAYLOAD_BASE, NFT_PAYLOAD_NETWORK_HEADER);
        data.be32(NFTA_PAYLOAD_OFFSET, offset);
        data.be32(NFTA_PAYLOAD_LEN, 4);
    });
    expression(rule, "bitwise", |data| {
        data.be32(NFTA_BITWISE_SREG, REGISTER);
        data.be32(NFTA_BITWISE_DREG, REGISTER);
        data.be32(NFTA_BITWISE_LEN, 4);
        data.nest(NFTA_BITWISE_MASK, |inside| {
            inside.bytes(NFTA_DATA_VALUE, &mask)
        });
        data.nest(NFTA_BITWISE_XOR, |inside| {
            inside.bytes(NFTA_DATA_VALUE, &[0; 4])
        });
    });
}

fn expression(rule: &mut Body, name: &str, data: impl FnOnce(&mut Body)) {
    rule.nest(NFTA_LIST_ELEM, |element| {
        element.string(NFTA_EXPR_NAME, name);
        element.nest(NFTA_EXPR_DATA, data);
    });
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
                      (CONFIG_NF_TABLES_INET, CONFIG_NFT_NAT, CONFIG_NFT_MASQ)",
        },
        other => other,
    }
}
