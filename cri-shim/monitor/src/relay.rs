//! The transfer of data between the pipes of processes in a container and the sockets of clients.
//!
//! While splice(2) moves data from a socket or a terminal into a pipe, the kernel keeps the pipe
//! locked, also while it waits for this data. Every other process that reads, writes or closes the
//! pipe then sleeps uninterruptibly. A process in a container could therefore stop the server if the
//! server used the container's pipes. Only the pod's monitor uses them. The clients get sockets, and
//! processes of the container have no access to these sockets.

use std::collections::{BTreeMap, VecDeque};
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};

use rustix::event::epoll::EventFlags;
use rustix::io::Errno;
use rustix::pipe::{SpliceFlags, splice};

use super::connection::ClientId;
use super::poller::{EventSource, Poller};

/// The maximum number of bytes that one splice(2) moves.
const SPLICE_BYTES: usize = 1 << 20;

/// The maximum number of calls of splice(2) before the monitor handles other events.
const MAX_SPLICES: usize = 16;

/// The maximum number of relays whose client has disconnected. Each has at most the data in the buffer
/// of its socket.
const MAX_LEFT: usize = 16;

/// All relays of the pod.
#[derive(Default)]
pub(crate) struct Relays {
    /// The relays, with the relay's number as the key.
    relays: BTreeMap<u64, Relay>,
    /// The exit statuses of execs whose output has not been transferred completely.
    exits: BTreeMap<ClientId, i32>,
    /// The numbers of the relays with input of clients that have disconnected, oldest first.
    left: VecDeque<u64>,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Direction {
    /// From a process's pipe to the client's socket.
    Output,
    /// From the client's socket to a process's pipe.
    Input,
}

/// One stream of a client.
#[derive(Debug)]
pub(crate) struct Relay {
    client: ClientId,
    direction: Direction,
    from: OwnedFd,
    to: OwnedFd,
    /// The number of bytes after which the relay ends. `None` while the exec's first process runs.
    left: Option<u64>,
    watched: End,
}

/// The end of a relay that the monitor watches.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum End {
    /// The relay waits for data.
    From,
    /// The relay waits until the other side has read data.
    To,
}

impl Relay {
    /// Creates a relay from `from` to `to`, and makes both descriptors non-blocking.
    pub(crate) fn new(
        client: ClientId,
        direction: Direction,
        from: OwnedFd,
        to: OwnedFd,
    ) -> Result<Self, Errno> {
        rustix::io::ioctl_fionbio(&from, true)?;
        rustix::io::ioctl_fionbio(&to, true)?;
        Ok(Relay {
            client,
            direction,
            from,
            to,
            left: None,
            watched: End::From,
        })
    }

    fn watch(&self, number: u64, poller: &Poller) -> Result<(), Errno> {
        let (fd, flags) = match self.watched {
            End::From => (&self.from, EventFlags::IN),
            End::To => (&self.to, EventFlags::OUT),
        };
        poller.watch(fd, EventSource::Relay(number), flags)
    }

    fn watched_fd(&self) -> BorrowedFd<'_> {
        match self.watched {
            End::From => self.from.as_fd(),
            End::To => self.to.as_fd(),
        }
    }

    /// Transfers the data that is available. Returns the end for which the relay must wait, or `None`
    /// if the relay has ended. A relay also ends when the other side no longer reads.
    fn transfer(&mut self) -> Result<Option<End>, Errno> {
        let flags = SpliceFlags::MOVE | SpliceFlags::NONBLOCK;
        for _ in 0..MAX_SPLICES {
            let left = self.left.map_or(SPLICE_BYTES, |left| {
                usize::try_from(left).map_or(SPLICE_BYTES, |left| left.min(SPLICE_BYTES))
            });
            if left == 0 {
                return Ok(None);
            }
            match splice(&self.from, None, &self.to, None, left, flags) {
                Ok(0) | Err(Errno::PIPE | Errno::CONNRESET) => return Ok(None),
                Ok(count) => self.left = self.left.map(|left| left.saturating_sub(count as u64)),
                Err(Errno::INTR) => {}
                Err(Errno::AGAIN) => return self.missing_end(),
                Err(errno) => return Err(errno),
            }
        }
        Ok(Some(End::From))
    }

    /// Returns the end at which the relay cannot continue. A relay with a number of bytes ends when no
    /// data is available, because another process has read the rest.
    fn missing_end(&self) -> Result<Option<End>, Errno> {
        let is_empty = rustix::io::ioctl_fionread(&self.from)? == 0;
        Ok(match (is_empty, self.left) {
            (false, _) => Some(End::To),
            (true, None) => Some(End::From),
            (true, Some(_)) => None,
        })
    }

    pub(crate) fn client(&self) -> ClientId {
        self.client
    }
}

