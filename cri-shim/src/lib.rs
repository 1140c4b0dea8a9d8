//! The CRI server `rrun-cri` and the monitor `rrun-monitor` that it starts for each pod.
//!
//! ARCHITECTURE.md tells which room holds what. Nothing here depends on the OCI runtime's
//! crate: runtimes are run by their command line.

pub mod monitor;
pub mod store;
