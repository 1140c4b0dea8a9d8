//! The transfer of data between the pipes and terminals of processes in a container and the sockets of
//! clients.
//!
//! While splice(2) moves data from a socket or a terminal into a pipe, the kernel keeps the pipe
//! locked, also while it waits for this data. Every other process that reads, writes or closes the
//! pipe then sleeps uninterruptibly. A terminal has locks that a process can hold as long: during the
//! ioctl TIOCGWINSZ, the kernel copies the size to the memory of the process, and every other process
//! that resizes the terminal waits. A process in a container could therefore stop the server if the
//! server used the container's pipes or terminals. Only the pod's monitor uses them. The clients get
//! sockets, and processes of the container have no access to these sockets.

use std::collections::{BTreeMap, VecDeque};
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::time::{Duration, Instant};

use rustix::event::epoll::EventFlags;
use rustix::io::{Errno, fcntl_dupfd_cloexec};
use rustix::pipe::{SpliceFlags, splice};
use rustix::pty::{OpenptFlags, ioctl_tiocgptpeer};
use rustix::termios::{Winsize, tcsetwinsize};

use super::connection::ClientId;
use super::poller::{EventSource, Poller};

/// The maximum number of bytes that one splice(2) moves.
const SPLICE_BYTES: usize = 1 << 20;

/// The maximum number of bytes that one read from a terminal or for a terminal returns.
const COPY_BYTES: usize = 4 << 10;

/// The maximum number of parts that a relay transfers before the monitor handles other events.
const MAX_PARTS: usize = 16;

/// The time for which the monitor waits for the last output from a terminal after the exit of the
/// exec's first process. The monitor waits only if other processes still have the terminal open. The
/// kernel can deliver the last output to the terminal's master with a short delay.
const TERMINAL_DRAIN_TIMEOUT: Duration = Duration::from_millis(100);

/// The maximum number of bytes that the monitor reads from a terminal after the exit of the exec's
/// first process. The kernel's buffer for a terminal is smaller. The monitor therefore reads all
/// output that the buffer contained at the exit.
const MAX_TERMINAL_DRAIN_BYTES: u64 = 256 << 10;

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
    /// From a process's pipe or terminal to the client's socket.
    Output,
    /// From the client's socket to a process's pipe or terminal.
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
    /// `None` if the relay is between a pipe and a socket. splice(2) transfers its data.
    terminal: Option<Terminal>,
}

