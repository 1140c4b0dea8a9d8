//! SPDY/3.1, as much of it as a server for Kubernetes' streams needs: the clients open streams
//! with headers, both sides send data and close their half.
//!
//! No I/O: [`frame`] takes frames out of bytes and makes bytes of them, [`headers`] is the
//! compression of their header blocks, [`session`] the streams and their windows, [`limits`] what
//! bounds them all. Source: the SPDY protocol, draft 3.1.

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
