//! The host's /proc, through which the kernel is told of processes and parameters.
//!
//! What is written there decides what protects a container. A process that another container
//! shares a mount namespace with, or a race with one, may have put another file in the place of
//! the one that is meant (CVE-2025-52881). So /proc is checked to be the root of a procfs, and
//! nothing that is mounted inside it is ever entered.

use std::fmt;
use std::os::fd::OwnedFd;

use rustix::fs::{FsWord, Mode, OFlags, ResolveFlags};
use rustix::io::Errno;

use crate::errno;

/// linux/magic.h
pub const PROC_SUPER_MAGIC: FsWord = 0x9fa0;

/// linux/proc_fs.h, PROC_ROOT_INO
const ROOT_INODE: u64 = 1;

/// Why /proc cannot be used.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum ProcfsError {
    Kernel(Errno),
    /// It is no procfs, or a part of one.
    Foreign,
}

impl From<Errno> for ProcfsError {
    fn from(errno: Errno) -> Self {
        ProcfsError::Kernel(errno)
    }
}

/// The whole sentence.
impl fmt::Display for ProcfsError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("open /proc: ")?;
        match self {
            ProcfsError::Kernel(errno) => f.write_str(&errno::text(errno.raw_os_error())),
            ProcfsError::Foreign => f.write_str("what is mounted there is not the kernel's own"),
        }
    }
}

/// The root directory of a procfs.
pub struct Procfs(OwnedFd);

impl Procfs {
    /// The one at /proc.
    pub fn open() -> Result<Procfs, ProcfsError> {
        let flags = OFlags::PATH | OFlags::DIRECTORY | OFlags::NOFOLLOW | OFlags::CLOEXEC;
        let root = rustix::fs::open("/proc", flags, Mode::empty())?;
        let is_procfs = rustix::fs::fstatfs(&root)?.f_type == PROC_SUPER_MAGIC;
        if !is_procfs || rustix::fs::fstat(&root)?.st_ino != ROOT_INODE {
            return Err(ProcfsError::Foreign);
        }
        Ok(Procfs(root))
    }

    fn open_below(&self, path: &str, flags: OFlags) -> Result<OwnedFd, Errno> {
        // `self` and `thread-self` are links, but to names beside them, which BENEATH allows.
        let resolve = ResolveFlags::BENEATH | ResolveFlags::NO_XDEV | ResolveFlags::NO_MAGICLINKS;
        rustix::fs::openat2(
            &self.0,
            path,
            flags | OFlags::CLOEXEC,
            Mode::empty(),
            resolve,
        )
    }

    /// Opens a file by its path below /proc, for writing.
    pub fn for_writing(&self, path: &str) -> Result<OwnedFd, Errno> {
        self.open_below(path, OFlags::WRONLY | OFlags::NOFOLLOW)
    }

    /// Opens anew, with the access that `flags` request, the file that descriptor `number` of this
    /// thread refers to. For an O_PATH descriptor, that is the file that was looked up, even if its
    /// path names another one by now.
    pub(crate) fn reopen_descriptor(&self, number: i32, flags: OFlags) -> Result<OwnedFd, Errno> {
        let directory = self.open_below("thread-self/fd", OFlags::PATH | OFlags::DIRECTORY)?;
        rustix::fs::openat(
            directory,
            number.to_string(),
            flags | OFlags::CLOEXEC,
            Mode::empty(),
        )
    }

    /// Writes a file by its path below /proc with one write(2), as the kernel wants it.
    pub fn write(&self, path: &str, text: &str) -> Result<(), Errno> {
        let file = self.for_writing(path)?;
        match rustix::io::write(&file, text.as_bytes())? {
            length if length == text.len() => Ok(()),
            _ => Err(Errno::INVAL),
        }
    }
}
