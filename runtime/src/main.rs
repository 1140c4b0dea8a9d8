//! rrun, an OCI runtime: it creates, starts, joins and deletes containers as the specification
//! at <https://github.com/opencontainers/runtime-spec> describes them, with runc's command line.
//!
//! The modules in the order in which a command meets them: [`commands`] reads the command line
//! and [`config`] the configuration, [`lifecycle::create`] makes cgroup and process,
//! [`lifecycle::init`] is what that process does until it executes its program,
//! [`lifecycle::start_socket`] is where it waits for `start`, and [`lifecycle::exec`] adds
//! further processes.
//!
//! The program has no start-up code of Rust's: that reads /proc/self/maps and allocates a signal
//! stack to report a stack overflow, in a program that runs for milliseconds.
#![cfg_attr(not(test), no_main)]

mod arguments;
mod cgroup;
mod commands;
mod config;
mod error;
mod lifecycle;
mod log;
mod mounts;
mod namespaces;
mod process;
mod seccomp;
mod sys;

use std::ffi::{c_char, c_int};

/// What the C library calls.
#[cfg_attr(not(test), unsafe(no_mangle))]
extern "C" fn main(count: c_int, words: *const *const c_char) -> c_int {
    // SAFETY: these are the arguments of main, which the C library vouches for.
    let words = unsafe { commands::words(count, words) };
    c_int::from(commands::main(words))
}
