//! Wrappers of the kernel's system calls, and parsers of the kernel's file formats. This module
//! contains no code that is specific to containers.

pub(crate) mod child;
pub(crate) mod clone;
pub(crate) mod command_line;
pub(crate) mod device_number;
pub(crate) mod dumpable;
pub(crate) mod files;
pub(crate) mod number_list;
pub(crate) mod path;
pub(crate) mod procfs;
pub(crate) mod syscalls;
pub(crate) mod time;
pub(crate) mod unix_socket;
