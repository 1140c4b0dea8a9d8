//! The kernel's calls and file formats. Nothing here knows what a container is.

pub mod number_list;
pub mod procfs;
pub mod regular_file;
pub mod signals;
pub mod syscalls;
pub mod time;
