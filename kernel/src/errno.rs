//! What the kernel answered, in words.

use std::io;

use nix::errno::Errno;

/// The errno's text and name: `Operation not permitted (EPERM)`.
pub fn text(raw: i32) -> String {
    let errno = Errno::from_raw(raw);
    if errno == Errno::UnknownErrno {
        return format!("errno {raw}");
    }
    format!("{} ({errno:?})", errno.desc())
}

/// [`text`] of the error's errno, or the error's own words if it has none.
pub fn describe(error: &io::Error) -> String {
    error.raw_os_error().map_or_else(|| error.to_string(), text)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_errno_has_its_text_and_its_name() {
        let error = io::Error::from_raw_os_error(libc::ENOENT);
        assert_eq!(describe(&error), "No such file or directory (ENOENT)");
        assert_eq!(describe(&io::Error::other("odd")), "odd");
        assert_eq!(text(100_000), "errno 100000");
    }
}