impl Relays {
    /// Begins the transfer of a stream. `number` identifies the relay within the monitor.
    pub(crate) fn begin(
        &mut self,
        number: u64,
        relay: Relay,
        poller: &Poller,
    ) -> Result<(), Errno> {
        relay.watch(number, poller)?;
        self.relays.insert(number, relay);
        Ok(())
    }

    /// Transfers the data of a relay whose descriptor has become ready. If an exec has exited and this
    /// was its last output, returns its client and its exit status. If the transfer failed, returns the
    /// client and the error.
    pub(crate) fn ready(
        &mut self,
        number: u64,
        poller: &Poller,
    ) -> Option<(ClientId, Result<i32, Errno>)> {
        let client = self.relays.get(&number)?.client;
        if let Err(errno) = self.transfer(number, poller) {
            return Some((client, Err(errno)));
        }
        if !self.exits.contains_key(&client) || self.has_output(client) {
            return None;
        }
        let code = self.exits.remove(&client)?;
        Some((client, Ok(code)))
    }

    /// Handles the exit of an exec. Its pipes contain all output that it wrote. Processes that it has
    /// started can write more output, which the client does not get. Returns whether the client has all
    /// output. If not, [`Relays::ready`] returns the exit status later.
    pub(crate) fn exec_exited(
        &mut self,
        client: ClientId,
        code: i32,
        poller: &Poller,
    ) -> Result<bool, Errno> {
        let is_output =
            |relay: &Relay| relay.client == client && relay.direction == Direction::Output;
        let of_client = self.relays.iter_mut().filter(|(_, relay)| is_output(relay));
        let mut numbers = Vec::new();
        for (number, relay) in of_client {
            relay.left = Some(rustix::io::ioctl_fionread(&relay.from)?);
            numbers.push(*number);
        }
        for number in numbers {
            self.transfer(number, poller)?;
        }
        let is_complete = !self.has_output(client);
        if !is_complete {
            self.exits.insert(client, code);
        }
        Ok(is_complete)
    }

    /// Ends the relays of a client that has disconnected. The relays with the client's input continue
    /// until the process has read the input, or until it exits.
    pub(crate) fn client_gone(&mut self, client: ClientId, poller: &Poller) {
        self.exits.remove(&client);
        let of_client = self
            .relays
            .iter()
            .filter(|(_, relay)| relay.client == client);
        let numbers: Vec<u64> = of_client.map(|(number, _)| *number).collect();
        for number in numbers {
            match self.relays.get(&number).map(|relay| relay.direction) {
                Some(Direction::Input) => {
                    let _ = self.transfer(number, poller);
                    self.left.push_back(number);
                }
                _ => self.remove(number, poller),
            }
        }
        self.left.retain(|number| self.relays.contains_key(number));
        while self.left.len() > MAX_LEFT {
            if let Some(oldest) = self.left.pop_front() {
                self.remove(oldest, poller);
            }
        }
    }

    fn remove(&mut self, number: u64, poller: &Poller) {
        if let Some(relay) = self.relays.remove(&number) {
            poller.unwatch(relay.watched_fd());
        }
    }

    fn has_output(&self, client: ClientId) -> bool {
        let mut relays = self.relays.values();
        relays.any(|relay| relay.client == client && relay.direction == Direction::Output)
    }

    /// Transfers the available data of a relay, and removes the relay if it has ended.
    fn transfer(&mut self, number: u64, poller: &Poller) -> Result<(), Errno> {
        let Some(relay) = self.relays.get_mut(&number) else {
            return Ok(());
        };
        let next = relay.transfer();
        if next == Ok(Some(relay.watched)) {
            return Ok(());
        }
        // Dropping a descriptor is not enough: another descriptor can refer to the same pipe.
        poller.unwatch(relay.watched_fd());
        let watched = next.and_then(|end| {
            let Some(end) = end else { return Ok(false) };
            relay.watched = end;
            relay.watch(number, poller).map(|()| true)
        });
        if watched != Ok(true) {
            self.relays.remove(&number);
        }
        watched.map(|_| ())
    }
}

