//! Unix sockets at paths of any length.

use std::os::fd::AsRawFd;
use std::path::Path;

use rustix::fs::{Mode, OFlags};
use rustix::io::Errno;
use rustix::net::SocketAddrUnix;

/// Passes the address of the socket `name` in `directory` to the function `with`. An address can
/// contain a path of at most 107 bytes, see unix(7). If the socket's path is longer, the address
/// contains the path `/proc/self/fd/N/NAME` instead, where N is a descriptor of `directory`.
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
