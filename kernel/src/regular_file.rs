//! Opens of files at paths that an image, a container or a pod controls.
//!
//! The rule: such a path is opened only once the kind of its file is known. To open a device calls
//! its driver, even if nothing is read or written: a watchdog begins to count, a tape rewinds, a
//! terminal hangs up. To open a FIFO waits for its other end. So the path is looked up with O_PATH,
//! which calls no driver and does not wait. If the file is a regular one, it is opened through its
//! descriptor. It is not opened by its path, because that may lead to another file by now.
//! Directories are simpler: with O_DIRECTORY the kernel refuses everything else before it calls a
//! driver.

use std::fmt;
use std::fs::File;
use std::io::Read as _;
use std::os::fd::{AsFd, AsRawFd};
use std::path::Path;

use rustix::fs::{CWD, FileType, Mode, OFlags, Stat};
use rustix::io::Errno;

use crate::errno::describe;
use crate::procfs::{Procfs, ProcfsError};

/// Why a file was not opened or read.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Unfit {
    /// It is a file of this other kind.
    Kind(FileType),
    /// It has more bytes than this limit.
    Larger(u64),
    Kernel(Errno),
    /// /proc, by which it would be opened, is not the kernel's own.
    Procfs(ProcfsError),
}

impl Unfit {
    /// A sentence about `file`.
    pub fn sentence(&self, file: &str) -> String {
        match self {
            Unfit::Kernel(_) | Unfit::Procfs(_) => format!("open {file}: {self}"),
            Unfit::Kind(_) | Unfit::Larger(_) => format!("{file} {}", self.predicate()),
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
                    _ => "of an unknown kind",
                };
                format!("is {kind}, not a regular file")
            }
            Unfit::Larger(limit) => format!("is larger than {} kB", limit >> 10),
            Unfit::Kernel(errno) => describe(&(*errno).into()),
            Unfit::Procfs(error) => error.to_string(),
        }
    }
}

/// The text to put after the file's name and a colon.
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

/// Opens the regular file at `path` with the access that `flags` request. Follows links. The
/// kernel's namespace files are regular files, too.
pub fn open(path: &Path, flags: OFlags) -> Result<File, Unfit> {
    open_at(CWD, path, flags, true)
}

/// Opens the regular file at `path` below `dir`. Without `follow`, a link as the last component is
/// refused.
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

/// Opens the file that `found`, an O_PATH descriptor, refers to, if it is a regular file.
pub fn reopen(found: impl AsFd, flags: OFlags) -> Result<File, Unfit> {
    check_kind(&found)?;
    reopen_regular(&Procfs::open()?, found, flags)
}

/// The same by a /proc that is open already, with the file's attributes.
pub fn reopen_by(procfs: &Procfs, found: impl AsFd, flags: OFlags) -> Result<(File, Stat), Unfit> {
    let stat = check_kind(&found)?;
    Ok((reopen_regular(procfs, found, flags)?, stat))
}

fn check_kind(found: impl AsFd) -> Result<Stat, Unfit> {
    let stat = rustix::fs::fstat(found)?;
    match FileType::from_raw_mode(stat.st_mode) {
        FileType::RegularFile => Ok(stat),
        kind => Err(Unfit::Kind(kind)),
    }
}

fn reopen_regular(procfs: &Procfs, found: impl AsFd, flags: OFlags) -> Result<File, Unfit> {
    // For a regular file O_NOCTTY has no effect, and O_NONBLOCK only avoids a wait for a lease.
    let flags = flags | OFlags::NONBLOCK | OFlags::NOCTTY;
    let number = found.as_fd().as_raw_fd();
    Ok(procfs.reopen_descriptor(number, flags)?.into())
}

/// Reads a file of at most `limit` bytes.
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
        let told = |unfit: std::result::Result<File, Unfit>| {
            unfit
                .err()
                .map(|unfit| unfit.to_string())
                .unwrap_or_default()
        };
        for (name, what) in [
            ("directory", "it is a directory, not a regular file"),
            ("socket", "it is a socket, not a regular file"),
            ("fifo", "it is a FIFO, not a regular file"),
            ("/dev/null", "it is a character device, not a regular file"),
            ("none", "No such file or directory (ENOENT)"),
        ] {
            assert_eq!(told(open(name)), what, "{name}");
        }
        let link = open_at(CWD, dir.join("link"), OFlags::RDONLY, false);
        assert_eq!(told(link), "it is a symbolic link, not a regular file");
        std::fs::remove_dir_all(&dir)?;
        Ok(())
    }
}
