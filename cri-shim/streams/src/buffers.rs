//! The kernel's buffers for the connections of clients, and the memory for incomplete messages.
//!
//! If a client does not read, the output for the client fills the buffers of its connection. Without
//! a limit, these buffers have several MiB: those of the socket, which the kernel enlarges, and those
//! of pipes. The buffers of all clients have a common limit, and the buffers of a new client are
//! smaller if the clients already have large buffers. The common limit also applies to messages of
//! which a client has sent only a part.

use std::io;
use std::os::fd::AsFd;
use std::sync::atomic::{AtomicUsize, Ordering};

use rustix::net::sockopt::{set_socket_recv_buffer_size, set_socket_send_buffer_size};

/// A client gets at most this fraction of the bytes that the other clients leave.
const FRACTION: usize = 32;

/// The limits on the buffers of one client. Each client has buffers of the minimum size, even if the
/// limit for all clients is reached.
const MIN_CLIENT_BYTES: usize = 256 << 10;
const MAX_CLIENT_BYTES: usize = 8 << 20;

/// The limits on the buffers of one forwarded connection to a program in a pod.
const MIN_FORWARD_BYTES: usize = 64 << 10;
const MAX_FORWARD_BYTES: usize = 1 << 20;

/// The number of bytes of an incomplete message that each client can send, even if the limit for
/// all clients is reached. Kubernetes' clients send messages of 32 KiB.
const MIN_MESSAGE_BYTES: usize = 64 << 10;

/// The limit on the buffers of all clients together.
static LIMIT: AtomicUsize = AtomicUsize::new(512 << 20);

/// The buffers of all clients together.
static RESERVED: AtomicUsize = AtomicUsize::new(0);

/// Sets the limit on the buffers for all clients together, in bytes.
pub fn set_buffer_limit(bytes: usize) {
    LIMIT.store(bytes, Ordering::Relaxed);
}

/// The buffers of one client. They have at most `bytes`: a quarter each for the socket's two
/// buffers, and an eighth each for up to three pipes.
pub(crate) struct StreamBuffers {
    bytes: usize,
}

impl StreamBuffers {
    /// Reserves the buffers of a client.
    pub(crate) fn of_client() -> Self {
        StreamBuffers::reserve(MIN_CLIENT_BYTES, MAX_CLIENT_BYTES)
    }

    /// Reserves the buffers of a forwarded connection.
    pub(crate) fn of_forward() -> Self {
        StreamBuffers::reserve(MIN_FORWARD_BYTES, MAX_FORWARD_BYTES)
    }

    fn reserve(min: usize, max: usize) -> Self {
        let bytes = share(
            LIMIT.load(Ordering::Relaxed),
            RESERVED.load(Ordering::Relaxed),
        );
        let bytes = bytes.clamp(min, max);
        RESERVED.fetch_add(bytes, Ordering::Relaxed);
        StreamBuffers { bytes }
    }

    /// Sets the sizes of a socket's buffers. The kernel doubles these sizes, socket(7), and no longer
    /// enlarges the buffers.
    pub(crate) fn limit_socket(&self, socket: impl AsFd) -> io::Result<()> {
        set_socket_send_buffer_size(&socket, self.bytes / 8)?;
        set_socket_recv_buffer_size(&socket, self.bytes / 8)?;
        Ok(())
    }

    /// Returns the capacity of a pipe, which is a power of two.
    pub(crate) fn pipe_bytes(&self) -> usize {
        let bytes = self.bytes / 8;
        1 << bytes.max(1).ilog2()
    }
}

impl Drop for StreamBuffers {
    fn drop(&mut self) {
        RESERVED.fetch_sub(self.bytes, Ordering::Relaxed);
    }
}

/// The bytes of a client's message that is not complete yet.
#[derive(Default)]
pub(crate) struct IncompleteMessage {
    bytes: usize,
    /// The part of `bytes` that counts against the limit for all clients.
    reserved: usize,
}

