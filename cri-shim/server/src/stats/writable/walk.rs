//! Counts the files and bytes in a directory tree that a container controls.
//!
//! The walk moves from directory to directory by descriptors ([`Levels`]). It never follows a symbolic
//! link, and never enters another mount. Its memory does not depend on the number of files. While the
//! walk runs, the container can change the tree.

use std::os::fd::{BorrowedFd, OwnedFd};
use std::path::Path;

use rrun_kernel::directory_levels::{Levels, MAX_CLOSED, OPEN};
use rustix::fs::{
    AtFlags, CWD, Dir, FileType, Mode, ResolveFlags, Stat, fstat, openat, openat2, statat,
};
use rustix::io::Errno;

/// The number of steps between two calls of `pause`. Reading an entry is a step, and so is leaving a
/// directory.
const STEPS_BETWEEN_PAUSES: u64 = 1024;

/// The result of a walk.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(super) struct Count {
    pub bytes: u64,
    pub inodes: u64,
    /// True if parts of the tree could not be counted.
    pub incomplete: bool,
}

impl Count {
    /// Counts the directories `roots` with their contents. A directory that does not exist is
    /// skipped. Calls `pause` from time to time, with the numbers until then. If `pause` returns
    /// false, the walk ends early.
    pub(super) fn of(roots: &[&Path], mut pause: impl FnMut(&Count) -> bool) -> Self {
        let mut count = Count::default();
        for root in roots {
            // O_DIRECTORY makes this call fail for a device before its driver is called.
            match openat(CWD, *root, OPEN, Mode::empty()) {
                Ok(root) => count.walk(root, &mut pause),
                Err(Errno::NOENT) => {}
                Err(_) => count.incomplete = true,
            }
        }
        count
    }

    fn walk(&mut self, root: OwnedFd, pause: &mut impl FnMut(&Count) -> bool) {
        if let Ok(stat) = fstat(&root) {
            self.add(&stat);
        }
        let mut levels = Levels::default();
        if levels.descend(root, 0).is_err() {
            self.incomplete = true;
        }
        let mut steps = 0_u64;
        loop {
            steps += 1;
            if steps.is_multiple_of(STEPS_BETWEEN_PAUSES) && !pause(self) {
                return;
            }
            let Some(directory) = levels.current() else {
                return;
            };
            let entry = match directory.read() {
                Some(Ok(entry)) => entry,
                end => {
                    self.incomplete |= end.is_some();
                    if levels.ascend().is_err() {
                        self.give_up(&levels);
                    }
                    continue;
                }
            };
            let name = entry.file_name();
            if name == c"." || name == c".." {
                continue;
            }
            let Ok(parent) = directory.fd() else { continue };
            let Ok(stat) = statat(parent, name, AtFlags::SYMLINK_NOFOLLOW) else {
                // The file was removed during the walk.
                continue;
            };
            self.add(&stat);
            if FileType::from_raw_mode(stat.st_mode) == FileType::Directory {
                let below = below(parent, name);
                match below {
                    Ok(_) if levels.depth_below_open() >= MAX_CLOSED => self.give_up(&levels),
                    Ok(below) => {
                        self.incomplete |= levels.descend(below, entry.offset()).is_err();
                    }
                    // The directory was removed or replaced, or it is a mount point.
                    Err(Errno::NOENT | Errno::NOTDIR | Errno::LOOP | Errno::XDEV) => {}
                    Err(_) => self.incomplete = true,
                }
            }
        }
    }

