//! The protection of this process's session keyring from its children.

use std::io;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use rustix::process::getegid;
use rustix::thread::{Gid, set_thread_res_gid};

/// The size of the stack of a thread that only sleeps, in bytes.
const STACK_BYTES: usize = 64 << 10;

/// Makes sure that no child replaces the session keyring of this process
/// (`KEYCTL_SESSION_TO_PARENT` of keyctl(2)). A container's process could otherwise give its own
/// keys to the hooks and to other later children of this process.
///
/// The kernel refuses the replacement if the parent's saved group id is not its group id, or if the
/// parent has several threads. Changing the saved group id is cheaper, but requires CAP_SETGID and
/// another valid group id. execve(2) sets the saved group id to the group id again. Without
/// CAP_SETGID, this function starts a thread that sleeps until this process exits. When this
/// function returns, the thread does not own a lock and never allocates memory again.
///
/// Call this function before this process creates the child, and [`end_protection`] in a child that
/// does not immediately call execve(2).
pub fn protect() -> io::Result<()> {
    let other = if getegid().is_root() { 1 } else { 0 };
    set_saved_group(Gid::from_raw(other)).or_else(|_| protect_by_thread())
}

/// Sets the saved group id of a child to its group id. Otherwise the kernel could refuse its parent
/// some operations on the child, such as prlimit(2).
///
/// This function does nothing if the child is in a new user namespace without id mappings. The
/// parent owns this namespace, so the kernel refuses it none of these operations.
pub fn end_protection() {
    let _ = set_saved_group(getegid());
}

fn set_saved_group(group: Gid) -> io::Result<()> {
    let unchanged = Gid::from_raw_unchecked(u32::MAX);
    Ok(set_thread_res_gid(unchanged, unchanged, group)?)
}

/// Makes sure, like [`protect`], that no child replaces the session keyring of this process. This
/// function always starts a thread. After [`protect`], other processes without CAP_SYS_PTRACE and
/// CAP_SYS_RESOURCE could not open the descriptors of this process in /proc or change its limits.
pub fn protect_by_thread() -> io::Result<()> {
    let sleeps = Arc::new(AtomicBool::new(false));
    let started = Arc::clone(&sleeps);
    let sleep = move || {
        started.store(true, Ordering::Release);
        loop {
            std::thread::park();
        }
    };
    std::thread::Builder::new()
        .stack_size(STACK_BYTES)
        .spawn(sleep)?;
    while !sleeps.load(Ordering::Acquire) {
        std::thread::yield_now();
    }
    Ok(())
}
