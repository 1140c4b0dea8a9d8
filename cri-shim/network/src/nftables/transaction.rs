//! Transactions of nf_tables. The kernel executes all messages of a transaction or none of them.

use super::expression::Rule;
use super::sets::{self, Operation, Set};
use super::{Generation, Hook, TableFamily};
use crate::error::NetworkError;
use crate::netlink::{Batch, Body, NLM_F_APPEND, NLM_F_CREATE, Socket};

pub(super) const NFNL_SUBSYS_NFTABLES: u16 = 10;
const NFNL_MSG_BATCH_BEGIN: u16 = 0x10;
const NFNL_MSG_BATCH_END: u16 = 0x11;
const NFNL_BATCH_GENID: u16 = 1;

/// The numbers of the message types.
pub(super) mod message {
    use super::NFNL_SUBSYS_NFTABLES;

    const fn of_subsystem(message: u16) -> u16 {
        NFNL_SUBSYS_NFTABLES << 8 | message
    }

    pub(in crate::nftables) const NEWTABLE: u16 = of_subsystem(0);
    pub(in crate::nftables) const DELTABLE: u16 = of_subsystem(2);
    pub(in crate::nftables) const NEWCHAIN: u16 = of_subsystem(3);
    pub(in crate::nftables) const NEWRULE: u16 = of_subsystem(6);
    pub(in crate::nftables) const GETRULE: u16 = of_subsystem(7);
    pub(in crate::nftables) const NEWSET: u16 = of_subsystem(9);
    pub(in crate::nftables) const NEWSETELEM: u16 = of_subsystem(12);
    pub(in crate::nftables) const GETSETELEM: u16 = of_subsystem(13);
    pub(in crate::nftables) const DELSETELEM: u16 = of_subsystem(14);
    pub(in crate::nftables) const NEWGEN: u16 = of_subsystem(15);
    pub(in crate::nftables) const GETGEN: u16 = of_subsystem(16);
}

/// The attribute with the name of the table. In the messages about tables, chains, rules, sets and
/// elements, this attribute has the same number.
pub(super) const TABLE: u16 = 1;

/// The attribute with the entries of a list of elements. In the messages about elements, this
/// attribute contains the elements.
pub(super) const ENTRIES: u16 = 3;

/// The numbers of further attributes.
pub(super) mod attribute {
    pub(in crate::nftables) const GEN_ID: u16 = 1;
    pub(in crate::nftables) const GEN_PROC_PID: u16 = 2;
    pub(in crate::nftables) const GEN_PROC_NAME: u16 = 3;
    pub(in crate::nftables) const ELEMENTS_SET: u16 = 2;
}

const NFTA_CHAIN_NAME: u16 = 3;
const NFTA_CHAIN_HOOK: u16 = 4;
const NFTA_CHAIN_POLICY: u16 = 5;
const NFTA_CHAIN_TYPE: u16 = 7;
const NFTA_HOOK_HOOKNUM: u16 = 1;
const NFTA_HOOK_PRIORITY: u16 = 2;
const NF_ACCEPT: u32 = 1;

const NFTA_RULE_CHAIN: u16 = 2;
const NFTA_RULE_EXPRESSIONS: u16 = 4;

const NFTA_SET_NAME: u16 = 2;
const NFTA_SET_FLAGS: u16 = 3;
const NFTA_SET_KEY_TYPE: u16 = 4;
const NFTA_SET_KEY_LEN: u16 = 5;
const NFTA_SET_DATA_TYPE: u16 = 6;
const NFTA_SET_DATA_LEN: u16 = 7;
const NFTA_SET_ID: u16 = 10;
const NFTA_SET_USERDATA: u16 = 13;
const NFT_SET_MAP: u32 = 8;

/// The user data of a set whose keys are names of interfaces. The kernel ignores the user data. The
/// program nft(8) needs it to print the names. The user data consists of the type
/// NFTNL_UDATA_SET_KEYBYTEORDER, the length of the value, and the value BYTEORDER_HOST_ENDIAN.
const KEYS_IN_HOST_ORDER: [u8; 6] = {
    let [a, b, c, d] = 1_u32.to_ne_bytes();
    [0, 4, a, b, c, d]
};

/// The number of bytes after which [`Transaction::is_full`] returns true. A transaction of this size
/// with one more message is smaller than the default size of a socket's send buffer.
const PIECE_BYTES: usize = 64 << 10;

impl TableFamily {
    /// Returns a `struct nfgenmsg`, which is the fixed header of an nf_tables message.
    pub(super) fn header(self) -> [u8; 4] {
        let family = match self {
            TableFamily::Inet => 1,
            TableFamily::Bridge => 7,
        };
        [family, 0, 0, 0]
    }
}

/// A list of messages that nf_tables executes atomically.
pub(super) struct Transaction(Batch);

impl Transaction {
    /// Begins a transaction. If the generation of the nftables tables is not `generation`, the
    /// kernel refuses the transaction with the error ERESTART.
    pub(super) fn begin(generation: Option<Generation>) -> Self {
        let mut batch = Batch::default();
        let action = "begin an nftables transaction";
        batch.message(action, NFNL_MSG_BATCH_BEGIN, 0, |body| {
            body.header(&border());
            if let Some(Generation(id)) = generation {
                body.be32(NFNL_BATCH_GENID, id);
            }
        });
        Transaction(batch)
    }

