//! Errors of the metadata store.

use std::io;
use std::path::PathBuf;
use std::sync::Arc;

use rrun_calls::error::{Code, Error};
use rrun_kernel::errno::describe;

#[derive(Debug, thiserror::Error)]
pub enum StoreError {
    #[error("open the metadata store {path}: {}", reason_of_open(.source))]
    Open {
        path: PathBuf,
        source: redb::DatabaseError,
    },
    #[error("read table {table} of the metadata store: {}", reason(.source))]
    Read {
        table: &'static str,
        source: Box<redb::Error>,
    },
    #[error(
        "convert the entry {key} in table {table} of the metadata store from or to JSON: {source}"
    )]
    Value {
        table: &'static str,
        key: String,
        source: serde_json::Error,
    },
    #[error("write to the metadata store: {}", reason(.0))]
    Write(Arc<redb::Error>),
    #[error("write to the metadata store: the writer thread has stopped")]
    Stopped,
}

/// Returns the reason of a failed operation, with the name of its errno.
fn reason(error: &redb::Error) -> String {
    match error {
        redb::Error::Io(error) => describe(error),
        error => error.to_string(),
    }
}

fn reason_of_open(error: &redb::DatabaseError) -> String {
    match error {
        redb::DatabaseError::Storage(redb::StorageError::Io(error)) => describe(error),
        error => error.to_string(),
    }
}

impl StoreError {
    /// Returns the gRPC code for a CRI request that failed with this error.
    pub fn code(&self) -> Code {
        let io_error = match self {
            StoreError::Open {
                source: redb::DatabaseError::Storage(redb::StorageError::Io(error)),
                ..
            } => error,
            StoreError::Read { source, .. } => match &**source {
                redb::Error::Io(error) => error,
                _ => return Code::Internal,
            },
            StoreError::Write(source) => match &**source {
                redb::Error::Io(error) => error,
                _ => return Code::Internal,
            },
            _ => return Code::Internal,
        };
        match io_error.kind() {
            io::ErrorKind::StorageFull | io::ErrorKind::QuotaExceeded => Code::ResourceExhausted,
            _ => Code::Internal,
        }
    }
}

impl From<StoreError> for Error {
    fn from(error: StoreError) -> Self {
        Error::new(error.code(), error.to_string())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_error_of_a_full_disk_has_the_code_resource_exhausted() {
        let failed = |errno| {
            let error = redb::Error::Io(io::Error::from_raw_os_error(errno));
            Error::from(StoreError::Write(Arc::new(error)))
        };
        const ENOSPC: i32 = 28;
        const EIO: i32 = 5;
        assert_eq!(failed(ENOSPC).code(), Code::ResourceExhausted);
        assert_eq!(failed(EIO).code(), Code::Internal);
        assert_eq!(
            failed(EIO).sentence(),
            "write to the metadata store: I/O error (EIO)"
        );
    }
}
