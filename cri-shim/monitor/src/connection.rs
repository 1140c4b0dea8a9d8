//! A client's connection to the monitor. The connection stores the received part of the request and
//! the unsent part of the answer.

use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::time::{Duration, Instant};

use rustix::io::Errno;
use serde::Serialize;

use rrun_protocol::Request;
use rrun_protocol::wire;

/// The number that identifies a connection. The monitor never reuses this number.
pub(crate) type ClientId = u64;

/// The time within which a client must send its request. The client must also read each answer
/// within this time.
const CLIENT_TIMEOUT: Duration = Duration::from_secs(30);

/// The maximum number of unsent bytes for one client. If a client does not read and more bytes
/// wait, the monitor disconnects the client.
const MAX_UNSENT_BYTES: usize = 256 << 10;

/// The progress of a client's connection.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Stage {
    /// The request has not arrived completely yet.
    Request,
    /// The monitor is processing the request.
    Working,
    /// The client has subscribed and receives every event.
    Subscribed,
    /// The monitor closes the connection as soon as it has sent the answer.
    Answered,
}

/// The result of reading from a client's connection.
pub(crate) enum Incoming {
    /// No complete request has arrived yet.
    Partial,
    /// A request with its descriptors.
    Request(Request, Vec<OwnedFd>),
    /// The client closed the connection or sent an invalid request.
    Closed,
}

pub(crate) struct Connection {
    pub(crate) stage: Stage,
    /// The serial number of the container, if the client's request is an exec or an attach.
    pub(crate) session: Option<u64>,
    socket: OwnedFd,
    received: Vec<u8>,
    fds: Vec<OwnedFd>,
    unsent: Vec<u8>,
    unsent_fds: Vec<OwnedFd>,
    /// The deadline for the client to send its request or to read its answer. After this deadline,
    /// the monitor disconnects the client.
    deadline: Option<Instant>,
}

impl Connection {
    pub(crate) fn new(socket: OwnedFd) -> Self {
        Connection {
            stage: Stage::Request,
            session: None,
            socket,
            received: Vec::new(),
            fds: Vec::new(),
            unsent: Vec::new(),
            unsent_fds: Vec::new(),
            deadline: Some(Instant::now() + CLIENT_TIMEOUT),
        }
    }

    pub(crate) fn socket(&self) -> BorrowedFd<'_> {
        self.socket.as_fd()
    }

    pub(crate) fn deadline(&self) -> Option<Instant> {
        self.deadline
    }

    pub(crate) fn has_output(&self) -> bool {
        !self.unsent.is_empty()
    }

    /// Reads the data that has arrived on the socket. The event loop calls this function when the
    /// socket is readable.
    pub(crate) fn read(&mut self) -> Incoming {
        loop {
            match wire::receive(&self.socket, &mut self.received, &mut self.fds) {
                Ok(0) => return Incoming::Closed,
                // A client must not send anything after its request, so the monitor closes the
                // connection.
                Ok(_) if self.stage != Stage::Request => return Incoming::Closed,
                Ok(_) => {}
                Err(Errno::INTR) => continue,
                Err(Errno::AGAIN) => return Incoming::Partial,
                Err(_) => return Incoming::Closed,
            }
            match wire::decode(&mut self.received) {
                Ok(None) => {}
                Ok(Some(request)) if self.received.is_empty() => {
                    self.stage = Stage::Working;
                    self.received = Vec::new();
                    self.deadline = None;
                    return Incoming::Request(request, std::mem::take(&mut self.fds));
                }
                Ok(Some(_)) | Err(_) => return Incoming::Closed,
            }
        }
    }

    /// Sends as much of the message as the socket accepts now. [`Connection::flush`] sends the rest
    /// of the message later. Returns false if the connection must be closed.
    pub(crate) fn send<T: Serialize>(&mut self, message: &T, fds: Vec<OwnedFd>) -> bool {
        if self.unsent.len() > MAX_UNSENT_BYTES {
            return false;
        }
        let Ok(bytes) = wire::encode(message) else {
            return false;
        };
        if self.unsent.is_empty() {
            self.unsent = bytes;
            self.unsent_fds = fds;
        } else {
            self.unsent.extend_from_slice(&bytes);
        }
        self.flush()
    }

    /// Sends as much of the waiting data as the socket accepts now. Returns false if an error
    /// occurred or the last answer has been sent. The caller must then close the connection.
    pub(crate) fn flush(&mut self) -> bool {
        let mut sent = 0;
        while let Some(rest) = self.unsent.get(sent..).filter(|rest| !rest.is_empty()) {
            let fds: Vec<_> = self.unsent_fds.iter().map(AsFd::as_fd).collect();
            match wire::send(&self.socket, rest, &fds) {
                Ok(count) => {
                    sent += count;
                    self.unsent_fds.clear();
                }
                Err(Errno::INTR) => {}
                Err(Errno::AGAIN) => break,
                Err(_) => return false,
            }
        }
        if sent > 0 {
            self.unsent.drain(..sent);
            self.deadline = None;
        }
        if self.unsent.is_empty() {
            self.unsent = Vec::new();
            return self.stage != Stage::Answered;
        }
        if self.deadline.is_none() {
            self.deadline = Some(Instant::now() + CLIENT_TIMEOUT);
        }
        true
    }
}
