//! Functions that open files at paths from images, containers and pods.
//!
//! A file at such a path is opened only after its type has been checked. Opening a device calls its
//! driver, even if nothing is read or written. For example, a watchdog starts its countdown, a tape
//! drive rewinds its tape, or a terminal hangs up. Opening a FIFO blocks until a process opens the
//! other end of the FIFO. For this reason, the functions first look up the path with O_PATH, which
//! calls no driver and does not block. If the file is a regular file, the functions open it through
//! the O_PATH descriptor. The path is not looked up a second time, because it could then lead to
//! another file. For a directory, O_DIRECTORY is enough. With O_DIRECTORY, the kernel refuses every
//! other type of file before it calls a driver.

use std::fmt;
use std::fs::File;
use std::io::Read as _;
use std::os::fd::{AsFd, AsRawFd};
use std::path::Path;

use rustix::fs::{CWD, FileType, Mode, OFlags, Stat};
use rustix::io::Errno;

use crate::errno::describe;
use crate::procfs::{Procfs, ProcfsError};

/// The reason why a file was not opened or read.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Unfit {
    /// The file is not a regular file. The value is the file's type.
    Kind(FileType),
    /// The file is larger than the limit. The value is the limit in bytes.
    Larger(u64),
    Kernel(Errno),
    /// The file was found, but it cannot be opened through /proc.
    Procfs(ProcfsError),
}

impl Unfit {
    /// Returns the reason as a whole sentence that contains `file`, the path of the file.
    pub fn sentence(&self, file: &str) -> String {
        match self {
            Unfit::Kernel(_) | Unfit::Procfs(_) => format!("open {file}: {self}"),
            Unfit::Kind(_) | Unfit::Larger(_) => format!("{file} {}", self.predicate()),
        }
    }

    /// Returns the errno of the failed system call, if the kernel reported an error.
    pub fn errno(&self) -> Option<i32> {
        match self {
            Unfit::Kernel(errno) | Unfit::Procfs(ProcfsError::Kernel(errno)) => {
                Some(errno.raw_os_error())
            }
            Unfit::Kind(_) | Unfit::Larger(_) | Unfit::Procfs(ProcfsError::Foreign) => None,
        }
    }

    fn predicate(&self) -> String {
        match self {
            Unfit::Kind(kind) => {
                let kind = match kind {
                    FileType::Directory => "a directory",
                    FileType::CharacterDevice => "a character device",
                    FileType::BlockDevice => "a block device",
                    FileType::Fifo => "a FIFO",
                    FileType::Socket => "a socket",
                    FileType::Symlink => "a symbolic link",
                    _ => "of an unknown type",
                };
                format!("is {kind}, not a regular file")
            }
            Unfit::Larger(limit) => format!("is larger than {} kB", limit >> 10),
            Unfit::Kernel(errno) => describe(&(*errno).into()),
            Unfit::Procfs(error) => error.to_string(),
        }
    }
}

/// Displays the reason without the file's path. The caller writes the path and a colon before the
/// reason.
impl fmt::Display for Unfit {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Unfit::Kernel(_) | Unfit::Procfs(_) => f.write_str(&self.predicate()),
            Unfit::Kind(_) | Unfit::Larger(_) => write!(f, "it {}", self.predicate()),
        }
    }
}

impl std::error::Error for Unfit {}

impl From<ProcfsError> for Unfit {
    fn from(error: ProcfsError) -> Self {
        Unfit::Procfs(error)
    }
}

impl From<Errno> for Unfit {
    fn from(errno: Errno) -> Self {
        Unfit::Kernel(errno)
    }
}

/// Opens the regular file at `path` with the access that `flags` request. Symbolic links are
/// followed. A namespace file (/proc/PID/ns/…) counts as a regular file, too.
pub fn open(path: &Path, flags: OFlags) -> Result<File, Unfit> {
    open_at(CWD, path, flags, true)
}

/// Opens the regular file at `path`, which is relative to `dir`. If `follow` is false, this
/// function refuses a path whose last component is a symbolic link.
pub fn open_at(
    dir: impl AsFd,
    path: impl rustix::path::Arg,
    flags: OFlags,
    follow: bool,
) -> Result<File, Unfit> {
    let mut look = OFlags::PATH | OFlags::CLOEXEC;
    look.set(OFlags::NOFOLLOW, !follow);
    let found = rustix::fs::openat(dir, path, look, Mode::empty())?;
    reopen(found, flags)
}

