//! The kernel's calls and file formats. Nothing here knows what a container is.

pub(crate) mod child;
pub(crate) mod clone;
pub(crate) mod files;
pub(crate) mod number_list;
pub(crate) mod path;
pub(crate) mod procfs;
pub(crate) mod syscalls;
pub(crate) mod time;
pub(crate) mod unix_socket;
