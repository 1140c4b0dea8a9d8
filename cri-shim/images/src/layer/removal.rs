//! Removes directory trees of any depth. Untrusted layers and containers can contain very deep trees.
//!
//! The removal moves from directory to directory by descriptors ([`Levels`]). In a usual tree, each
//! directory is read once, even while its entries are being removed. No directory is moved: the kernel
//! moves only one file between directories of a file system at a time, and a container that still has a
//! directory of the tree open can make such a move take long.
//!
//! A container with the capability LINUX_IMMUTABLE can make files immutable or append-only,
//! ioctl_iflags(2). The kernel does not remove such a file, and removes no entry of such a
//! directory. If a step fails for this reason, the flags are cleared, and the step is repeated.

use std::ffi::CString;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::path::Path;

use rustix::fs::{AtFlags, CWD, FileType, IFlags, Mode, OFlags, ioctl_getflags, ioctl_setflags};
use rustix::io::Errno;

use rrun_kernel::directory_levels::{Ascent, Levels, OPEN};
use rrun_kernel::regular_file;

/// Removes a file or a whole directory. Does nothing if `path` does not exist.
pub fn remove_path(path: &Path) -> Result<(), Errno> {
    remove_path_and(path, &|| Ok(()))
}

/// Like [`remove_path`], but calls `go_on` before the removal of each file. An error from `go_on` ends
/// the removal.
pub(crate) fn remove_path_and(
    path: &Path,
    go_on: &dyn Fn() -> Result<(), Errno>,
) -> Result<(), Errno> {
    let (Some(parent), Some(name)) = (path.parent(), path.file_name()) else {
        return Err(Errno::INVAL);
    };
    let parent = match rustix::fs::openat(CWD, parent, OPEN, Mode::empty()) {
        Err(Errno::NOENT) => return Ok(()),
        other => other?,
    };
    remove(&parent, name.as_encoded_bytes(), go_on)
}

/// Removes the file or directory `name` in the directory `parent`. Calls `go_on` before the removal
/// of each file in the directory. An error from `go_on` ends the removal.
pub(super) fn remove(
    parent: impl AsFd,
    name: &[u8],
    go_on: &dyn Fn() -> Result<(), Errno>,
) -> Result<(), Errno> {
    let parent = parent.as_fd();
    match unlink(parent, name, AtFlags::empty()) {
        Ok(()) | Err(Errno::NOENT) => return Ok(()),
        Err(Errno::ISDIR | Errno::PERM) => {}
        Err(error) => return Err(error),
    }
    let mut removal = Removal {
        go_on,
        levels: Levels::default(),
        names: Vec::new(),
        has_removed: false,
    };
    loop {
        removal.enter(open(parent, name)?, 0)?;
        removal.empty_directories()?;
        if !remains(remove_directory(parent, name), removal.has_removed)? {
            return Ok(());
        }
    }
}

struct Removal<'a> {
    go_on: &'a dyn Fn() -> Result<(), Errno>,
    levels: Levels,
    /// The names of the entered directories whose parent directory remains open. The first directory
    /// is not in the list.
    names: Vec<CString>,
    /// True if an entry has been removed since the removal has entered a directory.
    has_removed: bool,
}

