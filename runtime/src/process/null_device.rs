//! The null device as a standard stream of a process.
//!
//! rrun's caller often opens the host's /dev/null for the standard streams. A container without a
//! user namespace has the user id of the owner of this file. So fchmod(2) in the container would
//! change the mode of /dev/null for the whole host. The process gets another file instead, which is
//! also the null device.

use std::os::fd::{BorrowedFd, OwnedFd};

use rustix::fs::{CWD, FileType, Mode, OFlags, ResolveFlags, Stat, fstat, openat2};
use rustix::io::Errno;
use rustix::mount::{FsMountFlags, FsOpenFlags, MountAttrFlags, fsconfig_create, fsmount, fsopen};
use rustix::stdio::{dup2_stderr, dup2_stdin, dup2_stdout, stderr, stdin, stdout};

use crate::error::{Context, Result};
use rrun_kernel::namespace_limits::beyond_limit;

type Duplicate = fn(&OwnedFd) -> std::result::Result<(), Errno>;

/// Replaces each standard stream that is the null device, and calls `other` for each other open
/// stream with the result of fstat(2). The process must be in the container's mount namespace, and
/// must still have its capabilities.
pub(crate) fn replace_host_device(other: impl Fn(BorrowedFd<'_>, &Stat)) -> Result<()> {
    replace(other).doing(|| "replace a standard stream that is the host's /dev/null")
}

fn replace(other: impl Fn(BorrowedFd<'_>, &Stat)) -> std::result::Result<(), Errno> {
    let streams: [(_, Duplicate); 3] = [
        (stdin(), |null| dup2_stdin(null)),
        (stdout(), |null| dup2_stdout(null)),
        (stderr(), |null| dup2_stderr(null)),
    ];
    let mut null = None;
    for (stream, duplicate) in streams {
        match fstat(stream) {
            Ok(stat) if is_null_device(&stat) => {}
            Ok(stat) => {
                other(stream, &stat);
                continue;
            }
            Err(Errno::BADF) => continue,
            Err(errno) => return Err(errno),
        }
        let null = match &mut null {
            Some(null) => null,
            none => match open().and_then(|found| found.map_or_else(|| beyond_limit(create), Ok)) {
                Ok(opened) => none.insert(opened),
                // Either the container's devices do not include the null device, or the process is
                // in a user namespace, whose root does not own the host's /dev/null.
                Err(Errno::PERM) => continue,
                Err(errno) => return Err(errno),
            },
        };
        duplicate(null)?;
    }
    Ok(())
}

/// Returns whether the file is the null device. See null(4).
pub(crate) fn is_null_device(stat: &Stat) -> bool {
    FileType::from_raw_mode(stat.st_mode) == FileType::CharacterDevice
        && stat.st_rdev == rustix::fs::makedev(1, 3)
}

/// Opens the container's /dev/null. Returns `None` if this path is not the null device, or contains a
/// link. A process in the container can replace /dev with a link to `/proc/PID/root/dev`, where the
/// process PID belongs to rrun and is still in the host's root.
fn open() -> std::result::Result<Option<OwnedFd>, Errno> {
    let open = |flags| {
        let (flags, mode) = (flags | OFlags::CLOEXEC, Mode::empty());
        match openat2(CWD, c"/dev/null", flags, mode, ResolveFlags::NO_SYMLINKS) {
            Err(Errno::NOENT | Errno::NOTDIR | Errno::LOOP) => Ok(None),
            opened => opened.map(Some),
        }
    };
    // O_PATH calls no driver. If the container replaces the file after this check, the second call
    // opens another file. The container itself could open this file, and rrun does not use it.
    let Some(found) = open(OFlags::PATH)? else {
        return Ok(None);
    };
    if !is_null_device(&fstat(&found)?) {
        return Ok(None);
    }
    let Some(opened) = open(OFlags::RDWR | OFlags::NONBLOCK | OFlags::NOCTTY)? else {
        return Ok(None);
    };
    if !is_null_device(&fstat(&opened)?) {
        return Ok(None);
    }
    // The stream must block like other files.
    rustix::fs::fcntl_setfl(&opened, OFlags::RDWR)?;
    Ok(Some(opened))
}

/// Creates a null device in a file system that is not mounted anywhere. A container can delete or
/// replace its /dev/null.
fn create() -> std::result::Result<OwnedFd, Errno> {
    let fs = fsopen("tmpfs", FsOpenFlags::FSOPEN_CLOEXEC)?;
    fsconfig_create(&fs)?;
    let mount = fsmount(
        &fs,
        FsMountFlags::FSMOUNT_CLOEXEC,
        MountAttrFlags::MOUNT_ATTR_NOSUID | MountAttrFlags::MOUNT_ATTR_NOEXEC,
    )?;
    let mode = Mode::from_raw_mode(0o666);
    let device = rustix::fs::makedev(1, 3);
    rustix::fs::mknodat(&mount, c"null", FileType::CharacterDevice, mode, device)?;
    // Ours: only this process can reach the file system.
    rustix::fs::openat(
        &mount,
        c"null",
        OFlags::RDWR | OFlags::CLOEXEC,
        Mode::empty(),
    )
}
