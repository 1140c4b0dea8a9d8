//! The protocol errors that a client can cause.

use super::limits::{MAX_CONTROL_BYTES, MAX_HEADER_BLOCK_BYTES};

/// A protocol error, which ends the session. After such an error, the server cannot interpret any
/// further data from the client.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum SpdyError {
    #[error("the client sent a frame of SPDY version {0}, but only version 3 is supported")]
    Version(u16),
    #[error("the client sent a control frame of {0} bytes; at most {max} are allowed", max = MAX_CONTROL_BYTES)]
    TooLong(usize),
    #[error("the client sent a frame of type {0} with a wrong length")]
    Length(u16),
    #[error("the client sent a header block that can't be decompressed")]
    Compression,
    #[error("the client sent a header block of more than the allowed {max} bytes", max = MAX_HEADER_BLOCK_BYTES)]
    HeadersTooLong,
    #[error("the client sent a malformed header block")]
    Headers,
    #[error("the client sent headers after it had opened all streams")]
    HeadersTooLate,
    #[error(
        "the client opened stream {0}, whose number is even or not greater than the previous stream's"
    )]
    StreamId(u32),
    #[error("the client increased a flow control window beyond 2 GiB")]
    Window,
    #[error("the client sends control frames without reading the answers")]
    Flood,
}