/// The additional state of a relay between a terminal and a socket.
#[derive(Debug, Default)]
struct Terminal {
    /// The data that was read from one end, and that the other end has not accepted yet.
    unwritten: Vec<u8>,
    /// The other side of the terminal. While it is open, the output does not end when the processes
    /// close the terminal, because they can open it again.
    slave: Option<OwnedFd>,
    /// The time at which the output ends if no data is available. `None` while the exec's first
    /// process runs.
    deadline: Option<Instant>,
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
    /// Creates a relay between a pipe and a socket, and makes both descriptors non-blocking.
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
            terminal: None,
        })
    }

    /// Creates the two relays between an exec's terminal and the client's socket.
    pub(crate) fn of_exec_terminal(
        client: ClientId,
        master: OwnedFd,
        socket: OwnedFd,
    ) -> Result<[Self; 2], Errno> {
        let flags = OpenptFlags::RDWR | OpenptFlags::NOCTTY | OpenptFlags::CLOEXEC;
        let terminal = Terminal {
            // If the other side can't be opened, the output ends when the processes close it.
            slave: ioctl_tiocgptpeer(&master, flags).ok(),
            ..Terminal::default()
        };
        let input = Relay::to_terminal(
            client,
            fcntl_dupfd_cloexec(&socket, 3)?,
            fcntl_dupfd_cloexec(&master, 3)?,
        )?;
        let mut output = Relay::new(client, Direction::Output, master, socket)?;
        output.terminal = Some(terminal);
        Ok([input, output])
    }

    /// Creates a relay from a client's socket to the master of a terminal.
    pub(crate) fn to_terminal(
        client: ClientId,
        socket: OwnedFd,
        master: OwnedFd,
    ) -> Result<Self, Errno> {
        let mut relay = Relay::new(client, Direction::Input, socket, master)?;
        relay.terminal = Some(Terminal::default());
        Ok(relay)
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
        let next = match self.terminal.take() {
            None => self.splice(),
            Some(mut terminal) => {
                let next = self.copy(&mut terminal.unwritten, terminal.deadline);
                self.terminal = Some(terminal);
                next
            }
        };
        match next {
            // EIO means that no process has the other side of the terminal open.
            Err(Errno::PIPE | Errno::CONNRESET) => Ok(None),
            Err(Errno::IO) if self.terminal.is_some() => Ok(None),
            next => next,
        }
    }

    fn splice(&mut self) -> Result<Option<End>, Errno> {
        let flags = SpliceFlags::MOVE | SpliceFlags::NONBLOCK;
        for _ in 0..MAX_PARTS {
            let room = self.room(SPLICE_BYTES);
            if room == 0 {
                return Ok(None);
            }
            match splice(&self.from, None, &self.to, None, room, flags) {
                Ok(0) => return Ok(None),
                Ok(count) => self.count(count),
                Err(Errno::INTR) => {}
                Err(Errno::AGAIN) => return self.missing_end(),
                Err(errno) => return Err(errno),
            }
        }
        Ok(Some(End::From))
    }

    /// Like [`Relay::splice`], but for a terminal. `unwritten` and `deadline` are fields of
    /// [`Terminal`].
    fn copy(
        &mut self,
        unwritten: &mut Vec<u8>,
        deadline: Option<Instant>,
    ) -> Result<Option<End>, Errno> {
        for _ in 0..MAX_PARTS {
            if !unwritten.is_empty() {
                match rustix::io::write(&self.to, unwritten) {
                    Ok(count) => drop(unwritten.drain(..count)),
                    Err(Errno::INTR) => {}
                    Err(Errno::AGAIN) => return Ok(Some(End::To)),
                    Err(errno) => return Err(errno),
                }
                continue;
            }
            let mut buffer = [0; COPY_BYTES];
            let room = self.room(COPY_BYTES);
            if room == 0 {
                return Ok(None);
            }
            match rustix::io::read(&self.from, buffer.get_mut(..room).unwrap_or_default()) {
                Ok(0) => return Ok(None),
                Ok(count) => {
                    self.count(count);
                    unwritten.extend_from_slice(buffer.get(..count).unwrap_or_default());
                }
                Err(Errno::INTR) => {}
                Err(Errno::AGAIN) => {
                    *unwritten = Vec::new();
                    let is_over = deadline.is_some_and(|deadline| Instant::now() >= deadline);
                    return Ok((!is_over).then_some(End::From));
                }
                Err(errno) => return Err(errno),
            }
        }
        Ok(Some(if unwritten.is_empty() {
            End::From
        } else {
            End::To
        }))
    }

    /// Returns the number of bytes that the relay may transfer now, at most `most`.
    fn room(&self, most: usize) -> usize {
        let left = self
            .left
            .map(|left| usize::try_from(left).unwrap_or(usize::MAX));
        left.map_or(most, |left| left.min(most))
    }

    fn count(&mut self, transferred: usize) {
        self.left = self
            .left
            .map(|left| left.saturating_sub(transferred as u64));
    }

    /// Limits the output to the data that is available when the exec's first process has exited.
    fn process_exited(&mut self) -> Result<(), Errno> {
        self.left = Some(match &mut self.terminal {
            None => rustix::io::ioctl_fionread(&self.from)?,
            Some(terminal) => {
                terminal.slave = None;
                terminal.deadline = Some(Instant::now() + TERMINAL_DRAIN_TIMEOUT);
                MAX_TERMINAL_DRAIN_BYTES
            }
        });
        Ok(())
    }

    /// Returns the time at which the relay ends if no data has arrived.
    fn deadline(&self) -> Option<Instant> {
        let waits = self.watched == End::From;
        self.terminal.as_ref()?.deadline.filter(|_| waits)
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

    /// Handles the exit of an exec. Its pipes or its terminal contain all output that it wrote.
    /// Processes that it has started can write more output, which the client does not get. Returns
    /// whether the client has all output. If not, [`Relays::ready`] returns the exit status later.
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
            relay.process_exited()?;
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

    /// Sets the size of the terminal of a client's exec. Fails with `ENOTTY` if it has no terminal.
    pub(crate) fn resize(&self, client: ClientId, size: Winsize) -> Result<(), Errno> {
        let mut relays = self.relays.values();
        let output = relays.find(|relay| {
            relay.client == client
                && relay.direction == Direction::Output
                && relay.terminal.is_some()
        });
        tcsetwinsize(&output.ok_or(Errno::NOTTY)?.from, size)
    }

    /// Returns the time at which [`Relays::due`] returns a relay.
    pub(crate) fn next_check(&self) -> Option<Instant> {
        self.relays.values().filter_map(Relay::deadline).min()
    }

    /// Returns the relays for which [`Relays::ready`] must be called even if no descriptor is ready.
    pub(crate) fn due(&self, now: Instant) -> Vec<u64> {
        let is_due = |relay: &Relay| relay.deadline().is_some_and(|deadline| now >= deadline);
        let due = self.relays.iter().filter(|(_, relay)| is_due(relay));
        due.map(|(number, _)| *number).collect()
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

    /// Returns the relays of an exec's terminal, the other side of the terminal, and the client's
    /// socket.
    fn terminal() -> (Relays, Poller, OwnedFd, UnixStream) {
        let poller = Poller::new().unwrap();
        let flags = OpenptFlags::RDWR | OpenptFlags::NOCTTY | OpenptFlags::CLOEXEC;
        let master = rustix::pty::openpt(flags).unwrap();
        rustix::pty::unlockpt(&master).unwrap();
        let slave = ioctl_tiocgptpeer(&master, flags).unwrap();
        let mut mode = rustix::termios::tcgetattr(&slave).unwrap();
        mode.make_raw();
        let when = rustix::termios::OptionalActions::Now;
        rustix::termios::tcsetattr(&slave, when, &mode).unwrap();
        let (ours, theirs) = UnixStream::pair().unwrap();
        let mut relays = Relays::default();
        let both = Relay::of_exec_terminal(CLIENT, master, ours.into()).unwrap();
        for (number, relay) in (PIPE..).zip(both) {
            relays.begin(number, relay, &poller).unwrap();
        }
        (relays, poller, slave, theirs)
    }

    fn received(socket: &mut UnixStream, count: usize) -> Vec<u8> {
        let mut bytes = vec![0; count];
        socket.read_exact(&mut bytes).unwrap();
        bytes
    }

    const TERMINAL_INPUT: u64 = PIPE;
    const TERMINAL_OUTPUT: u64 = PIPE + 1;

    #[test]
    fn a_terminal_is_transferred_in_both_directions_and_resized() {
        let (mut relays, poller, slave, mut socket) = terminal();
        let mut text = [0; 5];
        socket.write_all(b"typed").unwrap();
        assert_eq!(relays.ready(TERMINAL_INPUT, &poller), None);
        rustix::io::read(&slave, &mut text).unwrap();
        assert_eq!(&text, b"typed");
        rustix::io::write(&slave, b"shown").unwrap();
        assert_eq!(relays.ready(TERMINAL_OUTPUT, &poller), None);
        assert_eq!(received(&mut socket, 5), b"shown");
        let size = Winsize {
            ws_row: 31,
            ws_col: 101,
            ws_xpixel: 0,
            ws_ypixel: 0,
        };
        assert_eq!(relays.resize(CLIENT, size), Ok(()));
        assert_eq!(relays.resize(CLIENT + 1, size), Err(Errno::NOTTY));
        let size = rustix::termios::tcgetwinsize(&slave).unwrap();
        assert_eq!((size.ws_col, size.ws_row), (101, 31));
    }

    #[test]
    fn a_terminal_that_was_closed_and_opened_again_ends_with_the_exec() {
        let (mut relays, poller, slave, mut socket) = terminal();
        rustix::io::write(&slave, b"one").unwrap();
        drop(slave);
        assert_eq!(relays.ready(TERMINAL_OUTPUT, &poller), None);
        assert!(relays.has_output(CLIENT));
        assert_eq!(relays.exec_exited(CLIENT, 3, &poller), Ok(true));
        relays.client_gone(CLIENT, &poller);
        assert!(
            relays
                .relays
                .values()
                .all(|relay| relay.direction == Direction::Input)
        );
        assert_eq!(received(&mut socket, 3), b"one");
    }

    #[test]
    fn an_open_terminal_ends_a_short_time_after_the_exit_of_the_exec() {
        let (mut relays, poller, slave, mut socket) = terminal();
        assert_eq!(relays.exec_exited(CLIENT, 3, &poller), Ok(false));
        rustix::io::write(&slave, b"last").unwrap();
        assert_eq!(relays.ready(TERMINAL_OUTPUT, &poller), None);
        let check = relays.next_check().unwrap();
        assert!(relays.due(check - Duration::from_millis(1)).is_empty());
        assert_eq!(relays.due(check), [TERMINAL_OUTPUT]);
        std::thread::sleep(check.saturating_duration_since(Instant::now()));
        let ended = relays.ready(TERMINAL_OUTPUT, &poller);
        assert_eq!(ended, Some((CLIENT, Ok(3))));
        assert_eq!(received(&mut socket, 4), b"last");
    }

    #[test]
    fn output_of_a_terminal_waits_for_a_slow_client_after_the_exit() {
        let (mut relays, poller, slave, mut socket) = terminal();
        rustix::io::ioctl_fionbio(&slave, true).unwrap();
        let mut written = 0;
        // The socket's and the terminal's buffers are full after this loop.
        while let Ok(count) = rustix::io::write(&slave, &[b'x'; 4096]) {
            written += count;
            relays.ready(TERMINAL_OUTPUT, &poller);
        }
        drop(slave);
        assert_eq!(relays.exec_exited(CLIENT, 3, &poller), Ok(false));
        std::thread::sleep(TERMINAL_DRAIN_TIMEOUT);
        assert_eq!(relays.next_check(), None);
        let mut received = 0;
        let exit = loop {
            let mut buffer = [0; 64 << 10];
            received += socket.read(&mut buffer).unwrap();
            if let Some(exit) = relays.ready(TERMINAL_OUTPUT, &poller) {
                break exit;
            }
        };
        assert_eq!(exit, (CLIENT, Ok(3)));
        rustix::io::ioctl_fionbio(&socket, true).unwrap();
        let mut rest = Vec::new();
        let _ = socket.read_to_end(&mut rest);
        assert_eq!(received + rest.len(), written);
    }
}
