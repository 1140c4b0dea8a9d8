//! Messages on the socket: length, JSON and descriptors, for both sides of the protocol.

use std::io::{IoSlice, IoSliceMut};
use std::mem::MaybeUninit;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};

use rustix::io::Errno;
use rustix::net::{
    RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags, SendAncillaryBuffer,
    SendAncillaryMessage, SendFlags,
};
use serde::Serialize;
use serde::de::DeserializeOwned;

/// The most bytes of JSON in one message, either way.
const MAX_MESSAGE_BYTES: usize = 4 << 20;

/// The most descriptors that one message carries: an exec's stdio.
const MAX_FDS: usize = 3;

/// How much is read from a socket at once.
const READ_BYTES: usize = 4096;

#[derive(Debug, thiserror::Error)]
pub enum WireError {
    #[error("a message of {0} bytes, more than the {MAX_MESSAGE_BYTES} allowed")]
    TooLong(usize),
    #[error("a message that can't be read: {0}")]
    Json(#[from] serde_json::Error),
}

/// A message as it goes over the socket.
pub fn encode<T: Serialize>(message: &T) -> Result<Vec<u8>, WireError> {
    let mut bytes = vec![0; 4];
    serde_json::to_writer(&mut bytes, message)?;
    let length = bytes.len() - 4;
    match u32::try_from(length) {
        Ok(prefix) if length <= MAX_MESSAGE_BYTES => {
            bytes[..4].copy_from_slice(&prefix.to_le_bytes());
            Ok(bytes)
        }
        _ => Err(WireError::TooLong(length)),
    }
}

/// Takes the first message off what has been received; `None` until it is whole.
pub fn decode<T: DeserializeOwned>(received: &mut Vec<u8>) -> Result<Option<T>, WireError> {
    let Some(prefix) = received.first_chunk::<4>() else {
        return Ok(None);
    };
    let length = u32::from_le_bytes(*prefix) as usize;
    if length > MAX_MESSAGE_BYTES {
        return Err(WireError::TooLong(length));
    }
    let Some(json) = received.get(4..4 + length) else {
        return Ok(None);
    };
    let message = serde_json::from_slice(json)?;
    received.drain(..4 + length);
    Ok(Some(message))
}

/// Sends what fits, the descriptors with the first byte. Never raises SIGPIPE, never blocks.
pub fn send(socket: impl AsFd, bytes: &[u8], fds: &[BorrowedFd<'_>]) -> Result<usize, Errno> {
    let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(MAX_FDS))];
    let mut control = SendAncillaryBuffer::new(&mut space);
    if !fds.is_empty() && !control.push(SendAncillaryMessage::ScmRights(fds)) {
        return Err(Errno::MSGSIZE);
    }
    let flags = SendFlags::NOSIGNAL | SendFlags::DONTWAIT;
    rustix::net::sendmsg(socket, &[IoSlice::new(bytes)], &mut control, flags)
}

/// Appends what has arrived to `received` and `fds`, and returns how many bytes that was: 0 at
/// the end of the stream. More descriptors at once than a message can carry are the other side's
/// error (`EMSGSIZE`). Never blocks.
pub fn receive(
    socket: impl AsFd,
    received: &mut Vec<u8>,
    fds: &mut Vec<OwnedFd>,
) -> Result<usize, Errno> {
    let mut chunk = [0; READ_BYTES];
    let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(MAX_FDS))];
    let mut control = RecvAncillaryBuffer::new(&mut space);
    let flags = RecvFlags::CMSG_CLOEXEC | RecvFlags::DONTWAIT;
    let message = rustix::net::recvmsg(
        socket,
        &mut [IoSliceMut::new(&mut chunk)],
        &mut control,
        flags,
    )?;
    for message in control.drain() {
        if let RecvAncillaryMessage::ScmRights(passed) = message {
            fds.extend(passed);
        }
    }
    if message.flags.contains(rustix::net::ReturnFlags::CTRUNC) || fds.len() > MAX_FDS {
        return Err(Errno::MSGSIZE);
    }
    received.extend_from_slice(chunk.get(..message.bytes).unwrap_or_default());
    Ok(message.bytes)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::Request;

    #[test]
    fn a_message_is_whole_only_with_its_last_byte() {
        let bytes = encode(&Request::Start { id: "a".into() }).unwrap();
        let mut received = bytes[..bytes.len() - 1].to_vec();
        assert!(decode::<Request>(&mut received).unwrap().is_none());
        received.push(bytes[bytes.len() - 1]);
        received.extend_from_slice(&bytes[..3]);
        let request = decode::<Request>(&mut received).unwrap();
        assert!(matches!(request, Some(Request::Start { id }) if id == "a"));
        assert_eq!(received, &bytes[..3]);
    }

    #[test]
    fn a_length_beyond_the_limit_is_refused_before_its_bytes_come() {
        let mut received = u32::MAX.to_le_bytes().to_vec();
        assert!(matches!(
            decode::<Request>(&mut received),
            Err(WireError::TooLong(_))
        ));
    }

    #[test]
    fn garbage_is_refused() {
        let mut received = vec![2, 0, 0, 0, b'x', b'y'];
        assert!(matches!(
            decode::<Request>(&mut received),
            Err(WireError::Json(_))
        ));
    }

    #[test]
    fn descriptors_travel_with_the_first_byte() {
        let (left, right) = rustix::net::socketpair(
            rustix::net::AddressFamily::UNIX,
            rustix::net::SocketType::STREAM,
            rustix::net::SocketFlags::CLOEXEC,
            None,
        )
        .unwrap();
        let null = std::fs::File::open("/dev/null").unwrap();
        let sent = send(&left, b"abc", &[null.as_fd(), null.as_fd()]).unwrap();
        assert_eq!(sent, 3);
        let (mut bytes, mut fds) = (Vec::new(), Vec::new());
        assert_eq!(receive(&right, &mut bytes, &mut fds).unwrap(), 3);
        assert_eq!((bytes.as_slice(), fds.len()), (&b"abc"[..], 2));
        assert_eq!(
            receive(&right, &mut bytes, &mut fds).unwrap_err(),
            Errno::AGAIN
        );
    }
}
