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
use std::time::Duration;

use rustix::fs::AtFlags;
use rustix::io::{Errno, retry_on_intr};
use rustix::net::{
    AddressFamily, RecvFlags, SendFlags, SocketFlags, SocketType, acceptfrom_with, bind, connect,
    recv, send, socket_with,
};

use crate::error::{Context, Error, Result, refuse};
use crate::lifecycle::container_dir::{ContainerDir, START_SOCKET, START_SOCKET_PENDING};
use crate::seccomp::Report;
use crate::sys::files::is_socket;
use crate::sys::unix_socket::{hand_over, receive_last, receive_pending, take_over};
use rrun_kernel::unix_socket::at_address;

const START: &[u8] = b"G";
const STARTING: u8 = b'L';
const FAILED: u8 = b'F';
const FILTERED: u8 = b'S';
/// The time that the first process waits before it tries again to accept a connection.
const ACCEPT_PAUSE: Duration = Duration::from_millis(10);
/// The maximum size of a message between `start` and the first process, in bytes.
const MESSAGE_BYTES: usize = 16 << 10;

fn socket(flags: SocketFlags) -> Result<OwnedFd> {
    let flags = flags | SocketFlags::CLOEXEC;
    socket_with(AddressFamily::UNIX, SocketType::SEQPACKET, flags, None)
        .doing(|| "create a unix socket")
}

/// Creates the start socket in a container's directory. The socket first gets the name
/// [`START_SOCKET_PENDING`], and `start` does not find the socket under this name. Later,
/// [`publish`] renames the socket. The first process of `run` does not wait for `start`. Its socket
/// only shows that the container is still being created, until execve(2) closes the socket.
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

/// Removes the start socket of `run`, after the first process has executed the program.
pub(crate) fn remove(dir: &ContainerDir) -> Result<()> {
    match rustix::fs::unlinkat(dir, START_SOCKET_PENDING, AtFlags::empty()) {
        Ok(()) | Err(Errno::NOENT) => Ok(()),
        result => result.doing(|| {
            let path = dir.path().join(START_SOCKET_PENDING);
            format!("remove the start socket {}", path.display())
        }),
    }
}

/// Returns whether the first process of the container in `directory` is still being set up. Until
/// the end of the setup, the first process can be in the host's root.
pub(crate) fn is_pending(directory: &Path) -> Result<bool> {
    Ok(is_socket(&directory.join(START_SOCKET_PENDING))?
        && is_open(directory, START_SOCKET_PENDING)?)
}

/// Returns whether a process waits at the start socket in the container's directory `directory`.
pub(crate) fn is_waiting(directory: &Path) -> Result<bool> {
    is_open(directory, START_SOCKET)
}

/// Returns whether a process has the socket `name` open. This function connects to the socket and
/// disconnects immediately. The waiting process ignores a client that disconnects before it
/// requests the start.
fn is_open(directory: &Path, name: &str) -> Result<bool> {
    let socket = socket(SocketFlags::NONBLOCK)?;
    match at_address(directory, name, |address| connect(&socket, address)) {
        // EAGAIN means that several clients are waiting for the process.
        Ok(()) | Err(Errno::AGAIN) => Ok(true),
        Err(Errno::CONNREFUSED | Errno::NOENT) => Ok(false),
        Err(errno) => Err(errno).doing(|| format!("connect to {}", directory.join(name).display())),
    }
}

/// Waits until a `start` command connects and requests the start, and returns the connection to
/// this command. The container's first process calls this function.
pub(crate) fn accept(socket: BorrowedFd<'_>) -> Result<OwnedFd> {
    loop {
        let connection = match acceptfrom_with(socket, SocketFlags::CLOEXEC) {
            Ok((connection, _)) => connection,
            Err(Errno::INTR | Errno::CONNABORTED) => continue,
            // The host is short of memory or of open files. No process can report this error to the
            // user, so the process tries again.
            Err(Errno::MFILE | Errno::NFILE | Errno::NOBUFS | Errno::NOMEM) => {
                std::thread::sleep(ACCEPT_PAUSE);
                continue;
            }
            Err(errno) => return Err(errno).doing(|| "wait until `rrun start` connects"),
        };
        match answer(connection.as_fd()) {
            Ok(true) => return Ok(connection),
            Ok(false) => {}
            Err(error) => send_error(connection.as_fd(), &error),
        }
    }
}

/// Reads and answers the request of a `start` command. Returns false if the command disconnected
/// before it requested the start, or before it received the answer.
fn answer(connection: BorrowedFd<'_>) -> Result<bool> {
    let mut word = [0u8; 1];
    let request = match retry_on_intr(|| recv(connection, &mut word, RecvFlags::empty())) {
        Err(Errno::CONNRESET) => return Ok(false),
        request => request.doing(|| "read the request of `rrun start`")?,
    };
    if request.1 != 1 || word != *START {
        return Ok(false);
    }
    match send_message(connection, &[STARTING]) {
        Err(Errno::PIPE | Errno::CONNRESET) => Ok(false),
        sent => sent
            .map(|()| true)
            .doing(|| "answer the request of `rrun start`"),
    }
}

