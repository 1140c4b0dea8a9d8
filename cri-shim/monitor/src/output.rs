//! A container's output. The monitor reads the output when it arrives, and passes it to the log and
//! to attached clients.

use std::os::fd::{AsFd, BorrowedFd, OwnedFd};

use rustix::pty::{OpenptFlags, ioctl_tiocgptpeer};

use super::connection::ClientId;
use super::container_log::{ContainerLog, ReadBuffer, ReadOutcome, Stream};
use super::effect::Effect;
use super::follower::Follower;
use rrun_protocol::{Failure, FailureKind, Reply};

/// The maximum number of reads from each stream after a container has exited. With 64 KiB for each
/// read, 64 reads are more than enough to empty a pipe. A process outside the container could
/// continue to write to the pipe. Without this limit, the monitor would then read from the pipe for
/// ever.
const MAX_DRAIN_READS: usize = 64;

/// If a read returns at least this many bytes, the pipe was nearly full. A new pipe has a capacity
/// of 64 KiB.
pub(crate) const LARGE_READ_BYTES: usize = 48 << 10;

/// The capacity in bytes to which the monitor enlarges a nearly full pipe. Without privileges, 1
/// MiB is the maximum (pipe(7)). With a larger pipe, the container can continue to write while the
/// monitor delays reading. The kernel charges the pipe's pages to the container's memory.
const ENLARGED_PIPE_BYTES: usize = 1 << 20;

/// The container's output streams, and the log and the clients that receive the output.
pub(crate) struct Output {
    log: ContainerLog,
    /// The reading end of the stdout pipe, or the master of the container's terminal.
    stdout: Option<OwnedFd>,
    stderr: Option<OwnedFd>,
    /// The other side of the container's terminal. `None` until all processes have closed it for the
    /// first time.
    slave: Option<OwnedFd>,
    /// The streams that the monitor does not watch, because the log accepts no more output.
    paused: Vec<Stream>,
    /// The number of reads from the stream that [`Output::drain`] reads at present. `None` before
    /// the first call of this function.
    drain_reads: Option<usize>,
    /// The streams whose pipe the monitor has already tried to enlarge.
    enlarged: Vec<Stream>,
    followers: Vec<Follower>,
    /// The clients that wait until the log has been reopened.
    reopening: Vec<ClientId>,
}

/// The result of [`Output::ready`] for a stream.
pub(crate) enum StreamState {
    /// The number of bytes that were read. More bytes may be available.
    Read(usize),
    /// No bytes are available now, or the stream has ended.
    Idle,
    /// The log accepts no more output. The monitor must not watch the stream until
    /// [`Output::resume`] returns it.
    Paused,
}

impl Output {
    /// Creates a container's output. The output has no streams yet.
    pub(crate) fn new(log: ContainerLog) -> Self {
        Output {
            log,
            stdout: None,
            stderr: None,
            slave: None,
            paused: Vec::new(),
            drain_reads: None,
            enlarged: Vec::new(),
            followers: Vec::new(),
            reopening: Vec::new(),
        }
    }

    /// Sets the monitor's ends of the container's pipes. These ends must be non-blocking.
    pub(crate) fn set_pipes(&mut self, stdout: OwnedFd, stderr: OwnedFd) {
        (self.stdout, self.stderr) = (Some(stdout), Some(stderr));
    }

    /// Sets the master of the container's terminal. The master must be non-blocking.
    pub(crate) fn set_terminal(&mut self, master: OwnedFd) {
        self.stdout = Some(master);
    }

