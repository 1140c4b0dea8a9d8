//! Locks of the kernel that a process can hold as long as it wants. Everybody else who needs such a
//! lock waits in the kernel, and no signal ends the wait.

use std::fs::File;
use std::io::{self, Write};
use std::net::UdpSocket;
use std::num::NonZeroUsize;
use std::os::fd::{AsFd, AsRawFd, FromRawFd, OwnedFd};
use std::os::unix::fs::OpenOptionsExt;
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::thread;
use std::time::Duration;

use nix::errno::Errno;
use nix::fcntl::{SpliceFFlags, splice};
use nix::libc;
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::sys::mman::{MapFlags, ProtFlags, mmap_anonymous};

const PAGE_BYTES: usize = 4096;

/// The number of the ioctl SIOCGIFCONF, see netdevice(7).
const SIOCGIFCONF: libc::c_ulong = 0x8912;

/// The time after which a thread has begun its ioctl.
const BEGIN_DELAY: Duration = Duration::from_millis(100);

/// A thread that keeps a pipe locked. Dropping this value unlocks the pipe.
///
/// splice(2) from a socket into a pipe waits for data with the pipe locked. Nobody sends data to the
/// socket here.
pub(crate) struct PipeLock {
    _silent: UnixStream,
    /// close(2) of a pipe waits for the lock, so this descriptor must be dropped after the socket.
    _reader: File,
}

impl PipeLock {
    /// Locks a pipe that contains data. The process that reads the pipe then waits for the lock.
    pub(crate) fn new(pipe: &File) -> io::Result<Self> {
        let path = format!("/proc/self/fd/{}", pipe.as_raw_fd());
        let mut options = File::options();
        let options = options.read(true).custom_flags(libc::O_NONBLOCK);
        let reader = options.open(path)?;
        loop {
            let mut pipe = pipe.try_clone()?;
            let (socket, silent) = UnixStream::pair()?;
            let locking = thread::spawn(move || {
                let _ = pipe.write_all(b"data\n");
                let (from, to) = (socket.as_fd(), pipe.as_fd());
                splice(from, None, to, None, PAGE_BYTES, SpliceFFlags::empty())
            });
            thread::sleep(Duration::from_millis(200));
            // The other process can read the data before the pipe is locked.
            let mut polled = [PollFd::new(reader.as_fd(), PollFlags::POLLIN)];
            if poll(&mut polled, PollTimeout::ZERO)? > 0 {
                return Ok(PipeLock {
                    _silent: silent,
                    _reader: reader,
                });
            }
            drop(silent);
            let _ = locking.join();
        }
    }
}

/// A thread that is in an ioctl which copies data to memory with a lock held. Dropping this value
/// releases the lock.
///
/// The memory is a page that userfaultfd(2) manages. The copy waits until somebody provides the page.
pub(crate) struct SlowCopy {
    _faults: OwnedFd,
}

impl SlowCopy {
    /// Keeps the size of a terminal locked (TIOCGWINSZ).
    pub(crate) fn of_terminal_size(terminal: &Path) -> io::Result<Self> {
        let mut options = File::options();
        let options = options.read(true).custom_flags(libc::O_NOCTTY);
        let terminal = options.open(terminal)?;
        let (faults, page) = missing_page()?;
        thread::spawn(move || {
            // SAFETY: the kernel writes a winsize, which is smaller than a page, to the page. No other
            // code uses the page, and it is never unmapped.
            Errno::result(unsafe { libc::ioctl(terminal.as_raw_fd(), libc::TIOCGWINSZ, page) })
        });
        thread::sleep(BEGIN_DELAY);
        Ok(SlowCopy { _faults: faults })
    }

    /// Keeps a directory locked (getdents64(2)), while a thread waits for the right to change it.
    /// Reading of the directory then has to wait, too.
    pub(crate) fn of_directory(directory: &Path) -> io::Result<Self> {
        let lock = Self::of_entries(directory)?;
        let waits = directory.join("waits");
        thread::spawn(move || std::fs::create_dir(waits));
        thread::sleep(BEGIN_DELAY);
        Ok(lock)
    }

