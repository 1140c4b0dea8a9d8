//! Pipes and terminals, read and written without blocking.

use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};

use rustix::io::Errno;
use tokio::io::unix::{AsyncFd, AsyncFdReadyGuard};

use crate::pipe::Pipe;

/// One read takes at most this: what a pipe holds.
pub(crate) const READ_BYTES: usize = 64 << 10;

/// One end of a pipe, or a terminal's master.
pub struct Descriptor {
    fd: AsyncFd<OwnedFd>,
    is_terminal: bool,
}

impl Descriptor {
    /// `fd` becomes non-blocking.
    pub fn new(fd: OwnedFd) -> io::Result<Self> {
        rustix::io::ioctl_fionbio(&fd, true)?;
        let is_terminal = rustix::termios::isatty(&fd);
        // SAFETY: an OwnedFd gives the same descriptor for as long as it lives.
        let registered = unsafe { AsyncFd::register(fd) };
        Ok(Descriptor {
            fd: registered.map_err(io::Error::from)?,
            is_terminal,
        })
    }

    pub(crate) fn is_terminal(&self) -> bool {
        self.is_terminal
    }

    /// Reads what is there: `Some(0)` at the end, `None` if there is nothing now.
    pub(crate) fn try_read(&self, buffer: &mut [u8]) -> io::Result<Option<usize>> {
        loop {
            match rustix::io::read(self.fd.get_ref(), &mut *buffer) {
                Ok(count) => return Ok(Some(count)),
                Err(Errno::INTR) => {}
                Err(Errno::AGAIN) => return Ok(None),
                // A terminal whose other side nobody has open.
                Err(Errno::IO) => return Ok(Some(0)),
                Err(errno) => return Err(errno.into()),
            }
        }
    }

    /// Puts what is there into a pipe: see [`Pipe::fill`]. Not for a terminal.
    pub(crate) fn splice(&self, pipe: &mut Pipe, most: usize) -> io::Result<usize> {
        pipe.fill(self, most)
    }

    /// Waits for something to read. Whoever then finds nothing clears the guard.
    pub(crate) async fn readable(&self) -> io::Result<AsyncFdReadyGuard<'_, OwnedFd>> {
        self.fd.readable().await
    }

    /// Writes everything, waiting while the other side does not read.
    pub(crate) async fn write_all(&self, mut bytes: &[u8]) -> io::Result<()> {
        while !bytes.is_empty() {
            let mut guard = self.fd.writable().await?;
            match rustix::io::write(self.fd.get_ref(), bytes) {
                Ok(count) => bytes = bytes.get(count..).unwrap_or_default(),
                Err(Errno::INTR) => {}
                Err(Errno::AGAIN) => guard.clear_ready(),
                Err(errno) => return Err(errno.into()),
            }
        }
        Ok(())
    }

    /// How many bytes could be read now.
    pub(crate) fn pending(&self) -> u64 {
        rustix::io::ioctl_fionread(self.fd.get_ref()).unwrap_or(0)
    }
}

impl AsFd for Descriptor {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.fd.get_ref().as_fd()
    }
}
