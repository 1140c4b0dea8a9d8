//! Removes directory trees of any depth. Untrusted layers and containers can contain very deep trees.
//!
//! Each level of directories needs an open file descriptor and a stack frame. The number of levels
//! in a hostile tree is not limited. A directory that is nested too deep is therefore moved to the
//! top of the tree, and removed later. The time for the removal grows linearly with the number of
//! files: each directory is read once, even while its entries are being removed.
//!
//! A container with the capability LINUX_IMMUTABLE can make files immutable or append-only,
//! ioctl_iflags(2). The kernel does not remove such a file, and removes no entry of such a
//! directory. If a step fails for this reason, the flags are cleared, and the step is repeated.

use std::os::fd::{AsFd, BorrowedFd};
use std::path::Path;

use rustix::fs::{
    AtFlags, CWD, Dir, FileType, IFlags, Mode, OFlags, RenameFlags, ioctl_getflags, ioctl_setflags,
};
use rustix::io::Errno;

use rrun_kernel::regular_file;

const OPEN: OFlags = OFlags::RDONLY
    .union(OFlags::DIRECTORY)
    .union(OFlags::NOFOLLOW)
    .union(OFlags::CLOEXEC);

/// The number of levels of directories that are open at the same time.
const MAX_DEPTH: usize = 32;

/// Removes a file or a whole directory. Does nothing if `path` does not exist.
pub fn remove_path(path: &Path) -> Result<(), Errno> {
    let (Some(parent), Some(name)) = (path.parent(), path.file_name()) else {
        return Err(Errno::INVAL);
    };
    let parent = match rustix::fs::openat(CWD, parent, OPEN, Mode::empty()) {
        Err(Errno::NOENT) => return Ok(()),
        other => other?,
    };
    remove(&parent, name.as_encoded_bytes(), &|| Ok(()))
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
    let top = rustix::fs::openat(parent, name, OPEN, Mode::empty())?;
    let mut removal = Removal {
        top: top.as_fd(),
        go_on,
        moved: 0,
        waiting: Vec::new(),
    };
    loop {
        let removed = removal.empty(&mut Dir::read_from(&top)?, 1)?;
        while let Some(number) = removal.waiting.pop() {
            match removal.remove_directory(top.as_fd(), moved_name(number).as_bytes(), 1) {
                // The loop that reads the top directory can find a moved directory, too.
                Ok(()) | Err(Errno::NOENT) => {}
                Err(error) => return Err(error),
            }
        }
        match unlink(parent, name, AtFlags::REMOVEDIR) {
            Err(Errno::NOTEMPTY | Errno::EXIST) if removed => {}
            other => return other,
        }
    }
}

struct Removal<'a> {
    /// The directory that is being removed.
    top: BorrowedFd<'a>,
    go_on: &'a dyn Fn() -> Result<(), Errno>,
    /// The number of directories that were moved to `top`.
    moved: u64,
    /// The numbers of the directories in `top` that were nested too deep and must be removed later.
    waiting: Vec<u64>,
}

impl Removal<'_> {
    /// Removes the entries of a directory at the level `depth`. Returns whether the directory had
    /// entries.
    fn empty(&mut self, directory: &mut Dir, depth: usize) -> Result<bool, Errno> {
        let mut removed = false;
        while let Some(entry) = directory.read() {
            let entry = entry?;
            let name = entry.file_name().to_bytes();
            if name == b"." || name == b".." {
                continue;
            }
            removed = true;
            (self.go_on)()?;
            let directory = directory.fd()?;
            if !is_directory(directory, name, entry.file_type())? {
                unlink(directory, name, AtFlags::empty())?;
            } else if depth < MAX_DEPTH {
                self.remove_directory(directory, name, depth)?;
            } else {
                self.move_up(directory, name)?;
            }
        }
        Ok(removed)
    }

    fn remove_directory(
        &mut self,
        parent: BorrowedFd<'_>,
        name: &[u8],
        depth: usize,
    ) -> Result<(), Errno> {
        loop {
            let opened = rustix::fs::openat(parent, name, OPEN, Mode::empty())?;
            let removed = self.empty(&mut Dir::new(opened)?, depth + 1)?;
            // A file system can skip entries if a directory changes while it is being read.
            match unlink(parent, name, AtFlags::REMOVEDIR) {
                Err(Errno::NOTEMPTY | Errno::EXIST) if removed => {}
                other => return other,
            }
        }
    }

    /// Moves the directory `name` from `from` to `top`, under a name that is not in use in `top`.
    fn move_up(&mut self, from: BorrowedFd<'_>, name: &[u8]) -> Result<(), Errno> {
        loop {
            self.moved += 1;
            let to = moved_name(self.moved);
            let rename =
                || rustix::fs::renameat_with(from, name, self.top, &to, RenameFlags::NOREPLACE);
            match unlocked([self.top, from], (from, name), rename) {
                Err(Errno::EXIST) => {}
                Err(error) => return Err(error),
                Ok(()) => {
                    self.waiting.push(self.moved);
                    return Ok(());
                }
            }
        }
    }
}

fn unlink(parent: BorrowedFd<'_>, name: &[u8], flags: AtFlags) -> Result<(), Errno> {
    unlocked([parent], (parent, name), || {
        rustix::fs::unlinkat(parent, name, flags)
    })
}

/// Calls `act`. If `act` fails because a file is immutable or append-only, clears these flags of
/// `directories` and of the file `name` in `parent`, and calls `act` again.
fn unlocked<const N: usize>(
    directories: [BorrowedFd<'_>; N],
    (parent, name): (BorrowedFd<'_>, &[u8]),
    act: impl Fn() -> Result<(), Errno>,
) -> Result<(), Errno> {
    match act() {
        Err(Errno::PERM) => {}
        done => return done,
    }
    let mut cleared = false;
    for directory in directories {
        cleared |= unlock(directory);
    }
    // Only regular files and directories are opened. The kernel refuses to set the flags of other
    // files with ioctl_iflags(2).
    cleared |= match rustix::fs::openat(parent, name, OPEN, Mode::empty()) {
        Ok(directory) => unlock(directory),
        Err(_) => regular_file::open_at(parent, name, OFlags::RDONLY, false).is_ok_and(unlock),
    };
    if cleared { act() } else { Err(Errno::PERM) }
}

/// Clears the flags that prevent the removal of a file. Returns whether the file had such a flag.
fn unlock(file: impl AsFd) -> bool {
    let locked = IFlags::IMMUTABLE | IFlags::APPEND;
    ioctl_getflags(&file).is_ok_and(|flags| {
        flags.intersects(locked) && ioctl_setflags(&file, flags.difference(locked)).is_ok()
    })
}

fn moved_name(number: u64) -> String {
    format!(".rrun-removed-{number}")
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
    use super::*;

    #[test]
    fn immutable_and_append_only_files_are_removed() -> Result<(), Box<dyn std::error::Error>> {
        if !rustix::process::geteuid().is_root() {
            eprintln!("skipped: setting the flags of a file needs root");
            return Ok(());
        }
        let root = std::env::temp_dir().join(format!("rrun-immutable-{}", std::process::id()));
        // The innermost directory is moved to the top before it is removed.
        let deep = root.join("a/".repeat(MAX_DEPTH + 1));
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
