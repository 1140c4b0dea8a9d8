//! The socket that a created container waits at for `start`.
//!
//! The container's first process listens at a unix socket in the container's directory; `start`
//! connects to it. runc and crun use a FIFO. A socket reports more: nobody can connect to a process
//! that is gone, only one of two starters is accepted, and the same connection carries the error
//! back if the program cannot be executed. If it can, close-on-exec closes the connection.

use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::path::Path;

use rustix::io::Errno;
use rustix::net::{
    AddressFamily, RecvFlags, SendFlags, SocketFlags, SocketType, acceptfrom_with, bind, connect,
    recv, send, socket_with,
};

use crate::error::{Context, Error, Result, refuse};
use crate::lifecycle::container_dir::{ContainerDir, START_SOCKET, START_SOCKET_PENDING};
use crate::seccomp::Report;
use crate::sys::unix_socket::{receive_descriptor, send_descriptor};
use rrun_kernel::unix_socket::at_address;

const START: &[u8] = b"G";
const STARTING: u8 = b'L';
const FAILED: u8 = b'F';
const FILTERED: u8 = b'S';
/// Longest error that is carried.
const MESSAGE_BYTES: usize = 16 << 10;

fn socket(flags: SocketFlags) -> Result<OwnedFd> {
    let flags = flags | SocketFlags::CLOEXEC;
    socket_with(AddressFamily::UNIX, SocketType::SEQPACKET, flags, None)
        .doing(|| "make a unix socket")
}

/// Makes the socket in a container's directory, under a name where no starter looks for it yet.
pub(crate) fn listen(directory: &Path) -> Result<OwnedFd> {
    let socket = socket(SocketFlags::empty())?;
    at_address(directory, START_SOCKET_PENDING, |address| {
        bind(&socket, address)
    })
    .and_then(|()| rustix::net::listen(&socket, 8))
    .doing(|| {
        format!(
            "make socket {}",
            directory.join(START_SOCKET_PENDING).display()
        )
    })?;
    Ok(socket)
}

/// Lets starters find the socket: the container is made, and its first process waits. A starter
/// that connected earlier would have to wait for that, without a bound.
pub(crate) fn publish(dir: &ContainerDir) -> Result<()> {
    rustix::fs::renameat(dir, START_SOCKET_PENDING, dir, START_SOCKET)
        .doing(|| format!("name socket {}", dir.path().join(START_SOCKET).display()))
}

/// Whether a process waits at the socket in this directory. To that process, this connection is a
/// starter that went away.
pub(crate) fn is_waiting(directory: &Path) -> bool {
    let Ok(socket) = socket(SocketFlags::NONBLOCK) else {
        return true;
    };
    let connected = at_address(directory, START_SOCKET, |address| connect(&socket, address));
    !matches!(connected, Err(Errno::CONNREFUSED | Errno::NOENT))
}

/// From the container's first process: waits until a starter is there, and lets it in.
pub(crate) fn accept(socket: BorrowedFd<'_>) -> Result<OwnedFd> {
    loop {
        let starter = match acceptfrom_with(socket, SocketFlags::CLOEXEC) {
            Ok((starter, _)) => starter,
            Err(Errno::INTR | Errno::CONNABORTED) => continue,
            Err(errno) => return Err(errno).doing(|| "wait for start"),
        };
        let mut word = [0u8; 1];
        let request = recv(&starter, &mut word, RecvFlags::empty());
        // A starter that went away before it requested the start has not started anything.
        if matches!(request, Ok((_, 1))) && word == *START {
            let _ = send(&starter, &[STARTING], SendFlags::NOSIGNAL);
            return Ok(starter);
        }
    }
}

/// From the container's first process: tells the starter that it came to nothing.
pub(crate) fn send_error(starter: BorrowedFd<'_>, error: &Error) {
    let mut message = vec![FAILED];
    message.extend(error.to_string().bytes().take(MESSAGE_BYTES - 1));
    let _ = send(starter, &message, SendFlags::NOSIGNAL);
}

/// From the container's first process: hands over the shared page. The filter that is loaded next
/// may forbid this process to send messages.
pub(crate) fn send_page(starter: BorrowedFd<'_>, page: BorrowedFd<'_>) -> Result<()> {
    send_descriptor(starter, page, &[FILTERED]).doing(|| "hand the shared page to start")
}

/// From `start`: makes the first process execute the container's program, and returns when it has
/// done so. Calls `serve_agent` when that process is about to load its filter.
///
/// # Errors
/// The container is not waiting to be started; or what prevented the execution.
pub(crate) fn start(
    directory: &Path,
    id: &str,
    serve_agent: impl Fn(&Report) -> Result<()>,
) -> Result<()> {
    let not_created = || {
        Error::new(format!(
            "cannot start container {id}: it is not in state created"
        ))
    };
    let socket = socket(SocketFlags::empty())?;
    let path = directory.join(START_SOCKET);
    match at_address(directory, START_SOCKET, |address| connect(&socket, address)) {
        Ok(()) => {}
        Err(Errno::NOENT) => return Err(not_created()),
        Err(Errno::CONNREFUSED) => {
            // Its process is gone, or it was started by a starter that died meanwhile.
            let _ = rustix::fs::unlink(&path);
            return Err(not_created());
        }
        Err(errno) => return Err(errno).doing(|| format!("connect to {}", path.display())),
    }
    send(&socket, START, SendFlags::NOSIGNAL).map_err(|_| not_created())?;
    let mut buffer = vec![0u8; MESSAGE_BYTES];
    let mut let_in = false;
    let mut report = None;
    loop {
        let (length, descriptor) = match receive_descriptor(socket.as_fd(), &mut buffer) {
            // Closed, and the process had not read everything.
            Err(Errno::CONNRESET) => (0, None),
            received => received.doing(|| "wait for the container's first process")?,
        };
        match (buffer.get(..length).unwrap_or_default(), descriptor) {
            ([STARTING], _) if !let_in => {
                let_in = true;
                let _ = rustix::fs::unlink(&path);
            }
            ([FILTERED], Some(page)) => serve_agent(report.insert(Report::new(page)))?,
            ([FAILED, sentence @ ..], _) => {
                return Err(Error::new(String::from_utf8_lossy(sentence)));
            }
            // Closed: by executing the program, if it had let us in.
            ([], _) if let_in => return report.as_ref().map_or(Ok(()), Report::verdict),
            ([], _) => return Err(not_created()),
            _ => refuse!("the container's first process sent what it can not have sent"),
        }
    }
}
