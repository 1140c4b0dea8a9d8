//! Closes the descriptors that a process has inherited.

/// Closes all descriptors whose number is at least `first`. No `OwnedFd` of the process may own any
/// of these descriptors.
pub(crate) fn close_from(first: u32) {
    // SAFETY: close_range(2) has no pointer arguments, and the caller guarantees that no `OwnedFd`
    // owns any of the descriptors.
    unsafe { libc::syscall(libc::SYS_close_range, first, u32::MAX, 0u32) };
}
