//! Writes a directory tree with the file names from an untrusted archive.
//!
//! Every path is resolved with the tree's root as `/` ([`rrun_kernel::in_root`]). A
//! symbolic link in the archive therefore can't lead out of the tree. Only the unpacking thread
//! changes the tree. No program in the tree runs before the layer is complete.

use std::ops::Range;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};

use rrun_kernel::in_root;
use rustix::fs::{
    AtFlags, FileType, Gid, Mode, OFlags, ResolveFlags, Stat, Timespec, Timestamps, UTIME_OMIT,
    Uid, XattrFlags,
};
use rustix::io::Errno;

use super::disk_use::DiskUse;
use super::error::LayerError;

/// The maximum lengths in bytes of a path and of a file name. The kernel's names for these limits
/// are PATH_MAX, which includes the final NUL, and NAME_MAX.
const PATH_BYTES: usize = 4095;
const NAME_BYTES: usize = 255;

/// The maximum number of symbolic links that the kernel follows in one path (path_resolution(7)).
const MAX_LINKS_IN_PATH: u64 = 40;

pub(super) const OPAQUE: &str = "trusted.overlay.opaque";

/// The extended attribute that marks a directory as unlisted. An archive can contain files in a
/// directory, but no entry for the directory itself. Such a directory is called unlisted. Overlayfs
/// ignores unknown attributes with the prefix `trusted.overlay.` and hides them from programs. When
/// an archive is unpacked, attributes with this prefix are ignored. An archive therefore can't set
/// this mark.
const UNLISTED: &str = "trusted.overlay.rrun.unlisted";

/// The path of a file relative to the tree's root. The path contains no empty component, no `.` and
/// no `..`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct EntryName(Vec<u8>);

impl EntryName {
    /// Parses a path from the archive. Even a path that begins with `/` is relative to the tree's
    /// root.
    pub(super) fn parse(path: &[u8]) -> Result<Self, LayerError> {
        let mut clean = Vec::with_capacity(path.len());
        for part in path.split(|byte| *byte == b'/') {
            match part {
                b"" | b"." => continue,
                b".." => {
                    return Err(LayerError::malformed(
                        path,
                        "its path leads upwards with ..",
                    ));
                }
                _ if part.len() > NAME_BYTES => {
                    return Err(LayerError::malformed(
                        path,
                        "a component of its path is longer than 255 bytes",
                    ));
                }
                _ => {
                    if !clean.is_empty() {
                        clean.push(b'/');
                    }
                    clean.extend_from_slice(part);
                }
            }
        }
        if clean.len() > PATH_BYTES {
            return Err(LayerError::malformed(
                path,
                "its path is longer than 4095 bytes",
            ));
        }
        Ok(EntryName(clean))
    }

    pub(super) fn is_root(&self) -> bool {
        self.0.is_empty()
    }

    pub(super) fn as_bytes(&self) -> &[u8] {
        &self.0
    }

    /// Splits the path into its directory and its last component. For the root, the directory and
    /// the last component are empty.
    pub(super) fn split(&self) -> (&[u8], &[u8]) {
        match self.0.iter().rposition(|byte| *byte == b'/') {
            Some(slash) => (&self.0[..slash], &self.0[slash + 1..]),
            None => (&[], &self.0),
        }
    }

    pub(super) fn parts(&self) -> impl Iterator<Item = &[u8]> {
        self.0.split(|byte| *byte == b'/')
    }
}

pub(super) struct Tree {
    root: OwnedFd,
    /// The path, the descriptor and the original times of the directory with the last unpacked
    /// entry. The directory remains open because the next entry is usually in the same directory.
    /// Creating a file changes the directory's times, so `leave` restores them.
    current: Option<(Vec<u8>, OwnedFd, Timestamps)>,
    /// The number of directories below the root with the mark [`UNLISTED`].
    pub unlisted: u64,
    /// The number of files and directories that were created.
    pub inodes: u64,
    /// The bytes of these files on the disk.
    pub used: DiskUse,
    /// An upper limit for the number of path components that the kernel has looked up. The kernel
    /// does not report how many components a symbolic link adds to a path. Each path through a link
    /// therefore counts as the longest possible path.
    pub lookups: u64,
    /// The number of components in the longest target of a symbolic link.
    longest_link: u64,
}

impl Tree {
    pub(super) fn new(root: OwnedFd) -> Self {
        Tree {
            root,
            current: None,
            unlisted: 0,
            inodes: 0,
            used: DiskUse::default(),
            lookups: 0,
            longest_link: 0,
        }
    }

