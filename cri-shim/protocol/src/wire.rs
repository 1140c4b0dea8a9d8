//! The encoding of messages on the socket (length, JSON and descriptors). The CRI server and the
//! monitor both use this module.

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

/// The maximum number of bytes of JSON in one message, in either direction.
const MAX_MESSAGE_BYTES: usize = 4 << 20;

/// The maximum number of descriptors in one message. A request to start a process (Exec) carries
/// three descriptors, for stdin, stdout and stderr.
const MAX_FDS: usize = 3;

/// The maximum number of bytes that one read from a socket returns.
const READ_BYTES: usize = 4096;

#[derive(Debug, thiserror::Error)]
pub enum WireError {
    #[error("a message has {0} bytes, more than the allowed {MAX_MESSAGE_BYTES}")]
    TooLong(usize),
    #[error("a message cannot be parsed: {0}")]
    Json(#[from] serde_json::Error),
}

/// Returns the bytes that are sent over the socket for a message.
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

/// Removes the first message from `received` and returns the message. Returns `None` if the message
/// is not complete yet.
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

/// Sends as many bytes as the socket accepts, and sends the descriptors together with the first
/// byte. Returns the number of bytes that were sent. This function never raises SIGPIPE and never
/// blocks.
pub fn send(socket: impl AsFd, bytes: &[u8], fds: &[BorrowedFd<'_>]) -> Result<usize, Errno> {
    let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(MAX_FDS))];
    let mut control = SendAncillaryBuffer::new(&mut space);
    if !fds.is_empty() && !control.push(SendAncillaryMessage::ScmRights(fds)) {
        return Err(Errno::MSGSIZE);
    }
    let flags = SendFlags::NOSIGNAL | SendFlags::DONTWAIT;
    rustix::net::sendmsg(socket, &[IoSlice::new(bytes)], &mut control, flags)
}

/// Receives bytes and descriptors, and appends them to `received` and `fds`. Returns the number of
/// received bytes, which is 0 at the end of the stream. If the peer has sent more descriptors than
/// one message can carry, this function fails with EMSGSIZE. The function never blocks.
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
    fn a_message_is_decoded_only_after_its_last_byte_has_arrived() {
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
    fn a_length_beyond_the_limit_is_refused_before_its_bytes_arrive() {
        let mut received = u32::MAX.to_le_bytes().to_vec();
        assert!(matches!(
            decode::<Request>(&mut received),
            Err(WireError::TooLong(_))
        ));
    }

    #[test]
    fn a_message_that_is_not_json_is_refused() {
        let mut received = vec![2, 0, 0, 0, b'x', b'y'];
        assert!(matches!(
            decode::<Request>(&mut received),
            Err(WireError::Json(_))
        ));
    }

    #[test]
    fn descriptors_are_sent_with_the_first_byte() {
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
