//! A container's life.
