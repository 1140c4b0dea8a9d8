//! Fuzz targets for what a container and a server send to a monitor. `tests/fuzz` runs them.

/// The name and the function of a fuzz target.
pub type Target = (&'static str, fn(&[u8]));

/// The fuzz targets in this crate.
pub const TARGETS: &[Target] = &[];
