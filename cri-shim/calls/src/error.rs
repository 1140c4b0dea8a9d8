//! The error of a failed CRI request. Each error has a gRPC code for kubelet and one sentence for
//! the operator.

use std::fmt;
use std::io;

use rrun_kernel::errno::describe;
pub use tonic::Code;
use tonic::Status;

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
            sentence: sentence.into(),
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
        self.map_err(|error| Error {
            code: error.code,
            sentence: format!("{}: {}", what(), error.sentence),
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

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
