//! Helpers that all crates of the CRI server share. [`error`] defines errors that consist of a gRPC
//! code and a sentence. [`wait`] logs every step that takes over ten seconds. [`lock`] locks a
//! mutex even if it is poisoned. [`singleflight`] lets the retry of a CRI request join the work
//! that the first request started. [`turns`] lets only one of several long tasks run at a time.

pub mod error;
pub mod lock;
pub mod singleflight;
pub mod turns;
pub mod wait;
