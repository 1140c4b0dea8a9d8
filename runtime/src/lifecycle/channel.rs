//! The talk between a process being made into a container's and its parent, rrun.
//!
//! One socket pair, one message a record. It closes by itself when the program is executed
//! (close-on-exec) or the process dies, so that neither side waits for a dead one.

use std::os::fd::{AsFd, BorrowedFd, OwnedFd};

use rustix::io::Errno;
use rustix::net::{AddressFamily, RecvFlags, SendFlags, SocketFlags, SocketType, socketpair};

use crate::error::{Context, Error, Result, refuse};
use crate::seccomp::Report;
use crate::sys::unix_socket::{receive_descriptor, send_descriptor};

/// The longest sentence that is carried.
const MESSAGE_BYTES: usize = 16 << 10;

const NEEDS_PARENT: u8 = b'M';
const RUN_HOOKS: u8 = b'H';
const TERMINAL: u8 = b'T';
const READY: u8 = b'R';
const CLONED: u8 = b'B';
const FILTERED: u8 = b'S';
const FAILED: u8 = b'F';
const GO_ON: u8 = b'G';

/// What the new process has to say.
pub(crate) enum ChildMessage {
    /// From an intermediate process: the first process, which it made as its sibling.
    Cloned(i32),
    /// It is in its namespaces and waits for what only the host's side can do: the mappings
    /// of a user namespace and what that has no right to, network devices, resctrl.
    NeedsParent,
    /// All is mounted, the old root still there; it waits for the hooks to be run.
    RunHooks,
    /// The master side of its terminal.
    Terminal(OwnedFd),
    /// Nothing is left to do but to execute the program.
    Ready,
    /// As `Ready`, but a filter follows: the process reports everything else in the shared page.
    Filtered(Report),
    /// It could not go on.
    Failed(Error),
    /// It executed the program, or died.
    Closed,
}

/// One end of the socket pair.
pub(crate) struct Channel {
    fd: OwnedFd,
}

/// Parent's end, child's end.
pub(crate) fn pair() -> Result<(Channel, Channel)> {
    let (parent, child) = socketpair(
        AddressFamily::UNIX,
        SocketType::SEQPACKET,
        SocketFlags::CLOEXEC,
        None,
    )
    .doing(|| "make a socket pair")?;
    Ok((Channel { fd: parent }, Channel { fd: child }))
}

impl AsFd for Channel {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.fd.as_fd()
    }
}

impl Channel {
    fn send(&self, message: &[u8]) -> Result<()> {
        rustix::net::send(&self.fd, message, SendFlags::NOSIGNAL)
            .doing(|| "report to the parent process")?;
        Ok(())
    }

    /// From the child: asks, and waits for the answer.
    fn request(&self, request: u8) -> Result<()> {
        self.send(&[request])?;
        self.wait_for_answer()
    }

    fn wait_for_answer(&self) -> Result<()> {
        let mut answer = [0u8; 1];
        loop {
            match rustix::net::recv(&self.fd, &mut answer, RecvFlags::empty()) {
                Ok((_, 1)) if answer == [GO_ON] => return Ok(()),
                Err(Errno::INTR) => {}
                Ok(_) => refuse!("the parent process is gone"),
                Err(errno) => return Err(errno).doing(|| "wait for the parent process"),
            }
        }
    }

    pub(crate) fn cloned(&self, pid: i32) -> Result<()> {
        let [a, b, c, d] = pid.to_ne_bytes();
        self.send(&[CLONED, a, b, c, d])
    }

    pub(crate) fn wait_for_parent(&self) -> Result<()> {
        self.request(NEEDS_PARENT)
    }

    pub(crate) fn wait_for_hooks(&self) -> Result<()> {
        self.request(RUN_HOOKS)
    }

    /// Hands the shared page to the parent. The filter that is loaded next may forbid this process
    /// to send messages.
    pub(crate) fn send_page(&self, page: BorrowedFd<'_>) -> Result<()> {
        send_descriptor(self.fd.as_fd(), page, &[FILTERED])
            .doing(|| "hand the shared page to the parent process")
    }

    pub(crate) fn send_ready(&self) -> Result<()> {
        self.send(&[READY])
    }

    pub(crate) fn send_terminal(&self, master: BorrowedFd<'_>) -> Result<()> {
        send_descriptor(self.fd.as_fd(), master, &[TERMINAL])
            .doing(|| "hand the terminal to the parent process")
    }

    pub(crate) fn send_error(&self, error: &Error) {
        let mut message = vec![FAILED];
        message.extend(error.to_string().bytes().take(MESSAGE_BYTES - 1));
        // If nobody listens, nobody wants to know.
        let _ = self.send(&message);
    }

    /// From the parent: the answer to a question.
    pub(crate) fn answer(&self) -> Result<()> {
        rustix::net::send(&self.fd, &[GO_ON], SendFlags::NOSIGNAL)
            .doing(|| "answer the container's first process")?;
        Ok(())
    }

    /// From the parent: the next message.
    pub(crate) fn receive(&self) -> Result<ChildMessage> {
        let mut buffer = vec![0u8; MESSAGE_BYTES];
        let (length, descriptor) = match receive_descriptor(self.fd.as_fd(), &mut buffer) {
            Err(Errno::CONNRESET) => return Ok(ChildMessage::Closed),
            result => result.doing(|| "wait for the container's first process")?,
        };
        let message = buffer.get(..length).unwrap_or_default();
        Ok(match (message, descriptor) {
            ([], _) => ChildMessage::Closed,
            ([CLONED, a, b, c, d], _) => ChildMessage::Cloned(i32::from_ne_bytes([*a, *b, *c, *d])),
            ([NEEDS_PARENT], _) => ChildMessage::NeedsParent,
            ([RUN_HOOKS], _) => ChildMessage::RunHooks,
            ([READY], _) => ChildMessage::Ready,
            ([TERMINAL], Some(master)) => ChildMessage::Terminal(master),
            ([FILTERED], Some(page)) => ChildMessage::Filtered(Report::new(page)),
            ([FAILED, sentence @ ..], _) => {
                ChildMessage::Failed(Error::new(String::from_utf8_lossy(sentence)))
            }
            _ => refuse!("the container's first process sent what it can not have sent"),
        })
    }
}

/// Sends a process's descriptor away as runc does, whose message says how it was made:
/// `standard` for a container's first process, `setns` for one of `exec`.
pub(crate) fn send_pidfd(socket: &OwnedFd, pidfd: &OwnedFd, made: &str) -> Result<()> {
    send_descriptor(socket.as_fd(), pidfd.as_fd(), made.as_bytes())
        .doing(|| "send the process's descriptor over --pidfd-socket")
}
