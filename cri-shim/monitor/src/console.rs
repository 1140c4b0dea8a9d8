//! The console socket, through which a runtime sends a terminal's master to the monitor.

use std::os::fd::{AsFd, OwnedFd};
use std::path::PathBuf;

use rustix::io::Errno;
use rustix::net::{AddressFamily, SocketAddrUnix, SocketFlags, SocketType};

use rrun_protocol::wire;

/// A socket in the monitor's working directory, on which one runtime call sends the master of one
/// terminal. Dropping the `Console` removes the socket's file.
pub(crate) struct Console {
    name: String,
    listener: OwnedFd,
}

impl Console {
    /// Opens a console socket. `number` makes the socket's name unique within the monitor.
    pub(crate) fn open(number: u64) -> Result<Self, Errno> {
        let name = format!("console-{number}.sock");
        let flags = SocketFlags::CLOEXEC | SocketFlags::NONBLOCK;
        let listener =
            rustix::net::socket_with(AddressFamily::UNIX, SocketType::STREAM, flags, None)?;
        rustix::net::bind(&listener, &SocketAddrUnix::new(name.as_str())?)?;
        let console = Console { name, listener };
        rustix::net::listen(&console.listener, 1)?;
        Ok(console)
    }

    /// Returns the path through which the runtime connects to the socket. The path begins with
    /// /proc/PID/cwd instead of the path of the monitor's directory. For this reason, the path is
    /// always short enough for a socket address.
    pub(crate) fn path(&self) -> PathBuf {
        let cwd = format!("/proc/{}/cwd", std::process::id());
        PathBuf::from(cwd).join(&self.name)
    }

    /// Receives the terminal's master. The caller must call `receive` only after the runtime's
    /// exit. The runtime sends the master before it exits, so `receive` does not have to wait.
    pub(crate) fn receive(&self) -> Result<OwnedFd, Errno> {
        let socket = rustix::net::accept_with(&self.listener, SocketFlags::CLOEXEC)?;
        let (mut name, mut fds) = (Vec::new(), Vec::new());
        wire::receive(&socket, &mut name, &mut fds)?;
        let master = fds.pop().ok_or(Errno::BADMSG)?;
        // The runtime can send any descriptor. Reads from a descriptor that is not a terminal could
        // block the monitor. For this reason, `receive` refuses such a descriptor.
        if !rustix::termios::isatty(master.as_fd()) {
            return Err(Errno::NOTTY);
        }
        Ok(master)
    }
}

impl Drop for Console {
    fn drop(&mut self) {
        let _ = std::fs::remove_file(&self.name);
    }
}
