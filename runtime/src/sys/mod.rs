//! The kernel's calls and file formats. Nothing here knows what a container is.

pub(crate) mod child;
pub(crate) mod clone;
pub(crate) mod errno;
pub(crate) mod files;
pub(crate) mod mount_setattr;
pub(crate) mod number_list;
pub(crate) mod path;
pub(crate) mod procfs;
pub(crate) mod regular_file;
pub(crate) mod signals;
pub(crate) mod syscalls;
pub(crate) mod time;
pub(crate) mod unix_socket;
