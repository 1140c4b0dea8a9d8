//! A container's output: read when it comes, and passed on to its log and to attached clients.

use std::os::fd::{AsFd, BorrowedFd, OwnedFd};

use super::connection::ClientId;
use super::container_log::{ContainerLog, ReadBuffer, ReadOutcome, Stream};
use super::effect::Effect;
use super::follower::Follower;
use rrun_protocol::{Failure, FailureKind, Reply};

/// How often each stream is read at a container's end: a pipe holds much less, and a process
/// outside the container that writes on must not keep us.
const MAX_DRAIN_READS: usize = 64;

/// A read of this much or more found a pipe nearly full, which holds 64 KiB at first.
pub(crate) const LARGE_READ_BYTES: usize = 48 << 10;

/// The size of a pipe that was found nearly full: the most that pipe(7) gives for the asking. The
/// container's writer goes on while we leave it alone, and pays for the pages itself.
const ENLARGED_PIPE_BYTES: usize = 1 << 20;

/// The container's output and where it goes.
pub(crate) struct Output {
    log: ContainerLog,
    /// A pipe, or a terminal's master.
    stdout: Option<OwnedFd>,
    stderr: Option<OwnedFd>,
    /// The streams that are not watched while the log takes nothing.
    paused: Vec<Stream>,
    /// The streams that have been given a larger pipe, if they could be.
    enlarged: Vec<Stream>,
    followers: Vec<Follower>,
    /// The clients that wait for the log to be opened again.
    reopening: Vec<ClientId>,
}

/// What became of a stream that was ready.
pub(crate) enum StreamState {
    /// This many bytes were read; there may be more.
    Read(usize),
    /// There is nothing now, or nothing any more.
    Idle,
    /// The log takes nothing. The stream is not to be watched until [`Output::resume`].
    Paused,
}

impl Output {
    /// Without streams yet.
    pub(crate) fn new(log: ContainerLog) -> Self {
        Output {
            log,
            stdout: None,
            stderr: None,
            paused: Vec::new(),
            enlarged: Vec::new(),
            followers: Vec::new(),
            reopening: Vec::new(),
        }
    }

    /// Our ends of the container's pipes, which do not block.
    pub(crate) fn set_pipes(&mut self, stdout: OwnedFd, stderr: OwnedFd) {
        (self.stdout, self.stderr) = (Some(stdout), Some(stderr));
    }

    /// The master of the container's terminal, which does not block.
    pub(crate) fn set_terminal(&mut self, master: OwnedFd) {
        self.stdout = Some(master);
    }

    /// The container's terminal, if it has one: it is in stdout's place.
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

    /// Reads from a stream that is ready.
    pub(crate) fn ready(&mut self, stream: Stream, buffer: &mut ReadBuffer) -> StreamState {
        if !self.log.has_room() {
            self.paused.push(stream);
            return StreamState::Paused;
        }
        match self.pump(stream, buffer) {
            ReadOutcome::Data => StreamState::Read(buffer.last_read().len()),
            ReadOutcome::Empty => StreamState::Idle,
            ReadOutcome::End => {
                self.close(stream);
                StreamState::Idle
            }
        }
    }

    /// The streams to watch again, once there is room in the log.
    pub(crate) fn resume(&mut self) -> Vec<Stream> {
        if self.paused.is_empty() || !self.log.has_room() {
            return Vec::new();
        }
        std::mem::take(&mut self.paused)
    }

    /// Reads from a stream once, for the log and for those that follow.
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
            // A terminal has no size, and some nodes allow no more than there is.
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

    /// Reads what is there, and closes both streams.
    pub(crate) fn drain(&mut self, buffer: &mut ReadBuffer) {
        for stream in [Stream::Stdout, Stream::Stderr] {
            for _ in 0..MAX_DRAIN_READS {
                if self.pump(stream, buffer) != ReadOutcome::Data {
                    break;
                }
            }
            self.log.finish(stream);
        }
        (self.stdout, self.stderr) = (None, None);
        self.paused.clear();
    }

    pub(crate) fn follow(&mut self, follower: Follower) {
        self.followers.push(follower);
    }

    pub(crate) fn unfollow(&mut self, client: ClientId) {
        self.followers
            .retain(|follower| follower.client() != client);
    }

    /// The container writes no more: closes the followers' pipes, and returns who they were and
    /// what they need to know of the streams' ends.
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

    /// Why the log could not be opened, if that is known. Where the file system hangs it is not,
    /// and the container waits for its log with its first line.
    pub(crate) fn log_failure(&self, id: &str) -> Option<Failure> {
        let file = self.log.file()?;
        let unfit = file.opened()?.err()?;
        let path = file.path().display();
        Some(Failure {
            kind: FailureKind::Monitor,
            message: format!("open the log {path} of container {id}: {unfit}"),
        })
    }

    /// Has the log opened again at its path; [`Output::log_reopened`] has the answer.
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

    /// Answers those who wait for the log to be opened again, if it has been.
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
            .map(|unfit| format!("open the log {path} of container {id} again: {unfit}"));
        let clients = std::mem::take(&mut self.reopening).into_iter();
        clients
            .map(|client| match &failure {
                None => Effect::Reply(client, Reply::Done),
                Some(message) => Effect::fail(client, FailureKind::Monitor, message.as_str()),
            })
            .collect()
    }
}
