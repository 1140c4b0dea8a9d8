//! The system call mount_setattr(2), which rustix lacks.

use std::os::fd::{AsRawFd, BorrowedFd};

use rustix::io::Errno;

use crate::errno::last;

/// The `struct mount_attr` of mount_setattr(2). A field with the value 0 changes no attribute of
/// the mount.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct MountAttr {
    pub attr_set: u64,
    pub attr_clr: u64,
    pub propagation: u64,
    pub userns_fd: u64,
}

impl MountAttr {
    /// The attributes that make a mount read-only and change nothing else.
    pub const READ_ONLY: MountAttr = MountAttr {
        attr_set: libc::MOUNT_ATTR_RDONLY,
        attr_clr: 0,
        propagation: 0,
        userns_fd: 0,
    };

    /// Adds an id mapping to the attributes. The mount then maps the owners of its files with the
    /// id mapping of the user namespace `users`. The kernel refuses an id mapping for a mount that
    /// is already attached to a mount namespace.
    pub fn with_ids_of(mut self, users: BorrowedFd<'_>) -> Self {
        self.attr_set |= libc::MOUNT_ATTR_IDMAP;
        self.userns_fd = u64::try_from(users.as_raw_fd()).unwrap_or_default();
        self
    }
}

/// Changes the attributes of the mount that `mount` refers to. If `recursive` is true, this
/// function also changes all mounts below that mount.
pub fn mount_setattr(
    mount: BorrowedFd<'_>,
    recursive: bool,
    attr: &MountAttr,
) -> Result<(), Errno> {
    let flags = libc::AT_EMPTY_PATH | if recursive { libc::AT_RECURSIVE } else { 0 };
    // SAFETY: the path is a NUL-terminated string, and `attr` is a valid mount_attr of the given
    // length.
    let returned = unsafe {
        libc::syscall(
            libc::SYS_mount_setattr,
            mount.as_raw_fd(),
            c"".as_ptr(),
            flags as libc::c_uint,
            attr as *const MountAttr,
            std::mem::size_of::<MountAttr>(),
        )
    };
    if returned < 0 {
        return Err(last());
    }
    Ok(())
}
