//! clone3(2): a fork that places the child in new namespaces and in a cgroup.

use std::os::fd::{AsRawFd, BorrowedFd, FromRawFd, OwnedFd};

use crate::errno;
use rustix::io::Errno;

use crate::namespace_limits::fork_beyond_limit;

/// The flag `CLONE_INTO_CGROUP` from linux/sched.h. The libc crate declares this flag with a type
/// that is too small for the flag's value.
const CLONE_INTO_CGROUP: u64 = 0x2_0000_0000;

/// The `struct clone_args` of clone3(2) as of Linux 5.7, which ends with the field `cgroup`.
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

/// The result of [`clone3`]. It distinguishes the new process from the calling process.
pub enum Cloned {
    /// [`clone3`] has returned in the new process.
    Child,
    /// [`clone3`] has returned in the calling process. `pid` is the new process's id in the
    /// caller's PID namespace.
    Parent { pid: i32, pidfd: OwnedFd },
}

/// Forks with a single system call, which also places the new process in namespaces and in a
/// cgroup. For each `CLONE_NEW*` flag in `flags`, the new process is in a new namespace. If
/// `cgroup` is not `None`, the new process is in `cgroup`. With `CLONE_PARENT` in `flags`, the new
/// process is a sibling of the caller instead of its child.
///
/// If the flags contain CLONE_NEWUSER, the new process may have a random effective user id until it
/// becomes root of its user namespace (see [`crate::namespace_limits`]).
///
/// # Errors
/// Returns the errno of clone3(2). Flags that would share the caller's memory with the new process
/// are refused with EINVAL.
///
/// # Safety
/// If the calling process has several threads, the new process must call only async-signal-safe
/// functions, see signal-safety(7). Another thread may hold a lock at the time of the fork. In the
/// new process, this lock is never released. If the new process waited for the lock, it would wait
/// for ever.
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
        // With CLONE_PARENT, the new process inherits the caller's exit signal, and clone3(2)
        // requires that `exit_signal` is 0.
        exit_signal: if is_sibling { 0 } else { libc::SIGCHLD as u64 },
        ..CloneArgs::default()
    };
    if let Some(fd) = cgroup {
        args.flags |= CLONE_INTO_CGROUP;
        args.cgroup = fd.as_raw_fd() as u64;
    }
    // SAFETY: `args` is valid and shares no memory. The caller guarantees that the new process calls
    // only async-signal-safe functions, and fork_beyond_limit calls no other functions in it.
    let forked = fork_beyond_limit(flags, || unsafe { fork(&mut args) })?;
    match forked {
        0 => Ok(Cloned::Child),
        pid => Ok(Cloned::Parent {
            pid,
            // SAFETY: on success the kernel has stored a new descriptor in `pidfd`, and this
            // descriptor has no other owner.
            pidfd: unsafe { OwnedFd::from_raw_fd(pidfd) },
        }),
    }
}

/// Calls clone3(2). Returns 0 in the new process, and the new process's id in the calling process.
///
/// # Safety
/// The pointers in `args` must be valid, `args.flags` must share no memory, and the new process
/// must call only async-signal-safe functions.
unsafe fn fork(args: &mut CloneArgs) -> Result<i32, Errno> {
    let (args, size) = (&raw mut *args, std::mem::size_of::<CloneArgs>());
    // SAFETY: `args` is a valid clone_args of the given length and outlives the call.
    match unsafe { libc::syscall(libc::SYS_clone3, args, size) } {
        pid @ 0.. => Ok(pid as i32),
        _ => Err(errno::last()),
    }
}
