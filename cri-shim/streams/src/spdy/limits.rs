//! The limits on the server's memory that a client can use. Any client can be hostile, so the
//! server limits every resource that a client can use.

/// The maximum size in bytes of a control frame without its header of eight bytes.
pub const MAX_CONTROL_BYTES: usize = 16 << 10;

/// The maximum size in bytes of a piece of a data frame. A data frame can be 16 MiB long, so the
/// decoder returns the frame's data in pieces as they arrive.
pub(super) const MAX_PIECE_BYTES: usize = 64 << 10;

/// The maximum size in bytes of one decompressed header block.
pub(super) const MAX_HEADER_BLOCK_BYTES: usize = 16 << 10;

/// The maximum number of headers in one header block.
pub(super) const MAX_HEADERS: usize = 64;

/// The maximum number of simultaneously open streams. The server refuses further streams.
pub(super) const MAX_STREAMS: usize = 1024;
