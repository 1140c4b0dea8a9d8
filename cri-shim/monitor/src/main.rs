//! One `rrun-monitor` process per pod: the parent of its containers.
//!
//! `protocol` is the whole contract between it and the CRI server; `wire` puts it on a socket.
//! The process itself begins in `startup` and then stays in `serve`, a loop around one epoll
//! set. What it does for a container is in `container`, `create_rollback`, `termination`, `exec` and `attach`;
//! what it needs from the kernel and the runtime in `runtime`, `container_log`, `log_file`, `console`, `cgroup` and `exit`.

mod attach;
mod calls;
mod cgroup;
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
