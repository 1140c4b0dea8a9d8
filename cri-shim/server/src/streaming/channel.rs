//! The channels between the server and the pod's monitor for the streams or the terminal of a
//! command.

use std::io;
use std::os::fd::OwnedFd;

use rustix::net::sockopt::set_socket_send_buffer_size;
use rustix::net::{AddressFamily, SocketFlags, SocketType, socketpair};
use rustix::pipe::{PipeFlags, fcntl_setpipe_size, pipe_with};

use crate::sandbox::Sandbox;

/// Creates a channel, and returns its reading end and its writing end. `bytes` is the capacity of the
/// channel; `None` stands for the kernel's default.
///
/// The channel is a pair of sockets: a process in the container could stop the server with a pipe
/// (`monitor/src/relay.rs`). If the pod has a monitor of an earlier version, the channel is a pipe
/// nevertheless, which the monitor passes to the process.
pub(super) fn channel(sandbox: &Sandbox, bytes: Option<usize>) -> io::Result<(OwnedFd, OwnedFd)> {
    if !sandbox.state().relays {
        let (read, write) = pipe_with(PipeFlags::CLOEXEC)?;
        if let Some(bytes) = bytes {
            let _ = fcntl_setpipe_size(&write, bytes);
        }
        return Ok((read, write));
    }
    let (read, write) = sockets()?;
    if let Some(bytes) = bytes {
        set_capacity(&write, bytes)?;
    }
    Ok((read, write))
}

/// Creates the channel for the data of a terminal, and returns the server's end and the monitor's end.
/// `bytes` is the capacity in the direction to the server. Returns `None` if the pod has a monitor of
/// an earlier version, which passes the terminal's master to the server.
pub(super) fn terminal_channel(
    sandbox: &Sandbox,
    bytes: usize,
) -> io::Result<Option<(OwnedFd, OwnedFd)>> {
    if !sandbox.state().relays_terminals {
        return Ok(None);
    }
    let (ours, theirs) = sockets()?;
    set_capacity(&theirs, bytes)?;
    Ok(Some((ours, theirs)))
}

fn sockets() -> io::Result<(OwnedFd, OwnedFd)> {
    let (kind, flags) = (SocketType::STREAM, SocketFlags::CLOEXEC);
    Ok(socketpair(AddressFamily::UNIX, kind, flags, None)?)
}

fn set_capacity(socket: &OwnedFd, bytes: usize) -> io::Result<()> {
    // The kernel doubles the size, socket(7).
    Ok(set_socket_send_buffer_size(socket, bytes / 2)?)
}
