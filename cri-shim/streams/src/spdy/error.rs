//! What a client can do wrong.

use super::limits::{MAX_CONTROL_BYTES, MAX_HEADER_BLOCK_BYTES};

/// Why a session ends: after such an error nothing that the client sends can be interpreted.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum SpdyError {
    #[error("a frame of SPDY version {0}, not 3")]
    Version(u16),
    #[error("a control frame of {0} bytes, more than the {max} allowed", max = MAX_CONTROL_BYTES)]
    TooLong(usize),
    #[error("a frame of type {0} with the wrong length")]
    Length(u16),
    #[error("a header block that can't be decompressed")]
    Compression,
    #[error("a header block with more than the {max} bytes allowed", max = MAX_HEADER_BLOCK_BYTES)]
    HeadersTooLong,
    #[error("a header block that contradicts itself")]
    Headers,
    #[error("headers when no more streams are expected")]
    HeadersTooLate,
    #[error("stream {0}, which is not the client's to open now")]
    StreamId(u32),
    #[error("a window beyond 2 GiB")]
    Window,
    #[error("more control frames than the client reads answers to")]
    Flood,
}
