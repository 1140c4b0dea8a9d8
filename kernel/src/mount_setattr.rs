//! mount_setattr(2), which rustix lacks.

use std::io;
use std::os::fd::{AsRawFd, BorrowedFd};

use rustix::io::Errno;

/// `struct mount_attr` of mount_setattr(2). Zero means no change.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct MountAttr {
    pub attr_set: u64,
    pub attr_clr: u64,
    pub propagation: u64,
    pub userns_fd: u64,
}

impl MountAttr {
    /// Makes a mount read-only, and changes nothing else.
    pub const READ_ONLY: MountAttr = MountAttr {
        attr_set: libc::MOUNT_ATTR_RDONLY,
        attr_clr: 0,
        propagation: 0,
        userns_fd: 0,
    };

    /// Also maps the ids of the mount's files by the user namespace `users`. Such a mount must not
    /// be attached anywhere yet.
    pub fn with_ids_of(mut self, users: BorrowedFd<'_>) -> Self {
        self.attr_set |= libc::MOUNT_ATTR_IDMAP;
        self.userns_fd = u64::try_from(users.as_raw_fd()).unwrap_or_default();
        self
    }
}

/// Changes the attributes of the mount that `mount` refers to, and of all below it if `recursive`.
pub fn mount_setattr(
    mount: BorrowedFd<'_>,
    recursive: bool,
    attr: &MountAttr,
) -> Result<(), Errno> {
    let flags = libc::AT_EMPTY_PATH | if recursive { libc::AT_RECURSIVE } else { 0 };
    // SAFETY: the path is a NUL-terminated string, attr a valid mount_attr of the length given.
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
        return Err(Errno::from_io_error(&io::Error::last_os_error()).unwrap_or(Errno::IO));
    }
    Ok(())
}
