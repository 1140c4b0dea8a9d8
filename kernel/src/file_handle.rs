//! File handles, open_by_handle_at(2). A handle finds a file without a path.

use std::os::fd::{AsRawFd, BorrowedFd, FromRawFd, OwnedFd};

use rustix::fs::OFlags;
use rustix::io::Errno;

use crate::errno::last;

/// The length of the longest handle in bytes. The handles of ext4, XFS, btrfs and tmpfs are shorter.
const HANDLE_BYTES: usize = 24;

/// The `struct file_handle` of open_by_handle_at(2).
#[repr(C)]
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct FileHandle {
    handle_bytes: libc::c_uint,
    handle_type: libc::c_int,
    f_handle: [u8; HANDLE_BYTES],
}

impl FileHandle {
    /// Returns the handle of an open file. Fails with `OPNOTSUPP` if the file system has no handles,
    /// and with `OVERFLOW` if its handles are longer than [`HANDLE_BYTES`].
    pub fn of(file: BorrowedFd<'_>) -> Result<FileHandle, Errno> {
        let mut handle = FileHandle {
            handle_bytes: HANDLE_BYTES as libc::c_uint,
            handle_type: 0,
            f_handle: [0; HANDLE_BYTES],
        };
        let mut mount_id: libc::c_int = 0;
        // SAFETY: the path is a NUL-terminated string, `handle` has space for `handle_bytes` bytes,
        // and `mount_id` is a valid int.
        let returned = unsafe {
            libc::syscall(
                libc::SYS_name_to_handle_at,
                file.as_raw_fd(),
                c"".as_ptr(),
                &raw mut handle,
                &raw mut mount_id,
                libc::AT_EMPTY_PATH,
            )
        };
        if returned < 0 {
            return Err(last());
        }
        Ok(handle)
    }

    /// Opens the file. `mount` is a file on the mount on which the file is opened. Fails with `STALE`
    /// if the file was removed, and with `PERM` without CAP_DAC_READ_SEARCH.
    pub fn open(&self, mount: BorrowedFd<'_>, flags: OFlags) -> Result<OwnedFd, Errno> {
        // SAFETY: `self` is a valid handle, which the kernel only reads.
        let returned = unsafe {
            libc::syscall(
                libc::SYS_open_by_handle_at,
                mount.as_raw_fd(),
                std::ptr::from_ref(self),
                flags.bits(),
            )
        };
        let descriptor = i32::try_from(returned).map_err(|_| Errno::IO)?;
        if descriptor < 0 {
            return Err(last());
        }
        // SAFETY: the kernel has just returned this descriptor, and nothing else owns it.
        Ok(unsafe { OwnedFd::from_raw_fd(descriptor) })
    }
}
