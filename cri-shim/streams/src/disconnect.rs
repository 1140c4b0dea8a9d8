//! How a connection says that its other end is gone.

use std::io;

use rustix::io::Errno;

/// Whether this error only means that the other end has gone. Anything else is worth a log line.
pub fn is_disconnect(error: &io::Error) -> bool {
    let kinds = [
        io::ErrorKind::BrokenPipe,
        io::ErrorKind::ConnectionReset,
        io::ErrorKind::UnexpectedEof,
        io::ErrorKind::NotConnected,
    ];
    kinds.contains(&error.kind()) || error.raw_os_error() == Some(Errno::PIPE.raw_os_error())
}
