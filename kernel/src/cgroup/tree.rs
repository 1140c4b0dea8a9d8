//! Walks through a cgroup and the cgroups below it.
//!
//! A container with a writable cgroup mount can nest cgroups so deeply that their paths are longer
//! than PATH_MAX. This module therefore opens each cgroup relative to its parent, and then opens
//! the parent again as `..`. The kernel never moves a cgroup to another parent, so `..` always leads
//! back to the cgroup from which the walk came. Only one directory is open at a time.

use std::ffi::{CString, OsStr};
use std::mem::MaybeUninit;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::ffi::OsStrExt;
use std::path::{Path, PathBuf};

use rustix::fs::{AtFlags, FileType, Mode, OFlags, RawDir};
use rustix::io::Errno;

const OPEN: OFlags = OFlags::RDONLY
    .union(OFlags::DIRECTORY)
    .union(OFlags::CLOEXEC);

/// The maximum length of a path that [`CgroupTree::path`] returns. Error messages contain this path.
const MAX_PATH_BYTES: usize = 1024;

/// A walk through a cgroup and all cgroups below it. The walk visits each parent before its
/// children. If another process removes a cgroup during the walk, the walk omits this cgroup.
pub struct CgroupTree {
    /// The path of the first cgroup.
    top: PathBuf,
    /// The directory of the current cgroup.
    directory: OwnedFd,
    /// The children of the first cgroup that the walk has not visited yet.
    children: Vec<CString>,
    /// The cgroups from a child of the first cgroup down to the current cgroup.
    below: Vec<Level>,
}

struct Level {
    name: CString,
    /// The children of this cgroup that the walk has not visited yet.
    children: Vec<CString>,
}

impl CgroupTree {
    /// Begins a walk at the cgroup with the path `top`, which is the first current cgroup. Returns
    /// `None` if the cgroup does not exist.
    ///
    /// # Errors
    /// All errors of a walk contain the path of the cgroup that could not be read (see
    /// [`CgroupTree::path`]), and the errno.
    pub fn open(top: &Path) -> Result<Option<Self>, (PathBuf, Errno)> {
        let failed = |errno| (top.to_owned(), errno);
        let directory = match rustix::fs::open(top, OPEN, Mode::empty()) {
            Err(Errno::NOENT) => return Ok(None),
            directory => directory.map_err(failed)?,
        };
        let children = children(directory.as_fd()).map_err(failed)?;
        Ok(Some(CgroupTree {
            top: top.to_owned(),
            directory,
            children,
            below: Vec::new(),
        }))
    }

    /// Returns the directory of the current cgroup.
    pub fn directory(&self) -> BorrowedFd<'_> {
        self.directory.as_fd()
    }

    /// Returns the path of the current cgroup. If this path is longer than [`MAX_PATH_BYTES`],
    /// returns the path of the nearest ancestor with a shorter path.
    pub fn path(&self) -> PathBuf {
        let mut path = self.top.clone();
        for level in &self.below {
            let name = level.name.as_bytes();
            if path.as_os_str().len() + name.len() >= MAX_PATH_BYTES {
                break;
            }
            path.push(OsStr::from_bytes(name));
        }
        path
    }

    /// Moves to the next cgroup. Returns false at the end of the walk.
    pub fn advance(&mut self) -> Result<bool, (PathBuf, Errno)> {
        loop {
            if let Some(child) = self.next_child() {
                if self.enter(child)? {
                    return Ok(true);
                }
            } else if self.leave()?.is_none() {
                return Ok(false);
            }
        }
    }

    /// Removes all cgroups below the first cgroup. Children are removed before their parents.
    /// Continues after a cgroup that can't be removed, and returns the first of these failures.
    pub(super) fn remove_below(mut self) -> Result<(), (PathBuf, Errno)> {
        let mut result = Ok(());
        loop {
            let (name, may_have_children) = match self.next_child() {
                Some(child) => (child, true),
                None => match self.leave()? {
                    Some(left) => (left, false),
                    None => return result,
                },
            };
            match rustix::fs::unlinkat(&self.directory, &name, AtFlags::REMOVEDIR) {
                Ok(()) | Err(Errno::NOENT) => {}
                Err(_) if may_have_children => drop(self.enter(name)?),
                Err(errno) => result = result.and(Err((self.path_of(name), errno))),
            }
        }
    }

    fn next_child(&mut self) -> Option<CString> {
        match self.below.last_mut() {
            Some(level) => level.children.pop(),
            None => self.children.pop(),
        }
    }

    /// Moves from the current cgroup to its child `name`. Returns false if the child does not exist
    /// any more.
    fn enter(&mut self, name: CString) -> Result<bool, (PathBuf, Errno)> {
        let flags = OPEN.union(OFlags::NOFOLLOW);
        let opened = rustix::fs::openat(&self.directory, &name, flags, Mode::empty());
        let read = opened.and_then(|directory| Ok((children(directory.as_fd())?, directory)));
        match read {
            Ok((children, directory)) => {
                self.directory = directory;
                self.below.push(Level { name, children });
                Ok(true)
            }
            Err(Errno::NOENT) => Ok(false),
            Err(errno) => Err((self.path_of(name), errno)),
        }
    }

    /// Moves from the current cgroup to its parent, and returns the name of the cgroup that the walk
    /// has left. Returns `None` if the current cgroup is the first cgroup.
    fn leave(&mut self) -> Result<Option<CString>, (PathBuf, Errno)> {
        if self.below.is_empty() {
            return Ok(None);
        }
        match rustix::fs::openat(&self.directory, "..", OPEN, Mode::empty()) {
            Ok(parent) => self.directory = parent,
            Err(errno) => return Err((self.path(), errno)),
        }
        Ok(self.below.pop().map(|level| level.name))
    }

    fn path_of(&mut self, child: CString) -> PathBuf {
        self.below.push(Level {
            name: child,
            children: Vec::new(),
        });
        let path = self.path();
        self.below.pop();
        path
    }
}

