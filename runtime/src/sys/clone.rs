//! clone3(2): a fork into new namespaces and into a cgroup.

use std::os::fd::{AsRawFd, BorrowedFd, FromRawFd, OwnedFd};

use rustix::io::Errno;

use crate::sys::syscalls::check;

/// linux/sched.h; the constant in libc has a type that can not hold it.
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
pub(crate) enum Cloned {
    /// In the new process.
    Child,
    /// In the old one; `pid` is the new process's id in the caller's PID namespace.
    Parent { pid: i32, pidfd: OwnedFd },
}

/// A fork in one system call with new namespaces (`CLONE_NEW*` in `flags`), inside
/// `cgroup` if one is given. See clone3(2).
///
/// With `CLONE_PARENT` among the flags, the new process is its caller's sibling instead.
///
/// The caller must be single-threaded; then the child is an ordinary copy of it, in which
/// any code may run. `CLONE_VM` and its like must not be among the flags.
pub(crate) fn clone3(flags: u64, cgroup: Option<BorrowedFd<'_>>) -> Result<Cloned, Errno> {
    const SHARING: u64 = (libc::CLONE_VM | libc::CLONE_THREAD | libc::CLONE_SIGHAND) as u64;
    if flags & SHARING != 0 {
        return Err(Errno::INVAL);
    }
    let beside = flags & libc::CLONE_PARENT as u64 != 0;
    let mut pidfd: libc::c_int = -1;
    let mut args = CloneArgs {
        flags: flags | libc::CLONE_PIDFD as u64,
        pidfd: &raw mut pidfd as u64,
        // A sibling's end is told as its maker's end will be.
        exit_signal: if beside { 0 } else { libc::SIGCHLD as u64 },
        ..CloneArgs::default()
    };
    if let Some(fd) = cgroup {
        args.flags |= CLONE_INTO_CGROUP;
        args.cgroup = fd.as_raw_fd() as u64;
    }
    // SAFETY: args is a valid clone_args of the length given and outlives the call. No memory
    // is shared with the child, and this program never starts a thread, so that the copy
    // is in a consistent state (no lock is held by a thread that the child lacks).
    let pid = check(unsafe {
        libc::syscall(
            libc::SYS_clone3,
            &raw mut args,
            std::mem::size_of::<CloneArgs>(),
        )
    })?;
    if pid == 0 {
        return Ok(Cloned::Child);
    }
    // SAFETY: on success the kernel has stored a new descriptor that nobody else owns.
    let pidfd = unsafe { OwnedFd::from_raw_fd(pidfd) };
    Ok(Cloned::Parent {
        pid: pid as i32,
        pidfd,
    })
}
