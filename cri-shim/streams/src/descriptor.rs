//! Non-blocking reads and writes of sockets, pipes and terminals.

use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::sync::{Mutex, PoisonError};

use rustix::io::Errno;
use rustix::pty::{OpenptFlags, ioctl_tiocgptpeer};
use tokio::io::unix::{AsyncFd, AsyncFdReadyGuard};

use crate::pipe::Pipe;

/// The maximum number of bytes that one read returns. A pipe has this capacity by default.
pub(crate) const READ_BYTES: usize = 64 << 10;

/// A socket, one end of a pipe, or a terminal's master.
pub struct Descriptor {
    fd: AsyncFd<OwnedFd>,
    is_terminal: bool,
    /// The other side of the terminal, if this process holds it open.
    slave: Mutex<Option<OwnedFd>>,
}

impl Descriptor {
    /// Makes `fd` non-blocking, and registers it with tokio.
    pub fn new(fd: OwnedFd) -> io::Result<Self> {
        rustix::io::ioctl_fionbio(&fd, true)?;
        let is_terminal = rustix::termios::isatty(&fd);
        // SAFETY: an `OwnedFd` refers to the same open descriptor as long as it exists.
        let registered = unsafe { AsyncFd::register(fd) };
        Ok(Descriptor {
            fd: registered.map_err(io::Error::from)?,
            is_terminal,
            slave: Mutex::new(None),
        })
    }

    /// Like [`Descriptor::new`], but holds the other side of the terminal open. The data then does
    /// not end when the processes close their terminal, because they can open it again. After
    /// [`Descriptor::release`], the data ends when no process has the terminal open.
    pub fn held_open(master: OwnedFd) -> io::Result<Self> {
        let flags = OpenptFlags::RDWR | OpenptFlags::NOCTTY | OpenptFlags::CLOEXEC;
        // If the other side can't be opened, the data ends when the processes close it.
        let slave = ioctl_tiocgptpeer(&master, flags).ok();
        let mut held = Descriptor::new(master)?;
        held.slave = Mutex::new(slave);
        Ok(held)
    }

    /// Closes the other side of the terminal, which [`Descriptor::held_open`] opened.
    pub(crate) fn release(&self) {
        let mut slave = self.slave.lock().unwrap_or_else(PoisonError::into_inner);
        *slave = None;
    }

    pub fn is_terminal(&self) -> bool {
        self.is_terminal
    }

    /// Reads the data that is available. Returns the number of read bytes, which is 0 at the end of
    /// the data. Returns `None` if no data is available now.
    pub fn try_read(&self, buffer: &mut [u8]) -> io::Result<Option<usize>> {
        loop {
            match rustix::io::read(self.fd.get_ref(), &mut *buffer) {
                Ok(count) => return Ok(Some(count)),
                Err(Errno::INTR) => {}
                Err(Errno::AGAIN) => return Ok(None),
                // EIO means the end of the data: no process has the other side of the terminal
                // open.
                Err(Errno::IO) => return Ok(Some(0)),
                Err(errno) => return Err(errno.into()),
            }
        }
    }

    /// Moves the data that is available into a pipe, see [`Pipe::fill`]. `self` must not be a
    /// terminal.
    pub(crate) fn splice(&self, pipe: &mut Pipe, most: usize) -> io::Result<usize> {
        pipe.fill(self, most)
    }

    /// Waits until data can be read. If the caller then finds no data, it must clear the readiness
    /// of the returned guard.
    pub async fn readable(&self) -> io::Result<AsyncFdReadyGuard<'_, OwnedFd>> {
        self.fd.readable().await
    }

    /// Writes all bytes, and waits while the process on the other side does not read.
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

    /// Returns the number of bytes that can be read now.
    pub fn pending(&self) -> io::Result<u64> {
        Ok(rustix::io::ioctl_fionread(self.fd.get_ref())?)
    }
}

impl AsFd for Descriptor {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.fd.get_ref().as_fd()
    }
}
