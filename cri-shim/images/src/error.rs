//! Errors of image operations. Each error has a kind and one sentence for the operator. The kind
//! determines the gRPC code.

use std::fmt;
use std::io;

use rustix::io::Errno;

use crate::layer::LayerError;
use rrun_calls::error::{Code, Error};
use rrun_store::StoreError;

/// The kind of a failure. Each kind maps to one gRPC code.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Kind {
    /// The image is not on this node, or the registry has no image with that name.
    NotFound,
    /// A reference, a credential or a configuration file is invalid.
    InvalidArgument,
    /// The registry requires credentials, or rejects the given credentials.
    Unauthenticated,
    /// The registry recognises the caller, but denies access.
    PermissionDenied,
    /// The registry is unreachable or overloaded, or its answer broke off.
    Unavailable,
    /// The received data does not match its digest, or is not a valid layer.
    DataLoss,
    /// A limit was reached, for example the disk is full or a layer is too large.
    ResourceExhausted,
    /// The image needs a feature that rrun does not support.
    Unimplemented,
    /// An operation on this machine failed, for example a system call or a write to the metadata
    /// store.
    Internal,
}

/// The error of a failed image operation. Every caller that waited for the same pull receives a
/// clone of the error. The message never contains credentials.
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

    /// Prefixes the message with a description of the operation that failed.
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
