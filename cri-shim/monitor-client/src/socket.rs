//! Sockets of monitors, whatever the length of their paths.

use std::os::fd::OwnedFd;
use std::path::Path;
use std::time::Duration;

use rrun_kernel::unix_socket::at_address;
use rustix::io::Errno;
use rustix::net::{AddressFamily, SocketAddrUnix, SocketFlags, SocketType};

/// Connections that may wait for a monitor that is busy or still starting.
const BACKLOG: i32 = 256;

/// How long a connect waits before it tries again while a monitor's backlog is full.
const CONNECT_RETRY_INTERVAL: Duration = Duration::from_millis(5);

/// Calls `with` with the address of the socket at this path.
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

/// Listens on a socket at this path, which must not be there.
pub(crate) fn bind(socket: &Path) -> Result<OwnedFd, Errno> {
    let flags = SocketFlags::CLOEXEC | SocketFlags::NONBLOCK;
    let listener = rustix::net::socket_with(AddressFamily::UNIX, SocketType::STREAM, flags, None)?;
    at(socket, |address| rustix::net::bind(&listener, address))?;
    rustix::net::listen(&listener, BACKLOG)?;
    Ok(listener)
}

/// Connects, waiting while the monitor's backlog is full. The socket does not block, and the
/// executor does not know of it yet: what is sent at once is there when the monitor looks.
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