    fn message(
        &mut self,
        family: TableFamily,
        action: String,
        kind: u16,
        flags: u16,
        body: impl FnOnce(&mut Body),
    ) {
        self.0.message(action, kind, flags, |message| {
            message.header(&family.header());
            body(message);
        });
    }

    pub(super) fn table(&mut self, family: TableFamily, table: &str) {
        let action = format!("create the nftables table {table}");
        self.message(family, action, message::NEWTABLE, NLM_F_CREATE, |body| {
            body.string(TABLE, table);
        });
    }

    /// Adds messages that delete the table, if it exists.
    pub(super) fn delete_table(&mut self, family: TableFamily, table: &str) {
        // The table is created before the deletion. Without the table, the deletion would fail.
        self.table(family, table);
        let action = format!("delete the nftables table {table}");
        self.message(family, action, message::DELTABLE, 0, |body| {
            body.string(TABLE, table);
        });
    }

    /// Adds a message that creates a set or a map.
    pub(super) fn set(&mut self, table: &str, set: Set) {
        let name = set.name();
        let action = format!("create the set {name} of the nftables table {table}");
        self.message(
            set.family(),
            action,
            message::NEWSET,
            NLM_F_CREATE,
            |body| {
                let (key, data) = set.types();
                body.string(TABLE, table);
                body.string(NFTA_SET_NAME, name);
                let flags = if data.is_some() { NFT_SET_MAP } else { 0 };
                body.be32(NFTA_SET_FLAGS, flags);
                body.be32(NFTA_SET_KEY_TYPE, key.number);
                body.be32(NFTA_SET_KEY_LEN, key.bytes);
                if let Some(data) = data {
                    body.be32(NFTA_SET_DATA_TYPE, data.number);
                    body.be32(NFTA_SET_DATA_LEN, data.bytes);
                }
                body.be32(NFTA_SET_ID, set.id());
                if set == Set::Ports {
                    body.bytes(NFTA_SET_USERDATA, &KEYS_IN_HOST_ORDER);
                }
            },
        );
    }

    pub(super) fn chain(
        &mut self,
        family: TableFamily,
        table: &str,
        chain: &str,
        hook: Option<Hook>,
    ) {
        let action = format!("create the chain {chain} of the nftables table {table}");
        self.message(family, action, message::NEWCHAIN, NLM_F_CREATE, |body| {
            body.string(TABLE, table);
            body.string(NFTA_CHAIN_NAME, chain);
            let Some(hook) = hook else {
                return;
            };
            body.nest(NFTA_CHAIN_HOOK, |inside| {
                inside.be32(NFTA_HOOK_HOOKNUM, hook.number);
                inside.bytes(NFTA_HOOK_PRIORITY, &hook.priority.to_be_bytes());
            });
            body.be32(NFTA_CHAIN_POLICY, NF_ACCEPT);
            body.string(NFTA_CHAIN_TYPE, hook.kind);
        });
    }

    pub(super) fn rule(&mut self, family: TableFamily, table: &str, chain: &str, rule: &Rule) {
        let action = format!("add a rule to the chain {chain} of the nftables table {table}");
        let flags = NLM_F_CREATE | NLM_F_APPEND;
        self.message(family, action, message::NEWRULE, flags, |body| {
            body.string(TABLE, table);
            body.string(NFTA_RULE_CHAIN, chain);
            body.nest(NFTA_RULE_EXPRESSIONS, |list| rule.write(list));
        });
    }

    /// Adds messages that add or remove elements of a set.
    pub(super) fn elements(&mut self, table: &str, change: &sets::ElementList) {
        let set = change.set;
        let mut message = |kind, flags| {
            let action = format!(
                "change the set {} of the nftables table {table}",
                set.name()
            );
            self.message(set.family(), action, kind, flags, |body| {
                body.string(TABLE, table);
                body.string(attribute::ELEMENTS_SET, set.name());
                body.nest(ENTRIES, |list| change.write(list));
            });
        };
        message(message::NEWSETELEM, NLM_F_CREATE);
        if change.operation == Operation::Remove {
            message(message::DELSETELEM, 0);
        }
    }

    /// Returns whether a further message could make the transaction too large for a send buffer of
    /// the default size.
    pub(super) fn is_full(&self) -> bool {
        self.0.bytes() >= PIECE_BYTES
    }

    pub(super) fn commit(mut self, socket: &mut Socket) -> Result<(), NetworkError> {
        // The kernel answers the messages after it has committed the transaction. One acknowledgement
        // is enough, because the kernel also sends the errors of the other messages. If the kernel
        // sent many acknowledgements, they might not fit into the receive buffer.
        self.0.acknowledge_last();
        let action = "commit an nftables transaction";
        self.0
            .message(action, NFNL_MSG_BATCH_END, 0, |body| body.header(&border()));
        socket.execute_whole(&self.0)
    }
}

/// Returns the `struct nfgenmsg` of the messages that begin and end a transaction. This header
/// contains the number of the nftables subsystem.
const fn border() -> [u8; 4] {
    let [high, low] = NFNL_SUBSYS_NFTABLES.to_be_bytes();
    [0, 0, high, low]
}
