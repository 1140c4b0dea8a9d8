//! What every CRI call needs, whatever it is about: an [`error`] with a gRPC code and a sentence,
//! [`wait`]s that the log reports, [`lock`], and [`singleflight`], by which a retry joins the call
//! in flight.

pub mod error;
pub mod lock;
pub mod singleflight;
pub mod wait;
