//! A directory tree made from names that a stranger chose.
//!
//! Every path is resolved by the kernel with the tree's root as `/` (openat2(2),
//! RESOLVE_IN_ROOT): a symbolic link that the archive planted leads nowhere else. Nobody but the
//! unpacking thread writes here, and nothing runs from here, before the layer is whole.

use std::ops::Range;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};

use rustix::fs::{
    AtFlags, FileType, Gid, Mode, OFlags, ResolveFlags, Stat, Timespec, Timestamps, UTIME_OMIT,
    Uid, XattrFlags,
};
use rustix::io::Errno;

use super::error::LayerError;

/// linux/limits.h: PATH_MAX and NAME_MAX.
const PATH_BYTES: usize = 4095;
const NAME_BYTES: usize = 255;

/// The kernel answers EAGAIN when something was renamed anywhere while it followed `..`.
const OPENAT2_TRIES: usize = 64;

pub(super) const OPAQUE: &str = "trusted.overlay.opaque";

/// Marks a directory that the archive used without listing it. overlayfs ignores unknown attributes
/// with this prefix and hides all of them. No archive can set one.
const UNLISTED: &str = "trusted.overlay.rrun.unlisted";

/// The name of a file below the root: no empty part, no `.`, no `..`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct EntryName(Vec<u8>);

