//! Opens files in the host's /proc. rrun writes to these files to configure processes and to set
//! kernel parameters.
//!
//! A container's protection can depend on the values that rrun writes. Another process in the same
//! mount namespace can mount a different file over a file in /proc. The mount can even be made
//! directly before rrun opens the file (CVE-2025-52881). For this reason, this module checks that
//! /proc is the root of a procfs, and refuses every path that crosses a mount point inside /proc.

use std::fmt;
use std::os::fd::OwnedFd;

use rustix::fs::{FsWord, Mode, OFlags, ResolveFlags};
use rustix::io::Errno;

use crate::errno;

/// The file system type of a procfs, from linux/magic.h.
pub const PROC_SUPER_MAGIC: FsWord = 0x9fa0;

/// The inode number of a procfs's root directory, `PROC_ROOT_INO` in linux/proc_fs.h.
const ROOT_INODE: u64 = 1;

/// The reason why /proc cannot be used.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum ProcfsError {
    Kernel(Errno),
    /// The mount at /proc is not a procfs, or it shows only a subdirectory of a procfs.
    Foreign,
}

impl From<Errno> for ProcfsError {
    fn from(errno: Errno) -> Self {
        ProcfsError::Kernel(errno)
    }
}

/// Displays a complete sentence, which begins with `open /proc: `.
impl fmt::Display for ProcfsError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("open /proc: ")?;
        match self {
            ProcfsError::Kernel(errno) => f.write_str(&errno::text(errno.raw_os_error())),
            ProcfsError::Foreign => f.write_str("the mount at /proc is not the root of a procfs"),
        }
    }
}

/// The root directory of a procfs.
pub struct Procfs(OwnedFd);

impl Procfs {
    /// Opens the procfs that is mounted at /proc.
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
        // `self` and `thread-self` are symbolic links. BENEATH allows them, because they lead to
        // directories inside /proc.
        let resolve = ResolveFlags::BENEATH | ResolveFlags::NO_XDEV | ResolveFlags::NO_MAGICLINKS;
        rustix::fs::openat2(
            &self.0,
            path,
            flags | OFlags::CLOEXEC,
            Mode::empty(),
            resolve,
        )
    }

    /// Opens a file for writing. `path` is relative to /proc.
    pub fn for_writing(&self, path: &str) -> Result<OwnedFd, Errno> {
        self.open_below(path, OFlags::WRONLY | OFlags::NOFOLLOW)
    }

    /// Reads a short file at `path`, which is relative to /proc. Returns at most the first 512 bytes.
    pub fn read(&self, path: &str) -> Result<Vec<u8>, Errno> {
        let file = self.open_below(path, OFlags::RDONLY | OFlags::NOFOLLOW)?;
        let mut text = vec![0; 512];
        let length = rustix::io::retry_on_intr(|| rustix::io::read(&file, &mut *text))?;
        text.truncate(length);
        Ok(text)
    }

    /// Reopens the file to which this thread's descriptor `number` refers, with the access mode in
    /// `flags`. `reopen_descriptor` opens exactly that file, even if the file's path now leads to
    /// another file.
    pub(crate) fn reopen_descriptor(&self, number: i32, flags: OFlags) -> Result<OwnedFd, Errno> {
        let directory = self.open_below("thread-self/fd", OFlags::PATH | OFlags::DIRECTORY)?;
        rustix::fs::openat(
            directory,
            number.to_string(),
            flags | OFlags::CLOEXEC,
            Mode::empty(),
        )
    }

    /// Writes `text` to the file at `path`, which is relative to /proc. The kernel requires that
    /// the whole text is passed in one write(2).
    pub fn write(&self, path: &str, text: &str) -> Result<(), Errno> {
        let file = self.for_writing(path)?;
        match rustix::io::write(&file, text.as_bytes())? {
            length if length == text.len() => Ok(()),
            _ => Err(Errno::INVAL),
        }
    }
}
