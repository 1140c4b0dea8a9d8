//! Recognises the errors of a connection whose peer has disconnected.

use std::io;

use rustix::io::Errno;

/// Returns whether this error only means that the peer has disconnected. The caller should log any
/// other error.
pub fn is_disconnect(error: &io::Error) -> bool {
    let kinds = [
        io::ErrorKind::BrokenPipe,
        io::ErrorKind::ConnectionReset,
        io::ErrorKind::UnexpectedEof,
        io::ErrorKind::NotConnected,
    ];
    kinds.contains(&error.kind()) || error.raw_os_error() == Some(Errno::PIPE.raw_os_error())
}