impl EntryName {
    /// From an archive's path, taken as relative to the root even if it begins with `/`.
    pub(super) fn parse(path: &[u8]) -> Result<Self, LayerError> {
        let mut clean = Vec::with_capacity(path.len());
        for part in path.split(|byte| *byte == b'/') {
            match part {
                b"" | b"." => continue,
                b".." => {
                    return Err(LayerError::malformed(
                        path,
                        "its name leads upwards with ..",
                    ));
                }
                _ if part.len() > NAME_BYTES => {
                    return Err(LayerError::malformed(
                        path,
                        "a part of its name is longer than 255 bytes",
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
                "its name is longer than 4095 bytes",
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

    /// The directory and the last part; the root has neither.
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
    /// The directory of the last entry, since the next is most often its neighbour; with the
    /// times it must have again when we leave it, for making a file in it changes them.
    current: Option<(Vec<u8>, OwnedFd, Timestamps)>,
    /// How many directories below the root are marked as unlisted.
    pub unlisted: u64,
    /// Files and directories made.
    pub inodes: u64,
}

impl Tree {
    pub(super) fn new(root: OwnedFd) -> Self {
        Tree {
            root,
            current: None,
            unlisted: 0,
            inodes: 0,
        }
    }

    pub(super) fn root(&self) -> BorrowedFd<'_> {
        self.root.as_fd()
    }

    /// Opens what is there, links followed inside the root.
    pub(super) fn open(&self, path: &[u8], flags: OFlags) -> Result<OwnedFd, Errno> {
        let path: &[u8] = if path.is_empty() { b"." } else { path };
        for _ in 1..OPENAT2_TRIES {
            match self.try_open(path, flags) {
                Err(Errno::AGAIN) => std::thread::yield_now(),
                other => return other,
            }
        }
        self.try_open(path, flags)
    }

    fn try_open(&self, path: &[u8], flags: OFlags) -> Result<OwnedFd, Errno> {
        rustix::fs::openat2(
            &self.root,
            path,
            flags | OFlags::CLOEXEC,
            Mode::empty(),
            ResolveFlags::IN_ROOT | ResolveFlags::NO_MAGICLINKS | ResolveFlags::NO_XDEV,
        )
    }

    /// Opens the directory that an entry goes into and keeps it open; makes it, and those above
    /// it, if the archive did not.
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
            let times = times_of(&opened)
                .map_err(|e| LayerError::system("look at the directory", directory, e))?;
            self.current = Some((directory.to_vec(), opened, times));
        }
        match &self.current {
            Some((_, directory, _)) => Ok(directory.as_fd()),
            None => Ok(self.root.as_fd()),
        }
    }

    /// Closes the current directory and gives it its times back.
    pub(super) fn leave(&mut self) -> Result<(), LayerError> {
        if let Some((path, directory, times)) = self.current.take() {
            rustix::fs::futimens(&directory, &times)
                .map_err(|e| LayerError::system("set the times of", &path, e))?;
        }
        Ok(())
    }

    fn make_implied(&mut self, directory: &[u8]) -> Result<OwnedFd, LayerError> {
        let fail = |e| LayerError::system("make the directory", directory, e);
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
            above = match self.open(&directory[..end], flags) {
                Err(missing @ (Errno::NOENT | Errno::NOTDIR)) => {
                    self.make_unlisted(&above, directory, start..end, missing)?
                }
                other => other.map_err(fail)?,
            };
        }
    }

    /// Makes the directory that is `part` of the path `directory`, in `above`, which does not
    /// change its times. `missing` is why it could not be opened.
    fn make_unlisted(
        &mut self,
        above: &OwnedFd,
        directory: &[u8],
        part: Range<usize>,
        missing: Errno,
    ) -> Result<OwnedFd, LayerError> {
        let fail = |e| LayerError::system("make the directory", directory, e);
        let (prefix, part) = (&directory[..part.end], &directory[part]);
        let times = times_of(above).map_err(fail)?;
        let whiteout = is_whiteout(above, part);
        if whiteout {
            rustix::fs::unlinkat(above, part, AtFlags::empty()).map_err(fail)?;
        } else if missing == Errno::NOTDIR {
            return Err(LayerError::malformed(
                directory,
                "a part of its name is a file, not a directory",
            ));
        }
        match rustix::fs::mkdirat(above, part, Mode::from_raw_mode(0o755)) {
            Ok(()) => self.inodes += 1,
            Err(Errno::EXIST) => {
                return Err(LayerError::malformed(
                    directory,
                    "a part of its name is a symbolic link that leads nowhere",
                ));
            }
            Err(error) => return Err(fail(error)),
        }
        let flags = OFlags::RDONLY | OFlags::DIRECTORY;
        let opened = self.open(prefix, flags).map_err(fail)?;
        // mkdir(2) takes the group of a set-group-ID parent and clears the umask's bits.
        let (root, group) = (Uid::ROOT, Gid::ROOT);
        rustix::fs::fchown(&opened, Some(root), Some(group)).map_err(fail)?;
        rustix::fs::fchmod(&opened, Mode::from_raw_mode(0o755)).map_err(fail)?;
        // The whiteout hides the directory of the layers below: this one is new.
        if whiteout {
            make_opaque(&opened).map_err(fail)?;
        } else if mark_unlisted(&opened).map_err(fail)? {
            self.unlisted += 1;
        }
        rustix::fs::futimens(above, &times).map_err(fail)?;
        Ok(opened)
    }
}

/// Tells overlayfs that nothing of the directory shows from the layers below
/// (Documentation/filesystems/overlayfs.rst, "whiteouts and opaque directories").
pub(super) fn make_opaque(directory: impl AsFd) -> Result<(), Errno> {
    rustix::fs::fsetxattr(directory, OPAQUE, b"y", XattrFlags::empty())
}

/// Whether the directory hides its contents in the layers below.
pub(super) fn is_opaque(directory: impl AsFd) -> bool {
    let mut value = [0; 1];
    let found = rustix::fs::fgetxattr(directory, OPAQUE, &mut value);
    found.is_ok() && value == *b"y"
}

/// Marks a directory that takes its owner, mode, attributes and time from the layers below. False:
/// the file system does not support the mark, and the directory keeps its own.
pub(super) fn mark_unlisted(directory: impl AsFd) -> Result<bool, Errno> {
    match rustix::fs::fsetxattr(directory, UNLISTED, b"y", XattrFlags::empty()) {
        Ok(()) => Ok(true),
        Err(Errno::NOTSUP) => Ok(false),
        Err(error) => Err(error),
    }
}

/// Removes the mark, because the archive lists the directory after all, or hides it in the layers
/// below. False: the directory had no mark.
pub(super) fn unmark(directory: impl AsFd) -> Result<bool, Errno> {
    match rustix::fs::fremovexattr(directory, UNLISTED) {
        Ok(()) => Ok(true),
        Err(Errno::NODATA | Errno::NOTSUP) => Ok(false),
        Err(error) => Err(error),
    }
}

/// Whether the archive used the directory without listing it.
pub(super) fn is_unlisted(directory: impl AsFd) -> Result<bool, Errno> {
    match rustix::fs::fgetxattr(directory, UNLISTED, &mut [0; 1]) {
        Ok(_) => Ok(true),
        Err(Errno::NODATA | Errno::NOTSUP) => Ok(false),
        Err(error) => Err(error),
    }
}

/// overlayfs's sign for "gone": a character device 0/0.
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
    look_at(directory, name).is_some_and(|stat| {
        FileType::from_raw_mode(stat.st_mode) == FileType::CharacterDevice && stat.st_rdev == 0
    })
}

/// What is there under that name, a link itself and not where it leads.
pub(super) fn look_at(directory: impl AsFd, name: &[u8]) -> Option<Stat> {
    rustix::fs::statat(directory, name, AtFlags::SYMLINK_NOFOLLOW).ok()
}

fn times_of(file: impl AsFd) -> Result<Timestamps, Errno> {
    let stat = rustix::fs::fstat(file)?;
    Ok(modified(stat.st_mtime, stat.st_mtime_nsec as u32))
}

/// Times that set the modification and leave the access alone.
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
    fn names_are_relative_to_the_root_and_never_lead_upwards() -> Result<(), LayerError> {
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
}