impl Removal<'_> {
    /// Removes the entries of the current directory and of the directories below it. Returns when it
    /// has left the first directory.
    fn empty_directories(&mut self) -> Result<(), Errno> {
        let mut offset = 0;
        let mut is_again = false;
        while let Some(directory) = self.levels.current() {
            let Some(entry) = directory.read() else {
                (offset, is_again) = self.leave()?;
                continue;
            };
            let entry = entry?;
            let (name, at) = (entry.file_name(), offset);
            offset = entry.offset();
            if name == c"." || name == c".." {
                continue;
            }
            (self.go_on)()?;
            let parent = directory.fd()?;
            if !is_directory(parent, name.to_bytes(), entry.file_type())? {
                unlink(parent, name.to_bytes(), AtFlags::empty())?;
                self.has_removed = true;
                continue;
            }
            if std::mem::take(&mut is_again)
                && !remains(remove_directory(parent, name.to_bytes()), self.has_removed)?
            {
                self.has_removed = true;
                continue;
            }
            let directory = open(parent, name.to_bytes())?;
            if !self.levels.is_deep() {
                self.names.push(name.to_owned());
            }
            self.enter(directory, at)?;
            offset = 0;
        }
        Ok(())
    }

    fn enter(&mut self, directory: OwnedFd, offset: i64) -> Result<(), Errno> {
        self.has_removed = false;
        self.levels.descend(directory, offset)
    }

    /// Leaves the current directory, and removes it if the directory above it is open. If not, the next
    /// entry of the directory above it is the entry of the directory that was left. Returns the
    /// position in the current directory, and whether the next entry is such an entry.
    fn leave(&mut self) -> Result<(i64, bool), Errno> {
        match self.levels.ascend()? {
            Ascent::Open => {}
            Ascent::Closed { offset } => return Ok((offset, true)),
            Ascent::Forgotten => return Ok((0, false)),
        }
        // The position in an open directory is never used.
        let position = (0, false);
        let (Some(directory), Some(name)) = (self.levels.current(), self.names.pop()) else {
            return Ok(position);
        };
        let parent = directory.fd()?;
        if remains(remove_directory(parent, name.to_bytes()), self.has_removed)? {
            let directory = open(parent, name.to_bytes())?;
            self.names.push(name);
            self.enter(directory, 0)?;
        } else {
            self.has_removed = true;
        }
        Ok(position)
    }
}

fn open(parent: BorrowedFd<'_>, name: &[u8]) -> Result<OwnedFd, Errno> {
    rustix::fs::openat(parent, name, OPEN, Mode::empty())
}

/// Removes a directory whose entries have been removed. While a process reads this directory, the
/// kernel keeps the parent directory locked, too. For this reason, the removal empties each directory
/// first.
fn remove_directory(parent: BorrowedFd<'_>, name: &[u8]) -> Result<(), Errno> {
    match unlink(parent, name, AtFlags::REMOVEDIR) {
        Err(Errno::NOENT) => Ok(()),
        removed => removed,
    }
}

/// Returns whether a directory is not empty after the removal of its entries. A file system can skip
/// entries if a directory changes while it is being read. Fails if no entry was removed.
fn remains(removed: Result<(), Errno>, has_removed: bool) -> Result<bool, Errno> {
    match removed {
        Err(Errno::NOTEMPTY | Errno::EXIST) if has_removed => Ok(true),
        removed => removed.map(|()| false),
    }
}

fn unlink(parent: BorrowedFd<'_>, name: &[u8], flags: AtFlags) -> Result<(), Errno> {
    match rustix::fs::unlinkat(parent, name, flags) {
        Err(Errno::PERM) => {}
        done => return done,
    }
    // The file or its directory is immutable or append-only.
    let mut cleared = unlock(parent);
    // Only regular files and directories are opened. The kernel refuses to set the flags of other
    // files with ioctl_iflags(2).
    cleared |= match rustix::fs::openat(parent, name, OPEN, Mode::empty()) {
        Ok(directory) => unlock(directory),
        Err(_) => regular_file::open_at(parent, name, OFlags::RDONLY, false).is_ok_and(unlock),
    };
    if !cleared {
        return Err(Errno::PERM);
    }
    rustix::fs::unlinkat(parent, name, flags)
}

/// Clears the flags that prevent the removal of a file. Returns whether the file had such a flag.
fn unlock(file: impl AsFd) -> bool {
    let locked = IFlags::IMMUTABLE | IFlags::APPEND;
    ioctl_getflags(&file).is_ok_and(|flags| {
        flags.intersects(locked) && ioctl_setflags(&file, flags.difference(locked)).is_ok()
    })
}

fn is_directory(parent: BorrowedFd<'_>, name: &[u8], kind: FileType) -> Result<bool, Errno> {
    if kind != FileType::Unknown {
        return Ok(kind == FileType::Directory);
    }
    let stat = rustix::fs::statat(parent, name, AtFlags::SYMLINK_NOFOLLOW)?;
    Ok(FileType::from_raw_mode(stat.st_mode) == FileType::Directory)
}

