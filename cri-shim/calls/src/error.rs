//! Why a call failed: a gRPC code for kubelet, one sentence for a person.

use std::fmt;
use std::io;

use rrun_kernel::errno::describe;
pub use tonic::Code;
use tonic::Status;

pub type Result<T, E = Error> = std::result::Result<T, E>;

/// A failed call's answer. Clones go to every caller that joined it.
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

    /// Something on this node failed.
    pub fn internal(sentence: impl Into<String>) -> Self {
        Error::new(Code::Internal, sentence)
    }

    /// The request contradicts itself or lacks what it needs.
    pub fn invalid(sentence: impl Into<String>) -> Self {
        Error::new(Code::InvalidArgument, sentence)
    }

    pub fn not_found(sentence: impl Into<String>) -> Self {
        Error::new(Code::NotFound, sentence)
    }

    /// The object is not in the state that the call needs.
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

/// Adds what was being done to what the kernel said.
pub trait During<T> {
    /// `what` as in "mount proc on /proc".
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
    fn an_errno_is_said_in_words_and_by_name() {
        let denied: io::Result<()> = Err(io::Error::from_raw_os_error(libc::EPERM));
        let said = denied
            .during(|| "mount proc on /proc".into())
            .map_err(|error| error.to_string());
        assert_eq!(
            said,
            Err("mount proc on /proc: Operation not permitted (EPERM)".into())
        );
    }
}
