//! The gRPC codes for failed requests to a monitor and for a failed start of a monitor.

use std::io;

use rrun_calls::error::{Code, Error};
use rrun_protocol::FailureKind;
use rustix::io::Errno;

use crate::{MonitorError, SpawnError};

impl From<MonitorError> for Error {
    fn from(error: MonitorError) -> Self {
        let code = match &error {
            MonitorError::Failed(failure) => match failure.kind {
                FailureKind::NotFound => Code::NotFound,
                FailureKind::WrongState => Code::FailedPrecondition,
                FailureKind::Runtime | FailureKind::Monitor => Code::Internal,
            },
            // The code is not DeadlineExceeded, because kubelet would interpret DeadlineExceeded as
            // the timeout of a probe and restart the container.
            MonitorError::Deadline { .. } => Code::Unavailable,
            MonitorError::Unreachable { error, .. } if is_out_of_resources(error) => {
                Code::ResourceExhausted
            }
            MonitorError::Unreachable { .. } => Code::Internal,
            MonitorError::Gone { .. } | MonitorError::Protocol { .. } => Code::Internal,
        };
        Error::new(code, error.to_string())
    }
}

impl From<SpawnError> for Error {
    fn from(error: SpawnError) -> Self {
        let code = match &error {
            SpawnError::File { error, .. } if is_out_of_resources(error) => Code::ResourceExhausted,
            SpawnError::File { .. } | SpawnError::Alive(_) => Code::Internal,
        };
        Error::new(code, error.to_string())
    }
}

/// Returns whether the error means that the node has no disk space, descriptors or memory left.
fn is_out_of_resources(error: &io::Error) -> bool {
    let errno = Errno::from_io_error(error);
    matches!(
        errno,
        Some(Errno::NOSPC | Errno::DQUOT | Errno::MFILE | Errno::NFILE | Errno::NOMEM)
    )
}
