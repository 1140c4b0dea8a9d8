//! The directories from the root of a tree to the directory that a walk has reached.
//!
//! An untrusted tree can be deeper than any path can express, and than a process can have descriptors.
//! The directories of the first levels remain open. On the levels below, only the current directory is
//! open, and the walk finds the directory above through `..`. While the walk runs, a container can move
//! directories of the tree.

use std::os::fd::{BorrowedFd, OwnedFd};

use rustix::fs::{Dir, Mode, OFlags, fstat, openat};
use rustix::io::Errno;

/// The number of levels whose directories remain open. Usual trees have fewer levels.
pub const OPEN_LEVELS: usize = 128;

/// With O_NOATIME, a walk does not change the directories' access times. A container can't notice when
/// its files are being counted.
pub const OPEN: OFlags = OFlags::RDONLY
    .union(OFlags::DIRECTORY)
    .union(OFlags::NOFOLLOW)
    .union(OFlags::NOATIME)
    .union(OFlags::CLOEXEC);

#[derive(Default)]
pub struct Levels {
    /// The open directories of the first levels.
    open: Vec<Dir>,
    /// The directories between the open ones and the current one. Each needs 24 bytes.
    closed: Vec<ClosedDirectory>,
    /// The current directory, if it is below the levels of `open`, and the position in the directory
    /// above at which the walk continues.
    deep: Option<(Dir, i64)>,
}

/// A directory that was closed before all its entries were read.
struct ClosedDirectory {
    /// The device and the inode number.
    id: (u64, u64),
    /// See [`Levels::deep`].
    offset_above: i64,
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

    /// Returns the number of directories that the walk has closed.
    pub fn closed(&self) -> usize {
        self.closed.len()
    }

    /// Enters a subdirectory of the current directory. `offset` is the position in the current
    /// directory at which the walk continues later. It is not used if the current directory remains
    /// open.
    pub fn descend(&mut self, directory: OwnedFd, offset: i64) -> Result<(), Errno> {
        let directory = Dir::new(directory)?;
        if self.open.len() < OPEN_LEVELS {
            self.open.push(directory);
        } else if let Some((above, offset_above)) = self.deep.replace((directory, offset)) {
            // If fstat(2) fails, the id matches no directory, and `ascend` does not find this one.
            let id = above.stat().map(|stat| (stat.st_dev, stat.st_ino));
            self.closed.push(ClosedDirectory {
                id: id.unwrap_or_default(),
                offset_above,
            });
        }
        Ok(())
    }

    /// Leaves the current directory. If the directory above it was closed, opens it at the offset that
    /// [`Levels::descend`] got, and returns this offset. Fails if the current directory was moved. The
    /// deepest directory that is still open is then the current one.
    pub fn ascend(&mut self) -> Result<Option<i64>, Errno> {
        let Some((directory, offset)) = self.deep.take() else {
            self.open.pop();
            return Ok(None);
        };
        let Some(above) = self.closed.pop() else {
            return Ok(None);
        };
        let opened = directory.fd().and_then(|it| above.open_from(it, offset));
        match opened {
            Ok(opened) => {
                self.deep = Some((opened, above.offset_above));
                Ok(Some(offset))
            }
            Err(errno) => {
                self.closed.clear();
                Err(errno)
            }
        }
    }
}

impl ClosedDirectory {
    /// Opens the directory as the parent of `directory`. Fails if `directory` was moved.
    fn open_from(&self, directory: BorrowedFd<'_>, offset: i64) -> Result<Dir, Errno> {
        // O_DIRECTORY makes this call fail for a device before its driver is called.
        let above = openat(directory, c"..", OPEN, Mode::empty())?;
        let stat = fstat(&above)?;
        if (stat.st_dev, stat.st_ino) != self.id {
            return Err(Errno::STALE);
        }
        let mut above = Dir::new(above)?;
        above.seek(offset)?;
        Ok(above)
    }
}
