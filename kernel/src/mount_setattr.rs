//! mount_setattr(2), which rustix does not have.

use std::io;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd};

/// Sets attributes (`MOUNT_ATTR_…`) of a mount, and of those below it. With `users`, files in it
/// have the ids that this user namespace maps theirs to; its mount must be attached nowhere yet.
pub fn set(
    mount: impl AsFd,
    recursive: bool,
    attributes: u64,
    users: Option<BorrowedFd<'_>>,
) -> io::Result<()> {
    // SAFETY: mount_attr is plain numbers, for which zero means no change.
    let mut attr: libc::mount_attr = unsafe { std::mem::zeroed() };
    attr.attr_set = attributes;
    if let Some(users) = users {
        attr.attr_set |= libc::MOUNT_ATTR_IDMAP;
        attr.userns_fd = u64::try_from(users.as_raw_fd()).unwrap_or_default();
    }
    let flags = match recursive {
        true => libc::AT_EMPTY_PATH | libc::AT_RECURSIVE,
        false => libc::AT_EMPTY_PATH,
    };
    // SAFETY: the descriptor, the string and the structure outlive the call; the size is the
    // structure's.
    let set = unsafe {
        libc::syscall(
            libc::SYS_mount_setattr,
            mount.as_fd().as_raw_fd(),
            c"".as_ptr(),
            flags,
            &raw const attr,
            size_of::<libc::mount_attr>(),
        )
    };
    match set {
        0 => Ok(()),
        _ => Err(io::Error::last_os_error()),
    }
}
