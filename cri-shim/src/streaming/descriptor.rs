//! Pipes and terminals, read and written without blocking.

use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};

use rustix::io::Errno;
use tokio::io::unix::AsyncFd;

/// One read takes at most this: what a pipe holds.
pub const CHUNK: usize = 64 << 10;

/// One end of a pipe, or a terminal's master.
pub struct Descriptor(AsyncFd<OwnedFd>);

impl Descriptor {
    /// `fd` becomes non-blocking.
    pub fn new(fd: OwnedFd) -> io::Result<Self> {
        rustix::io::ioctl_fionbio(&fd, true)?;
        // SAFETY: an OwnedFd gives the same descriptor for as long as it lives.
        let registered = unsafe { AsyncFd::register(fd) };
        Ok(Descriptor(registered.map_err(io::Error::from)?))
    }

    /// Reads what is there: `Some(0)` at the end, `None` if there is nothing now.
    pub fn try_read(&self, buffer: &mut [u8]) -> io::Result<Option<usize>> {
        loop {
            match rustix::io::read(self.0.get_ref(), &mut *buffer) {
                Ok(count) => return Ok(Some(count)),
                Err(Errno::INTR) => {}
                Err(Errno::AGAIN) => return Ok(None),
                // A terminal whose other side nobody has open.
                Err(Errno::IO) => return Ok(Some(0)),
                Err(errno) => return Err(errno.into()),
            }
        }
    }

    /// Waits for something to read, and reads at most [`CHUNK`] bytes of it; 0 at the end.
    /// `buffer` has memory only while there is something in it.
    pub async fn read(&self, buffer: &mut Vec<u8>) -> io::Result<usize> {
        loop {
            let mut guard = self.0.readable().await?;
            if buffer.is_empty() {
                buffer.resize(CHUNK, 0);
            }
            if let Some(count) = self.try_read(buffer)? {
                return Ok(count);
            }
            guard.clear_ready();
            *buffer = Vec::new();
        }
    }

    /// Writes everything, waiting while the other side does not read.
    pub async fn write_all(&self, mut bytes: &[u8]) -> io::Result<()> {
        while !bytes.is_empty() {
            let mut guard = self.0.writable().await?;
            match rustix::io::write(self.0.get_ref(), bytes) {
                Ok(count) => bytes = bytes.get(count..).unwrap_or_default(),
                Err(Errno::INTR) => {}
                Err(Errno::AGAIN) => guard.clear_ready(),
                Err(errno) => return Err(errno.into()),
            }
        }
        Ok(())
    }

    /// How many bytes could be read now.
    pub fn pending(&self) -> u64 {
        rustix::io::ioctl_fionread(self.0.get_ref()).unwrap_or(0)
    }
}

impl AsFd for Descriptor {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.0.get_ref().as_fd()
    }
}
