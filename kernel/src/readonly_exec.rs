//! Access to executables through a separate read-only file system. No process can overwrite an
//! executable through this file system.
//!
//! A container's process begins as a process of rrun, and is visible inside the container even
//! before its execve(2). The link /proc/PID/exe of this rrun process leads to an executable of the
//! host. A process in the container could open this link. As soon as no process executes this
//! executable any more, the container could overwrite the executable (CVE-2019-5736).
//!
//! The link /proc/PID/exe leads to the file on the mount from which the file was executed. For this
//! reason, rrun executes the file from an overlay of the directory that contains the file. The
//! overlay has no writable layer and is not attached to any mount namespace. Opening a file of the
//! overlay for writing fails with EROFS, even for a process of root with all capabilities. No
//! process can make the mount writable, because mount_setattr(2) and mount(2) refuse a mount
//! outside the caller's mount namespace. The kernel removes the overlay when no process executes a
//! file of the overlay any more. The overlay does not copy the contents of the file.
//!
//! A read-only copy of the *mount* would protect the contents of the file equally well. However, a
//! file on this copy would have the same inode as the original file, and a container could try to
//! open this inode for writing. On a read-only mount, the kernel refuses to open a file for
//! writing. Before the refusal, it increments the inode's number of writers, and after the refusal
//! it decrements the number again. While the number is not zero, execve(2) of the file fails with
//! ETXTBSY. If a container opens the file for writing in a loop, every fiftieth execve(2) of the
//! file fails on the whole node. An overlay prevents these failures, because it has its own inodes.
//! The overlay is also read-only as a whole file system. On a read-only file system, the kernel
//! refuses the open without incrementing the number of writers.

use std::ffi::{CStr, OsStr};
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};

use rustix::fs::{CWD, Mode, OFlags};
use rustix::io::Errno;
use rustix::mount::{FsMountFlags, FsOpenFlags, MountAttrFlags, OpenTreeFlags};

use crate::mount_setattr::{MountAttr, mount_setattr};
use crate::namespace_limits::beyond_limit;

/// Opens the file `name` with O_PATH in a read-only overlay, whose lower layer is `directory`.
pub fn open_in_overlay(directory: impl AsFd, name: &OsStr) -> Result<OwnedFd, Errno> {
    let mount = beyond_limit(|| mount_overlay(directory.as_fd()))?;
    let flags = OFlags::PATH | OFlags::NOFOLLOW | OFlags::CLOEXEC;
    rustix::fs::openat(&mount, name, flags, Mode::empty())
}

fn mount_overlay(directory: BorrowedFd<'_>) -> Result<OwnedFd, Errno> {
    let overlay = rustix::mount::fsopen("overlay", FsOpenFlags::FSOPEN_CLOEXEC)?;
    // An overlay without a writable layer needs two lower layers, so /dev is the second one. The
    // first layer is passed as the number of a descriptor, because some characters in a path would
    // need escaping.
    let layers = format!("/proc/self/fd/{}:/dev", directory.as_raw_fd());
    rustix::mount::fsconfig_set_string(&overlay, "lowerdir", layers)?;
    rustix::mount::fsconfig_create(&overlay)?;
    let flags = FsMountFlags::FSMOUNT_CLOEXEC;
    rustix::mount::fsmount(&overlay, flags, MountAttrFlags::MOUNT_ATTR_RDONLY)
}

/// Opens the file at `path` with O_PATH on a read-only copy of the mount that contains the file.
pub fn open_on_readonly_mount(path: &CStr) -> Result<OwnedFd, Errno> {
    let flags = OpenTreeFlags::OPEN_TREE_CLONE | OpenTreeFlags::OPEN_TREE_CLOEXEC;
    let mount = beyond_limit(|| rustix::mount::open_tree(CWD, path, flags))?;
    mount_setattr(mount.as_fd(), false, &MountAttr::READ_ONLY)?;
    Ok(mount)
}
