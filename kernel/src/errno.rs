//! The kernel's error numbers as text.

use std::io;

use nix::errno::Errno;

/// An errno of the kernel that is not part of POSIX. For a seccomp filter, it means that the kernel
/// can't compile the BPF program (linux/errno.h).
pub const ENOTSUPP: i32 = 524;

/// Returns the errno of the last system call of this thread that failed.
pub fn last() -> rustix::io::Errno {
    rustix::io::Errno::from_io_error(&io::Error::last_os_error()).unwrap_or(rustix::io::Errno::IO)
}

/// Returns the description and the name of an errno, such as `Operation not permitted (EPERM)`.
pub fn text(raw: i32) -> String {
    let errno = Errno::from_raw(raw);
    if errno == Errno::UnknownErrno {
        return format!("errno {raw}");
    }
    format!("{} ({errno:?})", errno.desc())
}

/// Returns the [`text`] of the errno in `error`. If `error` contains no errno, this function
/// returns the display text of `error`.
pub fn describe(error: &io::Error) -> String {
    error.raw_os_error().map_or_else(|| error.to_string(), text)
}

/// Returns whether the errno means that this machine lacks a resource or has a broken device. With
/// any other errno, the cause can be the file itself.
pub fn is_of_the_machine(raw: i32) -> bool {
    use Errno::{EDQUOT, EIO, EMFILE, ENFILE, ENOMEM, ENOSPC};
    let errno = Errno::from_raw(raw);
    [EDQUOT, EIO, EMFILE, ENFILE, ENOMEM, ENOSPC].contains(&errno)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_errno_is_described_by_its_text_and_its_name() {
        let error = io::Error::from_raw_os_error(libc::ENOENT);
        assert_eq!(describe(&error), "No such file or directory (ENOENT)");
        assert_eq!(describe(&io::Error::other("odd")), "odd");
        assert_eq!(text(100_000), "errno 100000");
    }
}
