//! The directories from the root of a tree to the directory that a walk has reached.
//!
//! An untrusted tree can be deeper than any path can express, and than a process can have descriptors.
//! The directories of the first levels remain open. On the levels below, only the current directory is
//! open, and the walk finds the directory above through its file handle. `..` would be slow: on a bind
//! mount, the kernel follows all directories up to the mount's root at each `..`. While the walk runs,
//! a container can move directories of the tree.

use std::collections::VecDeque;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};

use rustix::fs::{Dir, Mode, OFlags, fstat, openat};
use rustix::io::Errno;

use crate::file_handle::FileHandle;

/// The number of levels whose directories remain open. Usual trees have fewer levels.
pub const OPEN_LEVELS: usize = 128;

/// The number of closed directories directly above the current one that a walk remembers. Each needs
/// 48 bytes. If a tree is deeper, the walk remembers only some of the directories above these.
pub const MAX_CLOSED: usize = 1 << 13;

/// The maximum number of other directories that a walk remembers.
const MAX_FAR: usize = 1 << 13;

/// The distance between the other directories, until there are [`MAX_FAR`] of them.
const FIRST_STRIDE: usize = 64;

/// With O_NOATIME, a walk does not change the directories' access times. A container can't notice when
/// its files are being counted.
pub const OPEN: OFlags = OFlags::RDONLY
    .union(OFlags::DIRECTORY)
    .union(OFlags::NOFOLLOW)
    .union(OFlags::NOATIME)
    .union(OFlags::CLOEXEC);

/// The directory that is the current one after [`Levels::ascend`].
#[derive(Debug, PartialEq, Eq)]
pub enum Ascent {
    /// The directory above the last one. It remained open. This is also the result if the walk has left
    /// the root.
    Open,
    /// The directory above the last one. It was closed, and is open again at the offset that
    /// [`Levels::descend`] got.
    Closed { offset: i64 },
    /// A directory several levels above the last one, at its beginning. The directories between them
    /// were forgotten.
    Forgotten,
}

pub struct Levels {
    /// The open directories of the first levels.
    open: Vec<Dir>,
    /// The closed directories directly above the current one, from the highest to the lowest.
    closed: VecDeque<ClosedDirectory>,
    /// The remembered directories above those of `closed`, each with the number of directories that
    /// were closed above it. This number is a multiple of `stride`.
    far: Vec<(usize, ClosedDirectory)>,
    stride: usize,
    /// The number of directories between the open ones and the current one.
    depth: usize,
    /// The current directory, if it is below the levels of `open`, and the position in the directory
    /// above at which the walk continues.
    deep: Option<(Dir, i64)>,
}

/// A directory that was closed before all its entries were read.
struct ClosedDirectory {
    identity: Identity,
    /// See [`Levels::deep`].
    offset_above: i64,
}

/// Identifies a closed directory, so that the walk finds it again.
#[derive(PartialEq, Eq)]
enum Identity {
    Handle(FileHandle),
    /// The device and the inode number, if the file system has no handles.
    Inode(u64, u64),
}

impl Levels {
    /// Returns the current directory, or `None` if the walk has left the root.
    pub fn current(&mut self) -> Option<&mut Dir> {
        match &mut self.deep {
            Some((directory, _)) => Some(directory),
            None => self.open.last_mut(),
        }
    }

    /// Returns the root if it is open.
    pub fn root(&self) -> Option<&Dir> {
        self.open.first()
    }

    /// Returns whether the current directory is below the levels that remain open.
    pub fn is_deep(&self) -> bool {
        self.deep.is_some()
    }

    /// Returns the number of directories between the open ones and the current one.
    pub fn depth_below_open(&self) -> usize {
        self.depth
    }

    /// Enters a subdirectory of the current directory. `offset` is the position in the current
    /// directory at which the walk continues later. It is not used if the current directory remains
    /// open.
    pub fn descend(&mut self, directory: OwnedFd, offset: i64) -> Result<(), Errno> {
        let directory = Dir::new(directory)?;
        if self.open.len() < OPEN_LEVELS {
            self.open.push(directory);
            return Ok(());
        }
        let identity = match &self.deep {
            Some((above, _)) => Some(Identity::of(above.fd()?)?),
            None => None,
        };
        let above = self.deep.replace((directory, offset));
        if let (Some(identity), Some((_, offset_above))) = (identity, above) {
            if self.closed.len() >= MAX_CLOSED {
                self.forget_one();
            }
            self.closed.push_back(ClosedDirectory {
                identity,
                offset_above,
            });
            self.depth += 1;
        }
        Ok(())
    }

