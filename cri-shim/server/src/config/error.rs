//! What is wrong with a configuration.

use std::path::PathBuf;

#[derive(Debug, thiserror::Error, PartialEq, Eq)]
pub(crate) enum ConfigError {
    #[error("read the configuration {file}: {reason}")]
    Read { file: PathBuf, reason: String },
    /// A mistake that stands in a file.
    #[error("{file}, line {line}, {key}: {reason}")]
    Parse {
        file: PathBuf,
        line: usize,
        key: String,
        reason: String,
    },
    /// A value that can't be served, wherever it comes from; dots join the key to its tables.
    #[error("{key}: {reason}")]
    Value { key: &'static str, reason: String },
}
