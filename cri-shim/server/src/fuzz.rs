//! Fuzz targets for the messages of the CRI and for files of images. `tests/fuzz` runs them.

/// The names and functions of the fuzz targets in this crate.
pub const TARGETS: &[(&str, fn(&[u8]))] = &[];
