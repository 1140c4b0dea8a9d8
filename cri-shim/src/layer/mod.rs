//! Layers: from a stream to an overlay lower directory.
