//! clone3(2): a fork into new namespaces and into a cgroup.

use std::io;
use std::os::fd::{AsRawFd, BorrowedFd, FromRawFd, OwnedFd};

use rustix::io::Errno;

/// linux/sched.h; the constant in libc has a type that cannot hold it.
const CLONE_INTO_CGROUP: u64 = 0x2_0000_0000;

/// `struct clone_args` of clone3(2), as of Linux 5.7 (`cgroup` is its last field).
#[repr(C, align(8))]
#[derive(Default)]
struct CloneArgs {
    flags: u64,
    pidfd: u64,
    child_tid: u64,
    parent_tid: u64,
    exit_signal: u64,
    stack: u64,
    stack_size: u64,
    tls: u64,
    set_tid: u64,
    set_tid_size: u64,
    cgroup: u64,
}

/// Which of the two processes returned from [`clone3`].
pub enum Cloned {
    /// The new process.
    Child,
    /// The calling process. `pid` is the new process's id in the caller's PID namespace.
    Parent { pid: i32, pidfd: OwnedFd },
}

/// A fork in one system call with new namespaces (`CLONE_NEW*` in `flags`), into `cgroup` if one is
/// given.
///
/// With `CLONE_PARENT` among the flags, the new process is its caller's sibling instead.
///
/// # Errors
/// EINVAL also for flags by which the new process would share the caller's memory.
///
/// # Safety
/// If the caller has several threads, the new process may only make calls that are safe in a signal
/// handler, signal-safety(7): a lock that another thread held stays locked in the copy for ever.
pub unsafe fn clone3(flags: u64, cgroup: Option<BorrowedFd<'_>>) -> Result<Cloned, Errno> {
    const SHARING: u64 = (libc::CLONE_VM | libc::CLONE_THREAD | libc::CLONE_SIGHAND) as u64;
    if flags & SHARING != 0 {
        return Err(Errno::INVAL);
    }
    let is_sibling = flags & libc::CLONE_PARENT as u64 != 0;
    let mut pidfd: libc::c_int = -1;
    let mut args = CloneArgs {
        flags: flags | libc::CLONE_PIDFD as u64,
        pidfd: &raw mut pidfd as u64,
        // With CLONE_PARENT the exit signal is the caller's own, and clone3(2) wants 0 here.
        exit_signal: if is_sibling { 0 } else { libc::SIGCHLD as u64 },
        ..CloneArgs::default()
    };
    if let Some(fd) = cgroup {
        args.flags |= CLONE_INTO_CGROUP;
        args.cgroup = fd.as_raw_fd() as u64;
    }
    // SAFETY: args is a valid clone_args of the length given and outlives the call. The new process
    // shares no memory. What it may do is the caller's promise.
    let pid = unsafe {
        libc::syscall(
            libc::SYS_clone3,
            &raw mut args,
            std::mem::size_of::<CloneArgs>(),
        )
    };
    match pid {
        0 => Ok(Cloned::Child),
        1.. => Ok(Cloned::Parent {
            pid: pid as i32,
            // SAFETY: on success the kernel has stored a new descriptor that nobody else owns.
            pidfd: unsafe { OwnedFd::from_raw_fd(pidfd) },
        }),
        _ => Err(Errno::from_io_error(&io::Error::last_os_error()).unwrap_or(Errno::IO)),
    }
}
