//! The channel between rrun and a child process that is about to become a process of a container.
//!
//! The channel is a socket pair of type SOCK_SEQPACKET, so each message arrives as one packet. The
//! kernel closes the child's end when the child executes its program (close-on-exec). If the child
//! or the parent dies, the kernel closes the end of the dead process. Therefore neither process
//! waits for a peer that no longer exists.

use std::os::fd::{AsFd, BorrowedFd, OwnedFd};

use rustix::io::{Errno, retry_on_intr};
use rustix::net::{AddressFamily, RecvFlags, SendFlags, SocketFlags, SocketType, socketpair};

use crate::error::{Context, Error, Result, refuse};
use crate::seccomp::Report;
use crate::sys::unix_socket::{
    hand_over, receive_last, receive_pending, send_descriptor, take_over,
};

/// The maximum size of a message on the channel, in bytes.
const MESSAGE_BYTES: usize = 16 << 10;

const NEEDS_PARENT: u8 = b'M';
const NEEDS_ROOT: u8 = b'O';
const RUN_HOOKS: u8 = b'H';
const TERMINAL: u8 = b'T';
const READY: u8 = b'R';
const CLONED: u8 = b'B';
const FILTERED: u8 = b'S';
const FAILED: u8 = b'F';
const CONTINUE: u8 = b'G';

/// A message from the child to its parent.
pub(crate) enum ChildMessage {
    /// The process id of the container's first process. An intermediate process sends this message
    /// after it has created the first process as its sibling (CLONE_PARENT).
    Cloned(i32),
    /// The child is in its namespaces, and waits for its parent. The parent on the host does the
    /// steps that the child has no right to do. These steps write the id mappings of a user
    /// namespace, set the child's limits, move network devices, and create resctrl groups.
    NeedsParent,
    /// The child waits until the parent has attached the container's root in the child's mount
    /// namespace, because the child cannot reach root.path.
    NeedsRoot,
    /// The child has mounted all file systems, but its root is still the host's root. The child
    /// waits until the parent has run the prestart and createRuntime hooks.
    RunHooks,
    /// The master side of the child's terminal.
    Terminal(OwnedFd),
    /// The child has finished every step except the execution of its program.
    Ready,
    /// The child is about to load its seccomp filter and then execute its program. The message
    /// contains the descriptor of a shared page. After the child has loaded the filter, it reports
    /// errors through this page.
    Filtered(Report),
    /// The child failed with this error.
    Failed(Error),
    /// The channel is closed, because the child executed its program or died.
    Closed,
}

/// One end of the channel between rrun and its child.
pub(crate) struct Channel {
    fd: OwnedFd,
}

/// Creates a channel and returns the parent's end and the child's end.
pub(crate) fn pair() -> Result<(Channel, Channel)> {
    let (parent, child) = socketpair(
        AddressFamily::UNIX,
        SocketType::SEQPACKET,
        SocketFlags::CLOEXEC,
        None,
    )
    .doing(|| "create a socket pair")?;
    Ok((Channel { fd: parent }, Channel { fd: child }))
}

impl AsFd for Channel {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.fd.as_fd()
    }
}

impl Channel {
    fn send(&self, message: &[u8]) -> Result<()> {
        retry_on_intr(|| rustix::net::send(&self.fd, message, SendFlags::NOSIGNAL))
            .doing(|| "send a message to the parent process")?;
        Ok(())
    }

    /// Sends a request from the child to the parent, and waits for the parent's answer.
    fn request(&self, request: u8) -> Result<()> {
        self.send(&[request])?;
        self.wait_for_answer()
    }

