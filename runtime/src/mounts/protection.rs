//! `linux.maskedPaths` and `linux.readonlyPaths`.

use std::collections::BTreeSet;
use std::os::fd::{AsFd, OwnedFd};
use std::path::{Path, PathBuf};

use rustix::fs::{AtFlags, FileType};
use rustix::io::Errno;

use super::tree::{clone_descriptor, clone_tree, move_mount};
use crate::error::{Context, Result, refuse};
use crate::mounts::rootfs::{Protected, Rootfs};
use crate::process::null_device::is_null_device;
use crate::sys::path::cleaned;
use rrun_kernel::empty_tmpfs;
use rrun_kernel::mount_setattr::{MountAttr, mount_setattr};
use rrun_kernel::namespace_limits::beyond_limit;

/// Hides the paths of `linux.maskedPaths`. A directory is covered with an empty directory, and any
/// other file with /dev/null. A path that does not exist is skipped.
///
/// # Errors
/// Fails if a path leads to the root directory.
pub(crate) fn mask(rootfs: &Rootfs, paths: &[String], label: Option<&str>) -> Result<()> {
    let (mut empty, mut null): (Option<OwnedFd>, Option<OwnedFd>) = (None, None);
    for path in distinct(paths) {
        let doing = || format!("mask {} (linux.maskedPaths)", path.display());
        let target = match rootfs.open_to_protect(&path) {
            Err(Errno::NOENT | Errno::NOTDIR) => continue,
            result => match result.doing(doing)? {
                Protected::Root => refuse!("{}: it leads to the root directory", doing()),
                Protected::Below(target) => target,
            },
        };
        let stat = rustix::fs::fstat(&target).doing(doing)?;
        let is_directory = FileType::from_raw_mode(stat.st_mode) == FileType::Directory;
        let attached = if is_directory { &mut empty } else { &mut null };
        // The same empty tmpfs covers all masked directories, and the same mount of /dev/null covers
        // all other masked files. The kernel can copy a mount only after the mount is attached. So
        // rrun attaches the mount to the first path, and attaches copies to the other paths.
        let cover = match attached {
            Some(attached) => clone_descriptor(attached, false).doing(doing)?,
            None if is_directory => beyond_limit(|| empty_tmpfs::create(label)).doing(doing)?,
            None => null_device(rootfs, doing)?,
        };
        move_mount(&cover, &target).doing(doing)?;
        attached.get_or_insert(cover);
    }
    Ok(())
}

/// Returns a mount of the container's own /dev/null. rrun checks the descriptor of this file, because
/// the path could lead to another file (CVE-2025-31133). Returns a mount of the host's /dev/null only
/// if the container has no null device: a program in the container that watches the host's device
/// with inotify(7) slows down every program of the node that uses the device. In a user namespace,
/// the container's /dev/null is itself a mount of the host's.
///
/// The mount is read-only, because otherwise root in the container could change the owner and the
/// mode of the host's /dev/null. A read-only mount does not prevent writing to a device.
fn null_device(rootfs: &Rootfs, doing: impl Fn() -> String + Copy) -> Result<OwnedFd> {
    let null = match rootfs.null_device().doing(doing)? {
        Some(null) => clone_descriptor(&null, false).doing(doing)?,
        None => {
            let null = clone_tree(Path::new("/dev/null"), false).doing(doing)?;
            let stat = rustix::fs::statat(&null, "", AtFlags::EMPTY_PATH).doing(doing)?;
            if !is_null_device(&stat) {
                refuse!("{}: the host's /dev/null is not the null device", doing());
            }
            null
        }
    };
    mount_setattr(null.as_fd(), false, &MountAttr::READ_ONLY).doing(doing)?;
    Ok(null)
}

/// Makes the paths of `linux.readonlyPaths` read-only, with all mounts below them. Returns whether a
/// path leads to the root directory. Like runc and crun, rrun then makes the root itself read-only,
/// but not the mounts below it. The caller must do this after all other steps that create files or
/// mounts.
pub(crate) fn make_read_only(rootfs: &Rootfs, paths: &[String]) -> Result<bool> {
    let mut includes_root = false;
    for path in distinct(paths) {
        let doing = || format!("make {} read-only (linux.readonlyPaths)", path.display());
        let target = match rootfs.open_to_protect(&path) {
            Err(Errno::NOENT | Errno::NOTDIR) => continue,
            result => match result.doing(doing)? {
                Protected::Root => {
                    includes_root = true;
                    continue;
                }
                Protected::Below(target) => target,
            },
        };
        let copy = clone_descriptor(&target, true).doing(doing)?;
        mount_setattr(copy.as_fd(), true, &MountAttr::READ_ONLY).doing(doing)?;
        move_mount(&copy, &target).doing(doing)?;
    }
    Ok(includes_root)
}

/// Returns the paths in their first order, but each path only once. A second mount on the same file
/// would have no effect. With many mounts on the same file, each further mount would take longer.
fn distinct(paths: &[String]) -> impl Iterator<Item = PathBuf> {
    let mut seen = BTreeSet::new();
    let paths = paths.iter().map(|path| cleaned(Path::new(path)));
    paths.filter(move |path| seen.insert(path.clone()))
}
