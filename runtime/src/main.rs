//! The program `rrun`. The crate's library contains the code.
//!
//! The crate is `no_main`, so the program does not run the start-up code of Rust's standard
//! library. To be able to report a stack overflow, the start-up code reads /proc/self/maps and
//! allocates a signal stack. Both steps take too long in a program that runs for only a few
//! milliseconds.
#![no_main]

use std::ffi::{c_char, c_int};

/// The entry point, which the C library calls.
#[unsafe(no_mangle)]
extern "C" fn main(count: c_int, words: *const *const c_char) -> c_int {
    // SAFETY: the C library calls `main` with a valid argument count and a valid argument vector,
    // whose strings the program is allowed to change.
    let words = unsafe { rrun::words(count, words) };
    c_int::from(rrun::main(words))
}
