//! The clients that are connected, and the socket that they come by.

use std::collections::BTreeMap;
use std::os::fd::OwnedFd;
use std::time::{Duration, Instant};

use rustix::event::epoll::EventFlags;
use rustix::io::Errno;
use rustix::net::SocketFlags;

use super::connection::{ClientId, Connection, Incoming, Stage};
use super::own_log;
use super::poller::{EventSource, Poller};
use super::serials::Serials;
use rrun_kernel::errno::describe;
use rrun_protocol::Reply;

/// The most clients at once; more wait in the socket's backlog.
const MAX_CLIENTS: usize = 256;

/// How long no client is accepted after descriptors have run out.
const ACCEPT_PAUSE: Duration = Duration::from_secs(1);

pub(crate) struct Clients {
    listener: OwnedFd,
    connections: BTreeMap<ClientId, Connection>,
    /// When clients are accepted again, if they are not now.
    accept_paused_until: Option<Instant>,
}

impl Clients {
    pub(crate) fn new(listener: OwnedFd, poller: &Poller) -> Result<Self, Errno> {
        poller.watch(&listener, EventSource::Listener, EventFlags::IN)?;
        Ok(Clients {
            listener,
            connections: BTreeMap::new(),
            accept_paused_until: None,
        })
    }

    pub(crate) fn contains(&self, client: ClientId) -> bool {
        self.connections.contains_key(&client)
    }

    /// The next client that waits to be accepted. With none the listener is watched on, unless
    /// there is no room for another client.
    pub(crate) fn accept(&mut self, poller: &Poller, serials: &mut Serials) -> Option<ClientId> {
        while self.connections.len() < MAX_CLIENTS {
            let flags = SocketFlags::CLOEXEC | SocketFlags::NONBLOCK;
            let socket = match rustix::net::accept_with(&self.listener, flags) {
                Ok(socket) => socket,
                Err(Errno::INTR | Errno::CONNABORTED) => continue,
                Err(Errno::AGAIN) => return None,
                Err(errno) => {
                    own_log::write(&format!("accept a client: {}", describe(&errno.into())));
                    break;
                }
            };
            let client = serials.next();
            if poller
                .watch(&socket, EventSource::Client(client), EventFlags::IN)
                .is_ok()
            {
                self.connections.insert(client, Connection::new(socket));
                return Some(client);
            }
        }
        poller.modify(&self.listener, EventSource::Listener, EventFlags::empty());
        self.accept_paused_until = Some(Instant::now() + ACCEPT_PAUSE);
        None
    }

    /// Accepts clients again once the pause is over.
    pub(crate) fn end_accept_pause(&mut self, now: Instant, poller: &Poller) {
        if self.accept_paused_until.is_some_and(|until| now >= until) {
            self.accept_paused_until = None;
            poller.modify(&self.listener, EventSource::Listener, EventFlags::IN);
        }
    }

    /// Sends and reads what a client's socket is ready for.
    pub(crate) fn ready(
        &mut self,
        client: ClientId,
        flags: EventFlags,
        poller: &Poller,
    ) -> Incoming {
        let Some(connection) = self.connections.get_mut(&client) else {
            return Incoming::Partial;
        };
        let writable = flags.contains(EventFlags::OUT);
        if writable && !connection.flush() {
            return Incoming::Closed;
        }
        let incoming = connection.read();
        if writable && matches!(incoming, Incoming::Partial) {
            watch_socket(client, connection, poller);
        }
        incoming
    }

    /// Sends a message, with what follows it on the connection. False when the connection is of
    /// no use any more: then call [`Clients::remove`]. A client that has gone needs no message.
    #[must_use]
    pub(crate) fn send(
        &mut self,
        client: ClientId,
        next: Stage,
        reply: &Reply,
        fds: Vec<OwnedFd>,
        poller: &Poller,
    ) -> bool {
        let Some(connection) = self.connections.get_mut(&client) else {
            return true;
        };
        connection.stage = next;
        if !connection.send(reply, fds) {
            return false;
        }
        if connection.has_output() {
            watch_socket(client, connection, poller);
        }
        true
    }

    /// Closes a connection. False if there is no such client.
    pub(crate) fn remove(&mut self, client: ClientId) -> bool {
        let removed = self.connections.remove(&client).is_some();
        if removed {
            // There is room for another.
            self.accept_paused_until = self.accept_paused_until.map(|_| Instant::now());
        }
        removed
    }

    pub(crate) fn subscribers(&self) -> Vec<ClientId> {
        self.those(|connection| connection.stage == Stage::Subscribed)
    }

    /// Those that took too long to send their request, or to read their answer.
    pub(crate) fn overdue(&self, now: Instant) -> Vec<ClientId> {
        self.those(|connection| connection.deadline().is_some_and(|at| now >= at))
    }

    fn those(&self, which: impl Fn(&Connection) -> bool) -> Vec<ClientId> {
        let those = self.connections.iter().filter(|(_, it)| which(it));
        those.map(|(client, _)| *client).collect()
    }

    /// When a deadline passes, or the pause ends.
    pub(crate) fn next_check(&self) -> Option<Instant> {
        let deadlines = self.connections.values().filter_map(Connection::deadline);
        deadlines.chain(self.accept_paused_until).min()
    }
}

/// Waits for room in a client's socket as long as something waits to be sent.
fn watch_socket(client: ClientId, connection: &Connection, poller: &Poller) {
    let mut flags = EventFlags::IN;
    if connection.has_output() {
        flags |= EventFlags::OUT;
    }
    poller.modify(connection.socket(), EventSource::Client(client), flags);
}
