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
const PATIENCE: Duration = Duration::from_secs(30);

/// How many bytes may wait for a client that does not read: it is dropped with the next.
const MAX_WAITING: usize = 256 << 10;

/// What a connection is for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Role {
    /// Its request is not whole yet.
    Asking,
    /// Its request is being worked on.
    Waiting,
    /// Gets every event.
    Subscriber,
    /// Answered; closed as soon as the answer is sent.
    Answered,
}

/// What came in.
pub(crate) enum Input {
    /// Nothing whole yet.
    Partial,
    Request(Request),
    /// The client closed, or sent what is no request.
    Closed,
}

pub(crate) struct Connection {
    pub role: Role,
    socket: OwnedFd,
    received: Vec<u8>,
    fds: Vec<OwnedFd>,
    waiting: Vec<u8>,
    passing: Vec<OwnedFd>,
    /// When the client is given up, if it owes us something.
    deadline: Option<Instant>,
}

impl Connection {
    pub(crate) fn new(socket: OwnedFd) -> Self {
        Connection {
            role: Role::Asking,
            socket,
            received: Vec::new(),
            fds: Vec::new(),
            waiting: Vec::new(),
            passing: Vec::new(),
            deadline: Some(Instant::now() + PATIENCE),
        }
    }

    pub(crate) fn socket(&self) -> BorrowedFd<'_> {
        self.socket.as_fd()
    }

    pub(crate) fn deadline(&self) -> Option<Instant> {
        self.deadline
    }

    /// The descriptors that came with the request.
    pub(crate) fn take_fds(&mut self) -> Vec<OwnedFd> {
        std::mem::take(&mut self.fds)
    }

    pub(crate) fn has_output(&self) -> bool {
        !self.waiting.is_empty()
    }

    /// Reads what has come. Called when the socket is readable.
    pub(crate) fn read(&mut self) -> Input {
        loop {
            match wire::receive(&self.socket, &mut self.received, &mut self.fds) {
                Ok(0) => return Input::Closed,
                // One request is all that a client has to say.
                Ok(_) if self.role != Role::Asking => return Input::Closed,
                Ok(_) => {}
                Err(Errno::INTR) => continue,
                Err(Errno::AGAIN) => return Input::Partial,
                Err(_) => return Input::Closed,
            }
            match wire::decode(&mut self.received) {
                Ok(None) => {}
                Ok(Some(request)) if self.received.is_empty() => {
                    self.role = Role::Waiting;
                    self.received = Vec::new();
                    self.deadline = None;
                    return Input::Request(request);
                }
                Ok(Some(_)) | Err(_) => return Input::Closed,
            }
        }
    }

    /// Sends a message, or as much of it as the client takes now. False if the connection is of
    /// no use any more.
    pub(crate) fn send<T: Serialize>(&mut self, message: &T, fds: Vec<OwnedFd>) -> bool {
        if self.waiting.len() > MAX_WAITING {
            return false;
        }
        let Ok(bytes) = wire::encode(message) else {
            return false;
        };
        if self.waiting.is_empty() {
            self.waiting = bytes;
            self.passing = fds;
        } else {
            self.waiting.extend_from_slice(&bytes);
        }
        self.flush()
    }

    /// Sends what waits. False if the connection is of no use any more.
    pub(crate) fn flush(&mut self) -> bool {
        let mut sent = 0;
        while let Some(rest) = self.waiting.get(sent..).filter(|rest| !rest.is_empty()) {
            let passing: Vec<_> = self.passing.iter().map(AsFd::as_fd).collect();
            match wire::send(&self.socket, rest, &passing) {
                Ok(count) => {
                    sent += count;
                    self.passing.clear();
                }
                Err(Errno::INTR) => {}
                Err(Errno::AGAIN) => break,
                Err(_) => return false,
            }
        }
        if sent > 0 {
            self.waiting.drain(..sent);
            self.deadline = None;
        }
        if self.waiting.is_empty() {
            self.waiting = Vec::new();
            return self.role != Role::Answered;
        }
        if self.deadline.is_none() {
            self.deadline = Some(Instant::now() + PATIENCE);
        }
        true
    }
}