    /// Records that the tree contains a symbolic link to `target`.
    pub(super) fn count_link(&mut self, target: &[u8]) {
        self.used.add_link(target);
        self.longest_link = self.longest_link.max(components(target));
    }

    pub(super) fn root(&self) -> BorrowedFd<'_> {
        self.root.as_fd()
    }

    /// Opens an existing file or directory. Symbolic links are resolved inside the tree's root.
    /// `flags` contains O_PATH or O_DIRECTORY.
    pub(super) fn open(&mut self, path: &[u8], flags: OFlags) -> Result<OwnedFd, Errno> {
        let path: &[u8] = if path.is_empty() { b"." } else { path };
        self.lookups += components(path);
        match open_below(&self.root, path, flags) {
            Err(Errno::LOOP) => {}
            other => return other,
        }
        self.lookups += MAX_LINKS_IN_PATH * self.longest_link;
        in_root::open(&self.root, path, flags, ResolveFlags::NO_XDEV)
    }

    /// Opens `directory`, the directory of an entry, and keeps it open. Creates the directory and
    /// its parents if they do not exist.
    pub(super) fn enter(&mut self, directory: &[u8]) -> Result<BorrowedFd<'_>, LayerError> {
        if self
            .current
            .as_ref()
            .is_none_or(|(path, ..)| path != directory)
        {
            self.leave()?;
            let opened = match self.open(directory, OFlags::RDONLY | OFlags::DIRECTORY) {
                Err(Errno::NOENT | Errno::NOTDIR) => self.make_implied(directory)?,
                other => {
                    other.map_err(|e| LayerError::system("open the directory", directory, e))?
                }
            };
            let times = times_of(&opened).map_err(|e| {
                LayerError::system("read the attributes of the directory", directory, e)
            })?;
            self.current = Some((directory.to_vec(), opened, times));
        }
        match &self.current {
            Some((_, directory, _)) => Ok(directory.as_fd()),
            None => Ok(self.root.as_fd()),
        }
    }

    /// Closes the directory that contains the most recently unpacked entry, and sets the
    /// directory's times back to their earlier values.
    pub(super) fn leave(&mut self) -> Result<(), LayerError> {
        if let Some((path, directory, times)) = self.current.take() {
            rustix::fs::futimens(&directory, &times)
                .map_err(|e| LayerError::system("set the times of", &path, e))?;
        }
        Ok(())
    }

    fn make_implied(&mut self, directory: &[u8]) -> Result<OwnedFd, LayerError> {
        let fail = |e| LayerError::system("create the directory", directory, e);
        let flags = OFlags::RDONLY | OFlags::DIRECTORY;
        let mut end = 0;
        let mut above = self.open(b"", flags).map_err(fail)?;
        loop {
            let rest = directory.get(end..).unwrap_or_default();
            let start = end + usize::from(rest.first() == Some(&b'/'));
            let Some(rest) = directory.get(start..).filter(|rest| !rest.is_empty()) else {
                return Ok(above);
            };
            let length = rest
                .iter()
                .position(|byte| *byte == b'/')
                .unwrap_or(rest.len());
            end = start + length;
            // Each directory is opened in its parent. If each prefix of the path were opened from
            // the root, the time would grow with the square of the path's length.
            self.lookups += 1;
            let opened = match open_below(&above, &directory[start..end], flags) {
                Err(Errno::LOOP) => self.open(&directory[..end], flags),
                other => other,
            };
            above = match opened {
                Err(missing @ (Errno::NOENT | Errno::NOTDIR)) => {
                    self.make_unlisted(&above, directory, start..end, missing)?
                }
                other => other.map_err(fail)?,
            };
        }
    }

    /// Creates one missing directory in its parent `above`, and marks the new directory as
    /// unlisted. The range `part` of the path `directory` contains the new directory's name. The
    /// times of `above` do not change. `missing` is the error that the attempt to open the missing
    /// directory returned.
    fn make_unlisted(
        &mut self,
        above: &OwnedFd,
        directory: &[u8],
        part: Range<usize>,
        missing: Errno,
    ) -> Result<OwnedFd, LayerError> {
        let fail = |e| LayerError::system("create the directory", directory, e);
        let part = &directory[part];
        let times = times_of(above).map_err(fail)?;
        let whiteout = is_whiteout(above, part);
        if whiteout {
            rustix::fs::unlinkat(above, part, AtFlags::empty()).map_err(fail)?;
        } else if missing == Errno::NOTDIR {
            return Err(LayerError::malformed(
                directory,
                "a component of its path is a file, not a directory",
            ));
        }
        match rustix::fs::mkdirat(above, part, Mode::from_raw_mode(0o755)) {
            Ok(()) => {
                self.inodes += 1;
                self.used.add_directory();
                self.used.add_name(part);
            }
            Err(Errno::EXIST) => {
                return Err(LayerError::malformed(
                    directory,
                    "a component of its path is a symbolic link whose target does not exist",
                ));
            }
            Err(error) => return Err(fail(error)),
        }
        let opened = open_below(above, part, OFlags::RDONLY | OFlags::DIRECTORY).map_err(fail)?;
        // mkdir(2) applies the umask to the mode. If the parent directory has the set-group-ID bit,
        // mkdir(2) also takes the group from the parent. The owner, group and mode are therefore
        // set explicitly.
        let (root, group) = (Uid::ROOT, Gid::ROOT);
        rustix::fs::fchown(&opened, Some(root), Some(group)).map_err(fail)?;
        rustix::fs::fchmod(&opened, Mode::from_raw_mode(0o755)).map_err(fail)?;
        // The removed whiteout hid the directory with the same path in the layers below. Overlayfs
        // must not merge this hidden directory with the new directory.
        if whiteout {
            make_opaque(&opened).map_err(fail)?;
        } else if mark_unlisted(&opened).map_err(fail)? {
            self.unlisted += 1;
        }
        rustix::fs::futimens(above, &times).map_err(fail)?;
        Ok(opened)
    }
}

