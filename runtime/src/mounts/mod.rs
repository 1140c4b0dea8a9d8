//! The mounts of a container, which rrun creates and moves by file descriptor.
//!
//! rrun first creates a detached mount with all its attributes (fsopen, open_tree, mount_setattr).
//! rrun then attaches the mount (move_mount) to a path that it looked up with openat2. So the mount
//! is never visible with less protection than requested.

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

pub(crate) use entry::{Isolation, Mount};
pub(crate) use host_mounts::{HostMounts, MountSources, attach_for_first_process};
