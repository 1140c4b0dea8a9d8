//! Connections from clients that have not sent a complete request yet.
//!
//! Every process on the node can connect to the server's TCP listeners. The server limits the
//! number of connections without a complete request. If the limit is reached, a new connection
//! replaces the oldest one. Clients that send their requests slowly or never can therefore not
//! prevent the service for other clients.

use std::collections::BTreeMap;
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use tokio::sync::Notify;

use rrun_calls::lock::lock;

/// The minimum time between two log messages about the limit.
const LOG_INTERVAL: Duration = Duration::from_secs(60);

/// The waiting connections of one listener.
pub(crate) struct WaitingClients {
    /// The purpose of the listener, for the log.
    purpose: &'static str,
    limit: usize,
    connections: Mutex<Connections>,
}

#[derive(Default)]
struct Connections {
    next: u64,
    /// The key of a connection is its number. The connections are ordered by their age.
    replaced: BTreeMap<u64, Arc<Notify>>,
    logged: Option<Instant>,
}

/// The place of a connection among the waiting connections. Dropping this value frees the place.
pub(crate) struct Place {
    clients: Arc<WaitingClients>,
    number: u64,
}

impl WaitingClients {
    pub(crate) fn new(purpose: &'static str, limit: usize) -> Arc<Self> {
        Arc::new(WaitingClients {
            purpose,
            limit,
            connections: Mutex::default(),
        })
    }

    /// Adds a connection. Returns its place, and a notification. When the notification arrives, the
    /// caller must close the connection, because a newer connection has replaced it.
    pub(crate) fn add(self: &Arc<Self>) -> (Place, Arc<Notify>) {
        let replaced = Arc::new(Notify::new());
        let mut connections = lock(&self.connections);
        if connections.replaced.len() >= self.limit
            && let Some((_, oldest)) = connections.replaced.pop_first()
        {
            oldest.notify_one();
            self.log(&mut connections);
        }
        let number = connections.next;
        connections.next += 1;
        connections.replaced.insert(number, Arc::clone(&replaced));
        let clients = Arc::clone(self);
        (Place { clients, number }, replaced)
    }

    fn log(&self, connections: &mut Connections) {
        let now = Instant::now();
        let recent = |at: Instant| now.duration_since(at) < LOG_INTERVAL;
        if !connections.logged.is_some_and(recent) {
            connections.logged = Some(now);
            log::warn!(
                "the server closes the oldest connections for {}, because {} clients have connected without sending a request",
                self.purpose,
                self.limit
            );
        }
    }
}

impl Drop for Place {
    fn drop(&mut self) {
        lock(&self.clients.connections)
            .replaced
            .remove(&self.number);
    }
}

#[cfg(test)]
mod tests {
    use futures_util::FutureExt;

    use super::*;

    #[test]
    fn a_new_connection_replaces_the_oldest_one_if_the_limit_is_reached() {
        let clients = WaitingClients::new("tests", 2);
        let (first, first_replaced) = clients.add();
        let (second, second_replaced) = clients.add();
        drop(second);
        let (_third, third_replaced) = clients.add();
        let is_replaced = |notify: &Notify| notify.notified().now_or_never().is_some();
        assert!(!is_replaced(&first_replaced));
        let (_fourth, fourth_replaced) = clients.add();
        assert!(is_replaced(&first_replaced));
        drop(first);
        for waiting in [second_replaced, third_replaced, fourth_replaced] {
            assert!(!is_replaced(&waiting));
        }
        assert_eq!(lock(&clients.connections).replaced.len(), 2);
    }
}
