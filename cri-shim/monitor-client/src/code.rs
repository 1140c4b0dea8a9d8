//! The gRPC codes of failures between the CRI server and a monitor.

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
        let code = match &error {
            SpawnError::File { error, .. } if lacks_room(error) => Code::ResourceExhausted,
            SpawnError::File { .. } | SpawnError::Alive(_) => Code::Internal,
        };
        Error::new(code, error.to_string())
    }
}

/// Whether the disk, the descriptors or the memory of the node have run out.
fn lacks_room(error: &io::Error) -> bool {
    let errno = Errno::from_io_error(error);
    matches!(
        errno,
        Some(Errno::NOSPC | Errno::DQUOT | Errno::MFILE | Errno::NFILE | Errno::NOMEM)
    )
}
