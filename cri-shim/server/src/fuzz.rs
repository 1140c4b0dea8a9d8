//! Fuzz targets for the messages of the CRI and for files of images. `tests/fuzz` runs them.

/// The name and the function of a fuzz target.
pub type Target = (&'static str, fn(&[u8]));

/// The fuzz targets in this crate.
pub const TARGETS: &[Target] = &[];
