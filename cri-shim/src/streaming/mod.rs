//! Exec's pipes.