/// Returns the names of a cgroup's children. A cgroup that has been removed has no children.
fn children(cgroup: BorrowedFd<'_>) -> Result<Vec<CString>, Errno> {
    let mut buffer = [MaybeUninit::uninit(); 8 << 10];
    let mut entries = RawDir::new(cgroup, &mut buffer);
    let mut children = Vec::new();
    while let Some(entry) = entries.next() {
        match entry {
            Ok(entry) if entry.file_type() == FileType::Directory => {
                let name = entry.file_name();
                if name != c"." && name != c".." {
                    children.push(name.to_owned());
                }
            }
            Ok(_) => {}
            Err(Errno::NOENT | Errno::NODEV) => return Ok(Vec::new()),
            Err(errno) => return Err(errno),
        }
    }
    Ok(children)
}

/// These tests use ordinary directories, which cgroups resemble. Only tests with real cgroups need
/// privileges.
#[cfg(test)]
mod tests {
    use super::*;
    use crate::cgroup::remove_tree;

    fn directory(test: &str) -> PathBuf {
        let path = std::env::temp_dir().join(format!("rrun-tree-{test}-{}", std::process::id()));
        std::fs::create_dir_all(&path).unwrap();
        path
    }

    /// Creates `depth` nested directories with names of `length` bytes, and a second directory on
    /// each level.
    fn nest(top: &Path, depth: usize, length: usize) {
        let name = "d".repeat(length);
        let mut at = rustix::fs::open(top, OPEN, Mode::empty()).unwrap();
        for _ in 0..depth {
            rustix::fs::mkdirat(&at, "second", Mode::RWXU).unwrap();
            rustix::fs::mkdirat(&at, &name, Mode::RWXU).unwrap();
            at = rustix::fs::openat(&at, &name, OPEN, Mode::empty()).unwrap();
        }
    }

    fn count(top: &Path) -> usize {
        let mut tree = CgroupTree::open(top).unwrap().unwrap();
        let mut count = 1;
        while tree.advance().unwrap() {
            assert!(tree.path().as_os_str().len() <= MAX_PATH_BYTES);
            count += 1;
        }
        count
    }

    #[test]
    fn cgroups_with_paths_longer_than_path_max_are_visited_and_removed() {
        for (depth, length) in [(30, 200), (300, 20)] {
            let top = directory(&format!("deep-{depth}"));
            nest(&top, depth, length);
            assert_eq!(count(&top), 1 + 2 * depth);
            remove_tree(&top).unwrap();
            assert!(!top.exists());
        }
    }

    #[test]
    fn a_missing_cgroup_has_no_tree_and_is_removed_successfully() {
        let top = directory("missing");
        std::fs::remove_dir(&top).unwrap();
        assert!(CgroupTree::open(&top).unwrap().is_none());
        remove_tree(&top).unwrap();
    }

    #[test]
    fn all_other_cgroups_are_removed_if_one_can_not_be_removed() {
        let top = directory("busy");
        for path in ["a/b/c", "a/d", "e"] {
            std::fs::create_dir_all(top.join(path)).unwrap();
        }
        std::fs::write(top.join("a/b/file"), "").unwrap();
        let (path, errno) = remove_tree(&top).unwrap_err();
        assert_eq!((path, errno), (top.join("a/b"), Errno::NOTEMPTY));
        assert_eq!(count(&top), 3);
        std::fs::remove_dir_all(&top).unwrap();
    }
}
