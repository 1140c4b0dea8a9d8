//! rrun, an OCI runtime. rrun creates, starts, enters and deletes containers as the runtime
//! specification at <https://github.com/opencontainers/runtime-spec> describes, and has runc's
//! command line.
//!
//! The following modules create a container, in this order. [`commands`] reads the command line,
//! and [`config`] reads the configuration. [`lifecycle::create`] creates the cgroup and the
//! container's first process. [`lifecycle::init`] is the code that the first process runs until it
//! executes its program. [`lifecycle::start_socket`] is the socket at which the first process waits
//! for `start`. [`lifecycle::exec`] adds further processes to a running container.
//!
//! The crate is `no_main`, so the program does not run the start-up code of Rust's standard
//! library. To be able to report a stack overflow, the start-up code reads /proc/self/maps and
//! allocates a signal stack. Both steps take too long in a program that runs for only a few
//! milliseconds.
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

/// The entry point, which the C library calls.
#[cfg_attr(not(test), unsafe(no_mangle))]
extern "C" fn main(count: c_int, words: *const *const c_char) -> c_int {
    // SAFETY: the C library calls `main` with a valid argument count and a valid argument vector.
    let words = unsafe { commands::words(count, words) };
    c_int::from(commands::main(words))
}
