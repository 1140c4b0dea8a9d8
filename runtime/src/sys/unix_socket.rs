//! Connections to a unix socket of rrun's caller, and the transfer of descriptors over unix
//! sockets. See unix(7).

use std::io::{IoSlice, IoSliceMut};
use std::mem::MaybeUninit;
use std::os::fd::{BorrowedFd, OwnedFd};

use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::io::{Errno, retry_on_intr};
use rustix::net::{
    AddressFamily, RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags, ReturnFlags,
    SendAncillaryBuffer, SendAncillaryMessage, SendFlags, SocketAddrUnix, SocketFlags, SocketType,
    recvmsg, sendmsg, socket_with,
};

use crate::error::{Context, Result};

/// Connects to a socket of rrun's caller. rrun later sends a descriptor over this socket.
///
/// # Errors
/// Fails if no process listens at `path`. `what` describes the socket in the error message.
pub(crate) fn connect(what: &str, path: &str) -> Result<OwnedFd> {
    let doing = || format!("connect to {what} {path}");
    let socket = socket_with(
        AddressFamily::UNIX,
        SocketType::STREAM,
        SocketFlags::CLOEXEC,
        None,
    )
    .doing(doing)?;
    let address = SocketAddrUnix::new(path).doing(doing)?;
    retry_on_intr(|| rustix::net::connect(&socket, &address)).doing(doing)?;
    Ok(socket)
}

/// Receives a message and the descriptor in it, if there is one.
///
/// # Errors
/// Fails with EMFILE if the message arrived, but the kernel dropped the message's descriptor
/// because this process has too many open descriptors.
pub(crate) fn receive_descriptor(
    socket: BorrowedFd<'_>,
    buffer: &mut [u8],
) -> std::result::Result<(usize, Option<OwnedFd>), Errno> {
    let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(1))];
    let mut ancillary = RecvAncillaryBuffer::new(&mut space);
    let received = loop {
        let mut parts = [IoSliceMut::new(buffer)];
        match recvmsg(socket, &mut parts, &mut ancillary, RecvFlags::CMSG_CLOEXEC) {
            Err(Errno::INTR) => {}
            result => break result?,
        }
    };
    let descriptor = ancillary.drain().find_map(|message| match message {
        RecvAncillaryMessage::ScmRights(mut descriptors) => descriptors.next(),
        _ => None,
    });
    if descriptor.is_none() && received.flags.contains(ReturnFlags::CTRUNC) {
        return Err(Errno::MFILE);
    }
    Ok((received.bytes, descriptor))
}

/// Receives a message like [`receive_descriptor`]. Returns an empty message if the peer has closed
/// the connection.
///
/// If the peer closes the connection although it has not read every message, the kernel reports
/// ECONNRESET before it delivers the peer's last messages. So this function tries again.
pub(crate) fn receive_last(
    socket: BorrowedFd<'_>,
    buffer: &mut [u8],
) -> std::result::Result<(usize, Option<OwnedFd>), Errno> {
    for _ in 0..2 {
        match receive_descriptor(socket, buffer) {
            Err(Errno::CONNRESET) => {}
            received => return received,
        }
    }
    Ok((0, None))
}

/// Receives a message like [`receive_last`], but without waiting. Returns `None` if no message has
/// arrived.
pub(crate) fn receive_pending(
    socket: BorrowedFd<'_>,
    buffer: &mut [u8],
) -> Option<(usize, Option<OwnedFd>)> {
    let mut watched = [PollFd::from_borrowed_fd(socket, PollFlags::IN)];
    let ready = poll(&mut watched, Some(&Timespec::default())).is_ok_and(|count| count > 0);
    ready.then(|| receive_last(socket, buffer).ok())?
}

/// Sends a descriptor together with `bytes` over a unix socket.
pub(crate) fn send_descriptor(
    socket: BorrowedFd<'_>,
    descriptor: BorrowedFd<'_>,
    bytes: &[u8],
) -> std::result::Result<(), Errno> {
    let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(1))];
    let mut ancillary = SendAncillaryBuffer::new(&mut space);
    let descriptors = [descriptor];
    if !ancillary.push(SendAncillaryMessage::ScmRights(&descriptors)) {
        return Err(Errno::NOBUFS);
    }
    retry_on_intr(|| {
        sendmsg(
            socket,
            &[IoSlice::new(bytes)],
            &mut ancillary,
            SendFlags::NOSIGNAL,
        )
    })
    .map(drop)
}
