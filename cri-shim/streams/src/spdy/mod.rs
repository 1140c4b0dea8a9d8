//! The part of SPDY/3.1 that a server for Kubernetes' streams needs. The clients open streams with
//! headers, and both sides send data and close their halves of the streams.
//!
//! The SPDY modules do no I/O. [`frame`] parses and serializes frames, and [`headers`] decompresses
//! the header blocks in frames. [`session`] tracks the open streams and their flow control windows.
//! [`limits`] contains the limits on the memory that a client can use. Source: the SPDY protocol,
//! draft 3.1.

#[cfg(test)]
mod compressor;
mod dictionary;
mod error;
pub(crate) mod frame;
mod headers;
mod limits;
mod session;

pub use error::SpdyError;
pub use frame::{Decoder, Frame};
pub use headers::Headers;
pub use limits::MAX_CONTROL_BYTES;
pub use session::{Allowance, Event, Session};
