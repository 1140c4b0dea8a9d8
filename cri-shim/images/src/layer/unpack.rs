//! Writes an archive's entries into a tree that overlayfs can use as a lower directory.

use std::io::{self, Read};
use std::os::fd::{AsFd, AsRawFd, OwnedFd};

use rustix::fs::{AtFlags, FileType, Gid, Mode, OFlags, Uid, XattrFlags};
use rustix::io::Errno;

use super::archive::{Entry, EntryKind, TarArchive};
use super::descriptor::Bounds;
use super::error::{LayerError, printable};
use super::removal;
use super::tree::{
    EntryName, Tree, is_whiteout, lstat, make_opaque, make_whiteout, mark_unlisted, modified,
    unmark,
};

/// The prefix of a whiteout's file name in the OCI image specification (layer.md, "Whiteouts").
const WHITEOUT: &[u8] = b".wh.";
/// The file name of an opaque whiteout in the OCI image specification.
const OPAQUE_WHITEOUT: &[u8] = b".wh..wh..opq";
/// The prefix of aufs's own metadata files, which do not belong to the image.
const AUFS: &[u8] = b".wh..wh.";

/// The maximum number of path components that the kernel looks up for one layer. An entry's path can
/// lead through 40 symbolic links with 2,000 components each, and the lookups for such an entry take
/// milliseconds. Without a limit, a small hostile layer could keep a thread busy for hours. Usual
/// layers need far fewer lookups, because few of their paths lead through symbolic links.
const MAX_LOOKUPS: u64 = 1 << 30;

/// The result of unpacking an archive.
#[derive(Debug, Default)]
pub struct UnpackSummary {
    /// The number of bytes on the disk: contents, targets of symbolic links, extended attributes and
    /// directories, in blocks of 4 KiB.
    pub bytes: u64,
    pub inodes: u64,
    /// The number of unlisted directories below the layer's root. For an unlisted directory, the
    /// archive has no entry, but it has entries for files in the directory. Unlisted directories
    /// are marked on the disk. In each image, the marked directories take their metadata from the
    /// layers below (see [`super::directory_layer`]).
    pub unlisted: u64,
    /// True if the layer hides all layers below it.
    pub opaque_root: bool,
}

pub(super) fn unpack<R: Read>(
    archive: &mut TarArchive<R>,
    root: OwnedFd,
    bounds: &Bounds,
    go_on: &dyn Fn() -> io::Result<()>,
) -> Result<UnpackSummary, LayerError> {
    let mut unpacking = Unpacking {
        go_on,
        tree: Tree::new(root),
        max_bytes: bounds.bytes,
        opaque_root: false,
        buffer: vec![0; 64 << 10],
    };
    mark_unlisted(unpacking.tree.root())
        .map_err(|e| LayerError::system("set the unlisted attribute of the directory", b"", e))?;
    let mut entries: u64 = 0;
    while let Some(entry) = archive.next_entry()? {
        entries += 1;
        if entries > bounds.entries || unpacking.tree.inodes > bounds.entries {
            return Err(LayerError::Bound(format!(
                "the layer contains more than the limit of {} files (image.layer_files)",
                bounds.entries
            )));
        }
        unpacking.place(archive, &entry)?;
        unpacking.check_bytes()?;
        if unpacking.tree.lookups > MAX_LOOKUPS {
            return Err(LayerError::Bound(format!(
                "the paths in the layer are too long, or lead through too many symbolic links: finding the files takes more than the limit of {MAX_LOOKUPS} lookups"
            )));
        }
    }
    unpacking.tree.leave()?;
    Ok(UnpackSummary {
        bytes: unpacking.tree.used.bytes(),
        inodes: unpacking.tree.inodes + 1,
        unlisted: unpacking.tree.unlisted,
        opaque_root: unpacking.opaque_root,
    })
}

struct Unpacking<'a> {
    go_on: &'a dyn Fn() -> io::Result<()>,
    tree: Tree,
    max_bytes: u64,
    opaque_root: bool,
    buffer: Vec<u8>,
}

