//! Connections to a unix socket of rrun's caller, and the transfer of descriptors over unix
//! sockets. See unix(7).

use std::io::{IoSlice, IoSliceMut};
use std::mem::MaybeUninit;
use std::os::fd::{AsRawFd as _, BorrowedFd, OwnedFd};

use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::io::{Errno, retry_on_intr};
use rustix::net::{
    AddressFamily, RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags, ReturnFlags,
    SendAncillaryBuffer, SendAncillaryMessage, SendFlags, SocketAddrUnix, SocketFlags, SocketType,
    recv, recvmsg, send, sendmsg, socket_with,
};
use rustix::process::{PidfdGetfdFlags, pidfd_getfd};

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

/// Sends a descriptor together with `bytes` over a unix socket. Returns the number of bytes that
/// were sent, which is smaller than the length of `bytes` only for a stream socket with a timeout.
pub(crate) fn send_descriptor(
    socket: BorrowedFd<'_>,
    descriptor: BorrowedFd<'_>,
    bytes: &[u8],
) -> std::result::Result<usize, Errno> {
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
}

/// Sends the message `kind` with a descriptor to another process of rrun. A process that is about
/// to become a process of a container calls this function.
///
/// The kernel refuses to send a descriptor (ETOOMANYREFS) if the processes of the sender's user
/// have too many descriptors in transit. These processes can be in other containers. After such a
/// refusal, this function sends the number of the descriptor, and waits until the receiver has
/// copied the descriptor with [`take_over`].
pub(crate) fn hand_over(
    socket: BorrowedFd<'_>,
    descriptor: BorrowedFd<'_>,
    kind: u8,
) -> std::result::Result<(), Errno> {
    match send_descriptor(socket, descriptor, &[kind]) {
        Err(Errno::TOOMANYREFS) => {}
        sent => return sent.map(drop),
    }
    let [a, b, c, d] = descriptor.as_raw_fd().to_ne_bytes();
    let message = [kind, a, b, c, d];
    retry_on_intr(|| send(socket, &message, SendFlags::NOSIGNAL))?;
    let mut answer = [0u8; 1];
    match retry_on_intr(|| recv(socket, &mut answer, RecvFlags::empty()))? {
        (_, 1) => Ok(()),
        _ => Err(Errno::TOOMANYREFS),
    }
}

/// Copies the descriptor whose number [`hand_over`] sent from the process `sender`, and lets this
/// process continue.
pub(crate) fn take_over(
    socket: BorrowedFd<'_>,
    sender: BorrowedFd<'_>,
    number: [u8; 4],
) -> Result<OwnedFd> {
    let doing = || "copy a descriptor of the container's process (pidfd_getfd), because the kernel refuses to send the descriptor while processes of the same user have too many descriptors in transit";
    let number = i32::from_ne_bytes(number);
    let copy = pidfd_getfd(sender, number, PidfdGetfdFlags::empty()).doing(doing)?;
    retry_on_intr(|| send(socket, &[0], SendFlags::NOSIGNAL)).doing(doing)?;
    Ok(copy)
}
