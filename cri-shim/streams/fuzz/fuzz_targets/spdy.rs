//! The fuzz target for a client's data on a SPDY connection. See ../README.md.
#![no_main]

use libfuzzer_sys::fuzz_target;

#[allow(dead_code, unused_imports)]
#[path = "../../src/spdy/mod.rs"]
mod spdy;

include!("../exercise.rs");

fuzz_target!(|input: &[u8]| exercise(input));
