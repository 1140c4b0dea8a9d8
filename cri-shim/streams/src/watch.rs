//! Tracks when a client's connection was last used, and whether the client is still connected.

use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, OnceLock};
use std::time::Duration;

use rustix::event::{PollFd, PollFlags, Timespec};
use tokio::net::TcpStream;
use tokio::time::Instant;

use crate::buffers::StreamBuffers;

/// The interval at which the server checks whether the client has closed the connection. The checks
/// are needed while the server does not read from the connection.
const HANGUP_POLL_INTERVAL: Duration = Duration::from_secs(1);

/// The time of the last transfer on a connection, and a duplicate of the connection's descriptor.
pub struct Watch {
    begin: Instant,
    /// The time of the last transfer in seconds after `begin`.
    moved: AtomicU64,
    socket: OwnedFd,
    buffers: OnceLock<StreamBuffers>,
}

/// The capacity in bytes of a pipe, if no buffers are reserved for the client. The kernel creates
/// pipes with this capacity.
const DEFAULT_PIPE_BYTES: usize = 64 << 10;

impl Watch {
    pub(crate) fn new(socket: &TcpStream) -> io::Result<Arc<Self>> {
        Ok(Arc::new(Watch {
            begin: Instant::now(),
            moved: AtomicU64::new(0),
            socket: socket.as_fd().try_clone_to_owned()?,
            buffers: OnceLock::new(),
        }))
    }

    /// Reserves the kernel's buffers for the client, and limits the buffers of its socket.
    pub fn limit_buffers(&self) -> io::Result<()> {
        let buffers = self.buffers.get_or_init(StreamBuffers::of_client);
        buffers.limit_socket(&self.socket)
    }

    /// Returns the capacity in bytes of the pipes for the client's data.
    pub fn pipe_bytes(&self) -> usize {
        let buffers = self.buffers.get();
        buffers.map_or(DEFAULT_PIPE_BYTES, StreamBuffers::pipe_bytes)
    }

    pub(crate) fn touch(&self) {
        let now = self.begin.elapsed().as_secs();
        self.moved.store(now, Ordering::Relaxed);
    }

    /// Waits until no data has been transferred on the connection for the time `limit`.
    pub async fn idle(&self, limit: Duration) {
        loop {
            let moved = Duration::from_secs(self.moved.load(Ordering::Relaxed));
            let at = self.begin + moved + limit;
            if Instant::now() >= at {
                return;
            }
            tokio::time::sleep_until(at).await;
        }
    }

    /// Waits until the client has closed the connection or the connection has been lost. Unread
    /// data from the client does not delay the result.
    pub(crate) async fn gone(&self) {
        while !self.is_gone() {
            tokio::time::sleep(HANGUP_POLL_INTERVAL).await;
        }
    }

    fn is_gone(&self) -> bool {
        let mut fds = [PollFd::new(&self.socket, PollFlags::RDHUP)];
        let ready = rustix::event::poll(&mut fds, Some(&Timespec::default()));
        ready.is_ok_and(|count| count > 0)
    }

    /// Shuts down the connection for all descriptors that refer to it.
    pub fn shut_down(&self) {
        let _ = rustix::net::shutdown(&self.socket, rustix::net::Shutdown::Both);
    }
}
