//! One `rrun-monitor` process per pod: the parent of its containers.
//!
//! `protocol` is the whole contract between it and the CRI server; `wire` puts it on a socket.
//! The process itself begins in `startup` and then stays in `serve`, a loop around one epoll
//! set. What it does for a container is in `container`, `undoing`, `ending`, `exec` and `attach`;
//! what it needs from the kernel and the runtime in `runtime`, `logs`, `log_file`, `console`, `cgroup` and `exit`.

pub mod attach;
mod cgroup;
mod connection;
mod console;
mod container;
mod descendants;
mod ending;
mod errno;
mod exec;
mod exec_cgroup;
mod exit;
mod journal;
mod log_file;
mod logs;
mod pod_init;
pub mod protocol;
mod runtime;
mod sealed;
mod serve;
mod startup;
mod undoing;
pub mod wire;

pub use startup::run;
