//! The console socket: how a runtime hands over a terminal's master side.

use std::os::fd::{AsFd, OwnedFd};
use std::path::PathBuf;

use rustix::io::Errno;
use rustix::net::{AddressFamily, SocketAddrUnix, SocketFlags, SocketType};

use rrun_protocol::wire;

/// A socket in our working directory on which one runtime call sends one terminal. The name is
/// gone when this is dropped.
pub(crate) struct Console {
    name: String,
    listener: OwnedFd,
}

impl Console {
    /// `number` makes the name unique within the monitor.
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

    /// A path for the runtime that fits into an address, however deep our directory is.
    pub(crate) fn path(&self) -> PathBuf {
        let cwd = format!("/proc/{}/cwd", std::process::id());
        PathBuf::from(cwd).join(&self.name)
    }

    /// The terminal's master, once the runtime has ended: it sends it before.
    pub(crate) fn receive(&self) -> Result<OwnedFd, Errno> {
        let socket = rustix::net::accept_with(&self.listener, SocketFlags::CLOEXEC)?;
        let (mut name, mut fds) = (Vec::new(), Vec::new());
        wire::receive(&socket, &mut name, &mut fds)?;
        let master = fds.pop().ok_or(Errno::BADMSG)?;
        // A message may carry any descriptor; what is no terminal would stall us.
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
