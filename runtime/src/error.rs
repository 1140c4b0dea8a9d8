//! The error type of rrun. Each error is one sentence for the person who reads it.
//!
//! Every error that reaches a user has the form `what rrun was doing, to what: what the kernel
//! reported (ENAME)`. The code that detects a failure builds the sentence, because only this code
//! has all parts of the sentence. The callers of this code pass the finished sentence on to their
//! own callers. The channel from a container's first process to its parent also transports finished
//! sentences.

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

/// The kind of an error, for calling functions that handle certain errors specially. All other
/// details of an error are in its sentence.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Kind {
    /// An error that no calling function handles specially.
    General,
    /// No container with the given id exists in the --root directory.
    NoSuchContainer,
    /// rrun has no permission to create cgroups, or the host does not use cgroup v2.
    NoCgroups,
    /// systemd has a unit with the name of the container's scope.
    UnitExists,
}

/// A sentence for the user, and the kind of the error.
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

    /// Puts `doing` in front of the error's sentence. `doing` describes the larger operation that
    /// failed because of this error.
    pub(crate) fn while_doing(mut self, doing: impl fmt::Display) -> Error {
        self.sentence = format!("{doing}: {}", self.sentence);
        self
    }
}

/// An error type that describes the reason of a failure. The reason is usually an errno.
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

/// The text of the crate's error names the failed step, but not the errno.
impl Reason for pathrs::error::Error {
    fn reason(&self) -> String {
        match self.kind() {
            pathrs::error::ErrorKind::OsError(Some(errno)) => errno::text(errno),
            _ => self.to_string(),
        }
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

/// A result whose error, such as an errno from the kernel, can be converted to a sentence.
pub(crate) trait Context<T> {
    /// Puts a description of the operation, such as `mount proc on /proc`, in front of the error's
    /// reason. `doing` builds the description, and is called only if the operation failed.
    fn doing<D: fmt::Display>(self, doing: impl FnOnce() -> D) -> Result<T>;
}

impl<T, E: Reason> Context<T> for std::result::Result<T, E> {
    fn doing<D: fmt::Display>(self, doing: impl FnOnce() -> D) -> Result<T> {
        self.map_err(|error| Error::new(format!("{}: {}", doing(), error.reason())))
    }
}

/// Expands to `return Err(Error::new(format!(…)))`, which returns an error from the calling
/// function.
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
    fn an_error_contains_the_errnos_description_and_its_name() {
        let failed: std::result::Result<(), _> = Err(rustix::io::Errno::PERM);
        let error = failed.doing(|| "mount proc on /proc").unwrap_err();
        assert_eq!(
            error.to_string(),
            "mount proc on /proc: Operation not permitted (EPERM)"
        );
    }
}
