//! Directories of the unified hierarchy (cgroup v2), and what their own files do. See cgroups(7) and
//! the kernel's Documentation/admin-guide/cgroup-v2.rst.

use std::fs::File;
use std::io;
use std::os::fd::{AsFd, BorrowedFd};
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};

use rustix::fs::{FsWord, Mode, OFlags};
use rustix::io::Errno;

/// Where the hierarchy is mounted.
pub const MOUNT_POINT: &str = "/sys/fs/cgroup";

/// linux/magic.h
const CGROUP2_SUPER_MAGIC: FsWord = 0x6367_7270;

/// Whether the hierarchy is mounted at [`MOUNT_POINT`].
pub fn is_mounted() -> Result<bool, Errno> {
    Ok(rustix::fs::statfs(MOUNT_POINT)?.f_type == CGROUP2_SUPER_MAGIC)
}

/// Whether an open directory is a cgroup's.
pub fn is_cgroup(directory: impl AsFd) -> Result<bool, Errno> {
    Ok(rustix::fs::fstatfs(directory)?.f_type == CGROUP2_SUPER_MAGIC)
}

/// Whether any process is in the cgroup or below it. A cgroup that does not exist has none.
pub fn is_populated(cgroup: &Path) -> bool {
    let events = std::fs::read_to_string(cgroup.join("cgroup.events"));
    events.is_ok_and(|events| keyed(&events, "populated") == Some(1))
}

/// Kills every process in the cgroup and below it, at once, so that none escapes by forking. Does
/// not wait for their end. A cgroup that does not exist is no error.
pub fn kill(cgroup: &Path) -> Result<(), Errno> {
    match write(cgroup, "cgroup.kill", "1") {
        // ENODEV: it was removed after it was opened.
        Err(Errno::NOENT | Errno::NODEV) => Ok(()),
        result => result,
    }
}

fn write(cgroup: &Path, file: &str, value: &str) -> Result<(), Errno> {
    let flags = OFlags::WRONLY | OFlags::CLOEXEC;
    let file = rustix::fs::open(cgroup.join(file), flags, Mode::empty())?;
    rustix::io::write(&file, value.as_bytes())?;
    Ok(())
}

/// A cgroup and all below it, parents before children.
pub fn tree(cgroup: &Path) -> Vec<PathBuf> {
    let mut found = vec![cgroup.to_owned()];
    let mut next = 0;
    while let Some(directory) = found.get(next).cloned() {
        next += 1;
        let entries = std::fs::read_dir(&directory).into_iter().flatten();
        found.extend(
            entries
                .flatten()
                .filter(|entry| entry.file_type().is_ok_and(|kind| kind.is_dir()))
                .map(|entry| entry.path()),
        );
    }
    found
}

/// Removes the cgroup and those below it, which must have no processes. A cgroup that does not exist
/// is no error.
///
/// # Errors
/// The first failure, children before parents, with its path. EBUSY: it has processes or children.
pub fn remove_tree(cgroup: &Path) -> Result<(), (PathBuf, Errno)> {
    // Mostly there is nothing below.
    match rustix::fs::rmdir(cgroup) {
        Ok(()) | Err(Errno::NOENT) => return Ok(()),
        Err(_) => {}
    }
    let mut failed = None;
    for directory in tree(cgroup).into_iter().rev() {
        match rustix::fs::rmdir(&directory) {
            Ok(()) | Err(Errno::NOENT) => {}
            Err(errno) => failed = failed.or(Some((directory, errno))),
        }
    }
    failed.map_or(Ok(()), Err)
}

/// The value of `key` in a flat keyed file, such as `populated` in cgroup.events.
pub fn keyed(text: &str, key: &str) -> Option<u64> {
    text.lines()
        .find_map(|line| line.strip_prefix(key)?.strip_prefix(' '))
        .and_then(|value| value.trim().parse().ok())
}

/// The controllers that the cgroup has and its children lack.
pub fn missing_below(cgroup: &Path) -> Vec<String> {
    let read = |file: &str| std::fs::read_to_string(cgroup.join(file)).unwrap_or_default();
    let enabled = read("cgroup.subtree_control");
    let is_enabled = |name: &str| enabled.split_ascii_whitespace().any(|known| known == name);
    read("cgroup.controllers")
        .split_ascii_whitespace()
        .filter(|name| !is_enabled(name))
        .map(str::to_owned)
        .collect()
}

/// Enables a controller for the cgroup's children.
pub fn enable_below(cgroup: &Path, controller: &str) -> Result<(), Errno> {
    write(cgroup, "cgroup.subtree_control", &format!("+{controller}"))
}

/// `oom_kill` in memory.events: how often the kernel has killed a process in this cgroup because
/// memory ran out. The file stays open, since the count must be read after the last process is gone.
#[derive(Debug)]
pub struct OomKills {
    events: File,
    seen: u64,
}

impl OomKills {
    /// `None` if the memory controller is not enabled.
    pub fn open(cgroup: &Path) -> Option<Self> {
        let events = File::open(cgroup.join("memory.events")).ok()?;
        Some(OomKills { events, seen: 0 })
    }

    /// Whether the kernel has killed since the last call.
    ///
    /// # Errors
    /// The cgroup has been removed.
    pub fn rose(&mut self) -> io::Result<bool> {
        let mut text = [0; 512];
        let length = self.events.read_at(&mut text, 0)?;
        let kills = text
            .get(..length)
            .and_then(|text| std::str::from_utf8(text).ok())
            .and_then(|text| keyed(text, "oom_kill"))
            .unwrap_or(self.seen);
        let rose = kills > self.seen;
        self.seen = kills;
        Ok(rose)
    }
}

/// poll(2) reports POLLPRI when the file has changed since it was read.
impl AsFd for OomKills {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.events.as_fd()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn flat_keyed_files_are_read_by_whole_keys() {
        let text = "inactive_file 5\nfile 7\n";
        assert_eq!(keyed(text, "file"), Some(7));
        assert_eq!(keyed(text, "inactive_file"), Some(5));
        assert_eq!(keyed(text, "inactive"), None);
    }
}
