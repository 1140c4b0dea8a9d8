//! Descriptors that a process inherited and must not keep.

/// Closes every descriptor from this one on. Only for a process that owns none of them.
pub(crate) fn close_from(first: u32) {
    // SAFETY: close_range(2) takes no pointers; the caller owns none of the descriptors.
    unsafe { libc::syscall(libc::SYS_close_range, first, u32::MAX, 0u32) };
}
