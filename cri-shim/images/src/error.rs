//! Why an image could not be had: a kind for the program, one sentence for the person.

use std::fmt;
use std::io;

use rustix::io::Errno;

use crate::layer::LayerError;
use rrun_calls::error::{Code, Error};
use rrun_store::StoreError;

/// What a failure means to the caller; each maps to one gRPC code.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Kind {
    /// No such image here, or no such name in the registry.
    NotFound,
    /// A reference, a credential or a configuration file that can't be read.
    InvalidArgument,
    /// The registry wants credentials, or refuses those it was given.
    Unauthenticated,
    /// The registry knows the caller and denies it.
    PermissionDenied,
    /// The registry is dead, overloaded or broke off in the middle.
    Unavailable,
    /// What arrived is not what its digest promised, or is no layer at all.
    DataLoss,
    /// A bound was reached: disk full, a layer that grows without end.
    ResourceExhausted,
    /// What rrun does not do yet.
    Unimplemented,
    /// This machine failed: a system call, the metadata store.
    Internal,
}

/// A failed image operation. Clones are cheap enough to hand to everyone who waited for the same
/// pull. The message never holds credentials.
#[derive(Clone, Debug, thiserror::Error)]
#[error("{message}")]
pub struct ImageError {
    kind: Kind,
    message: String,
}

impl ImageError {
    pub(crate) fn new(kind: Kind, message: impl Into<String>) -> Self {
        ImageError {
            kind,
            message: message.into(),
        }
    }

    pub fn kind(&self) -> Kind {
        self.kind
    }

    /// Puts what was being done in front of the message.
    pub(crate) fn context(self, what: impl fmt::Display) -> Self {
        ImageError {
            kind: self.kind,
            message: format!("{what}: {}", self.message),
        }
    }
}

impl From<StoreError> for ImageError {
    fn from(error: StoreError) -> Self {
        let kind = match error.code() {
            Code::ResourceExhausted => Kind::ResourceExhausted,
            _ => Kind::Internal,
        };
        ImageError::new(kind, error.to_string())
    }
}

impl From<LayerError> for ImageError {
    fn from(error: LayerError) -> Self {
        let kind = match &error {
            LayerError::Stream(error) if error.kind() == io::ErrorKind::Unsupported => {
                Kind::Unimplemented
            }
            LayerError::Stream(_) | LayerError::Malformed(_) | LayerError::Digest(_) => {
                Kind::DataLoss
            }
            LayerError::Bound(_) => Kind::ResourceExhausted,
            LayerError::System {
                errno: Errno::NOSPC | Errno::DQUOT | Errno::FBIG,
                ..
            } => Kind::ResourceExhausted,
            LayerError::System { .. } => Kind::Internal,
        };
        ImageError::new(kind, error.to_string())
    }
}

impl From<ImageError> for Error {
    fn from(error: ImageError) -> Self {
        let code = match error.kind() {
            Kind::NotFound => Code::NotFound,
            Kind::InvalidArgument => Code::InvalidArgument,
            Kind::Unauthenticated => Code::Unauthenticated,
            Kind::PermissionDenied => Code::PermissionDenied,
            Kind::Unavailable => Code::Unavailable,
            Kind::DataLoss => Code::DataLoss,
            Kind::ResourceExhausted => Code::ResourceExhausted,
            Kind::Unimplemented => Code::Unimplemented,
            Kind::Internal => Code::Internal,
        };
        Error::new(code, error.to_string())
    }
}