    /// Moves the highest directory of `closed` to the far directories, or forgets it. The far
    /// directories have the same distance from each other.
    fn forget_one(&mut self) {
        let depth = self.depth - self.closed.len();
        let highest = self.closed.pop_front();
        if depth.is_multiple_of(self.stride) {
            self.far.extend(highest.map(|directory| (depth, directory)));
        }
        if self.far.len() > MAX_FAR {
            self.stride *= 2;
            let stride = self.stride;
            self.far.retain(|(depth, _)| depth.is_multiple_of(stride));
        }
    }

    /// Leaves the current directory. Skips directories that were removed. If this call fails, the
    /// deepest directory that is still open is the current one.
    pub fn ascend(&mut self) -> Result<Ascent, Errno> {
        let Some((below, mut offset)) = self.deep.take() else {
            self.open.pop();
            return Ok(Ascent::Open);
        };
        while let Some((above, ascent)) = self.pop(offset) {
            match above.open_from(&below, &ascent) {
                Ok(Some(opened)) => {
                    self.deep = Some((opened, above.offset_above));
                    return Ok(ascent);
                }
                Ok(None) => offset = above.offset_above,
                Err(errno) => {
                    self.closed.clear();
                    self.far.clear();
                    self.depth = 0;
                    return Err(errno);
                }
            }
        }
        Ok(Ascent::Open)
    }

    /// Returns the lowest closed directory, which is then no longer remembered. `offset` is the
    /// position in the directory above the current one.
    fn pop(&mut self, offset: i64) -> Option<(ClosedDirectory, Ascent)> {
        if let Some(above) = self.closed.pop_back() {
            self.depth -= 1;
            return Some((above, Ascent::Closed { offset }));
        }
        let (depth, above) = self.far.pop()?;
        self.depth = depth;
        Some((above, Ascent::Forgotten))
    }
}

impl Default for Levels {
    fn default() -> Self {
        Levels {
            open: Vec::new(),
            closed: VecDeque::new(),
            far: Vec::new(),
            stride: FIRST_STRIDE,
            depth: 0,
            deep: None,
        }
    }
}

impl ClosedDirectory {
    /// Opens the directory. `below` is a directory below it. Returns `None` if the directory was
    /// removed. The file system may then refuse its position.
    fn open_from(&self, below: &Dir, ascent: &Ascent) -> Result<Option<Dir>, Errno> {
        let opened = match self.identity.open_from(below.fd()?) {
            Err(Errno::STALE) if matches!(self.identity, Identity::Handle(_)) => return Ok(None),
            opened => opened?,
        };
        if fstat(&opened)?.st_nlink == 0 {
            return Ok(None);
        }
        let mut directory = Dir::new(opened)?;
        if let Ascent::Closed { offset } = ascent {
            directory.seek(*offset)?;
        }
        Ok(Some(directory))
    }
}

impl Identity {
    fn of(directory: BorrowedFd<'_>) -> Result<Identity, Errno> {
        match FileHandle::of(directory) {
            Ok(handle) => Ok(Identity::Handle(handle)),
            Err(_) => {
                let stat = fstat(directory)?;
                Ok(Identity::Inode(stat.st_dev, stat.st_ino))
            }
        }
    }

    fn open_from(&self, directory: BorrowedFd<'_>) -> Result<OwnedFd, Errno> {
        if let Identity::Handle(handle) = self {
            match handle.open(directory, OPEN) {
                Err(Errno::PERM) => {}
                opened => return opened,
            }
        }
        // This file system has no handles, or this process may not use them. The call fails with
        // `STALE` if the directory was moved, or if the directory above was forgotten. O_DIRECTORY makes
        // this call fail for a device before its driver is called.
        let above = openat(directory, c"..", OPEN, Mode::empty())?;
        if Identity::of(above.as_fd())? != *self {
            return Err(Errno::STALE);
        }
        Ok(above)
    }
}