/// Opens the file behind the O_PATH descriptor `found`. Returns an error if the file is not a
/// regular file.
pub fn reopen(found: impl AsFd, flags: OFlags) -> Result<File, Unfit> {
    check_kind(&found)?;
    reopen_regular(&Procfs::open()?, found, flags)
}

/// Does the same as [`reopen`], but uses a /proc that is already open and also returns the file's
/// attributes.
pub fn reopen_by(procfs: &Procfs, found: impl AsFd, flags: OFlags) -> Result<(File, Stat), Unfit> {
    let stat = check_kind(&found)?;
    Ok((reopen_regular(procfs, found, flags)?, stat))
}

/// Returns the attributes of an open file. Returns an error if the file is not a regular file.
pub fn check_kind(found: impl AsFd) -> Result<Stat, Unfit> {
    let stat = rustix::fs::fstat(found)?;
    match FileType::from_raw_mode(stat.st_mode) {
        FileType::RegularFile => Ok(stat),
        kind => Err(Unfit::Kind(kind)),
    }
}

fn reopen_regular(procfs: &Procfs, found: impl AsFd, flags: OFlags) -> Result<File, Unfit> {
    // O_NOCTTY is only a precaution, because it has no effect on a regular file. With O_NONBLOCK,
    // the open fails instead of waiting until another process gives up its lease on the file, see
    // fcntl(2).
    let flags = flags | OFlags::NONBLOCK | OFlags::NOCTTY;
    let number = found.as_fd().as_raw_fd();
    Ok(procfs.reopen_descriptor(number, flags)?.into())
}

/// Reads the whole file. Fails if the file has more than `limit` bytes.
pub fn read(file: File, limit: u64) -> Result<Vec<u8>, Unfit> {
    let mut bytes = Vec::new();
    let read = file.take(limit + 1).read_to_end(&mut bytes);
    read.map_err(|error| Errno::from_io_error(&error).unwrap_or(Errno::IO))?;
    match u64::try_from(bytes.len()) {
        Ok(length) if length <= limit => Ok(bytes),
        _ => Err(Unfit::Larger(limit)),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    type Result<T = ()> = std::result::Result<T, Box<dyn std::error::Error>>;

    #[test]
    fn only_a_regular_file_is_opened() -> Result {
        let dir = std::env::temp_dir().join(format!("rrun-regular-{}", std::process::id()));
        std::fs::create_dir_all(dir.join("directory"))?;
        std::fs::write(dir.join("file"), "text")?;
        std::os::unix::fs::symlink("file", dir.join("link"))?;
        let _socket = std::os::unix::net::UnixListener::bind(dir.join("socket"))?;
        nix::unistd::mkfifo(&dir.join("fifo"), nix::sys::stat::Mode::S_IRUSR)?;
        let open = |name: &str| open(&dir.join(name), OFlags::RDONLY);
        for name in ["file", "link"] {
            assert_eq!(read(open(name)?, 4)?, b"text", "{name}");
        }
        open("/proc/self/ns/net")?;
        assert_eq!(read(open("file")?, 3), Err(Unfit::Larger(3)));
        let message_of = |unfit: std::result::Result<File, Unfit>| {
            unfit
                .err()
                .map(|unfit| unfit.to_string())
                .unwrap_or_default()
        };
        for (name, message) in [
            ("directory", "it is a directory, not a regular file"),
            ("socket", "it is a socket, not a regular file"),
            ("fifo", "it is a FIFO, not a regular file"),
            ("/dev/null", "it is a character device, not a regular file"),
            ("missing", "No such file or directory (ENOENT)"),
        ] {
            assert_eq!(message_of(open(name)), message, "{name}");
        }
        let link = open_at(CWD, dir.join("link"), OFlags::RDONLY, false);
        assert_eq!(
            message_of(link),
            "it is a symbolic link, not a regular file"
        );
        std::fs::remove_dir_all(&dir)?;
        Ok(())
    }
}