/// Opens a path that contains no symbolic links and leads to no other file system. Returns `LOOP`
/// if the path contains a symbolic link.
fn open_below(directory: impl AsFd, path: &[u8], flags: OFlags) -> Result<OwnedFd, Errno> {
    rustix::fs::openat2(
        directory,
        path,
        flags | OFlags::CLOEXEC,
        Mode::empty(),
        ResolveFlags::BENEATH | ResolveFlags::NO_SYMLINKS | ResolveFlags::NO_XDEV,
    )
}

/// Returns the number of components of a path.
fn components(path: &[u8]) -> u64 {
    1 + path.iter().filter(|byte| **byte == b'/').count() as u64
}

/// Makes a directory opaque. Overlayfs then hides the contents of the same directory in the layers
/// below (Documentation/filesystems/overlayfs.rst, "whiteouts and opaque directories").
pub(super) fn make_opaque(directory: impl AsFd) -> Result<(), Errno> {
    rustix::fs::fsetxattr(directory, OPAQUE, b"y", XattrFlags::empty())
}

/// Returns whether the directory is opaque. If a directory is opaque, overlayfs hides the contents
/// of the same directory in the layers below.
pub(super) fn is_opaque(directory: impl AsFd) -> bool {
    let mut value = [0; 1];
    let found = rustix::fs::fgetxattr(directory, OPAQUE, &mut value);
    found.is_ok() && value == *b"y"
}

/// Marks a directory as unlisted. In an image, a marked directory takes its owner, mode, attributes
/// and time from the layers below. If the file system does not support the mark, returns false, and
/// the directory keeps its own metadata.
pub(super) fn mark_unlisted(directory: impl AsFd) -> Result<bool, Errno> {
    match rustix::fs::fsetxattr(directory, UNLISTED, b"y", XattrFlags::empty()) {
        Ok(()) => Ok(true),
        Err(Errno::NOTSUP) => Ok(false),
        Err(error) => Err(error),
    }
}

/// Removes the mark of an unlisted directory. The caller has read a later entry of the archive for
/// this directory: the directory itself, or a whiteout. Returns false if the directory had no mark.
pub(super) fn unmark(directory: impl AsFd) -> Result<bool, Errno> {
    match rustix::fs::fremovexattr(directory, UNLISTED) {
        Ok(()) => Ok(true),
        Err(Errno::NODATA | Errno::NOTSUP) => Ok(false),
        Err(error) => Err(error),
    }
}

/// Returns whether the directory is marked as unlisted.
pub(super) fn is_unlisted(directory: impl AsFd) -> Result<bool, Errno> {
    match rustix::fs::fgetxattr(directory, UNLISTED, &mut [0; 1]) {
        Ok(_) => Ok(true),
        Err(Errno::NODATA | Errno::NOTSUP) => Ok(false),
        Err(error) => Err(error),
    }
}

