//! The system call clone3(2), for a program whose other threads only sleep.

use std::os::fd::BorrowedFd;

use rustix::io::Errno;

use crate::sys::command_line;
pub(crate) use rrun_kernel::clone3::Cloned;

/// Calls [`rrun_kernel::clone3::clone3`]. The child is allowed to run any code, not only
/// async-signal-safe functions. The child does not show rrun's arguments in /proc.
pub(crate) fn clone3(flags: u64, cgroup: Option<BorrowedFd<'_>>) -> Result<Cloned, Errno> {
    let arguments = command_line::hide();
    // SAFETY: rrun starts no thread, except a thread that only sleeps
    // ([`rrun_kernel::session_keyring`]). So the child cannot inherit a lock that another thread of
    // the parent holds.
    let cloned = unsafe { rrun_kernel::clone3::clone3(flags, cgroup) };
    if !matches!(cloned, Ok(Cloned::Child)) {
        arguments.show();
    }
    cloned
}