    fn add(&mut self, stat: &Stat) {
        self.inodes += 1;
        // The bytes of a file with several hard links are divided equally among its names. A
        // directory's bytes are not divided, because its link count depends on its subdirectories.
        #[allow(
            clippy::useless_conversion,
            reason = "the field has 32 bits on some architectures"
        )]
        let names = match FileType::from_raw_mode(stat.st_mode) {
            FileType::Directory => 1,
            _ => u64::from(stat.st_nlink).max(1),
        };
        // st_blocks counts in units of 512 bytes, stat(2).
        self.bytes += u64::try_from(stat.st_blocks).unwrap_or_default() * 512 / names;
    }

    /// Handles a directory that can't be counted, because it is nested too deep, or because the
    /// container moved a directory below the levels that remain open. Counts all used bytes of the
    /// file system: the directory can contain any of them, and only a hostile container does this.
    fn give_up(&mut self, levels: &Levels) {
        let top = levels.root();
        if let Some(Ok(file_system)) = top.map(Dir::statvfs) {
            let used = file_system.f_blocks.saturating_sub(file_system.f_bfree);
            self.bytes = self.bytes.max(used.saturating_mul(file_system.f_frsize));
        }
        self.incomplete = true;
    }
}

/// Opens the subdirectory `name`.
fn below(parent: BorrowedFd<'_>, name: &std::ffi::CStr) -> Result<OwnedFd, Errno> {
    let resolve = ResolveFlags::BENEATH | ResolveFlags::NO_SYMLINKS | ResolveFlags::NO_XDEV;
    // O_DIRECTORY makes this call fail for a device before its driver is called.
    openat2(parent, name, OPEN, Mode::empty(), resolve)
}

#[cfg(test)]
mod tests {
    use std::path::PathBuf;

    use rrun_kernel::directory_levels::OPEN_LEVELS;
    use rustix::fs::{OFlags, mkdirat, renameat};

    use super::*;

    type Outcome = Result<(), Box<dyn std::error::Error>>;

    /// A directory of a test. Dropping this value removes the directory.
    struct Tree(PathBuf);

    impl Tree {
        fn new(name: &str) -> std::io::Result<Self> {
            let name = format!("rrun-walk-{name}-{}", std::process::id());
            let tree = Tree(std::env::temp_dir().join(name));
            std::fs::create_dir_all(&tree.0)?;
            Ok(tree)
        }

        fn count(&self) -> Count {
            Count::of(&[&self.0], |_| true)
        }

        fn open(&self) -> Result<OwnedFd, Errno> {
            openat(CWD, &self.0, OPEN, Mode::empty())
        }
    }

    impl Drop for Tree {
        fn drop(&mut self) {
            let _ = rrun_images::layer::remove_path(&self.0);
        }
    }

    fn make_below(parent: &OwnedFd, name: &str) -> Result<OwnedFd, Errno> {
        mkdirat(parent, name, Mode::RWXU)?;
        openat(parent, name, OPEN, Mode::empty())
    }

    fn write(directory: &OwnedFd, name: &str, bytes: usize) -> Outcome {
        let flags = OFlags::WRONLY | OFlags::CREATE;
        let file = openat(directory, name, flags, Mode::RWXU)?;
        Ok(std::io::Write::write_all(
            &mut std::fs::File::from(file),
            &vec![b'x'; bytes],
        )?)
    }

    #[test]
    fn files_deeper_than_any_path_are_counted() -> Outcome {
        let tree = Tree::new("deep")?;
        let mut at = tree.open()?;
        for _ in 0..25 {
            at = make_below(&at, &"n".repeat(200))?;
        }
        write(&at, "hidden", 1 << 20)?;
        let count = tree.count();
        assert!(count.bytes >= 1 << 20, "{count:?}");
        assert_eq!((count.inodes, count.incomplete), (27, false));
        Ok(())
    }

    /// Each level has directories before and after the directory of the next level. The walk must
    /// continue after it has closed the directory.
    #[test]
    fn every_entry_is_counted_once_below_the_levels_that_remain_open() -> Outcome {
        let tree = Tree::new("levels")?;
        let mut at = tree.open()?;
        let levels = OPEN_LEVELS as u64 * 3;
        for _ in 0..levels {
            for name in 0..10 {
                make_below(&at, &name.to_string())?;
            }
            write(&at, "file", 1)?;
            at = make_below(&at, "next")?;
        }
        let count = tree.count();
        assert_eq!((count.inodes, count.incomplete), (1 + levels * 12, false));
        Ok(())
    }