    fn wait_for_answer(&self) -> Result<()> {
        let mut answer = [0u8; 1];
        loop {
            match rustix::net::recv(&self.fd, &mut answer, RecvFlags::empty()) {
                Ok((_, 1)) if answer == [CONTINUE] => return Ok(()),
                Err(Errno::INTR) => {}
                Ok(_) => refuse!("the parent process has exited"),
                Err(errno) => {
                    return Err(errno).doing(|| "wait for the answer of the parent process");
                }
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

    pub(crate) fn wait_for_root(&self) -> Result<()> {
        self.request(NEEDS_ROOT)
    }

    pub(crate) fn wait_for_hooks(&self) -> Result<()> {
        self.request(RUN_HOOKS)
    }

    /// Sends the shared page to the parent. After the child has loaded its seccomp filter, it
    /// reports errors through this page. The filter can forbid the child to send messages.
    pub(crate) fn send_page(&self, page: BorrowedFd<'_>) -> Result<()> {
        hand_over(self.fd.as_fd(), page, FILTERED)
            .doing(|| "send the shared page to the parent process")
    }

    pub(crate) fn send_ready(&self) -> Result<()> {
        self.send(&[READY])
    }

    pub(crate) fn send_terminal(&self, master: BorrowedFd<'_>) -> Result<()> {
        hand_over(self.fd.as_fd(), master, TERMINAL)
            .doing(|| "send the terminal to the parent process")
    }

    pub(crate) fn send_error(&self, error: &Error) {
        let mut message = vec![FAILED];
        message.extend(error.to_string().bytes().take(MESSAGE_BYTES - 1));
        // A failed send means that the parent is dead. The failure is ignored, because no process
        // can report the error any more.
        let _ = self.send(&message);
    }

    /// Sends the parent's answer to a request from the child. If the child is dead, this function
    /// does not fail, because the child's last message contains the reason of its death.
    pub(crate) fn answer(&self) -> Result<()> {
        match retry_on_intr(|| rustix::net::send(&self.fd, &[CONTINUE], SendFlags::NOSIGNAL)) {
            Err(Errno::PIPE | Errno::CONNRESET) => Ok(()),
            sent => sent
                .map(drop)
                .doing(|| "answer the request of the container's process"),
        }
    }

    /// Returns the child's error, if the child has already sent it.
    pub(crate) fn pending_failure(&self) -> Option<Error> {
        let mut buffer = vec![0u8; MESSAGE_BYTES];
        let (length, _) = receive_pending(self.fd.as_fd(), &mut buffer)?;
        match buffer.get(..length)? {
            [FAILED, sentence @ ..] => Some(Error::new(String::from_utf8_lossy(sentence))),
            _ => None,
        }
    }

    /// Receives the next message from the child. `child` is the child's pidfd.
    pub(crate) fn receive(&self, child: &OwnedFd) -> Result<ChildMessage> {
        let mut buffer = vec![0u8; MESSAGE_BYTES];
        let (length, descriptor) = receive_last(self.fd.as_fd(), &mut buffer)
            .doing(|| "wait for a message from the container's process")?;
        let take = |number| take_over(self.fd.as_fd(), child.as_fd(), number);
        let message = buffer.get(..length).unwrap_or_default();
        Ok(match (message, descriptor) {
            ([], _) => ChildMessage::Closed,
            ([CLONED, a, b, c, d], _) => ChildMessage::Cloned(i32::from_ne_bytes([*a, *b, *c, *d])),
            ([NEEDS_PARENT], _) => ChildMessage::NeedsParent,
            ([NEEDS_ROOT], _) => ChildMessage::NeedsRoot,
            ([RUN_HOOKS], _) => ChildMessage::RunHooks,
            ([READY], _) => ChildMessage::Ready,
            ([TERMINAL], Some(master)) => ChildMessage::Terminal(master),
            ([TERMINAL, a, b, c, d], None) => ChildMessage::Terminal(take([*a, *b, *c, *d])?),
            ([FILTERED], Some(page)) => ChildMessage::Filtered(Report::new(page)),
            ([FILTERED, a, b, c, d], None) => {
                ChildMessage::Filtered(Report::new(take([*a, *b, *c, *d])?))
            }
            ([FAILED, sentence @ ..], _) => {
                ChildMessage::Failed(Error::new(String::from_utf8_lossy(sentence)))
            }
            _ => refuse!("the container's process sent an unknown message"),
        })
    }
}

/// Sends a process's pidfd over the socket that --pidfd-socket names. `method` is the message's
/// text. As in runc's protocol for this socket, the text is `standard` for a container's first
/// process, and `setns` for a process that `exec` creates.
pub(crate) fn send_pidfd(socket: &OwnedFd, pidfd: &OwnedFd, method: &str) -> Result<()> {
    send_descriptor(socket.as_fd(), pidfd.as_fd(), method.as_bytes())
        .map(drop)
        .doing(|| "send the pidfd of the process over --pidfd-socket")
}
