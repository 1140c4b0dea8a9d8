//! The `rrun-monitor` process, which exists once for each pod and is the parent of the pod's
//! containers.
//!
//! The crate `rrun-protocol` defines the whole interface between the monitor and the CRI server.
//! The module `startup` prepares the process and then calls `serve`. `serve` is the event loop, and
//! waits for epoll events with `poller`. `serve` uses all other modules. Only `startup` uses
//! `serve`.
//!
//! The event loop stores the `clients` with their `connection`s, the runtime `calls`, the `execs`
//! and the containers.
//!
//! The life cycle of a `container` is implemented in `create`, `create_rollback`, `control` (start,
//! kill, update, delete), `attach` and `termination`. Each of these modules changes the container's
//! state and returns `effect`s. `serve` carries out the `effect`s. The module `output` passes a
//! container's output to the `container_log` and to `follower`s. The module `oom` decides which
//! out-of-memory kills are reported.
//!
//! The modules above call the kernel and the runtime through `runtime`, `readonly_exec`,
//! `log_file`, `console`, `exec_cgroup`, `descendants`, `exit`, `pause` and `pause_filter`.

mod attach;
mod calls;
mod clients;
mod coalescing;
mod connection;
mod console;
mod container;
mod container_log;
mod control;
mod create;
mod create_rollback;
mod descendants;
mod descriptors;
mod early_exits;
mod effect;
mod exec;
mod exec_cgroup;
mod exit;
mod failure_reason;
mod follower;
#[cfg(feature = "fuzz")]
pub mod fuzz;
mod joined;
mod killed_execs;
mod leftovers;
mod log_file;
mod oom;
mod output;
mod own_log;
mod pause;
mod pause_filter;
mod poller;
mod readonly_exec;
mod relay;
mod runtime;
mod serials;
mod serve;
mod startup;
mod termination;
mod timestamp;

use std::process::ExitCode;

/// Runs the whole program with the arguments of the command line.
pub fn main() -> ExitCode {
    match startup::run(std::env::args().skip(1)) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("rrun-monitor: {error}");
            ExitCode::FAILURE
        }
    }
}