    /// The walk finds the directory above, although `..` now leads to another directory.
    #[test]
    fn a_walk_continues_above_a_directory_that_was_moved() -> Outcome {
        let (tree, other) = (Tree::new("moved")?, Tree::new("other")?);
        let elsewhere = other.open()?;
        let levels = OPEN_LEVELS as u64 + 2;
        let mut above = tree.open()?;
        for _ in 0..levels {
            above = make_below(&above, "d")?;
        }
        // Some of these files are read after the directory `moved`.
        for file in 0..20 {
            write(&above, &file.to_string(), 0)?;
        }
        let moved = make_below(&above, "moved")?;
        let files = 2 * STEPS_BETWEEN_PAUSES;
        for file in 0..files {
            write(&make_below(&moved, &file.to_string())?, "file", 0)?;
        }
        let count = Count::of(&[&tree.0], |_| {
            let _ = renameat(&above, "moved", &elsewhere, "moved");
            true
        });
        let expected = levels + 22 + 2 * files;
        assert_eq!((count.inodes, count.incomplete), (expected, false));
        Ok(())
    }

    #[test]
    fn a_walk_continues_above_directories_that_were_removed() -> Outcome {
        let tree = Tree::new("removed-above")?;
        let mut chain = vec![tree.open()?];
        for _ in 0..OPEN_LEVELS + 4 {
            let below = make_below(&chain[chain.len() - 1], "d")?;
            chain.push(below);
        }
        let levels = chain.len() as u64;
        for file in 0..2 * STEPS_BETWEEN_PAUSES {
            write(&chain[chain.len() - 1], &file.to_string(), 0)?;
        }
        let chain = std::cell::RefCell::new(chain);
        let count = Count::of(&[&tree.0], |_| {
            let mut chain = chain.borrow_mut();
            if chain.len() as u64 == levels {
                for file in 0..2 * STEPS_BETWEEN_PAUSES {
                    let below = &chain[chain.len() - 1];
                    let _ = rustix::fs::unlinkat(below, file.to_string(), AtFlags::empty());
                }
                for _ in 0..3 {
                    chain.pop();
                    let above = &chain[chain.len() - 1];
                    let _ = rustix::fs::unlinkat(above, "d", AtFlags::REMOVEDIR);
                }
            }
            true
        });
        // The walk has not counted all bytes of the file system instead.
        assert!(count.inodes > levels && count.bytes < 16 << 20, "{count:?}");
        Ok(())
    }

    #[test]
    fn holes_links_and_missing_directories_are_not_counted() -> Outcome {
        let tree = Tree::new("sparse")?;
        let file = tree.0.join("file");
        std::fs::File::create(&file)?.set_len(1 << 40)?;
        std::fs::write(tree.0.join("data"), vec![b'x'; 1 << 20])?;
        for number in 0..7 {
            std::fs::hard_link(tree.0.join("data"), tree.0.join(number.to_string()))?;
        }
        std::os::unix::fs::symlink("/", tree.0.join("link"))?;
        let count = Count::of(&[&tree.0, Path::new("/nonexistent")], |_| true);
        assert!((1 << 20..2 << 20).contains(&count.bytes), "{count:?}");
        assert_eq!((count.inodes, count.incomplete), (11, false));
        Ok(())
    }

    #[test]
    fn a_walk_ends_early_if_the_container_was_removed() -> Outcome {
        let tree = Tree::new("removed")?;
        for number in 0..2 * STEPS_BETWEEN_PAUSES {
            std::fs::write(tree.0.join(number.to_string()), "")?;
        }
        let count = Count::of(&[&tree.0], |_| false);
        assert!(count.inodes < STEPS_BETWEEN_PAUSES, "{count:?}");
        Ok(())
    }
}
