//! The gRPC codes of failures between the CRI server and a monitor.

use rrun_calls::error::{Code, Error};
use rrun_protocol::FailureKind;

use crate::{MonitorError, SpawnError};

impl From<MonitorError> for Error {
    fn from(error: MonitorError) -> Self {
        let code = match &error {
            MonitorError::Failed(failure) => match failure.kind {
                FailureKind::NotFound => Code::NotFound,
                FailureKind::WrongState => Code::FailedPrecondition,
                FailureKind::Runtime | FailureKind::Monitor => Code::Internal,
            },
            // Not DeadlineExceeded: kubelet takes that for a probe's own timeout, and restarts the
            // container.
            MonitorError::Deadline { .. } => Code::Unavailable,
            MonitorError::Gone { .. } | MonitorError::Protocol { .. } => Code::Internal,
        };
        Error::new(code, error.to_string())
    }
}

impl From<SpawnError> for Error {
    fn from(error: SpawnError) -> Self {
        Error::internal(error.to_string())
    }
}
