//! Fuzz targets for what a bundle contains. `tests/fuzz` runs them.

/// The names and functions of the fuzz targets in this crate.
pub const TARGETS: &[(&str, fn(&[u8]))] = &[];
