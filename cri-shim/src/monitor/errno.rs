//! What the kernel said, for a sentence.

/// `No such file or directory (ENOENT)`.
pub fn kernel_said(error: &std::io::Error) -> String {
    match error.raw_os_error() {
        Some(number) => {
            let errno = nix::errno::Errno::from_raw(number);
            format!("{} ({errno:?})", errno.desc())
        }
        None => error.to_string(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_errno_has_its_text_and_its_name() {
        let error = std::io::Error::from_raw_os_error(libc::ENOENT);
        assert_eq!(kernel_said(&error), "No such file or directory (ENOENT)");
        assert_eq!(kernel_said(&std::io::Error::other("odd")), "odd");
    }
}
