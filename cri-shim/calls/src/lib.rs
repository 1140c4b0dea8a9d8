//! The crates of the CRI server share these: an [`error`] is a gRPC code and a sentence, a [`wait`]
//! of over ten seconds is logged, a [`lock`] ignores poisoning, and by [`singleflight`] a retry joins
//! the call in flight.

pub mod error;
pub mod lock;
pub mod singleflight;
pub mod wait;