/// Creates a whiteout, which hides the file `name` in the layers below. A whiteout of overlayfs is
/// a character device with the device number 0/0.
pub(super) fn make_whiteout(directory: impl AsFd, name: &[u8]) -> Result<(), Errno> {
    rustix::fs::mknodat(
        directory,
        name,
        FileType::CharacterDevice,
        Mode::empty(),
        rustix::fs::makedev(0, 0),
    )
}

pub(super) fn is_whiteout(directory: impl AsFd, name: &[u8]) -> bool {
    lstat(directory, name).is_some_and(|stat| {
        FileType::from_raw_mode(stat.st_mode) == FileType::CharacterDevice && stat.st_rdev == 0
    })
}

/// Returns the metadata of the file `name`, or `None` after an error. A symbolic link is not
/// followed.
pub(super) fn lstat(directory: impl AsFd, name: &[u8]) -> Option<Stat> {
    rustix::fs::statat(directory, name, AtFlags::SYMLINK_NOFOLLOW).ok()
}

fn times_of(file: impl AsFd) -> Result<Timestamps, Errno> {
    let stat = rustix::fs::fstat(file)?;
    Ok(modified(stat.st_mtime, stat.st_mtime_nsec as u32))
}

/// Returns the argument for utimensat(2) that sets the modification time and leaves the access time
/// unchanged.
pub(super) fn modified(seconds: i64, nanoseconds: u32) -> Timestamps {
    Timestamps {
        last_access: Timespec {
            tv_sec: 0,
            tv_nsec: UTIME_OMIT,
        },
        last_modification: Timespec {
            tv_sec: seconds,
            tv_nsec: i64::from(nanoseconds),
        },
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn paths_are_relative_to_the_root_and_contain_no_dot_dot() -> Result<(), LayerError> {
        assert_eq!(EntryName::parse(b"/a//./b/")?.as_bytes(), b"a/b");
        assert!(EntryName::parse(b"./")?.is_root());
        assert_eq!(
            EntryName::parse(b"a/b/c")?.split(),
            (b"a/b".as_slice(), b"c".as_slice())
        );
        for bad in [b"../a".as_slice(), b"a/../b", b"..", b"/.."] {
            assert!(EntryName::parse(bad).is_err());
        }
        assert!(EntryName::parse(&[b'x'; 256]).is_err());
        assert!(EntryName::parse(&b"x/".repeat(3000)).is_err());
        Ok(())
    }

    fn tree(name: &str) -> Result<(std::path::PathBuf, Tree), Box<dyn std::error::Error>> {
        let dir = std::env::temp_dir().join(format!("rrun-{name}-{}", std::process::id()));
        std::fs::create_dir_all(&dir)?;
        let flags = OFlags::RDONLY | OFlags::DIRECTORY;
        let root = rustix::fs::openat(rustix::fs::CWD, &dir, flags, Mode::empty())?;
        Ok((dir, Tree::new(root)))
    }

    #[test]
    fn the_time_to_create_a_deep_path_grows_linearly_with_its_depth()
    -> Result<(), Box<dyn std::error::Error>> {
        if !rustix::process::geteuid().is_root() {
            eprintln!("skipped: only root can set the owner of a directory");
            return Ok(());
        }
        let (dir, mut tree) = tree("deep-path")?;
        let deepest = b"a/".repeat(1000);
        tree.enter(&deepest[..deepest.len() - 1])?;
        assert_eq!(tree.inodes, 1000);
        assert!(tree.lookups <= 3 * 1000, "{} lookups", tree.lookups);
        drop(tree);
        crate::layer::remove_path(&dir)?;
        Ok(())
    }

    #[test]
    fn a_path_through_a_link_counts_as_many_lookups() -> Result<(), Box<dyn std::error::Error>> {
        let (dir, mut tree) = tree("links")?;
        std::fs::create_dir(dir.join("a"))?;
        let target = b"a/../".repeat(100);
        rustix::fs::symlinkat(target.as_slice(), tree.root(), "link")?;
        tree.count_link(&target);
        tree.enter(b"a")?;
        assert!(tree.lookups < 10, "{} lookups", tree.lookups);
        tree.enter(b"link")?;
        assert!(tree.lookups > 40 * 200, "{} lookups", tree.lookups);
        drop(tree);
        crate::layer::remove_path(&dir)?;
        Ok(())
    }
}
