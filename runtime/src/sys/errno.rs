//! An errno as text.

use nix::errno::Errno;

/// `Operation not permitted (EPERM)` from an errno.
pub(crate) fn errno_text(raw: i32) -> String {
    let errno = Errno::from_raw(raw);
    if errno == Errno::UnknownErrno {
        return format!("errno {raw}");
    }
    format!("{} ({errno:?})", errno.desc())
}
