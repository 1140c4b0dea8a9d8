//! One `rrun-monitor` process per pod: the parent of its containers.
//!
//! The crate `rrun-protocol` is the whole contract between it and the CRI server. The process
//! begins in `startup` and then stays in `serve`, a loop around epoll (`poller`) that knows
//! everything else and that nothing else knows.
//!
//! * What the loop keeps: `clients` with their `connection`s, runtime `calls`, `execs`, containers.
//! * A `container`'s life: `create`, `create_rollback`, `control` (start, kill, update, delete),
//!   `attach`, `termination`. These change its state and return `effect`s, which `serve` carries
//!   out. Its `output` goes to the `container_log` and to `follower`s; `oom` is what is reported of
//!   out-of-memory kills.
//! * What they need of the kernel and the runtime: `runtime`, `readonly_exec`, `log_file`,
//!   `console`, `exec_cgroup`, `descendants`, `exit`, `pause`.

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
mod log_file;
mod oom;
mod output;
mod own_log;
mod pause;
mod poller;
mod readonly_exec;
mod runtime;
mod serials;
mod serve;
mod startup;
mod termination;
mod timestamp;

use std::process::ExitCode;

fn main() -> ExitCode {
    match startup::run(std::env::args().skip(1)) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("rrun-monitor: {error}");
            ExitCode::FAILURE
        }
    }
}
