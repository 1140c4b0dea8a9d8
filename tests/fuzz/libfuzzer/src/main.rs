//! Runs the fuzz target that the environment variable RRUN_FUZZ_TARGET names, with libFuzzer.
#![no_main]

use std::sync::OnceLock;

use libfuzzer_sys::fuzz_target;
use rrun_fuzz::Target;

static TARGET: OnceLock<Target> = OnceLock::new();

fuzz_target!(
    init: {
        let name = std::env::var("RRUN_FUZZ_TARGET").unwrap_or_default();
        let target = rrun_fuzz::target(&name);
        let target = target.unwrap_or_else(|| panic!("there is no fuzz target {name:?}"));
        let _ = TARGET.set(target);
    },
    |input: &[u8]| {
        if let Some(target) = TARGET.get() {
            (target.function)(input);
        }
    }
);