impl Unpacking<'_> {
    fn check_bytes(&self) -> Result<(), LayerError> {
        if self.tree.used.bytes() > self.max_bytes {
            return Err(LayerError::too_large(self.max_bytes));
        }
        Ok(())
    }

    fn place<R: Read>(
        &mut self,
        archive: &mut TarArchive<R>,
        entry: &Entry,
    ) -> Result<(), LayerError> {
        let name = EntryName::parse(&entry.path)?;
        let lengths = entry.xattrs.iter();
        let lengths = lengths.map(|(key, value)| (key.len(), value.len()));
        self.tree.used.add_xattrs(lengths);
        if name.is_root() {
            return self.place_root(entry);
        }
        let (directory, last) = name.split();
        self.tree.used.add_name(last);
        if last == OPAQUE_WHITEOUT {
            return self.hide_all(directory);
        }
        if name.parts().any(|part| part.starts_with(AUFS)) {
            return Ok(());
        }
        if let Some(hidden) = last.strip_prefix(WHITEOUT) {
            return self.hide(&name, directory, hidden);
        }
        match entry.kind {
            EntryKind::Directory => self.place_directory(entry, &name),
            EntryKind::File => self.place_file(archive, entry, &name),
            EntryKind::HardLink => self.place_hard_link(entry, &name),
            EntryKind::Symlink => {
                if entry.link.is_empty() || entry.link.len() > 4095 {
                    return Err(LayerError::malformed(
                        &entry.path,
                        "it is a symbolic link without a target, or with a target of more than 4095 bytes",
                    ));
                }
                self.tree.count_link(&entry.link);
                let parent = self.tree.enter(directory)?;
                replacing(parent, last, self.go_on, || {
                    rustix::fs::symlinkat(entry.link.as_slice(), parent, last)
                })
                .map_err(|e| LayerError::system("create the symbolic link", &entry.path, e))?;
                self.finish_node(entry, &name)
            }
            EntryKind::CharacterDevice | EntryKind::BlockDevice | EntryKind::Fifo => {
                let kind = match entry.kind {
                    EntryKind::CharacterDevice => FileType::CharacterDevice,
                    EntryKind::BlockDevice => FileType::BlockDevice,
                    _ => FileType::Fifo,
                };
                let device = rustix::fs::makedev(entry.device.0, entry.device.1);
                let parent = self.tree.enter(directory)?;
                replacing(parent, last, self.go_on, || {
                    rustix::fs::mknodat(parent, last, kind, Mode::from_raw_mode(0o600), device)
                })
                .map_err(|e| LayerError::system("create the device", &entry.path, e))?;
                self.finish_node(entry, &name)
            }
        }
    }

    fn place_root(&mut self, entry: &Entry) -> Result<(), LayerError> {
        if entry.kind != EntryKind::Directory {
            return Err(LayerError::malformed(
                &entry.path,
                "the root of the layer is not a directory",
            ));
        }
        self.tree.leave()?;
        let root = self.tree.root();
        set_metadata(root, entry)?;
        unmark(root).map(drop).map_err(|e| {
            LayerError::system("remove the unlisted attribute of the directory", b"", e)
        })
    }

    /// Handles an opaque whiteout (`.wh..wh..opq`), which hides the contents of `directory` in the
    /// layers below.
    fn hide_all(&mut self, directory: &[u8]) -> Result<(), LayerError> {
        if directory.is_empty() {
            // Overlayfs ignores the opaque attribute of a layer's root directory. Instead, the
            // mount of the image must omit the layers below.
            self.opaque_root = true;
            return Ok(());
        }
        let opened = self.tree.enter(directory)?;
        make_opaque(opened).map_err(|e| {
            LayerError::system("set the opaque attribute of the directory", directory, e)
        })
    }

    /// Handles a whiteout (`.wh.NAME`), which hides the file NAME in the layers below. If this
    /// layer itself contains a file NAME, this file remains. The order of the file and the whiteout
    /// in the archive does not matter.
    fn hide(
        &mut self,
        name: &EntryName,
        directory: &[u8],
        hidden: &[u8],
    ) -> Result<(), LayerError> {
        if matches!(hidden, b"" | b"." | b"..") {
            return Err(LayerError::malformed(
                name.as_bytes(),
                "it is a whiteout that does not name a file",
            ));
        }
        let parent = self.tree.enter(directory)?;
        let fail = |e| LayerError::system("create the whiteout", name.as_bytes(), e);
        match make_whiteout(parent, hidden) {
            Ok(()) => self.tree.inodes += 1,
            Err(Errno::EXIST) => {
                let is_directory = lstat(parent, hidden).is_some_and(|stat| {
                    FileType::from_raw_mode(stat.st_mode) == FileType::Directory
                });
                if is_directory {
                    let flags = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::NOFOLLOW;
                    let opened =
                        rustix::fs::openat(parent, hidden, flags | OFlags::CLOEXEC, Mode::empty())
                            .map_err(fail)?;
                    make_opaque(&opened).map_err(fail)?;
                    // This layer removes the lower layers' directory and creates a new one. The new
                    // directory takes no metadata from the layers below.
                    if unmark(&opened).map_err(fail)? {
                        self.tree.unlisted -= 1;
                    }
                }
            }
            Err(error) => return Err(fail(error)),
        }
        Ok(())
    }

    fn place_directory(&mut self, entry: &Entry, name: &EntryName) -> Result<(), LayerError> {
        let (directory, last) = name.split();
        let parent = self.tree.enter(directory)?;
        let fail = |e| LayerError::system("create the directory", &entry.path, e);
        let flags = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::NOFOLLOW | OFlags::CLOEXEC;
        let mut made = true;
        let mut hides = false;
        match rustix::fs::mkdirat(parent, last, Mode::from_raw_mode(0o700)) {
            Ok(()) => {}
            Err(Errno::EXIST) => {
                let there = lstat(parent, last).ok_or_else(|| fail(Errno::NOENT))?;
                if FileType::from_raw_mode(there.st_mode) == FileType::Directory {
                    made = false;
                } else {
                    hides = is_whiteout(parent, last);
                    rustix::fs::unlinkat(parent, last, AtFlags::empty()).map_err(fail)?;
                    rustix::fs::mkdirat(parent, last, Mode::from_raw_mode(0o700)).map_err(fail)?;
                }
            }
            Err(error) => return Err(fail(error)),
        }
        let opened = rustix::fs::openat(parent, last, flags, Mode::empty()).map_err(fail)?;
        if hides {
            make_opaque(&opened).map_err(fail)?;
        }
        set_metadata(&opened, entry)?;
        if made {
            self.tree.inodes += 1;
            self.tree.used.add_directory();
        } else if unmark(&opened).map_err(fail)? {
            self.tree.unlisted -= 1;
        }
        Ok(())
    }

    fn place_file<R: Read>(
        &mut self,
        archive: &mut TarArchive<R>,
        entry: &Entry,
        name: &EntryName,
    ) -> Result<(), LayerError> {
        let (directory, last) = name.split();
        let parent = self.tree.enter(directory)?;
        let flags = OFlags::WRONLY | OFlags::CREATE | OFlags::EXCL | OFlags::NOFOLLOW;
        let file = replacing(parent, last, self.go_on, || {
            rustix::fs::openat(
                parent,
                last,
                flags | OFlags::CLOEXEC,
                Mode::from_raw_mode(0o600),
            )
        })
        .map_err(|e| LayerError::system("create the file", &entry.path, e))?;
        self.tree.inodes += 1;
        let fail = |e| LayerError::system("write the file", &entry.path, e);
        let mut end = 0;
        for (offset, length) in &entry.content.pieces {
            // The file system allocates whole blocks. A sparse file with many short pieces therefore
            // needs much more space on the disk than in the archive.
            self.tree.used.add_content(*length);
            self.check_bytes()?;
            self.write(archive, entry, &file, (*offset, *length))?;
            end = offset + length;
        }
        if end != entry.content.length {
            rustix::fs::ftruncate(&file, entry.content.length).map_err(fail)?;
        }
        set_metadata(&file, entry)
    }

    /// Writes one piece of a file. `offset` and `length` are the piece's position in the file.
    fn write<R: Read>(
        &mut self,
        archive: &mut TarArchive<R>,
        entry: &Entry,
        file: impl AsFd,
        (offset, length): (u64, u64),
    ) -> Result<(), LayerError> {
        let fail = |e| LayerError::system("write the file", &entry.path, e);
        let mut at = offset;
        let mut left = length;
        while left > 0 {
            let most = usize::try_from(left)
                .unwrap_or(usize::MAX)
                .min(self.buffer.len());
            let count = archive.read(&mut self.buffer[..most])?;
            if count == 0 {
                return Err(LayerError::malformed(
                    &entry.path,
                    "the archive ends before the content of this file is complete",
                ));
            }
            let mut chunk = &self.buffer[..count];
            while !chunk.is_empty() {
                match rustix::io::pwrite(&file, chunk, at) {
                    Ok(0) => return Err(fail(Errno::IO)),
                    Ok(written) => {
                        at += written as u64;
                        chunk = &chunk[written..];
                    }
                    Err(Errno::INTR) => {}
                    Err(error) => return Err(fail(error)),
                }
            }
            left -= count as u64;
        }
        Ok(())
    }

    fn place_hard_link(&mut self, entry: &Entry, name: &EntryName) -> Result<(), LayerError> {
        let target = EntryName::parse(&entry.link)?;
        if target.is_root() || target == *name {
            return Err(LayerError::malformed(
                &entry.path,
                "it is a hard link to the root or to itself",
            ));
        }
        let missing = || {
            LayerError::malformed(
                &entry.path,
                "it is a hard link to a file that the layer does not contain",
            )
        };
        let (target_directory, target_last) = target.split();
        let target_parent = match self
            .tree
            .open(target_directory, OFlags::PATH | OFlags::DIRECTORY)
        {
            Err(Errno::NOENT | Errno::NOTDIR) => return Err(missing()),
            other => {
                other.map_err(|e| LayerError::system("open the directory", target_directory, e))?
            }
        };
        match lstat(&target_parent, target_last) {
            None => return Err(missing()),
            Some(stat) if FileType::from_raw_mode(stat.st_mode) == FileType::Directory => {
                return Err(LayerError::malformed(
                    &entry.path,
                    "it is a hard link to a directory",
                ));
            }
            Some(_) => {}
        }
        let (directory, last) = name.split();
        let parent = self.tree.enter(directory)?;
        // Without AT_SYMLINK_FOLLOW, linkat(2) does not follow a symbolic link in the last
        // component of the target's path.
        replacing(parent, last, self.go_on, || {
            rustix::fs::linkat(&target_parent, target_last, parent, last, AtFlags::empty())
        })
        .map_err(|e| match e {
            Errno::NOENT => missing(),
            error => LayerError::system("create the hard link", &entry.path, error),
        })
    }

    /// Sets the owner, mode, attributes and time of a symbolic link, a device or a FIFO. Such an
    /// entry must not be opened.
    fn finish_node(&mut self, entry: &Entry, name: &EntryName) -> Result<(), LayerError> {
        self.tree.inodes += 1;
        let (directory, last) = name.split();
        let parent = self.tree.enter(directory)?;
        let fail = |what, e| LayerError::system(what, &entry.path, e);
        let (uid, gid) = (Uid::from_raw(entry.uid), Gid::from_raw(entry.gid));
        rustix::fs::chownat(
            parent,
            last,
            Some(uid),
            Some(gid),
            AtFlags::SYMLINK_NOFOLLOW,
        )
        .map_err(|e| fail("set the owner of", e))?;
        if entry.kind != EntryKind::Symlink {
            rustix::fs::chmodat(
                parent,
                last,
                Mode::from_raw_mode(entry.mode),
                AtFlags::empty(),
            )
            .map_err(|e| fail("set the mode of", e))?;
        }
        if !entry.xattrs.is_empty() {
            // lsetxattr(2) does not follow a symbolic link in the last component of the path. The
            // path begins with the descriptor of the parent directory. The kernel therefore does
            // not resolve the parent's path again, and follows no symbolic link in it.
            let mut path = format!("/proc/self/fd/{}/", parent.as_raw_fd()).into_bytes();
            path.extend_from_slice(last);
            set_xattrs(entry, |key, value| {
                rustix::fs::lsetxattr(path.as_slice(), key, value, XattrFlags::empty())
            })?;
        }
        rustix::fs::utimensat(
            parent,
            last,
            &modified(entry.mtime.0, entry.mtime.1),
            AtFlags::SYMLINK_NOFOLLOW,
        )
        .map_err(|e| fail("set the times of", e))
    }
}

