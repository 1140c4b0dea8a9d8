//! The mounts of a container, made and moved by file descriptor.
//!
//! A mount is first made detached, complete with all its attributes (fsopen, open_tree,
//! mount_setattr), and only then moved to a place that openat2 found (move_mount). At no
//! moment is it visible with less protection than was asked for.

mod attach;
mod attributes;
pub mod devices;
mod entry;
mod file_system;
mod host_mounts;
pub mod options;
pub mod protection;
pub mod readonly_exec;
mod remount;
pub mod rootfs;
mod tmpcopyup;
pub mod tree;

pub use entry::{Mount, OwnCgroup};
pub use host_mounts::{HostMounts, Sources};
