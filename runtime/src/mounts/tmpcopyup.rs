//! The option `tmpcopyup` of a tmpfs. With this option, rrun fills the tmpfs with a copy of the
//! directory that the tmpfs covers.
//!
//! An attacker could have prepared the covered directory, because it is part of the container's
//! root file system. So rrun opens each file by a single path component, relative to the descriptor
//! of the file's directory. rrun follows no link, and opens no FIFO or device (see
//! [`regular_file`]).

use std::ffi::CStr;
use std::fs::File;
use std::os::fd::{AsFd, OwnedFd};

use rustix::fs::{AtFlags, Dir, FileType, Gid, Mode, OFlags, RawMode, SeekFrom, Stat, Uid};
use rustix::io::Errno;

use crate::error::{Context, Result, refuse};
use rrun_kernel::procfs::Procfs;
use rrun_kernel::regular_file;

/// The largest depth of nested directories that rrun copies.
const DEPTH_MAX: usize = 128;

const DIRECTORY: OFlags = OFlags::RDONLY
    .union(OFlags::DIRECTORY)
    .union(OFlags::NOFOLLOW)
    .union(OFlags::CLOEXEC);

/// Copies the contents, owner and mode of the directory `from` to the root directory `to` of a
/// tmpfs. Both directories can be O_PATH descriptors. `is_set` returns true for the options `uid`,
/// `gid` and `mode` with which the tmpfs was mounted, and which this function must not change.
pub(crate) fn copy(from: impl AsFd, to: impl AsFd, is_set: impl Fn(&str) -> bool) -> Result<()> {
    let open = |fd: &dyn AsFd| {
        rustix::fs::openat(fd, ".", DIRECTORY, Mode::empty()).doing(|| "open the directory")
    };
    let from = open(&from)?;
    let stat = rustix::fs::fstat(&from).doing(|| "stat the directory")?;
    let to = open(&to)?;
    copy_below(&Procfs::open()?, &from, &to, DEPTH_MAX)?;
    let uid = (!is_set("uid")).then(|| Uid::from_raw(stat.st_uid));
    let gid = (!is_set("gid")).then(|| Gid::from_raw(stat.st_gid));
    let owner = copy_owner(&to, uid, gid)?;
    if is_set("mode") {
        return Ok(());
    }
    rustix::fs::fchmod(&to, mode_for(owner, &stat)).doing(|| "set the tmpfs's mode")
}

/// Copies the mode of the mount point `from` to the root directory of the tmpfs `to`.
pub(crate) fn copy_mode(from: impl AsFd, to: impl AsFd) -> Result<()> {
    let stat = rustix::fs::fstat(from).doing(|| "stat the mount point")?;
    let to = rustix::fs::openat(to, ".", DIRECTORY, Mode::empty()).doing(|| "open the tmpfs")?;
    rustix::fs::fchmod(&to, mode(&stat)).doing(|| "set the tmpfs's mode")
}

fn mode(stat: &Stat) -> Mode {
    Mode::from_raw_mode(stat.st_mode as RawMode & 0o7777)
}

/// Returns the mode of the copy of a file. If the copy has another owner than the file, it has no
/// set-uid and set-gid bits. Otherwise a program of an unmapped user would run as the user who owns
/// the copy, for example as root.
fn mode_for(owner: Owner, stat: &Stat) -> Mode {
    match owner {
        Owner::Copied => mode(stat),
        Owner::Unmapped => mode(stat) - (Mode::SUID | Mode::SGID),
    }
}

#[derive(Clone, Copy)]
enum Owner {
    Copied,
    /// The container's user namespace does not map the owner. The copy has the owner with which rrun
    /// created it.
    Unmapped,
}

/// Sets the owner and the mode of the file `to`. This function sets the owner first, because the
/// kernel clears the set-uid and set-gid bits of a file when the owner changes.
fn copy_owner_and_mode(to: &OwnedFd, stat: &Stat) -> Result<()> {
    let ids = (Uid::from_raw(stat.st_uid), Gid::from_raw(stat.st_gid));
    let owner = copy_owner(to, Some(ids.0), Some(ids.1))?;
    rustix::fs::fchmod(to, mode_for(owner, stat)).doing(|| "set a mode")
}

fn copy_owner(to: &OwnedFd, uid: Option<Uid>, gid: Option<Gid>) -> Result<Owner> {
    owner_set(rustix::fs::fchown(to, uid, gid))
}

/// Copies the owner to the file `name` in the directory `to`. The file can be a link.
fn copy_owner_at(to: &OwnedFd, name: &CStr, stat: &Stat) -> Result<Owner> {
    let ids = (Uid::from_raw(stat.st_uid), Gid::from_raw(stat.st_gid));
    let no_follow = AtFlags::SYMLINK_NOFOLLOW;
    owner_set(rustix::fs::chownat(
        to,
        name,
        Some(ids.0),
        Some(ids.1),
        no_follow,
    ))
}

