//! What a client may make us hold: everything that comes in is hostile, and everything is bounded.

/// The most bytes of a control frame after its first eight.
pub const MAX_CONTROL_BYTES: usize = 16 << 10;

/// Data frames are passed on in pieces of at most this, as they come: a frame may be 16 MiB long.
pub(super) const MAX_PIECE_BYTES: usize = 64 << 10;

/// The most bytes of one header block, decompressed.
pub(super) const MAX_HEADER_BLOCK_BYTES: usize = 16 << 10;

/// The most headers in one block.
pub(super) const MAX_HEADERS: usize = 64;

/// The most streams that are open at once; more are refused.
pub(super) const MAX_STREAMS: usize = 1024;