    /// Keeps the right to move files between directories of a file system (rename(2)). `directory` is
    /// a new directory.
    pub(crate) fn of_renames(directory: &Path) -> io::Result<Self> {
        let [from, to] = ["from", "to"].map(|name| directory.join(name));
        for directory in [&from, &to] {
            std::fs::create_dir_all(directory)?;
        }
        std::fs::write(from.join("file"), "")?;
        let lock = Self::of_entries(&to)?;
        thread::spawn(move || std::fs::rename(from.join("file"), to.join("file")));
        thread::sleep(BEGIN_DELAY);
        Ok(lock)
    }

    fn of_entries(directory: &Path) -> io::Result<Self> {
        let directory = File::open(directory)?;
        let (faults, page) = missing_page()?;
        thread::spawn(move || {
            let fd = directory.as_raw_fd();
            // SAFETY: the kernel writes at most PAGE_BYTES bytes to the page. No other code uses the
            // page, and it is never unmapped.
            let read = unsafe { libc::syscall(libc::SYS_getdents64, fd, page, PAGE_BYTES) };
            Errno::result(read)
        });
        thread::sleep(BEGIN_DELAY);
        Ok(SlowCopy { _faults: faults })
    }

    /// Keeps the kernel's lock on the network devices of all network namespaces locked (SIOCGIFCONF).
    pub(crate) fn of_interfaces() -> io::Result<Self> {
        let socket = UdpSocket::bind("127.0.0.1:0")?;
        let (faults, page) = missing_page()?;
        // struct ifconf: the length and the address of the memory.
        let mut interfaces = [PAGE_BYTES, page];
        thread::spawn(move || {
            let (fd, interfaces) = (socket.as_raw_fd(), interfaces.as_mut_ptr());
            // SAFETY: the kernel writes at most PAGE_BYTES bytes to the page. No other code uses the
            // page, and it is never unmapped.
            Errno::result(unsafe { libc::ioctl(fd, SIOCGIFCONF, interfaces) })
        });
        thread::sleep(BEGIN_DELAY);
        Ok(SlowCopy { _faults: faults })
    }
}

/// Returns the address of a page of which every access waits until the returned userfaultfd is closed.
fn missing_page() -> io::Result<(OwnedFd, usize)> {
    // SAFETY: userfaultfd(2) has no pointer arguments. The kernel returns a new descriptor, which
    // nobody else closes.
    let faults = unsafe {
        let fd = Errno::result(libc::syscall(libc::SYS_userfaultfd, libc::O_CLOEXEC))?;
        OwnedFd::from_raw_fd(i32::try_from(fd).map_err(io::Error::other)?)
    };
    let (length, access) = (
        NonZeroUsize::new(PAGE_BYTES).ok_or(Errno::EINVAL)?,
        ProtFlags::PROT_READ | ProtFlags::PROT_WRITE,
    );
    // SAFETY: the kernel selects the address of the new mapping.
    let page = unsafe { mmap_anonymous(None, length, access, MapFlags::MAP_PRIVATE)? };
    let page = page.as_ptr() as usize;
    // struct uffdio_api: the version of the interface, the features, and the supported ioctls.
    let mut api = [0xaa_u64, 0, 0];
    // struct uffdio_register: the address, the length, UFFDIO_REGISTER_MODE_MISSING, and the
    // supported ioctls.
    let mut register = [page as u64, PAGE_BYTES as u64, 1, 0];
    let fd = faults.as_raw_fd();
    // SAFETY: the two arrays have the sizes and the layouts of the structs that the kernel expects.
    unsafe {
        Errno::result(libc::ioctl(fd, 0xc018_aa3f, api.as_mut_ptr()))?;
        Errno::result(libc::ioctl(fd, 0xc020_aa00, register.as_mut_ptr()))?;
    }
    Ok((faults, page))
}