fn owner_set(result: std::result::Result<(), Errno>) -> Result<Owner> {
    match result {
        Ok(()) => Ok(Owner::Copied),
        Err(Errno::INVAL) => Ok(Owner::Unmapped),
        Err(errno) => Err(errno).doing(|| "set an owner"),
    }
}

fn copy_below(procfs: &Procfs, from: &OwnedFd, to: &OwnedFd, depth: usize) -> Result<()> {
    if depth == 0 {
        refuse!("directories are nested more than {DEPTH_MAX} levels deep");
    }
    let entries = Dir::read_from(from).doing(|| "list a directory")?;
    for entry in entries {
        let entry = entry.doing(|| "list a directory")?;
        let name = entry.file_name();
        if matches!(name.to_bytes(), b"." | b"..") {
            continue;
        }
        copy_entry(procfs, from, to, name, depth)
            .map_err(|error| error.while_doing(format!("copy {}", name.to_string_lossy())))?;
    }
    Ok(())
}

fn copy_entry(
    procfs: &Procfs,
    from: &OwnedFd,
    to: &OwnedFd,
    name: &CStr,
    depth: usize,
) -> Result<()> {
    let stat = rustix::fs::statat(from, name, AtFlags::SYMLINK_NOFOLLOW).doing(|| "stat it")?;
    let kind = FileType::from_raw_mode(stat.st_mode);
    match kind {
        FileType::Directory => {
            let from = rustix::fs::openat(from, name, DIRECTORY, Mode::empty());
            let from = from.doing(|| "open it")?;
            rustix::fs::mkdirat(to, name, Mode::RWXU).doing(|| "create the copy")?;
            let to = rustix::fs::openat(to, name, DIRECTORY, Mode::empty());
            let to = to.doing(|| "open the copy")?;
            copy_below(procfs, &from, &to, depth - 1)?;
            copy_owner_and_mode(&to, &stat)
        }
        FileType::RegularFile => copy_file(procfs, from, to, name),
        FileType::Symlink => {
            let link = rustix::fs::readlinkat(from, name, Vec::new()).doing(|| "read the link")?;
            rustix::fs::symlinkat(&link, to, name).doing(|| "create the copy")?;
            copy_owner_at(to, name, &stat).map(drop)
        }
        _ => {
            rustix::fs::mknodat(to, name, kind, Mode::empty(), stat.st_rdev)
                .doing(|| "create the copy")?;
            let owner = copy_owner_at(to, name, &stat)?;
            rustix::fs::chmodat(to, name, mode_for(owner, &stat), AtFlags::empty())
                .doing(|| "set its mode")
        }
    }
}

fn copy_file(procfs: &Procfs, from: &OwnedFd, to: &OwnedFd, name: &CStr) -> Result<()> {
    let flags = OFlags::PATH | OFlags::NOFOLLOW | OFlags::CLOEXEC;
    let found = rustix::fs::openat(from, name, flags, Mode::empty()).doing(|| "open it")?;
    let (from, stat) = regular_file::reopen_by(procfs, &found, OFlags::RDONLY)?;
    let flags = OFlags::WRONLY | OFlags::CREATE | OFlags::EXCL | OFlags::NOFOLLOW | OFlags::CLOEXEC;
    let to = rustix::fs::openat(to, name, flags, Mode::RUSR).doing(|| "create the copy")?;
    copy_contents(&from, &to, &stat).doing(|| "copy its contents")?;
    copy_owner_and_mode(&to, &stat)
}

/// Copies the data of a file. The holes of a sparse file become holes of the copy, because the tmpfs
/// has no room for the zeros of a large hole.
fn copy_contents(from: &File, to: &OwnedFd, stat: &Stat) -> std::result::Result<(), Errno> {
    // rrun copies at most as many bytes as the file had before the copy. Otherwise the copy would
    // never end for a file that keeps growing.
    let length = u64::try_from(stat.st_size).unwrap_or(0);
    // st_blocks is a number of units of 512 bytes (stat(3type)).
    if u64::try_from(stat.st_blocks).unwrap_or(0) >= length.div_ceil(512) {
        return copy_range(from, to, length);
    }
    let mut end = 0;
    while end < length {
        let start = match rustix::fs::seek(from, SeekFrom::Data(end)) {
            // The rest of the file is a hole.
            Err(Errno::NXIO) => break,
            start => start?,
        };
        end = rustix::fs::seek(from, SeekFrom::Hole(start))?.min(length);
        rustix::fs::seek(from, SeekFrom::Start(start))?;
        rustix::fs::seek(to, SeekFrom::Start(start))?;
        copy_range(from, to, end.saturating_sub(start))?;
    }
    rustix::fs::ftruncate(to, length)
}

/// Copies `length` bytes from the position of `from` to the position of `to`.
fn copy_range(from: &File, to: &OwnedFd, length: u64) -> std::result::Result<(), Errno> {
    let mut left = length;
    while left > 0 {
        let most = usize::try_from(left.min(1 << 30)).unwrap_or(1 << 30);
        match rustix::fs::sendfile(to, from, None, most)? {
            0 => break,
            copied => left -= copied as u64,
        }
    }
    Ok(())
}