/// Calls `make`, which creates the file `name` in `parent`. If an earlier entry of the same archive
/// already created this file, removes the file and calls `make` again. The file can be a directory
/// with millions of files, so the removal calls `go_on` before each step.
fn replacing<T>(
    parent: impl AsFd,
    name: &[u8],
    go_on: &dyn Fn() -> io::Result<()>,
    mut make: impl FnMut() -> Result<T, Errno>,
) -> Result<T, Errno> {
    match make() {
        Err(Errno::EXIST) => {
            removal::remove(parent, name, &|| go_on().map_err(|_| Errno::CANCELED))?;
            make()
        }
        other => other,
    }
}

/// Sets the owner, mode, attributes and time of an open file. The owner must be set first, because
/// chown(2) clears set-uid bits and capabilities.
fn set_metadata(file: impl AsFd, entry: &Entry) -> Result<(), LayerError> {
    let file = file.as_fd();
    let fail = |what, e| LayerError::system(what, &entry.path, e);
    rustix::fs::fchown(
        file,
        Some(Uid::from_raw(entry.uid)),
        Some(Gid::from_raw(entry.gid)),
    )
    .map_err(|e| fail("set the owner of", e))?;
    rustix::fs::fchmod(file, Mode::from_raw_mode(entry.mode))
        .map_err(|e| fail("set the mode of", e))?;
    set_xattrs(entry, |key, value| {
        rustix::fs::fsetxattr(file, key, value, XattrFlags::empty())
    })?;
    rustix::fs::futimens(file, &modified(entry.mtime.0, entry.mtime.1))
        .map_err(|e| fail("set the times of", e))
}

fn set_xattrs(
    entry: &Entry,
    set: impl Fn(&[u8], &[u8]) -> Result<(), Errno>,
) -> Result<(), LayerError> {
    for (key, value) in &entry.xattrs {
        // The attributes `trusted.overlay.*` and `user.overlay.*` control overlayfs. A layer with
        // these attributes could hide files or show files of other layers. These attributes in an
        // archive are therefore ignored.
        if key.starts_with(b"trusted.overlay.") || key.starts_with(b"user.overlay.") {
            continue;
        }
        match set(key, value) {
            Ok(()) => {}
            // Errors are ignored for three kinds of attributes, because the file is usable without
            // them: attributes that the file system does not support, labels of an inactive
            // security module, and user attributes of a symbolic link.
            Err(Errno::NOTSUP) => {}
            Err(Errno::PERM | Errno::INVAL) if key != b"security.capability" => {}
            Err(error) => {
                let what = format!("set the attribute {} of", printable(key));
                return Err(LayerError::system(&what, &entry.path, error));
            }
        }
    }
    Ok(())
}
