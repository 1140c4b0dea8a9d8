//! Linux interfaces that the runtime, the monitor and the CRI server share. This crate is small and
//! has no async code. The runtime runs for only a few milliseconds. Every pod has a monitor, so a
//! monitor must use little memory.

pub mod capability;
pub mod cgroup;
pub mod clone3;
pub mod date;
pub mod descriptor_limit;
pub mod device_number;
pub mod directory_levels;
pub mod empty_tmpfs;
pub mod errno;
pub mod file_handle;
pub mod heap;
pub mod id;
pub mod in_root;
pub mod mount_setattr;
pub mod namespace_limits;
pub mod netlink;
pub mod own_cgroup;
pub mod process_stat;
pub mod procfs;
pub mod readonly_exec;
pub mod regular_file;
pub mod session_keyring;
pub mod signal;
pub mod sysctl;
pub mod unix_socket;
