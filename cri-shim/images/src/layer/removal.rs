//! Removes directory trees of any depth. Untrusted layers can contain very deep trees.
//!
//! Recursion would need a file descriptor or a stack frame for each level of directories. The
//! number of levels in a hostile layer is not limited. This module therefore first moves each
//! nested directory to the top of the tree, and then empties the directory. Two open directories
//! are then enough for every tree.

use std::os::fd::{AsFd, OwnedFd};
use std::path::Path;

use rustix::fs::{AtFlags, CWD, Dir, FileType, Mode, OFlags, RenameFlags};
use rustix::io::Errno;

const OPEN: OFlags = OFlags::RDONLY
    .union(OFlags::DIRECTORY)
    .union(OFlags::NOFOLLOW)
    .union(OFlags::CLOEXEC);

/// Removes a file or a whole directory. Does nothing if `path` does not exist.
pub fn remove_path(path: &Path) -> Result<(), Errno> {
    let (Some(parent), Some(name)) = (path.parent(), path.file_name()) else {
        return Err(Errno::INVAL);
    };
    let parent = match rustix::fs::openat(CWD, parent, OPEN, Mode::empty()) {
        Err(Errno::NOENT) => return Ok(()),
        other => other?,
    };
    remove(&parent, name.as_encoded_bytes())
}

/// Removes the file or directory `name` in the directory `parent`.
pub(super) fn remove(parent: impl AsFd, name: &[u8]) -> Result<(), Errno> {
    let parent = parent.as_fd();
    match rustix::fs::unlinkat(parent, name, AtFlags::empty()) {
        Ok(()) | Err(Errno::NOENT) => return Ok(()),
        Err(Errno::ISDIR | Errno::PERM) => {}
        Err(error) => return Err(error),
    }
    let top = rustix::fs::openat(parent, name, OPEN, Mode::empty())?;
    let mut moved: u64 = 0;
    loop {
        let directories = unlink_files(&top)?;
        if directories.is_empty() {
            break;
        }
        for directory in directories {
            let open = rustix::fs::openat(&top, directory.as_slice(), OPEN, Mode::empty())?;
            loop {
                let below = unlink_files(&open)?;
                if below.is_empty() {
                    break;
                }
                for name in below {
                    move_up(&open, &name, &top, &mut moved)?;
                }
            }
            rustix::fs::unlinkat(&top, directory.as_slice(), AtFlags::REMOVEDIR)?;
        }
    }
    rustix::fs::unlinkat(parent, name, AtFlags::REMOVEDIR)
}

/// Moves the directory `name` from `from` to `top`, under a name that is not in use in `top`.
fn move_up(from: &OwnedFd, name: &[u8], top: &OwnedFd, moved: &mut u64) -> Result<(), Errno> {
    loop {
        *moved += 1;
        let to = format!(".rrun-removed-{moved}");
        match rustix::fs::renameat_with(from, name, top, to.as_str(), RenameFlags::NOREPLACE) {
            Err(Errno::EXIST) => {}
            other => return other,
        }
    }
}

/// The maximum number of directory names that are kept in memory at the same time.
const NAMES_AT_ONCE: usize = 1024;

/// Unlinks files in a directory and returns the names of up to `NAMES_AT_ONCE` subdirectories. If
/// the returned list is empty, the directory is now empty.
fn unlink_files(directory: &OwnedFd) -> Result<Vec<Vec<u8>>, Errno> {
    let mut directories = Vec::new();
    for entry in Dir::read_from(directory)? {
        let entry = entry?;
        let name = entry.file_name().to_bytes();
        if name == b"." || name == b".." {
            continue;
        }
        let is_directory = match entry.file_type() {
            FileType::Directory => true,
            FileType::Unknown => {
                let stat = rustix::fs::statat(directory, name, AtFlags::SYMLINK_NOFOLLOW)?;
                FileType::from_raw_mode(stat.st_mode) == FileType::Directory
            }
            _ => false,
        };
        if !is_directory {
            rustix::fs::unlinkat(directory, name, AtFlags::empty())?;
        } else {
            directories.push(name.to_vec());
            if directories.len() == NAMES_AT_ONCE {
                break;
            }
        }
    }
    Ok(directories)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_tree_far_deeper_than_path_max_is_removed() -> Result<(), Box<dyn std::error::Error>> {
        let root = std::env::temp_dir().join(format!("rrun-removal-{}", std::process::id()));
        std::fs::create_dir_all(&root)?;
        let mut at = rustix::fs::openat(CWD, &root, OPEN, Mode::empty())?;
        for _ in 0..1200 {
            rustix::fs::mkdirat(&at, "deep", Mode::from_raw_mode(0o700))?;
            rustix::fs::mkdirat(&at, ".rrun-removed-7", Mode::from_raw_mode(0o700))?;
            at = rustix::fs::openat(&at, "deep", OPEN, Mode::empty())?;
        }
        remove_path(&root)?;
        assert!(!root.exists());
        remove_path(&root)?;
        Ok(())
    }
}