fn send_message(connection: impl AsFd, message: &[u8]) -> std::result::Result<(), Errno> {
    retry_on_intr(|| send(&connection, message, SendFlags::NOSIGNAL)).map(drop)
}

/// Returns the error in a message that [`send_error`] sent.
fn failure(message: &[u8]) -> Option<Error> {
    let sentence = message.strip_prefix(&[FAILED])?;
    Some(Error::new(String::from_utf8_lossy(sentence)))
}

/// Reports to `start` why the program could not be executed. The container's first process calls
/// this function.
pub(crate) fn send_error(connection: BorrowedFd<'_>, error: &Error) {
    let mut message = vec![FAILED];
    message.extend(error.to_string().bytes().take(MESSAGE_BYTES - 1));
    let _ = send_message(connection, &message);
}

/// Sends the shared page to `start`. After the container's first process has loaded its seccomp
/// filter, it reports errors through this page. The filter can forbid the process to send messages.
pub(crate) fn send_page(connection: BorrowedFd<'_>, page: BorrowedFd<'_>) -> Result<()> {
    hand_over(connection, page, FILTERED).doing(|| "send the shared page to `rrun start`")
}

/// Requests that the first process execute the container's program, and waits for this execution.
/// The command `start` calls this function. `open_process` returns the pidfd of the first process.
/// When the first process is about to load its seccomp filter, this function calls `serve_agent`.
///
/// # Errors
/// Fails if the container does not wait for `start`, or if the program could not be executed.
pub(crate) fn start(
    directory: &Path,
    id: &str,
    open_process: impl Fn() -> Result<OwnedFd>,
    serve_agent: impl Fn(&Report) -> Result<()>,
) -> Result<()> {
    let path = directory.join(START_SOCKET);
    let socket = request_start(directory, &path, id)?;
    let mut buffer = vec![0u8; MESSAGE_BYTES];
    let mut accepted = false;
    let mut report = None;
    loop {
        let (length, mut descriptor) = receive_last(socket.as_fd(), &mut buffer)
            .doing(|| "wait for a message from the container's first process")?;
        let mut message = buffer.get(..length).unwrap_or_default();
        if let ([FILTERED, a, b, c, d], None) = (message, &descriptor) {
            let process = open_process()?;
            let number = [*a, *b, *c, *d];
            descriptor = Some(take_over(socket.as_fd(), process.as_fd(), number)?);
            message = &[FILTERED];
        }
        match (message, descriptor) {
            ([STARTING], _) if !accepted => {
                accepted = true;
                let _ = rustix::fs::unlink(&path);
            }
            ([FILTERED], Some(page)) => {
                if let Err(error) = serve_agent(report.insert(Report::new(page))) {
                    // If the first process failed at the same time, its own error is the cause.
                    let pending = receive_pending(socket.as_fd(), &mut buffer);
                    let message = pending.and_then(|(length, _)| buffer.get(..length));
                    return Err(message.and_then(failure).unwrap_or(error));
                }
            }
            (message @ [FAILED, ..], _) => {
                return Err(failure(message).unwrap_or_else(|| not_created(id)));
            }
            // The first process closed the connection. If the first process had accepted the
            // request, it has executed the program, or has left an error in the shared page.
            ([], _) if accepted => return report.as_ref().map_or(Ok(()), Report::verdict),
            ([], _) => return Err(not_created(id)),
            _ => refuse!("the container's first process sent an unknown message"),
        }
    }
}

/// Connects to the start socket at `path`, and requests the start.
fn request_start(directory: &Path, path: &Path, id: &str) -> Result<OwnedFd> {
    let socket = socket(SocketFlags::empty())?;
    let connected = at_address(directory, START_SOCKET, |address| {
        retry_on_intr(|| connect(&socket, address))
    });
    match connected {
        Ok(()) => {}
        Err(Errno::NOENT) => return Err(not_created(id)),
        Err(Errno::CONNREFUSED) => {
            // The first process is dead, or it has accepted another `start` command that died
            // before it removed the socket.
            let _ = rustix::fs::unlink(path);
            return Err(not_created(id));
        }
        Err(errno) => return Err(errno).doing(|| format!("connect to {}", path.display())),
    }
    match send_message(&socket, START) {
        // The first process has closed the connection. Its last message can contain the reason.
        Err(Errno::PIPE | Errno::CONNRESET) => {}
        sent => sent.doing(|| format!("request the start of container {id}"))?,
    }
    Ok(socket)
}

fn not_created(id: &str) -> Error {
    Error::new(format!(
        "cannot start container {id}: it is not in state created"
    ))
}
