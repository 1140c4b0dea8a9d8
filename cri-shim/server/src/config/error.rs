//! Errors in a configuration.

use std::path::PathBuf;

#[derive(Debug, thiserror::Error, PartialEq, Eq)]
pub(crate) enum ConfigError {
    #[error("read the configuration {file}: {reason}")]
    Read { file: PathBuf, reason: String },
    /// A mistake in a line of a configuration file.
    #[error("{file}, line {line}, {key}: {reason}")]
    Parse {
        file: PathBuf,
        line: usize,
        key: String,
        reason: String,
    },
    /// An invalid value in a file or on the command line. `key` is a full name such as
    /// `network.range`.
    #[error("{key}: {reason}")]
    Value { key: &'static str, reason: String },
}
