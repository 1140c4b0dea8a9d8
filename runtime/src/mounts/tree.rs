//! Operations on mounts by file descriptor: copy, move, and stop the propagation to the host.

use std::ffi::OsString;
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::ffi::OsStringExt;
use std::path::{Path, PathBuf};

use rustix::fs::{CWD, Mode, OFlags, ResolveFlags};
use rustix::io::Errno;
use rustix::mount::{MountPropagationFlags, MoveMountFlags, OpenTreeFlags, UnmountFlags};

use crate::error::{Context, Result};
use crate::mounts::options;
use crate::mounts::rootfs::Rootfs;
use rrun_kernel::mount_setattr::{MountAttr, mount_setattr};
use rrun_kernel::namespace_limits::beyond_limit;

/// Returns a detached copy of the mount at a path of the host. If `recursive` is true, the copy
/// includes the mounts below the path.
pub(crate) fn clone_tree(path: &Path, recursive: bool) -> std::result::Result<OwnedFd, Errno> {
    let mut flags = OpenTreeFlags::OPEN_TREE_CLONE | OpenTreeFlags::OPEN_TREE_CLOEXEC;
    if recursive {
        flags |= OpenTreeFlags::AT_RECURSIVE;
    }
    beyond_limit(|| rustix::mount::open_tree(CWD, path, flags))
}

/// Returns a detached copy of the mount that a descriptor refers to. If `recursive` is true, the
/// copy includes the mounts below the descriptor's file.
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
    beyond_limit(|| rustix::mount::open_tree(&fd, "", flags))
}

/// Attaches a mount to the file or directory that `target` refers to.
pub(crate) fn move_mount(mount: impl AsFd, target: impl AsFd) -> std::result::Result<(), Errno> {
    rustix::mount::move_mount(
        mount,
        "",
        target,
        "",
        MoveMountFlags::MOVE_MOUNT_F_EMPTY_PATH | MoveMountFlags::MOVE_MOUNT_T_EMPTY_PATH,
    )
}

/// Opens the container's root directory at `path`. config.json was refused if `path` contained a
/// symbolic link, but a user with write access to a directory of the path can exchange it later.
pub(crate) fn open_root(path: &Path) -> Result<OwnedFd> {
    let flags = OFlags::PATH | OFlags::DIRECTORY | OFlags::CLOEXEC;
    let no_links = ResolveFlags::NO_SYMLINKS;
    rustix::fs::openat2(CWD, path, flags, Mode::empty(), no_links)
        .doing(|| format!("open root.path {}", path.display()))
}

/// Returns a detached mount of the container's root directory `directory`, which was opened at
/// `path`, with all mounts below the root. Later mounts on this detached mount do not propagate to
/// the host. If `is_slave` is true, later mounts of the host propagate to the detached mount.
pub(crate) fn clone_root(directory: &OwnedFd, path: &Path, is_slave: bool) -> Result<OwnedFd> {
    let sentence = || format!("make root.path {} a separate mount", path.display());
    let root = clone_descriptor(directory, true).doing(sentence)?;
    let attr = MountAttr {
        propagation: if is_slave {
            options::SLAVE
        } else {
            options::PRIVATE
        },
        ..MountAttr::default()
    };
    mount_setattr(root.as_fd(), true, &attr).doing(sentence)?;
    Ok(root)
}

/// Stops the propagation of new mounts from `mount`, and from all mounts below `mount`, to the
/// host. New mounts of the host still propagate to these mounts.
pub(crate) fn make_slave(mount: &OwnedFd) -> std::result::Result<(), Errno> {
    let attr = MountAttr {
        propagation: options::SLAVE,
        ..MountAttr::default()
    };
    mount_setattr(mount.as_fd(), true, &attr)
}

