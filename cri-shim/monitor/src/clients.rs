//! The connected clients and the listening socket.

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

/// The maximum number of simultaneous clients. Further clients wait in the backlog of the listening
/// socket. The limit is higher than [`MAX_SESSIONS`]. Requests that stop or remove a container
/// therefore do not wait until an exec or an attachment ends.
const MAX_CLIENTS: usize = MAX_SESSIONS + 64;

/// The maximum number of execs and attachments at the same time. They can last as long as the pod.
pub(crate) const MAX_SESSIONS: usize = 256;

/// The maximum number of execs and attachments of one container at the same time. A container can
/// prevent the end of its execs, and must not prevent the execs of the pod's other containers.
pub(crate) const MAX_CONTAINER_SESSIONS: usize = 224;

/// The time for which the monitor accepts no further clients. This pause begins when
/// [`MAX_CLIENTS`] clients are connected, or when accept(2) fails.
const ACCEPT_PAUSE: Duration = Duration::from_secs(1);

pub(crate) struct Clients {
    listener: OwnedFd,
    connections: BTreeMap<ClientId, Connection>,
    /// The time at which the monitor accepts clients again, if accepting is paused.
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

    /// Counts the client's connection as an exec or an attachment of the container with this serial
    /// number. Returns an error if [`MAX_SESSIONS`] or [`MAX_CONTAINER_SESSIONS`] are reached.
    /// `abandoned` are the serial numbers of the containers of those execs whose client has
    /// disconnected.
    pub(crate) fn begin_session(
        &mut self,
        client: ClientId,
        container: u64,
        abandoned: &[u64],
    ) -> Result<(), String> {
        let connected = self.connections.values().filter_map(|it| it.session);
        let (mut all, mut own) = (0, 0);
        for session in connected.chain(abandoned.iter().copied()) {
            all += 1;
            own += usize::from(session == container);
        }
        let (what, limit) = match (own, all) {
            (MAX_CONTAINER_SESSIONS.., _) => ("container", MAX_CONTAINER_SESSIONS),
            (_, MAX_SESSIONS..) => ("pod", MAX_SESSIONS),
            _ => {
                if let Some(connection) = self.connections.get_mut(&client) {
                    connection.session = Some(container);
                }
                return Ok(());
            }
        };
        Err(format!(
            "the {what} already has {limit} execs and attachments, and this number is the limit"
        ))
    }

    pub(crate) fn contains(&self, client: ClientId) -> bool {
        self.connections.contains_key(&client)
    }

    /// Accepts the next waiting client. Returns `None` if no client waits, if [`MAX_CLIENTS`]
    /// clients are connected, or if accept(2) fails. In the last two cases, the monitor accepts no
    /// further clients for [`ACCEPT_PAUSE`].
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

    /// Watches the listening socket again once the pause in accepting clients is over.
    pub(crate) fn end_accept_pause(&mut self, now: Instant, poller: &Poller) {
        if self.accept_paused_until.is_some_and(|until| now >= until) {
            self.accept_paused_until = None;
            poller.modify(&self.listener, EventSource::Listener, EventFlags::IN);
        }
    }

    /// Sends the data that waits for a client, and receives the client's request, without blocking.
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

    /// Sends a message and sets the next stage of the connection. Returns false if the caller must
    /// close the connection with [`Clients::remove`]. If the client has already disconnected, this
    /// function drops the message.
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

    /// Closes a client's connection. Returns false if the client does not exist.
    pub(crate) fn remove(&mut self, client: ClientId) -> bool {
        let removed = self.connections.remove(&client).is_some();
        if removed {
            // The connection's descriptor is free again, so the monitor can accept another client
            // now.
            self.accept_paused_until = self.accept_paused_until.map(|_| Instant::now());
        }
        removed
    }

    pub(crate) fn subscribers(&self) -> Vec<ClientId> {
        self.those(|connection| connection.stage == Stage::Subscribed)
    }

    /// Returns the clients that took too long to send their request or to read their answer.
    pub(crate) fn overdue(&self, now: Instant) -> Vec<ClientId> {
        self.those(|connection| connection.deadline().is_some_and(|at| now >= at))
    }

    fn those(&self, which: impl Fn(&Connection) -> bool) -> Vec<ClientId> {
        let those = self.connections.iter().filter(|(_, it)| which(it));
        those.map(|(client, _)| *client).collect()
    }

    /// Returns the earliest time at which a client's deadline passes or the pause in accepting
    /// clients ends.
    pub(crate) fn next_check(&self) -> Option<Instant> {
        let deadlines = self.connections.values().filter_map(Connection::deadline);
        deadlines.chain(self.accept_paused_until).min()
    }
}

/// Watches whether a client's socket is readable and, while unsent data remains, whether it is
/// writable.
fn watch_socket(client: ClientId, connection: &Connection, poller: &Poller) {
    let mut flags = EventFlags::IN;
    if connection.has_output() {
        flags |= EventFlags::OUT;
    }
    poller.modify(connection.socket(), EventSource::Client(client), flags);
}
