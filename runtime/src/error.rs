//! What went wrong, as one sentence for the person who reads it.
//!
//! Every error that reaches a user has the form `what was being done, to what: what the
//! kernel said (ENAME)`. The sentence is built where the failure happens, because only
//! there all its parts are known; from there on it is only carried, also across the pipe
//! from a container's first process to its parent.

use std::fmt;

use rrun_kernel::errno;
use rrun_kernel::procfs::ProcfsError;
use rrun_kernel::regular_file::Unfit;

pub(crate) type Result<T> = std::result::Result<T, Error>;

impl From<Unfit> for Error {
    fn from(unfit: Unfit) -> Error {
        Error::new(unfit.to_string())
    }
}

impl From<ProcfsError> for Error {
    fn from(error: ProcfsError) -> Error {
        Error::new(error.to_string())
    }
}

/// What a caller may need to tell apart; everything else is in the sentence.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Kind {
    /// Anything that has no kind of its own.
    General,
    /// No container of that id under this root.
    NoSuchContainer,
}

/// One sentence, and its kind.
#[derive(Debug, thiserror::Error)]
#[error("{sentence}")]
pub(crate) struct Error {
    sentence: String,
    kind: Kind,
}

impl Error {
    pub(crate) fn new(sentence: impl Into<String>) -> Error {
        Error {
            sentence: sentence.into(),
            kind: Kind::General,
        }
    }

    pub(crate) fn with_kind(mut self, kind: Kind) -> Error {
        self.kind = kind;
        self
    }

    pub(crate) fn kind(&self) -> Kind {
        self.kind
    }

    /// Puts what was being done around what went wrong inside it.
    pub(crate) fn while_doing(mut self, doing: impl fmt::Display) -> Error {
        self.sentence = format!("{doing}: {}", self.sentence);
        self
    }
}

/// Something that carries the reason of a failure, mostly an errno.
pub(crate) trait Reason {
    fn reason(&self) -> String;
}

impl Reason for rustix::io::Errno {
    fn reason(&self) -> String {
        errno::text(self.raw_os_error())
    }
}

impl Reason for std::io::Error {
    fn reason(&self) -> String {
        self.raw_os_error()
            .map_or_else(|| self.to_string(), errno::text)
    }
}

impl Reason for Unfit {
    fn reason(&self) -> String {
        self.to_string()
    }
}

impl Reason for Error {
    fn reason(&self) -> String {
        self.sentence.clone()
    }
}

/// Turns a kernel's refusal into a sentence.
pub(crate) trait Context<T> {
    /// `doing` is evaluated only on failure: `mount proc on /proc`.
    fn doing<D: fmt::Display>(self, doing: impl FnOnce() -> D) -> Result<T>;
}

impl<T, E: Reason> Context<T> for std::result::Result<T, E> {
    fn doing<D: fmt::Display>(self, doing: impl FnOnce() -> D) -> Result<T> {
        self.map_err(|error| Error::new(format!("{}: {}", doing(), error.reason())))
    }
}

/// `return Err(Error::new(format!(…)))`.
macro_rules! refuse {
    ($($arg:tt)*) => {
        return Err($crate::error::Error::new(format!($($arg)*)))
    };
}
pub(crate) use refuse;

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_errno_becomes_words_and_its_name() {
        let failed: std::result::Result<(), _> = Err(rustix::io::Errno::PERM);
        let error = failed.doing(|| "mount proc on /proc").unwrap_err();
        assert_eq!(
            error.to_string(),
            "mount proc on /proc: Operation not permitted (EPERM)"
        );
    }
}