#[cfg(test)]
mod tests {
    use std::io::{Read, Write};
    use std::os::unix::net::UnixStream;

    use super::*;

    const CLIENT: ClientId = 7;
    const PIPE: u64 = 1;

    fn output() -> (Relays, Poller, std::io::PipeWriter, UnixStream) {
        let poller = Poller::new().unwrap();
        let (read, write) = std::io::pipe().unwrap();
        let (ours, theirs) = UnixStream::pair().unwrap();
        let relay = Relay::new(CLIENT, Direction::Output, read.into(), ours.into()).unwrap();
        let mut relays = Relays::default();
        relays.begin(PIPE, relay, &poller).unwrap();
        (relays, poller, write, theirs)
    }

    #[test]
    fn output_is_transferred_and_ends_with_the_pipe() {
        let (mut relays, poller, mut pipe, mut socket) = output();
        pipe.write_all(b"hello").unwrap();
        drop(pipe);
        assert_eq!(relays.ready(PIPE, &poller), None);
        let mut text = String::new();
        socket.read_to_string(&mut text).unwrap();
        assert_eq!(text, "hello");
        assert_eq!(relays.exec_exited(CLIENT, 3, &poller), Ok(true));
    }

    #[test]
    fn an_exit_is_reported_after_the_output_but_not_after_later_output() {
        let (mut relays, poller, mut pipe, mut socket) = output();
        // The socket's buffers are smaller than this output.
        let _ = rustix::pipe::fcntl_setpipe_size(&pipe, 1 << 20);
        pipe.write_all(&[b'x'; 1 << 20]).unwrap();
        assert_eq!(relays.exec_exited(CLIENT, 3, &poller), Ok(false));
        let mut received = 0;
        let exit = loop {
            let mut buffer = [0; 64 << 10];
            received += socket.read(&mut buffer).unwrap();
            // A process that the exec left behind writes.
            let _ = rustix::io::ioctl_fionbio(&pipe, true);
            let _ = pipe.write(b"later");
            if let Some(exit) = relays.ready(PIPE, &poller) {
                break exit;
            }
        };
        assert_eq!(exit, (CLIENT, Ok(3)));
        let mut rest = Vec::new();
        socket.read_to_end(&mut rest).unwrap();
        assert_eq!(received + rest.len(), 1 << 20);
    }

    #[test]
    fn input_of_a_client_that_disconnects_is_not_lost() {
        let poller = Poller::new().unwrap();
        let (mut read, write) = std::io::pipe().unwrap();
        let (ours, mut theirs) = UnixStream::pair().unwrap();
        let relay = Relay::new(CLIENT, Direction::Input, ours.into(), write.into()).unwrap();
        let mut relays = Relays::default();
        relays.begin(PIPE, relay, &poller).unwrap();
        // This input does not fit into the pipe.
        let input = [b'x'; 100 << 10];
        theirs.write_all(&input).unwrap();
        drop(theirs);
        relays.client_gone(CLIENT, &poller);
        let mut received = 0;
        while !relays.relays.is_empty() {
            let mut buffer = [0; 64 << 10];
            received += read.read(&mut buffer).unwrap();
            assert_eq!(relays.ready(PIPE, &poller), None);
        }
        let mut rest = Vec::new();
        read.read_to_end(&mut rest).unwrap();
        assert_eq!(received + rest.len(), input.len());
    }

    #[test]
    fn the_input_of_only_a_few_clients_that_disconnected_is_kept() {
        let poller = Poller::new().unwrap();
        let mut relays = Relays::default();
        let mut pipes = Vec::new();
        for number in 0..MAX_LEFT as u64 + 3 {
            let (read, write) = std::io::pipe().unwrap();
            let (ours, mut theirs) = UnixStream::pair().unwrap();
            let relay = Relay::new(number, Direction::Input, ours.into(), write.into()).unwrap();
            relays.begin(number, relay, &poller).unwrap();
            theirs.write_all(&[b'x'; 100 << 10]).unwrap();
            relays.client_gone(number, &poller);
            pipes.push(read);
        }
        assert_eq!(relays.relays.len(), MAX_LEFT);
        assert!(relays.relays.keys().all(|number| *number >= 3));
    }
}
