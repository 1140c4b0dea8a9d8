//! Opens of files at paths that a container, an image or a configuration controls.
//!
//! The rule: such a path is opened only once the kind of its file is known. To open a device calls
//! its driver, even if nothing is read: a watchdog begins to count, a tape rewinds. To open a FIFO
//! waits for its other end. So the path is looked up with O_PATH, which calls no driver and does
//! not wait. If the file is a regular one, it is opened through its descriptor. It is not opened by
//! its path, because that may lead to another file by now. Directories are simpler: with
//! O_DIRECTORY the kernel refuses everything else before it calls a driver.

use std::os::fd::{AsFd, AsRawFd, OwnedFd};
use std::path::Path;

use rustix::fs::{FileType, Mode, OFlags, Stat};
use rustix::io::Errno;

use crate::error::{Error, Reason as _, Result, refuse};
use crate::sys::procfs::Procfs;

/// Opens the regular file at `path` for reading, and follows links. The kernel's namespace files
/// are regular files, too. The error is the text to put after the file's name and a colon.
pub(crate) fn open(path: &Path) -> Result<OwnedFd> {
    let found = rustix::fs::open(path, OFlags::PATH | OFlags::CLOEXEC, Mode::empty());
    let found = found.map_err(kernel_error)?;
    let (file, _) = reopen(&Procfs::open()?, &found)?;
    Ok(file)
}

/// Opens for reading the file that `found`, an O_PATH descriptor, refers to, if it is regular.
pub(crate) fn reopen(procfs: &Procfs, found: &impl AsFd) -> Result<(OwnedFd, Stat)> {
    let stat = rustix::fs::fstat(found).map_err(kernel_error)?;
    let kind = match FileType::from_raw_mode(stat.st_mode) {
        FileType::RegularFile => {
            let number = found.as_fd().as_raw_fd();
            let file = procfs.own_descriptor(number).map_err(kernel_error)?;
            return Ok((file, stat));
        }
        FileType::Directory => "a directory",
        FileType::CharacterDevice => "a character device",
        FileType::BlockDevice => "a block device",
        FileType::Fifo => "a FIFO",
        FileType::Socket => "a socket",
        FileType::Symlink => "a symbolic link",
        _ => "of an unknown kind",
    };
    refuse!("it is {kind}, not a regular file")
}

fn kernel_error(errno: Errno) -> Error {
    Error::new(errno.reason())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_a_regular_file_is_opened() {
        let dir = std::env::temp_dir().join(format!("rrun-regular-file-{}", std::process::id()));
        std::fs::create_dir_all(&dir).unwrap();
        std::fs::write(dir.join("file"), "text").unwrap();
        std::os::unix::fs::symlink("file", dir.join("link")).unwrap();
        nix::unistd::mkfifo(&dir.join("fifo"), nix::sys::stat::Mode::S_IRUSR).unwrap();
        for path in ["file", "link", "/proc/self/ns/net"] {
            open(&dir.join(path)).unwrap();
        }
        for (path, words) in [
            (".", "is a directory, not a regular file"),
            ("fifo", "is a FIFO, not a regular file"),
            ("/dev/null", "is a character device, not a regular file"),
            ("none", "No such file"),
        ] {
            let error = open(&dir.join(path)).unwrap_err().to_string();
            assert!(error.contains(words), "{path}: {error}");
        }
        std::fs::remove_dir_all(&dir).unwrap();
    }
}
