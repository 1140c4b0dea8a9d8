//! Sockets of monitors, whatever the length of their paths.

use std::os::fd::{AsRawFd, OwnedFd};
use std::path::{Path, PathBuf};
use std::time::Duration;

use rustix::fs::{Mode, OFlags};
use rustix::net::{AddressFamily, SocketAddrUnix, SocketFlags, SocketType};

/// Connections that may wait for a monitor that is busy or still starting.
const BACKLOG: i32 = 256;

/// How long a connect waits before it tries again while a monitor's backlog is full.
const CONNECT_RETRY_INTERVAL: Duration = Duration::from_millis(5);

/// Longest path that fits into a unix socket's address with its final zero (unix(7)).
const MAX_ADDRESS_PATH: usize = 107;

/// Path of a socket by way of its directory, for paths that are too long for an address.
fn short_path(socket: &Path) -> rustix::io::Result<(PathBuf, Option<OwnedFd>)> {
    match (socket.parent(), socket.file_name()) {
        (Some(parent), Some(name)) if socket.as_os_str().len() > MAX_ADDRESS_PATH => {
            let flags = OFlags::PATH | OFlags::DIRECTORY | OFlags::CLOEXEC;
            let dir = rustix::fs::open(parent, flags, Mode::empty())?;
            let short = Path::new("/proc/self/fd").join(dir.as_raw_fd().to_string());
            Ok((short.join(name), Some(dir)))
        }
        _ => Ok((socket.to_owned(), None)),
    }
}

/// Listens on a socket at this path, which must not be there.
pub(crate) fn bind(socket: &Path) -> rustix::io::Result<OwnedFd> {
    let (path, _dir) = short_path(socket)?;
    let flags = SocketFlags::CLOEXEC | SocketFlags::NONBLOCK;
    let listener = rustix::net::socket_with(AddressFamily::UNIX, SocketType::STREAM, flags, None)?;
    rustix::net::bind(&listener, &SocketAddrUnix::new(&path)?)?;
    rustix::net::listen(&listener, BACKLOG)?;
    Ok(listener)
}

/// Connects, waiting while the monitor's backlog is full. The socket does not block, and the
/// executor does not know of it yet: what is sent at once is there when the monitor looks.
pub(crate) async fn connect(socket: &Path) -> std::io::Result<OwnedFd> {
    let (path, _dir) = short_path(socket)?;
    let address = SocketAddrUnix::new(&path)?;
    let flags = SocketFlags::CLOEXEC | SocketFlags::NONBLOCK;
    loop {
        let stream =
            rustix::net::socket_with(AddressFamily::UNIX, SocketType::STREAM, flags, None)?;
        match rustix::net::connect(&stream, &address) {
            Ok(()) => return Ok(stream),
            Err(rustix::io::Errno::AGAIN) => tokio::time::sleep(CONNECT_RETRY_INTERVAL).await,
            Err(errno) => return Err(errno.into()),
        }
    }
}