    /// Returns the master of the container's terminal, which is stored in place of the stdout pipe.
    /// The caller must check that the container has a terminal.
    pub(crate) fn terminal(&self) -> Option<BorrowedFd<'_>> {
        self.stream(Stream::Stdout)
    }

    pub(crate) fn stream(&self, stream: Stream) -> Option<BorrowedFd<'_>> {
        let fd = match stream {
            Stream::Stdout => &self.stdout,
            Stream::Stderr => &self.stderr,
        };
        fd.as_ref().map(AsFd::as_fd)
    }

    /// Reads from a stream that epoll has reported as readable.
    pub(crate) fn ready(&mut self, stream: Stream, buffer: &mut ReadBuffer) -> StreamState {
        if self.drain_reads.is_some() {
            return StreamState::Paused;
        }
        if !self.log.accepts(stream) {
            self.paused.push(stream);
            return StreamState::Paused;
        }
        match self.pump(stream, buffer) {
            ReadOutcome::Data if self.log.has_lines(stream) && !self.log.accepts(stream) => {
                self.paused.push(stream);
                StreamState::Paused
            }
            ReadOutcome::Data => StreamState::Read(buffer.last_read().len()),
            ReadOutcome::Empty => StreamState::Idle,
            ReadOutcome::HungUp if self.hold_terminal_open(stream) => StreamState::Idle,
            ReadOutcome::End | ReadOutcome::HungUp => {
                self.close(stream);
                StreamState::Idle
            }
        }
    }

    /// Opens the other side of the terminal `stream`, and keeps it open. As long as no process has
    /// the other side open, reads fail and epoll permanently reports a hang-up. The container's
    /// processes can close their terminal and open it again later, or hang it up with vhangup(2).
    /// Returns false if `stream` is not a terminal, or if the other side can't be opened.
    fn hold_terminal_open(&mut self, stream: Stream) -> bool {
        let flags = OpenptFlags::RDWR | OpenptFlags::NOCTTY | OpenptFlags::CLOEXEC;
        let master = self.stream(stream);
        let slave = master.and_then(|master| ioctl_tiocgptpeer(master, flags).ok());
        let is_open = slave.is_some();
        self.slave = slave;
        is_open
    }

    /// Returns the streams that can be watched again because the log has room.
    pub(crate) fn resume(&mut self) -> Vec<Stream> {
        let paused = std::mem::take(&mut self.paused);
        let accepts = |stream: &Stream| self.log.accepts(*stream);
        let (resumed, paused) = paused.into_iter().partition(accepts);
        self.paused = paused;
        resumed
    }

    /// Reads from a stream once, and passes the output to the log and to the followers.
    fn pump(&mut self, stream: Stream, buffer: &mut ReadBuffer) -> ReadOutcome {
        let fd = match stream {
            Stream::Stdout => &self.stdout,
            Stream::Stderr => &self.stderr,
        };
        let Some(fd) = fd else {
            return ReadOutcome::End;
        };
        let outcome = self.log.pump(fd, stream, buffer);
        if outcome != ReadOutcome::Data {
            return outcome;
        }
        if buffer.last_read().len() >= LARGE_READ_BYTES && !self.enlarged.contains(&stream) {
            self.enlarged.push(stream);
            // A failure is ignored. The stream can be a terminal, which can't be enlarged. A node
            // can also forbid larger pipes.
            let _ = rustix::pipe::fcntl_setpipe_size(fd, ENLARGED_PIPE_BYTES);
        }
        for follower in &mut self.followers {
            follower.write(stream, buffer.last_read());
        }
        outcome
    }

    fn close(&mut self, stream: Stream) {
        match stream {
            Stream::Stdout => self.stdout = None,
            Stream::Stderr => self.stderr = None,
        }
    }

    /// Reads the remaining output and closes both streams. Returns false if the log does not accept
    /// all remaining output now. The rest of the output then stays in the pipes, and the log's
    /// thread wakes the event loop, which must call this function again.
    pub(crate) fn drain(&mut self, buffer: &mut ReadBuffer) -> bool {
        self.slave = None;
        self.paused.clear();
        let mut reads = self.drain_reads.unwrap_or_default();
        for stream in [Stream::Stdout, Stream::Stderr] {
            while self.stream(stream).is_some() {
                if !self.log.accepts(stream) {
                    self.drain_reads = Some(reads);
                    return false;
                }
                reads += 1;
                if reads > MAX_DRAIN_READS || self.pump(stream, buffer) != ReadOutcome::Data {
                    self.close(stream);
                }
            }
            self.log.finish(stream);
            reads = 0;
        }
        self.drain_reads = Some(0);
        true
    }

    /// Continues [`Output::drain`] for a container that has exited, and closes the log when all output
    /// has been written to it. The log's thread then ends, because a pod can have many containers
    /// that have exited. If the output has not been written yet, the log's thread wakes the event
    /// loop, which must call this function again.
    pub(crate) fn close_written_log(&mut self, buffer: &mut ReadBuffer) {
        if self.reopening.is_empty() && self.drain(buffer) && self.log.is_written() {
            self.log = ContainerLog::default();
        }
    }

    pub(crate) fn replace_log(&mut self, log: ContainerLog) {
        self.log = log;
    }

    pub(crate) fn follow(&mut self, follower: Follower) {
        self.followers.push(follower);
    }

    pub(crate) fn unfollow(&mut self, client: ClientId) {
        self.followers
            .retain(|follower| follower.client() != client);
    }

    /// Closes the followers' pipes after the container's last output. Returns the clients of the
    /// followers, each with the message that reports the end of its streams.
    pub(crate) fn end_followers(&mut self) -> Vec<(ClientId, Reply)> {
        let followers = std::mem::take(&mut self.followers);
        followers
            .into_iter()
            .map(|follower| (follower.client(), follower.end()))
            .collect()
    }

    // The log.

    pub(crate) fn log(&self) -> &ContainerLog {
        &self.log
    }

    /// Returns the failure that occurred when the monitor opened the container's log. Returns
    /// `None` if the log is open. Also returns `None` while the log's thread is still opening the
    /// log, for example because the file system hangs. During this time, the container's output
    /// waits in memory.
    pub(crate) fn log_failure(&self, id: &str) -> Option<Failure> {
        let file = self.log.file()?;
        let unfit = file.opened()?.err()?;
        let path = file.path().display();
        Some(Failure {
            kind: FailureKind::Monitor,
            message: format!("open the log {path} of container {id}: {unfit}"),
        })
    }

    /// Starts to reopen the log at its path. [`Output::log_reopened`] answers the client later.
    pub(crate) fn reopen_log(&mut self, client: ClientId) -> Vec<Effect> {
        match self.log.file() {
            None => vec![Effect::Reply(client, Reply::Done)],
            Some(file) => {
                file.reopen();
                self.reopening.push(client);
                Vec::new()
            }
        }
    }

    /// Answers the clients that requested the reopening of the log. Returns no answers while the
    /// log's thread is still reopening the log.
    pub(crate) fn log_reopened(&mut self, id: &str) -> Vec<Effect> {
        if self.reopening.is_empty() {
            return Vec::new();
        }
        let Some(file) = self.log.file() else {
            return Vec::new();
        };
        let Some(reopened) = file.reopened() else {
            return Vec::new();
        };
        let path = file.path().display();
        let failure = reopened
            .err()
            .map(|unfit| format!("reopen the log {path} of container {id}: {unfit}"));
        let clients = std::mem::take(&mut self.reopening).into_iter();
        clients
            .map(|client| match &failure {
                None => Effect::Reply(client, Reply::Done),
                Some(message) => Effect::fail(client, FailureKind::Monitor, message.as_str()),
            })
            .collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use rustix::pty::{openpt, unlockpt};

    fn open(master: impl AsFd) -> OwnedFd {
        let flags = OpenptFlags::RDWR | OpenptFlags::NOCTTY | OpenptFlags::CLOEXEC;
        ioctl_tiocgptpeer(master, flags).unwrap()
    }

    #[test]
    fn the_output_of_a_terminal_that_was_closed_and_opened_again_is_read() {
        let master = openpt(OpenptFlags::RDWR | OpenptFlags::NOCTTY).unwrap();
        unlockpt(&master).unwrap();
        rustix::io::ioctl_fionbio(&master, true).unwrap();
        let slave = open(&master);
        let wake = std::sync::Arc::new(std::fs::File::open("/dev/null").unwrap().into());
        let mut output = Output::new(ContainerLog::open(None, &wake).unwrap());
        output.set_terminal(rustix::io::dup(&master).unwrap());
        let mut buffer = ReadBuffer::new();
        let mut read = |output: &mut Output| match output.ready(Stream::Stdout, &mut buffer) {
            StreamState::Read(_) => Some(buffer.last_read().to_owned()),
            _ => None,
        };

        rustix::io::write(&slave, b"one").unwrap();
        assert_eq!(read(&mut output).unwrap(), b"one");
        drop(slave);
        assert!(read(&mut output).is_none());
        assert!(read(&mut output).is_none());
        let slave = open(&master);
        rustix::io::write(&slave, b"two").unwrap();
        assert_eq!(read(&mut output).unwrap(), b"two");
        rustix::io::write(&slave, b"three").unwrap();
        drop(slave);
        output.drain(&mut buffer);
        assert_eq!(buffer.last_read(), b"three");
        assert!(output.terminal().is_none());
    }

    #[test]
    fn a_pipe_without_writers_is_closed() {
        let (stdout, writer) = rustix::pipe::pipe().unwrap();
        let (stderr, _open) = rustix::pipe::pipe().unwrap();
        let wake = std::sync::Arc::new(std::fs::File::open("/dev/null").unwrap().into());
        let mut output = Output::new(ContainerLog::open(None, &wake).unwrap());
        output.set_pipes(stdout, stderr);
        drop(writer);
        output.ready(Stream::Stdout, &mut ReadBuffer::new());
        assert!(output.stream(Stream::Stdout).is_none());
        assert!(output.stream(Stream::Stderr).is_some());
    }
}
