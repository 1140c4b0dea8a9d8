//! The program. What it does begins in `rrun::commands`.
//!
//! Without Rust's own start-up: that reads /proc/self/maps and makes a signal stack to tell
//! of a stack overflow, in a program whose whole life is measured in milliseconds.
#![no_main]

use std::ffi::{c_char, c_int};

/// What the C library calls.
#[unsafe(no_mangle)]
extern "C" fn main(count: c_int, words: *const *const c_char) -> c_int {
    // SAFETY: these are the arguments of main, which the C library vouches for.
    let words = unsafe { rrun::commands::words(count, words) };
    c_int::from(rrun::commands::main(words))
}
