//! Fuzz targets for answers of the kernel and of CNI plugins. `tests/fuzz` runs them.

/// The names and functions of the fuzz targets in this crate.
pub const TARGETS: &[(&str, fn(&[u8]))] = &[];
