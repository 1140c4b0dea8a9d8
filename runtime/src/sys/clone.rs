//! clone3(2), for a program that never starts a thread.

use std::os::fd::BorrowedFd;

use rustix::io::Errno;

pub(crate) use rrun_kernel::clone3::Cloned;

/// See [`rrun_kernel::clone3::clone3`]. Any code may run in the child.
pub(crate) fn clone3(flags: u64, cgroup: Option<BorrowedFd<'_>>) -> Result<Cloned, Errno> {
    // SAFETY: rrun never starts a thread, so that no lock is held that the copy lacks the holder of.
    unsafe { rrun_kernel::clone3::clone3(flags, cgroup) }
}
