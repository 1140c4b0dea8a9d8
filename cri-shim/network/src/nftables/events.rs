//! Reports changes of the nftables tables by other programs. The kernel sends a message about each
//! change to the sockets in the multicast group NFNLGRP_NFTABLES. A program can delete all tables of
//! the node with `nft flush ruleset`. Some firewalls do this whenever their configuration changes.

use std::sync::Arc;
use std::sync::atomic::{AtomicU32, Ordering};

use tokio::io::unix::AsyncFd;

use super::Generation;
use super::transaction::{NFNL_SUBSYS_NFTABLES, TABLE, attribute, message};
use crate::error::NetworkError;
use crate::netlink::{Attributes, Event, Socket};

const NFNLGRP_NFTABLES: u32 = 7;

/// The size of the `struct nfgenmsg` that precedes the attributes.
const HEADER_BYTES: usize = 4;

/// A change of the nftables tables by another program.
#[derive(Clone, PartialEq, Eq, Debug)]
pub(crate) enum Change {
    /// A program changed a table of rrun, or events were lost. The text describes the program.
    Ours(String),
    /// A program changed only other tables. The value is the generation after the change.
    Others(Generation),
}

/// A watch of all nftables tables.
pub(crate) struct Watch {
    socket: AsyncFd<Socket>,
    /// The name of rrun's tables.
    name: String,
    /// The number of the socket with which rrun changes its tables, see [`Socket::port`].
    own: Arc<AtomicU32>,
}

impl Watch {
    /// Begins to watch the tables in the network namespace of the calling thread.
    pub(crate) fn open(name: String, own: Arc<AtomicU32>) -> Result<Watch, NetworkError> {
        let socket = Socket::netfilter_events(NFNLGRP_NFTABLES)?;
        // SAFETY: the AsyncFd owns the socket. Only the AsyncFd closes the socket's descriptor, and
        // it unregisters the descriptor before the close. `Socket` always returns this descriptor.
        let socket = unsafe { AsyncFd::register(socket) };
        let socket = socket.map_err(|error| NetworkError::Watch(error.into()))?;
        Ok(Watch { socket, name, own })
    }

    /// Waits for changes by other programs.
    pub(crate) async fn changed(&mut self) -> Result<Change, NetworkError> {
        loop {
            let ready = self.socket.readable_mut().await;
            let mut ready = ready.map_err(NetworkError::Watch)?;
            let mut changes = Changes::default();
            let error = ready.get_inner_mut().events(|event| {
                if event.by != self.own.load(Ordering::Relaxed) {
                    changes.add(&event, &self.name);
                }
            });
            match error.raw_os_error() {
                Some(libc::EAGAIN) => ready.clear_ready(),
                // The kernel had no space for further events.
                Some(libc::ENOBUFS) => changes.ours = true,
                _ => return Err(NetworkError::Watch(error)),
            }
            if let Some(change) = changes.summary() {
                return Ok(change);
            }
        }
    }
}

/// The events that were read together.
#[derive(Default)]
struct Changes {
    /// True if another program has changed a table of rrun, or if events were lost.
    ours: bool,
    by: Option<String>,
    generation: Option<Generation>,
}

impl Changes {
    fn add(&mut self, event: &Event, name: &str) {
        if event.kind >> 8 != NFNL_SUBSYS_NFTABLES {
            return;
        }
        let attributes = Attributes(event.body.get(HEADER_BYTES..).unwrap_or_default());
        if event.kind != message::NEWGEN {
            self.ours |= attributes.string(TABLE) == Some(name);
            return;
        }
        // This event is the last event of a transaction.
        let number = |kind| attributes.array(kind).map(u32::from_be_bytes);
        self.generation = number(attribute::GEN_ID).map(Generation);
        if self.ours && self.by.is_none() {
            let program = attributes.string(attribute::GEN_PROC_NAME);
            let process = number(attribute::GEN_PROC_PID).unwrap_or_default();
            self.by = program.map(|program| format!("{program:?} (process {process})"));
        }
    }

    fn summary(self) -> Option<Change> {
        if self.ours {
            let by = self.by.unwrap_or_else(|| "another program".to_owned());
            return Some(Change::Ours(by));
        }
        self.generation.map(Change::Others)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::netlink::Body;

    fn event(kind: u16, attributes: impl FnOnce(&mut Body)) -> (u16, Vec<u8>) {
        let mut body = vec![0; HEADER_BYTES];
        attributes(&mut Body(&mut body));
        (kind, body)
    }

    fn summary(events: &[(u16, Vec<u8>)]) -> Option<Change> {
        let mut changes = Changes::default();
        for (kind, body) in events {
            let (kind, by) = (*kind, 1);
            changes.add(&Event { kind, by, body }, "rrun0");
        }
        changes.summary()
    }

    #[test]
    fn only_changes_of_rruns_tables_are_reported_with_the_program() {
        let of_table = |name| event(message::DELTABLE, |body| body.string(TABLE, name));
        let end = || {
            event(message::NEWGEN, |body| {
                body.be32(attribute::GEN_ID, 7);
                body.be32(attribute::GEN_PROC_PID, 12);
                body.string(attribute::GEN_PROC_NAME, "nft");
            })
        };
        assert_eq!(summary(&[]), None);
        assert_eq!(summary(&[of_table("rrun01")]), None);
        assert_eq!(
            summary(&[of_table("filter"), end()]),
            Some(Change::Others(Generation(7)))
        );
        let by_nft = Some(Change::Ours("\"nft\" (process 12)".to_owned()));
        assert_eq!(
            summary(&[of_table("rrun0"), of_table("filter"), end()]),
            by_nft
        );
        let unknown = Some(Change::Ours("another program".to_owned()));
        assert_eq!(summary(&[of_table("rrun0")]), unknown);
        // A message of another subsystem, and a message without attributes.
        assert_eq!(
            summary(&[event(1, |body| body.string(TABLE, "rrun0"))]),
            None
        );
        assert_eq!(summary(&[event(message::NEWGEN, |_| {})]), None);
    }
}
