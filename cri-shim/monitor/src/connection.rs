//! A client's connection: what has come of its request, what waits to be sent to it.

use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::time::{Duration, Instant};

use rustix::io::Errno;
use serde::Serialize;

use rrun_protocol::Request;
use rrun_protocol::wire;

/// A connection's number; never used twice.
pub(crate) type ClientId = u64;

/// How long a client may take to send its request, or to read its answer.
const CLIENT_TIMEOUT: Duration = Duration::from_secs(30);

/// The most bytes that wait for a client that does not read: at more it is dropped.
const MAX_UNSENT_BYTES: usize = 256 << 10;

/// How far a connection has come.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Stage {
    /// The request is not whole yet.
    Request,
    /// The request is being worked on.
    Working,
    /// The client gets every event.
    Subscribed,
    /// The connection is closed as soon as the answer is sent.
    Answered,
}

/// What came in.
pub(crate) enum Incoming {
    /// Nothing whole yet.
    Partial,
    /// The request, with its descriptors.
    Request(Request, Vec<OwnedFd>),
    /// The client closed, or sent what is no request.
    Closed,
}

pub(crate) struct Connection {
    pub(crate) stage: Stage,
    socket: OwnedFd,
    received: Vec<u8>,
    fds: Vec<OwnedFd>,
    unsent: Vec<u8>,
    unsent_fds: Vec<OwnedFd>,
    /// When the client is given up, if it owes us something.
    deadline: Option<Instant>,
}

impl Connection {
    pub(crate) fn new(socket: OwnedFd) -> Self {
        Connection {
            stage: Stage::Request,
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

    /// Reads what has come. Called when the socket is readable.
    pub(crate) fn read(&mut self) -> Incoming {
        loop {
            match wire::receive(&self.socket, &mut self.received, &mut self.fds) {
                Ok(0) => return Incoming::Closed,
                // One request is all that a client has to say.
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

    /// Sends a message, or as much of it as the client takes now. False if the connection is of
    /// no use any more.
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

    /// Sends what waits. False if the connection is of no use any more.
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