#[cfg(test)]
mod tests {
    use rrun_kernel::directory_levels::{MAX_CLOSED, OPEN_LEVELS};

    use super::*;

    #[test]
    fn immutable_and_append_only_files_are_removed() -> Result<(), Box<dyn std::error::Error>> {
        if !rustix::process::geteuid().is_root() {
            eprintln!("skipped: setting the flags of a file needs root");
            return Ok(());
        }
        let root = std::env::temp_dir().join(format!("rrun-immutable-{}", std::process::id()));
        let deep = root.join("a/".repeat(OPEN_LEVELS + 2));
        std::fs::create_dir_all(&deep)?;
        std::fs::write(root.join("file"), "")?;
        std::fs::write(deep.join("file"), "")?;
        let parent = deep.parent().ok_or("the path has no parent")?;
        let locked = [
            (root.join("file"), IFlags::APPEND),
            (deep.join("file"), IFlags::IMMUTABLE),
            (deep.clone(), IFlags::APPEND),
            (parent.to_owned(), IFlags::IMMUTABLE),
            (root.join("a"), IFlags::IMMUTABLE),
            (root.clone(), IFlags::APPEND),
        ];
        for (path, flag) in &locked {
            let file = std::fs::File::open(path)?;
            let flags = ioctl_getflags(&file)?;
            match ioctl_setflags(&file, flags | *flag) {
                Err(Errno::OPNOTSUPP | Errno::NOTTY) => {
                    eprintln!("skipped: the file system has no such flags");
                    return Ok(remove_path(&root)?);
                }
                set => set?,
            }
        }
        remove_path(&root)?;
        assert!(!root.exists());
        // The removal of a single file clears its flags, too.
        std::fs::write(&root, "")?;
        let file = std::fs::File::open(&root)?;
        ioctl_setflags(&file, ioctl_getflags(&file)? | IFlags::IMMUTABLE)?;
        remove_path(&root)?;
        assert!(!root.exists());
        Ok(())
    }

    /// The removal forgets directories on its way down.
    #[test]
    fn a_tree_deeper_than_the_remembered_directories_is_removed()
    -> Result<(), Box<dyn std::error::Error>> {
        // So many directories take minutes on a disk.
        let name = format!("rrun-deepest-{}", std::process::id());
        let root = Path::new("/dev/shm").join(name);
        std::fs::create_dir_all(&root)?;
        let mut at = rustix::fs::openat(CWD, &root, OPEN, Mode::empty())?;
        for _ in 0..3 * MAX_CLOSED {
            rustix::fs::mkdirat(&at, "deep", Mode::RWXU)?;
            rustix::fs::mkdirat(&at, "other", Mode::RWXU)?;
            at = rustix::fs::openat(&at, "deep", OPEN, Mode::empty())?;
        }
        // While a process has a directory open, each removal above it takes the kernel longer.
        drop(at);
        let steps = std::cell::Cell::new(0);
        remove_path_and(&root, &|| {
            steps.set(steps.get() + 1);
            Ok(())
        })?;
        assert!(!root.exists());
        assert!(steps.get() < 20 * MAX_CLOSED, "{steps:?} steps");
        Ok(())
    }

    #[test]
    fn a_tree_far_deeper_than_path_max_is_removed() -> Result<(), Box<dyn std::error::Error>> {
        let root = std::env::temp_dir().join(format!("rrun-removal-{}", std::process::id()));
        std::fs::create_dir_all(&root)?;
        let mut at = rustix::fs::openat(CWD, &root, OPEN, Mode::empty())?;
        let mode = Mode::from_raw_mode(0o700);
        for _ in 0..1200 {
            // The removal reads these directories before and after the directory of the next level.
            for name in ["a", "b", "z", "deep"] {
                rustix::fs::mkdirat(&at, name, mode)?;
                let full = rustix::fs::openat(&at, name, OPEN, Mode::empty())?;
                if name != "deep" {
                    rustix::fs::mkdirat(&full, "below", mode)?;
                }
            }
            at = rustix::fs::openat(&at, "deep", OPEN, Mode::empty())?;
        }
        remove_path(&root)?;
        assert!(!root.exists());
        remove_path(&root)?;
        Ok(())
    }
}
