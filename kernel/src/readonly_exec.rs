//! Executables on a read-only file system of their own, which nobody can write to.
//!
//! A process that is about to become a container's is, until its execve(2), visible in the
//! container as one whose /proc/PID/exe is a file of the host. Whoever opens that link could write
//! to the file once nobody executes it any more (CVE-2019-5736).
//!
//! A link in /proc/PID/exe leads to a file by the mount that it was executed from. So the file is
//! executed from an overlay of its directory that has no writable layer and is attached nowhere.
//! Opening it for writing gives EROFS, for every user and with every capability. Nobody can make
//! the mount writable, because mount_setattr(2) and mount(2) refuse a mount outside the caller's
//! mount namespace. It ends with the last process that was executed from it. The file's contents
//! are not copied.
//!
//! A read-only copy of the *mount* would keep the file as safe. But by it the container would hold
//! the file's own inode, and the kernel counts an open for writing as a writer of that inode for
//! the moment before it refuses it: a container that tries in a loop makes every fiftieth execve(2)
//! of that file fail with ETXTBSY, on the whole node. An overlay's inode is its own, and a file
//! system that is read-only as a whole refuses before it counts.

use std::ffi::{CStr, OsStr};
use std::os::fd::{AsFd, AsRawFd, OwnedFd};

use rustix::fs::{CWD, Mode, OFlags};
use rustix::io::Errno;
use rustix::mount::{FsMountFlags, FsOpenFlags, MountAttrFlags, OpenTreeFlags};

use crate::mount_setattr::{MountAttr, mount_setattr};

/// Opens (O_PATH) the file `name` of `directory`, as it is in such an overlay of the directory.
pub fn open_in_overlay(directory: impl AsFd, name: &OsStr) -> Result<OwnedFd, Errno> {
    let overlay = rustix::mount::fsopen("overlay", FsOpenFlags::FSOPEN_CLOEXEC)?;
    // Without a writable layer an overlay needs two layers. As a descriptor's number, the directory
    // needs no escapes.
    let layers = format!("/proc/self/fd/{}:/dev", directory.as_fd().as_raw_fd());
    rustix::mount::fsconfig_set_string(&overlay, "lowerdir", layers)?;
    rustix::mount::fsconfig_create(&overlay)?;
    let flags = FsMountFlags::FSMOUNT_CLOEXEC;
    let mount = rustix::mount::fsmount(&overlay, flags, MountAttrFlags::MOUNT_ATTR_RDONLY)?;
    let flags = OFlags::PATH | OFlags::NOFOLLOW | OFlags::CLOEXEC;
    rustix::fs::openat(&mount, name, flags, Mode::empty())
}

/// Opens (O_PATH) the file at `path` on a read-only copy of its mount.
pub fn open_on_readonly_mount(path: &CStr) -> Result<OwnedFd, Errno> {
    let flags = OpenTreeFlags::OPEN_TREE_CLONE | OpenTreeFlags::OPEN_TREE_CLOEXEC;
    let mount = rustix::mount::open_tree(CWD, path, flags)?;
    mount_setattr(mount.as_fd(), false, &MountAttr::READ_ONLY)?;
    Ok(mount)
}
