//! The kernel's calls and file formats. Nothing here knows what a container is.

pub mod child;
pub mod clone;
pub mod errno;
pub mod files;
pub mod mount_setattr;
pub mod number_list;
pub mod path;
pub mod procfs;
pub mod regular_file;
pub mod signals;
pub mod syscalls;
pub mod time;
pub mod unix_socket;
