//! A pod's life.
