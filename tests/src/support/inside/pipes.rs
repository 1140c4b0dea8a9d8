//! A process that keeps the pipes of its standard streams locked.

use std::fs::File;
use std::os::fd::BorrowedFd;

use super::InsideError;
use crate::support::kernel_locks::PipeLock;

/// Runs `inside lock-pipes DESCRIPTOR…`, which locks the pipes of these standard streams until the
/// process is killed. Prints `locked` if the pipe of stdout is not one of them.
pub(super) fn lock(descriptors: &[&str]) -> Result<(), InsideError> {
    let mut locks = Vec::new();
    for descriptor in descriptors {
        // SAFETY: the standard streams of this process are never closed.
        let stream = unsafe { BorrowedFd::borrow_raw(descriptor.parse()?) };
        let pipe = File::from(stream.try_clone_to_owned()?);
        locks.push(PipeLock::new(&pipe)?);
    }
    if !descriptors.contains(&"1") {
        super::say("locked")?;
    }
    super::wait()
}
