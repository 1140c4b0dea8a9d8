//! One `rrun-monitor` process per pod: the parent of its containers.
//!
//! `protocol` is the whole contract between it and the CRI server; `wire` puts it on a socket.

pub mod protocol;
pub mod wire;
