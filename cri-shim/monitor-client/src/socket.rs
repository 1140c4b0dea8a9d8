//! Functions that create a monitor's socket or connect to this socket. The socket's path can be too
//! long for a socket address, so the functions use [`at_address`].

use std::os::fd::OwnedFd;
use std::path::Path;
use std::time::Duration;

use rrun_kernel::unix_socket::at_address;
use rustix::fs::Mode;
use rustix::io::Errno;
use rustix::net::{AddressFamily, SocketAddrUnix, SocketFlags, SocketType};

/// The maximum number of connections that wait for the monitor's accept(2). Connections wait while
/// the monitor is busy or still starting.
const BACKLOG: i32 = 256;

/// The interval between the client's attempts to connect. The client retries connect(2) while
/// [`BACKLOG`] connections are already waiting.
const CONNECT_RETRY_INTERVAL: Duration = Duration::from_millis(5);

/// Passes the address of the socket at the path `socket` to the function `with`, and returns the
/// result of `with`.
fn at<T>(
    socket: &Path,
    with: impl FnOnce(&SocketAddrUnix) -> Result<T, Errno>,
) -> Result<T, Errno> {
    let name = socket.file_name().and_then(|name| name.to_str());
    let (Some(directory), Some(name)) = (socket.parent(), name) else {
        return Err(Errno::INVAL);
    };
    at_address(directory, name, with)
}

/// Creates a socket at this path and listens on it. The path must not exist yet.
pub(crate) fn bind(socket: &Path) -> Result<OwnedFd, Errno> {
    let flags = SocketFlags::CLOEXEC | SocketFlags::NONBLOCK;
    let listener = rustix::net::socket_with(AddressFamily::UNIX, SocketType::STREAM, flags, None)?;
    // bind(2) gives the file the mode of the unbound socket.
    rustix::fs::fchmod(&listener, Mode::from_raw_mode(0o600))?;
    at(socket, |address| rustix::net::bind(&listener, address))?;
    rustix::net::listen(&listener, BACKLOG)?;
    Ok(listener)
}

/// Connects to a monitor. While the monitor's backlog is full, this function waits and retries. The
/// returned socket is non-blocking and is not registered with tokio yet. If the caller sends its
/// request immediately, the monitor can read the request as soon as it accepts the connection.
pub(crate) async fn connect(socket: &Path) -> std::io::Result<OwnedFd> {
    let flags = SocketFlags::CLOEXEC | SocketFlags::NONBLOCK;
    loop {
        let stream =
            rustix::net::socket_with(AddressFamily::UNIX, SocketType::STREAM, flags, None)?;
        match at(socket, |address| rustix::net::connect(&stream, address)) {
            Ok(()) => return Ok(stream),
            Err(Errno::AGAIN) => tokio::time::sleep(CONNECT_RETRY_INTERVAL).await,
            Err(errno) => return Err(errno.into()),
        }
    }
}