/// Attaches the container's root on `directory`, which was opened at `path`, because pivot_root(2)
/// requires the root to be a mount in this namespace. The root then hides the previous content of
/// the directory.
pub(crate) fn attach_root(root: &OwnedFd, directory: &OwnedFd, path: &Path) -> Result<()> {
    move_mount(root, directory)
        .doing(|| format!("mount the container's root on {}", path.display()))
}

/// Moves the container's root from root.path to `/`, on top of the old root.
pub(crate) fn move_to_root(rootfs: &Rootfs) -> std::result::Result<(), Errno> {
    let flags = MoveMountFlags::MOVE_MOUNT_F_EMPTY_PATH;
    rustix::mount::move_mount(rootfs, "", CWD, "/", flags)
}

/// Unmounts every procfs and sysfs of the old root. Otherwise a process in a user namespace could
/// mount a new procfs or sysfs without masked paths. The kernel allows such a mount if the
/// process's mount namespace contains an unmasked procfs or sysfs at any path.
pub(crate) fn unmount_host_proc_and_sys() -> Result<()> {
    let file = "/proc/self/mountinfo";
    // A user can mount FUSE at a path that is not valid UTF-8.
    let text = std::fs::read(file).doing(|| format!("read {file}"))?;
    for point in text.split(|byte| *byte == b'\n').filter_map(proc_or_sysfs) {
        // rrun first makes the mount a slave, because the unmount would otherwise propagate to the
        // host. /proc/self/mountinfo also lists the mounts of the container. No path leads to the
        // container's mounts yet, so mount_change fails for them with EINVAL or ENOENT, and rrun
        // skips them.
        let slave = MountPropagationFlags::DOWNSTREAM | MountPropagationFlags::REC;
        let doing = || format!("unmount {} from the old root (--no-pivot)", point.display());
        match rustix::mount::mount_change(&point, slave) {
            Err(Errno::INVAL | Errno::NOENT | Errno::NOTDIR) => continue,
            changed => changed.doing(doing)?,
        }
        rustix::mount::unmount(&point, UnmountFlags::DETACH).doing(doing)?;
    }
    Ok(())
}

/// Returns the mount point in a line of mountinfo if the mount is a procfs or sysfs. The kernel writes a
/// blank, tab, newline or backslash in the path as `\` and three octal digits, proc_pid_mountinfo(5).
fn proc_or_sysfs(line: &[u8]) -> Option<PathBuf> {
    let mut words = line.split(|byte| *byte == b' ');
    let point = words.nth(4)?;
    words.find(|word| *word == b"-")?;
    if !matches!(words.next()?, b"proc" | b"sysfs") {
        return None;
    }
    let mut path = Vec::new();
    let mut rest = point;
    while let Some((first, others)) = rest.split_first() {
        let octal = others.get(..3).filter(|_| *first == b'\\');
        let octal = octal.and_then(|digits| std::str::from_utf8(digits).ok());
        match octal.and_then(|digits| u8::from_str_radix(digits, 8).ok()) {
            Some(byte) => {
                path.push(byte);
                rest = others.get(3..).unwrap_or_default();
            }
            None => {
                path.push(*first);
                rest = others;
            }
        }
    }
    Some(OsString::from_vec(path).into())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn mount_points_are_decoded() {
        let line = |point: &[u8], kind: &[u8]| {
            let (before, after) = (b"24 1 0:22 / ", b" rw shared:1 - ");
            [before.as_slice(), point, after, kind, b" none rw"].concat()
        };
        let decoded = |point: &[u8]| proc_or_sysfs(&line(point, b"proc"));
        assert_eq!(decoded(b"/proc"), Some("/proc".into()));
        assert_eq!(decoded(b"/a\\040b\\134c"), Some("/a b\\c".into()));
        let bytes = OsString::from_vec(b"/\xffx".to_vec());
        assert_eq!(decoded(b"/\xffx"), Some(bytes.into()));
        assert_eq!(proc_or_sysfs(&line(b"/x", b"tmpfs")), None);
        assert_eq!(proc_or_sysfs(b""), None);
    }
}
