//! The error of a failed CRI request. Each error has a gRPC code for kubelet and one sentence for
//! the operator.

use std::fmt;
use std::io;

use rrun_kernel::errno::{describe, is_of_the_machine};
pub use tonic::Code;
use tonic::Status;

/// The size limit of a sentence in bytes. A sentence can contain a value of the request, which can
/// have any length. gRPC sends the sentence in a header, and many clients refuse a header of more
/// than 16 KiB.
const MAX_SENTENCE_BYTES: usize = 4 << 10;

pub type Result<T, E = Error> = std::result::Result<T, E>;

/// The error that a failed CRI request returns. Every caller that joined the failed work receives a
/// clone of the error.
#[derive(Clone, Debug)]
pub struct Error {
    code: Code,
    sentence: String,
}

impl Error {
    pub fn new(code: Code, sentence: impl Into<String>) -> Self {
        Error {
            code,
            sentence: shortened(sentence.into()),
        }
    }

    /// Creates an error for a valid request that a problem on this node prevented.
    pub fn internal(sentence: impl Into<String>) -> Self {
        Error::new(Code::Internal, sentence)
    }

    /// Creates an error for a request that contradicts itself or lacks a required field.
    pub fn invalid(sentence: impl Into<String>) -> Self {
        Error::new(Code::InvalidArgument, sentence)
    }

    /// Creates an error for a file that a request, an image or a pod specifies. The request is
    /// invalid, except if `errno` means that this node lacks a resource or has a broken device. A
    /// caller repeats a request only after the other codes.
    pub fn of_file(errno: Option<i32>, sentence: impl Into<String>) -> Self {
        if errno.is_some_and(is_of_the_machine) {
            Error::internal(sentence)
        } else {
            Error::invalid(sentence)
        }
    }

    pub fn not_found(sentence: impl Into<String>) -> Self {
        Error::new(Code::NotFound, sentence)
    }

    /// Creates an error for an object whose state does not allow the requested operation.
    pub fn wrong_state(sentence: impl Into<String>) -> Self {
        Error::new(Code::FailedPrecondition, sentence)
    }

    pub fn unimplemented(sentence: impl Into<String>) -> Self {
        Error::new(Code::Unimplemented, sentence)
    }

    pub fn code(&self) -> Code {
        self.code
    }

    pub fn sentence(&self) -> &str {
        &self.sentence
    }
}

impl fmt::Display for Error {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.sentence)
    }
}

impl std::error::Error for Error {}

impl From<Error> for Status {
    fn from(error: Error) -> Self {
        Status::new(error.code, error.sentence)
    }
}

/// Removes the middle of a sentence that is longer than [`MAX_SENTENCE_BYTES`]. The beginning names
/// the failed operation, and the end contains the reason.
fn shortened(sentence: String) -> String {
    if sentence.len() <= MAX_SENTENCE_BYTES {
        return sentence;
    }
    let begin = sentence.floor_char_boundary(MAX_SENTENCE_BYTES / 2);
    let end = sentence.ceil_char_boundary(sentence.len() - MAX_SENTENCE_BYTES / 4);
    let (first, _) = sentence.split_at(begin);
    let (_, last) = sentence.split_at(end);
    format!("{first} [{} bytes are left out here] {last}", end - begin)
}

/// Prefixes an error with a description of the operation that failed.
pub trait During<T> {
    /// Prefixes the error with the text that `what` returns. The text describes the failed
    /// operation, for example "mount proc on /proc".
    fn during(self, what: impl FnOnce() -> String) -> Result<T>;
}

impl<T> During<T> for io::Result<T> {
    fn during(self, what: impl FnOnce() -> String) -> Result<T> {
        self.map_err(|error| Error::internal(format!("{}: {}", what(), describe(&error))))
    }
}

impl<T> During<T> for rustix::io::Result<T> {
    fn during(self, what: impl FnOnce() -> String) -> Result<T> {
        self.map_err(io::Error::from).during(what)
    }
}

impl<T> During<T> for Result<T> {
    fn during(self, what: impl FnOnce() -> String) -> Result<T> {
        self.map_err(|error| Error::new(error.code, format!("{}: {}", what(), error.sentence)))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_middle_of_a_long_sentence_is_left_out() {
        let long = Error::invalid(format!("the name \"{}\" is too long", "é".repeat(10_000)));
        let long: Result<()> = Err(long).during(|| "run the pod".to_owned());
        let text = long.map_err(|error| error.to_string()).unwrap_err();
        assert!(text.starts_with("run the pod: the name \"é"));
        assert!(text.ends_with("é\" is too long"));
        assert!(text.len() < MAX_SENTENCE_BYTES, "{} bytes", text.len());
    }

    #[test]
    fn a_lack_of_descriptors_does_not_make_a_request_invalid() {
        let code = |errno| Error::of_file(errno, "open the file").code();
        assert_eq!(code(Some(libc::EMFILE)), Code::Internal);
        assert_eq!(code(Some(libc::ELOOP)), Code::InvalidArgument);
        assert_eq!(code(None), Code::InvalidArgument);
    }

    #[test]
    fn an_error_contains_the_description_and_the_name_of_the_errno() {
        let denied: io::Result<()> = Err(io::Error::from_raw_os_error(libc::EPERM));
        let text = denied
            .during(|| "mount proc on /proc".into())
            .map_err(|error| error.to_string());
        assert_eq!(
            text,
            Err("mount proc on /proc: Operation not permitted (EPERM)".into())
        );
    }
}
