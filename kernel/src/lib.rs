//! What the OCI runtime and the CRI server both ask of Linux. Synchronous and small: the runtime
//! lives for milliseconds, and a monitor's memory is counted in kilobytes.

pub mod capability;
pub mod descriptor_limit;
pub mod errno;
pub mod heap;
pub mod mount_setattr;
pub mod regular_file;
pub mod signal;
