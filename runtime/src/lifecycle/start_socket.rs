//! The socket at which a created container waits for `start`.
//!
//! The container's first process listens on a unix socket in the container's directory, and `start`
//! connects to this socket. runc and crun use a FIFO instead. A socket has three advantages. First,
//! a connection to a dead process fails. Second, the first process accepts only one of two
//! concurrent `start` commands. Third, the first process can report an execution error over the
//! connection of `start`. In the first process, the connection's descriptor is marked
//! close-on-exec. So if the execution succeeds, the kernel closes the connection.

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
/// The maximum size of a message between `start` and the first process, in bytes.
const MESSAGE_BYTES: usize = 16 << 10;

fn socket(flags: SocketFlags) -> Result<OwnedFd> {
    let flags = flags | SocketFlags::CLOEXEC;
    socket_with(AddressFamily::UNIX, SocketType::SEQPACKET, flags, None)
        .doing(|| "create a unix socket")
}

/// Creates the start socket in a container's directory. The socket first gets the name
/// [`START_SOCKET_PENDING`], and `start` does not find the socket under this name. Later,
/// [`publish`] renames the socket.
pub(crate) fn listen(directory: &Path) -> Result<OwnedFd> {
    let socket = socket(SocketFlags::empty())?;
    at_address(directory, START_SOCKET_PENDING, |address| {
        bind(&socket, address)
    })
    .and_then(|()| rustix::net::listen(&socket, 8))
    .doing(|| {
        format!(
            "create socket {}",
            directory.join(START_SOCKET_PENDING).display()
        )
    })?;
    Ok(socket)
}

/// Gives the start socket its final name, so that `start` can find it. The first process must
/// already be waiting at the socket. Otherwise, a `start` command could connect and wait without a
/// time limit.
pub(crate) fn publish(dir: &ContainerDir) -> Result<()> {
    rustix::fs::renameat(dir, START_SOCKET_PENDING, dir, START_SOCKET).doing(|| {
        format!(
            "rename the start socket to {}",
            dir.path().join(START_SOCKET).display()
        )
    })
}

/// Returns whether a process waits at the start socket in the container's directory `directory`.
/// This function connects to the socket and disconnects immediately. The waiting process ignores a
/// client that disconnects before it requests the start.
pub(crate) fn is_waiting(directory: &Path) -> bool {
    let Ok(socket) = socket(SocketFlags::NONBLOCK) else {
        return true;
    };
    let connected = at_address(directory, START_SOCKET, |address| connect(&socket, address));
    !matches!(connected, Err(Errno::CONNREFUSED | Errno::NOENT))
}

/// Waits until a `start` command connects and requests the start, and returns the connection to
/// this command. The container's first process calls this function.
pub(crate) fn accept(socket: BorrowedFd<'_>) -> Result<OwnedFd> {
    loop {
        let connection = match acceptfrom_with(socket, SocketFlags::CLOEXEC) {
            Ok((connection, _)) => connection,
            Err(Errno::INTR | Errno::CONNABORTED) => continue,
            Err(errno) => return Err(errno).doing(|| "wait until `rrun start` connects"),
        };
        let mut word = [0u8; 1];
        let request = recv(&connection, &mut word, RecvFlags::empty());
        // Ignore a `start` command that disconnected before it requested the start.
        if matches!(request, Ok((_, 1))) && word == *START {
            let _ = send(&connection, &[STARTING], SendFlags::NOSIGNAL);
            return Ok(connection);
        }
    }
}

/// Reports to `start` why the program could not be executed. The container's first process calls
/// this function.
pub(crate) fn send_error(connection: BorrowedFd<'_>, error: &Error) {
    let mut message = vec![FAILED];
    message.extend(error.to_string().bytes().take(MESSAGE_BYTES - 1));
    let _ = send(connection, &message, SendFlags::NOSIGNAL);
}

/// Sends the shared page to `start`. After the container's first process has loaded its seccomp
/// filter, it reports errors through this page. The filter can forbid the process to send messages.
pub(crate) fn send_page(connection: BorrowedFd<'_>, page: BorrowedFd<'_>) -> Result<()> {
    send_descriptor(connection, page, &[FILTERED]).doing(|| "send the shared page to `rrun start`")
}

/// Requests that the first process execute the container's program, and waits for this execution.
/// The command `start` calls this function. When the first process is about to load its seccomp
/// filter, this function calls `serve_agent`.
///
/// # Errors
/// Fails if the container does not wait for `start`, or if the program could not be executed.
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
            // The first process is dead, or it has accepted another `start` command that died
            // before it removed the socket.
            let _ = rustix::fs::unlink(&path);
            return Err(not_created());
        }
        Err(errno) => return Err(errno).doing(|| format!("connect to {}", path.display())),
    }
    send(&socket, START, SendFlags::NOSIGNAL).map_err(|_| not_created())?;
    let mut buffer = vec![0u8; MESSAGE_BYTES];
    let mut accepted = false;
    let mut report = None;
    loop {
        let (length, descriptor) = match receive_descriptor(socket.as_fd(), &mut buffer) {
            // The first process closed the connection before it had read the request.
            Err(Errno::CONNRESET) => (0, None),
            received => {
                received.doing(|| "wait for a message from the container's first process")?
            }
        };
        match (buffer.get(..length).unwrap_or_default(), descriptor) {
            ([STARTING], _) if !accepted => {
                accepted = true;
                let _ = rustix::fs::unlink(&path);
            }
            ([FILTERED], Some(page)) => serve_agent(report.insert(Report::new(page)))?,
            ([FAILED, sentence @ ..], _) => {
                return Err(Error::new(String::from_utf8_lossy(sentence)));
            }
            // The first process closed the connection. If the first process had accepted the
            // request, it has executed the program, or has left an error in the shared page.
            ([], _) if accepted => return report.as_ref().map_or(Ok(()), Report::verdict),
            ([], _) => return Err(not_created()),
            _ => refuse!("the container's first process sent an unknown message"),
        }
    }
}
