//! The option `tmpcopyup` of a tmpfs: it begins with what the directory has that it covers.
//!
//! That directory is the container's, and hostile: nothing is opened by more than one name
//! below a descriptor, no link is followed, and no FIFO or device is opened ([`regular_file`]).

use std::ffi::CStr;
use std::os::fd::{AsFd, OwnedFd};

use rustix::fs::{AtFlags, Dir, FileType, Gid, Mode, OFlags, RawMode, Stat, Uid};
use rustix::io::Errno;

use crate::error::{Context, Result, refuse};
use rrun_kernel::procfs::Procfs;
use rrun_kernel::regular_file;

/// How many directories within each other are copied.
const DEPTH_MAX: usize = 128;

const DIRECTORY: OFlags = OFlags::RDONLY
    .union(OFlags::DIRECTORY)
    .union(OFlags::NOFOLLOW)
    .union(OFlags::CLOEXEC);

/// Copies the contents of one directory, its owner and mode, to another. Both may be O_PATH.
pub(crate) fn copy(from: impl AsFd, to: impl AsFd) -> Result<()> {
    let open = |fd: &dyn AsFd| {
        rustix::fs::openat(fd, ".", DIRECTORY, Mode::empty()).doing(|| "open the directory")
    };
    let from = open(&from)?;
    let stat = rustix::fs::fstat(&from).doing(|| "look at the directory")?;
    let to = open(&to)?;
    copy_below(&Procfs::open()?, &from, &to, DEPTH_MAX)?;
    copy_owner_and_mode(&to, &stat)
}

/// Gives a directory the mode of another.
pub(crate) fn copy_mode(from: impl AsFd, to: impl AsFd) -> Result<()> {
    let stat = rustix::fs::fstat(from).doing(|| "look at the mount point")?;
    let to = rustix::fs::openat(to, ".", DIRECTORY, Mode::empty()).doing(|| "open the tmpfs")?;
    rustix::fs::fchmod(&to, mode(&stat)).doing(|| "set the tmpfs's mode")
}

fn mode(stat: &Stat) -> Mode {
    Mode::from_raw_mode(stat.st_mode as RawMode & 0o7777)
}

/// Owner first: a change of it takes set-uid bits away.
fn copy_owner_and_mode(to: &OwnedFd, stat: &Stat) -> Result<()> {
    let owner = (Uid::from_raw(stat.st_uid), Gid::from_raw(stat.st_gid));
    match rustix::fs::fchown(to, Some(owner.0), Some(owner.1)) {
        // An owner that the container's user namespace does not have.
        Ok(()) | Err(Errno::INVAL) => {}
        result => result.doing(|| "set an owner")?,
    }
    rustix::fs::fchmod(to, mode(stat)).doing(|| "set a mode")
}

fn copy_below(procfs: &Procfs, from: &OwnedFd, to: &OwnedFd, depth: usize) -> Result<()> {
    if depth == 0 {
        refuse!("more than {DEPTH_MAX} directories are within each other");
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
    let stat = rustix::fs::statat(from, name, AtFlags::SYMLINK_NOFOLLOW).doing(|| "look at it")?;
    let kind = FileType::from_raw_mode(stat.st_mode);
    match kind {
        FileType::Directory => {
            let from = rustix::fs::openat(from, name, DIRECTORY, Mode::empty());
            let from = from.doing(|| "open it")?;
            rustix::fs::mkdirat(to, name, Mode::RWXU).doing(|| "make it")?;
            let to = rustix::fs::openat(to, name, DIRECTORY, Mode::empty());
            let to = to.doing(|| "open what was made")?;
            copy_below(procfs, &from, &to, depth - 1)?;
            copy_owner_and_mode(&to, &stat)
        }
        FileType::RegularFile => copy_file(procfs, from, to, name),
        FileType::Symlink => {
            let link = rustix::fs::readlinkat(from, name, Vec::new()).doing(|| "read the link")?;
            rustix::fs::symlinkat(&link, to, name).doing(|| "make it")
        }
        _ => {
            rustix::fs::mknodat(to, name, kind, Mode::empty(), stat.st_rdev).doing(|| "make it")?;
            rustix::fs::chmodat(to, name, mode(&stat), AtFlags::empty()).doing(|| "set its mode")
        }
    }
}

fn copy_file(procfs: &Procfs, from: &OwnedFd, to: &OwnedFd, name: &CStr) -> Result<()> {
    let flags = OFlags::PATH | OFlags::NOFOLLOW | OFlags::CLOEXEC;
    let found = rustix::fs::openat(from, name, flags, Mode::empty()).doing(|| "open it")?;
    let (from, stat) = regular_file::reopen_by(procfs, &found, OFlags::RDONLY)?;
    let flags = OFlags::WRONLY | OFlags::CREATE | OFlags::EXCL | OFlags::NOFOLLOW | OFlags::CLOEXEC;
    let to = rustix::fs::openat(to, name, flags, Mode::RUSR).doing(|| "make it")?;
    // No more than it had: one that grows meanwhile must not be followed for ever.
    let mut left = u64::try_from(stat.st_size).unwrap_or(0);
    while left > 0 {
        let most = usize::try_from(left.min(1 << 30)).unwrap_or(1 << 30);
        match rustix::fs::sendfile(&to, &from, None, most).doing(|| "copy its contents")? {
            0 => break,
            copied => left -= copied as u64,
        }
    }
    copy_owner_and_mode(&to, &stat)
}
