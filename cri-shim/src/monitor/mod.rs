//! One `rrun-monitor` process per pod: the parent of its containers.
//!
//! `protocol` is the whole contract between it and the CRI server.

pub mod protocol;