impl IncompleteMessage {
    /// Counts further bytes of the message. Returns an error if the message occupies more than half
    /// of the bytes that the other clients leave.
    pub(crate) fn add(&mut self, count: usize) -> io::Result<()> {
        self.bytes += count;
        let needed = self.bytes.saturating_sub(MIN_MESSAGE_BYTES);
        if needed <= self.reserved {
            return Ok(());
        }
        let others = RESERVED.load(Ordering::Relaxed) - self.reserved;
        if needed > LIMIT.load(Ordering::Relaxed).saturating_sub(others) / 2 {
            return Err(io::Error::other(format!(
                "a message has more than {} bytes, and the buffers of all clients have nearly reached their limit (stream_buffer_bytes)",
                self.bytes - count
            )));
        }
        self.reserve(needed);
        Ok(())
    }

    /// Subtracts bytes that do not belong to the message.
    pub(crate) fn subtract(&mut self, count: usize) {
        self.bytes = self.bytes.saturating_sub(count);
        self.reserve(self.bytes.saturating_sub(MIN_MESSAGE_BYTES));
    }

    /// Records that the message is complete.
    pub(crate) fn complete(&mut self) {
        self.subtract(self.bytes);
    }

    fn reserve(&mut self, bytes: usize) {
        RESERVED.fetch_add(bytes, Ordering::Relaxed);
        RESERVED.fetch_sub(self.reserved, Ordering::Relaxed);
        self.reserved = bytes;
    }
}

impl Drop for IncompleteMessage {
    fn drop(&mut self) {
        self.complete();
    }
}

fn share(limit: usize, reserved: usize) -> usize {
    limit.saturating_sub(reserved) / FRACTION
}

#[cfg(test)]
mod tests {
    use std::net::{TcpListener, TcpStream};

    use rustix::net::sockopt::{socket_recv_buffer_size, socket_send_buffer_size};

    use super::*;

    #[test]
    fn the_buffers_of_many_clients_are_small() {
        let limit = 512 << 20;
        let mut reserved = 0;
        for _ in 0..1024 {
            reserved += share(limit, reserved).clamp(MIN_CLIENT_BYTES, MAX_CLIENT_BYTES);
        }
        assert!(reserved <= limit + 1024 * MIN_CLIENT_BYTES, "{reserved}");
        assert_eq!(share(limit, 2 * limit), 0);
    }

    #[test]
    fn the_buffers_of_a_socket_and_of_three_pipes_fit_into_the_reserved_bytes() -> io::Result<()> {
        let listener = TcpListener::bind("127.0.0.1:0")?;
        let socket = TcpStream::connect(listener.local_addr()?)?;
        for bytes in [
            MIN_FORWARD_BYTES,
            MIN_CLIENT_BYTES,
            300_000,
            MAX_FORWARD_BYTES,
        ] {
            let buffers = StreamBuffers::reserve(bytes, bytes);
            buffers.limit_socket(&socket)?;
            let sizes = socket_send_buffer_size(&socket)? + socket_recv_buffer_size(&socket)?;
            let all = sizes + 3 * buffers.pipe_bytes();
            assert!(all <= bytes, "{all} bytes instead of {bytes}");
        }
        Ok(())
    }

    #[test]
    fn an_incomplete_message_counts_against_the_common_limit() {
        let mut message = IncompleteMessage::default();
        message.add(MIN_MESSAGE_BYTES).unwrap();
        assert_eq!(message.reserved, 0);
        message.add(1000).unwrap();
        assert_eq!(message.reserved, 1000);
        message.subtract(400);
        assert_eq!(message.reserved, 600);
        message.complete();
        assert_eq!((message.bytes, message.reserved), (0, 0));
        // The message alone would exceed half of the limit.
        let limit = LIMIT.load(Ordering::Relaxed);
        assert!(message.add(MIN_MESSAGE_BYTES + limit).is_err());
    }
}
