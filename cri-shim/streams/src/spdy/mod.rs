//! SPDY/3.1, as much of it as a server for Kubernetes' streams needs: the clients open streams
//! with headers, both sides send data and close their half.
//!
//! No I/O: [`frame`] takes frames out of bytes and makes bytes of them, [`headers`] is the
//! compression of their header blocks, [`session`] the streams and their windows. All that comes
//! in is hostile, and everything is bounded. Source: the SPDY protocol, draft 3.1.

mod dictionary;
pub mod frame;
pub mod headers;
pub mod session;

pub use frame::{Decoder, Frame};
pub use headers::Headers;
pub use session::{Event, Session};

/// What ends a session: after it nothing that comes can be made sense of.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum SpdyError {
    #[error("a frame of SPDY version {0}, not 3")]
    Version(u16),
    #[error("a control frame of {0} bytes, more than the {max} allowed", max = frame::MAX_CONTROL)]
    TooLong(usize),
    #[error("a frame of type {0} with the wrong length")]
    Length(u16),
    #[error("a header block that can't be decompressed")]
    Compression,
    #[error("a header block with more than the {max} bytes allowed", max = headers::MAX_BLOCK)]
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
