//! Unix sockets at paths of any length.

use std::os::fd::AsRawFd;
use std::path::Path;

use rustix::fs::{Mode, OFlags};
use rustix::io::Errno;
use rustix::net::SocketAddrUnix;

/// Calls `with` with the address of the socket `name` in a directory. A path that is too long for
/// an address (over 107 bytes, unix(7)) is reached through a descriptor of the directory.
pub fn at_address<T>(
    directory: &Path,
    name: &str,
    with: impl FnOnce(&SocketAddrUnix) -> Result<T, Errno>,
) -> Result<T, Errno> {
    if let Ok(address) = SocketAddrUnix::new(directory.join(name)) {
        return with(&address);
    }
    let flags = OFlags::PATH | OFlags::DIRECTORY | OFlags::CLOEXEC;
    let directory = rustix::fs::open(directory, flags, Mode::empty())?;
    let number = directory.as_raw_fd();
    with(&SocketAddrUnix::new(format!(
        "/proc/self/fd/{number}/{name}"
    ))?)
}
