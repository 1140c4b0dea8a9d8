//! rrun, an OCI runtime. rrun creates, starts, enters and deletes containers as the runtime
//! specification at <https://github.com/opencontainers/runtime-spec> describes, and has runc's
//! command line.
//!
//! The following modules create a container, in this order. [`commands`] reads the command line,
//! and [`config`] reads the configuration. [`lifecycle::create`] creates the cgroup and the
//! container's first process. [`lifecycle::init`] is the code that the first process runs until it
//! executes its program. [`lifecycle::start_socket`] is the socket at which the first process waits
//! for `start`. [`lifecycle::exec`] adds further processes to a running container.

mod arguments;
mod cgroup;
mod commands;
mod config;
mod error;
#[cfg(feature = "fuzz")]
pub mod fuzz;
mod lifecycle;
mod log;
mod mounts;
mod namespaces;
mod process;
mod seccomp;
mod sys;

pub use commands::{main, words};
