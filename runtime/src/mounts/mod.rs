//! The mounts of a container, made and moved by file descriptor.
//!
//! A mount is first made detached, complete with all its attributes (fsopen, open_tree,
//! mount_setattr), and only then moved to a place that openat2 found (move_mount). At no
//! moment is it visible with less protection than was asked for.

mod attach;
mod attributes;
pub(crate) mod devices;
mod entry;
mod file_system;
mod host_mounts;
pub(crate) mod options;
pub(crate) mod protection;
pub(crate) mod readonly_exec;
mod remount;
pub(crate) mod rootfs;
mod tmpcopyup;
pub(crate) mod tree;

pub(crate) use entry::{Mount, OwnCgroup};
pub(crate) use host_mounts::{HostMounts, MountSources};
