//! Mounts as file descriptors: copied, moved, cut off from the host.

use std::os::fd::{AsFd, OwnedFd};
use std::path::Path;

use rustix::fs::CWD;
use rustix::io::Errno;
use rustix::mount::{MountPropagationFlags, MoveMountFlags, OpenTreeFlags, UnmountFlags};

use crate::error::{Context, Result};
use crate::mounts::options;
use crate::mounts::rootfs::Rootfs;
use rrun_kernel::mount_setattr::{MountAttr, mount_setattr};

/// A detached copy of the mount at a path of the host, with those below it if `recursive`.
pub(crate) fn clone_tree(path: &Path, recursive: bool) -> std::result::Result<OwnedFd, Errno> {
    let mut flags = OpenTreeFlags::OPEN_TREE_CLONE | OpenTreeFlags::OPEN_TREE_CLOEXEC;
    if recursive {
        flags |= OpenTreeFlags::AT_RECURSIVE;
    }
    rustix::mount::open_tree(CWD, path, flags)
}

/// A detached copy of the mount that a descriptor refers to.
pub(crate) fn clone_descriptor(
    fd: impl AsFd,
    recursive: bool,
) -> std::result::Result<OwnedFd, Errno> {
    let mut flags = OpenTreeFlags::OPEN_TREE_CLONE
        | OpenTreeFlags::OPEN_TREE_CLOEXEC
        | OpenTreeFlags::AT_EMPTY_PATH;
    if recursive {
        flags |= OpenTreeFlags::AT_RECURSIVE;
    }
    rustix::mount::open_tree(fd, "", flags)
}

/// Moves a mount onto what `target` refers to.
pub(crate) fn move_mount(mount: impl AsFd, target: impl AsFd) -> std::result::Result<(), Errno> {
    rustix::mount::move_mount(
        mount,
        "",
        target,
        "",
        MoveMountFlags::MOVE_MOUNT_F_EMPTY_PATH | MoveMountFlags::MOVE_MOUNT_T_EMPTY_PATH,
    )
}

/// A copy of the mount that the root lies in, from the root on, and of those below it;
/// what is mounted on it does not reach the host.
pub(crate) fn clone_root(path: &Path) -> Result<OwnedFd> {
    let sentence = || format!("make root.path {} a mount of its own", path.display());
    let root = clone_tree(path, true).doing(sentence)?;
    make_slave(&root).doing(sentence)?;
    Ok(root)
}

/// What is mounted on it, or below it, does not reach the host; what the host mounts still
/// arrives.
pub(crate) fn make_slave(mount: &OwnedFd) -> std::result::Result<(), Errno> {
    let attr = MountAttr {
        propagation: options::SLAVE,
        ..MountAttr::default()
    };
    mount_setattr(mount.as_fd(), true, &attr)
}

/// Attaches the root, which pivot_root(2) wants to be a mount in this namespace. What lies on
/// `at` is hidden by it from then on.
pub(crate) fn attach_root(root: OwnedFd, at: &Path) -> Result<Rootfs> {
    rustix::mount::move_mount(&root, "", CWD, at, MoveMountFlags::MOVE_MOUNT_F_EMPTY_PATH)
        .doing(|| format!("mount the container's root on {}", at.display()))?;
    Ok(Rootfs::new(root))
}

/// Takes the old root's /proc and /sys off, wherever they are: a process in a user namespace
/// may mount either anew, unmasked, as long as it is unmasked anywhere in its mount namespace.
pub(crate) fn unmount_host_proc_and_sys() -> Result<()> {
    let file = "/proc/self/mountinfo";
    let text = std::fs::read_to_string(file).doing(|| format!("read {file}"))?;
    for line in text.lines() {
        let Some((before, after)) = line.split_once(" - ") else {
            continue;
        };
        let (Some(point), Some("proc" | "sysfs")) =
            (before.split(' ').nth(4), after.split(' ').next())
        else {
            continue;
        };
        // Not the host's. What the container has mounted is listed too, but no path leads
        // there yet.
        let slave = MountPropagationFlags::DOWNSTREAM | MountPropagationFlags::REC;
        if rustix::mount::mount_change(point, slave).is_ok() {
            rustix::mount::unmount(point, UnmountFlags::DETACH)
                .doing(|| format!("take {point} off the old root (--no-pivot)"))?;
        }
    }
    Ok(())
}
