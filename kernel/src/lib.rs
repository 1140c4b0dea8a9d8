//! What the runtime, the monitor and the CRI server ask of Linux. Synchronous and small: the
//! runtime lives for milliseconds, and a monitor's memory is counted in kilobytes.

pub mod capability;
pub mod cgroup;
pub mod clone3;
pub mod date;
pub mod descriptor_limit;
pub mod errno;
pub mod heap;
pub mod mount_setattr;
pub mod procfs;
pub mod readonly_exec;
pub mod regular_file;
pub mod signal;
pub mod unix_socket;
