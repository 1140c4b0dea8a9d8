//! Directories of the unified hierarchy (cgroup v2) and their interface files. See cgroups(7) and
//! the kernel's Documentation/admin-guide/cgroup-v2.rst.

mod kill;
mod tree;

use std::fs::File;
use std::io;
use std::os::fd::{AsFd, BorrowedFd};
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};

use rustix::fs::{FsWord, Mode, OFlags};
use rustix::io::Errno;

pub use kill::{Survivors, kill, kill_after_leases};
pub use tree::CgroupTree;

use kill::write;

/// The mount point of the unified hierarchy (cgroup v2).
pub const MOUNT_POINT: &str = "/sys/fs/cgroup";

/// The file system type of the unified hierarchy, from linux/magic.h.
const CGROUP2_SUPER_MAGIC: FsWord = 0x6367_7270;

/// Returns whether the unified hierarchy is mounted at [`MOUNT_POINT`].
pub fn is_mounted() -> Result<bool, Errno> {
    Ok(rustix::fs::statfs(MOUNT_POINT)?.f_type == CGROUP2_SUPER_MAGIC)
}

/// Returns whether `directory` is the open directory of a cgroup in the unified hierarchy.
pub fn is_cgroup(directory: impl AsFd) -> Result<bool, Errno> {
    Ok(rustix::fs::fstatfs(directory)?.f_type == CGROUP2_SUPER_MAGIC)
}

/// The flags for opening an interface file without waiting. A process of a container can hold a
/// lease on a file of the container's cgroup (F_SETLEASE in fcntl(2)). Without O_NONBLOCK, open(2) waits
/// until the kernel breaks the lease, usually for 45 s (lease-break-time in proc_sys_fs(5)). With
/// O_NONBLOCK, open(2) fails with EAGAIN, and the kernel breaks the lease at the same time.
const WITHOUT_WAITING: OFlags = OFlags::CLOEXEC.union(OFlags::NONBLOCK);

/// Opens an interface file of a cgroup to read it.
///
/// # Errors
/// EAGAIN means that a process holds a lease on the file.
pub fn open_file(path: &Path) -> io::Result<File> {
    let file = rustix::fs::open(path, OFlags::RDONLY | WITHOUT_WAITING, Mode::empty())?;
    Ok(File::from(file))
}

/// Returns the text of an interface file.
///
/// # Errors
/// EAGAIN means that a process holds a lease on the file.
pub fn read_file(path: &Path) -> io::Result<String> {
    io::read_to_string(open_file(path)?)
}

/// Returns whether the cgroup or any cgroup below it contains a process. Returns false if the
/// cgroup does not exist.
pub fn is_populated(cgroup: &Path) -> bool {
    match read_file(&cgroup.join("cgroup.events")) {
        Ok(events) => keyed(&events, "populated") == Some(1),
        // A process holds a lease on the file.
        Err(error) => error.kind() == io::ErrorKind::WouldBlock,
    }
}

/// Removes the cgroup and all cgroups below it. These cgroups must not contain any processes.
/// Children are removed before their parents. If the cgroup does not exist, `remove_tree` returns
/// `Ok`.
///
/// # Errors
/// The error contains the path of the first cgroup that could not be removed (see
/// [`CgroupTree::path`]), and the errno. EBUSY means that this cgroup still contains processes or
/// other cgroups.
pub fn remove_tree(cgroup: &Path) -> Result<(), (PathBuf, Errno)> {
    // Usually the cgroup has no children, so a single rmdir(2) is enough.
    match rustix::fs::rmdir(cgroup) {
        Ok(()) | Err(Errno::NOENT) => return Ok(()),
        Err(_) => {}
    }
    let Some(tree) = CgroupTree::open(cgroup)? else {
        return Ok(());
    };
    tree.remove_below()?;
    match rustix::fs::rmdir(cgroup) {
        Ok(()) | Err(Errno::NOENT) => Ok(()),
        Err(errno) => Err((cgroup.to_owned(), errno)),
    }
}

/// Returns the value of `key` in the text of a flat keyed file. An example is the key `populated`
/// in cgroup.events.
pub fn keyed(text: &str, key: &str) -> Option<u64> {
    text.lines()
        .find_map(|line| line.strip_prefix(key)?.strip_prefix(' '))
        .and_then(|value| value.trim().parse().ok())
}

/// Returns the controllers that are available in the cgroup but not enabled for its children.
pub fn missing_below(cgroup: &Path) -> Vec<String> {
    let read = |file: &str| read_file(&cgroup.join(file)).unwrap_or_default();
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

/// Limits the number of cgroups below `cgroup` to `most` (cgroup-v2.rst, `cgroup.max.descendants`).
/// Does nothing if the cgroup does not exist, or if it already has child cgroups.
pub fn limit_descendants(cgroup: &Path, most: usize) -> Result<(), Errno> {
    match read_file(&cgroup.join("cgroup.stat")) {
        Ok(stat) if keyed(&stat, "nr_descendants") == Some(0) => {
            write(cgroup, "cgroup.max.descendants", &most.to_string())
        }
        Ok(_) => Ok(()),
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(()),
        Err(error) => Err(Errno::from_io_error(&error).unwrap_or(Errno::IO)),
    }
}

/// The counter `oom_kill` in a cgroup's memory.events. If memory runs out and the kernel kills a
/// process in the cgroup, the kernel increments the counter. `OomKills` keeps memory.events open.
/// The counter therefore remains readable after the last process of the cgroup has exited.
#[derive(Debug)]
pub struct OomKills {
    events: File,
    seen: u64,
}

impl OomKills {
    /// Opens the counter of the OOM kills in `cgroup`. Returns `None` if the memory controller is
    /// not enabled.
    pub fn open(cgroup: &Path) -> Option<Self> {
        let events = open_file(&cgroup.join("memory.events")).ok()?;
        Some(OomKills { events, seen: 0 })
    }

    /// Returns whether the counter has risen since the last call. The first call returns whether
    /// the counter has risen since the cgroup was created.
    ///
    /// # Errors
    /// Fails if the cgroup has been removed.
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

/// The descriptor of memory.events. poll(2) reports POLLPRI on this descriptor when the file has
/// changed since it was last read.
impl AsFd for OomKills {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.events.as_fd()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_a_whole_key_of_a_flat_keyed_file_matches() {
        let text = "inactive_file 5\nfile 7\n";
        assert_eq!(keyed(text, "file"), Some(7));
        assert_eq!(keyed(text, "inactive_file"), Some(5));
        assert_eq!(keyed(text, "inactive"), None);
    }
}
