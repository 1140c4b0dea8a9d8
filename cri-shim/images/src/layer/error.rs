//! The errors of unpacking a layer.

use std::io;

use rustix::io::Errno;

#[derive(Debug, thiserror::Error)]
pub enum LayerError {
    /// The stream of the layer's bytes broke off, or can't be decompressed.
    #[error("{0}")]
    Stream(io::Error),
    /// The archive is invalid, or an entry would be written outside the layer.
    #[error("{0}")]
    Malformed(String),
    /// The received data does not match the size or the digest in the manifest or configuration.
    #[error("{0}")]
    Digest(String),
    #[error("{0}")]
    Bound(String),
    #[error("{what}: {}", explain(.errno))]
    System { what: String, errno: Errno },
}

fn explain(errno: &Errno) -> String {
    io::Error::from(*errno).to_string()
}

impl LayerError {
    pub(super) fn malformed(path: &[u8], why: &str) -> Self {
        LayerError::Malformed(format!("the entry {}: {why}", printable(path)))
    }

    /// Returns the error of a layer that exceeds the setting `image.layer_bytes`.
    pub(super) fn too_large(limit: u64) -> Self {
        LayerError::Bound(format!(
            "the layer unpacks to more than the limit of {limit} bytes (image.layer_bytes)"
        ))
    }

    pub(super) fn system(what: &str, path: &[u8], errno: Errno) -> Self {
        LayerError::System {
            what: format!("{what} {}", printable(path)),
            errno,
        }
    }
}

/// Formats an untrusted file name for a message. The result is shortened and contains no control
/// characters.
pub(super) fn printable(path: &[u8]) -> String {
    // 200 characters have at most 800 bytes.
    let mut text: String = String::from_utf8_lossy(&path[..path.len().min(800)])
        .chars()
        .take(200)
        .map(|c| if c.is_control() { '?' } else { c })
        .collect();
    if text.is_empty() {
        text.push('/');
    }
    text
}

impl From<ArchiveError> for LayerError {
    fn from(error: ArchiveError) -> Self {
        match error {
            ArchiveError::Stream(error) => LayerError::Stream(error),
            ArchiveError::Malformed(what) => LayerError::Malformed(what),
        }
    }
}

impl From<io::Error> for LayerError {
    fn from(error: io::Error) -> Self {
        LayerError::Stream(error)
    }
}

/// An error in a tar archive.
#[derive(Debug, thiserror::Error)]
pub(crate) enum ArchiveError {
    #[error(transparent)]
    Stream(#[from] io::Error),
    #[error("{0}")]
    Malformed(String),
}

pub(super) fn malformed<T>(what: impl Into<String>) -> Result<T, ArchiveError> {
    Err(ArchiveError::Malformed(what.into()))
}
