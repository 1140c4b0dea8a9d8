//! Functions for a child process that is a copy of rrun. With these functions, the child can end
//! itself. Its parent can kill the child, wait for its death and find the cause of its death.

use std::os::fd::{AsFd, OwnedFd};
use std::time::{Duration, Instant};

use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::io::Errno;
use rustix::process::{WaitId, WaitIdOptions, waitid};

use crate::error::Error;
use crate::sys::syscalls::pidfd_send_signal;

/// The time for which rrun waits for the death of a child that is dying.
const DEATH_TIMEOUT: Duration = Duration::from_secs(10);

/// Ends this child process without running the exit handlers or destructors that it inherited from
/// its parent.
pub(crate) fn exit_now() -> ! {
    // SAFETY: exit_group has only an integer argument, and runs no exit handlers.
    unsafe { libc::syscall(libc::SYS_exit_group, 1) };
    // A seccomp filter can refuse exit_group(2), and the C library's _exit would repeat that call
    // forever. So rrun calls abort(), which finally executes an invalid instruction.
    std::process::abort()
}

/// Ends this process with an invalid instruction. A seccomp filter can block or refuse every system
/// call, including exit_group(2), but not this instruction.
pub(crate) fn trap() -> ! {
    #[cfg(target_arch = "x86_64")]
    // SAFETY: the instruction raises SIGILL, whose default disposition ends the process.
    unsafe {
        std::arch::asm!("ud2", options(noreturn, nomem, nostack))
    }
    #[cfg(target_arch = "aarch64")]
    // SAFETY: as above.
    unsafe {
        std::arch::asm!("udf #0", options(noreturn, nomem, nostack))
    }
    #[cfg(not(any(target_arch = "x86_64", target_arch = "aarch64")))]
    exit_now()
}

/// A guard for a child process that is a copy of rrun. When the guard is dropped, on return or
/// during unwinding, it ends the child. So the child never continues with the parent's code.
pub(crate) struct NeverReturn;

impl Drop for NeverReturn {
    fn drop(&mut self) {
        exit_now()
    }
}

/// Kills a child and waits for its exit status, so that the child does not remain as a zombie. If
/// the kernel twice refuses to send the signal, this function returns without waiting, because the
/// child may never exit.
///
/// If the child already executes its program, rrun may be the tracer of one of its threads
/// (PTRACE_TRACEME). The kernel reports the child's exit only after rrun has reaped this thread. If
/// another process traces the child, rrun cannot reap the child, and gives up after
/// [`DEATH_TIMEOUT`].
pub(crate) fn kill_and_reap(pidfd: &OwnedFd) {
    const CHECK_INTERVAL: Duration = Duration::from_millis(10);
    let interval = Timespec {
        tv_sec: 0,
        tv_nsec: CHECK_INTERVAL.subsec_nanos().into(),
    };
    let kill = || pidfd_send_signal(pidfd.as_fd(), libc::SIGKILL);
    if kill().or_else(|_| kill()).is_err() {
        return;
    }
    let options = WaitIdOptions::EXITED | WaitIdOptions::NOHANG;
    let deadline = Instant::now() + DEATH_TIMEOUT;
    while Instant::now() < deadline {
        let mut watched = [PollFd::new(pidfd, PollFlags::IN)];
        let is_dead = poll(&mut watched, Some(&interval)).is_ok_and(|count| count > 0);
        if !matches!(waitid(WaitId::PidFd(pidfd.as_fd()), options), Ok(None)) {
            return;
        }
        while matches!(waitid(WaitId::All, options), Ok(Some(_))) {}
        if is_dead {
            std::thread::sleep(CHECK_INTERVAL);
        }
    }
}

/// Waits until a child has exited, and discards its exit status.
pub(crate) fn reap(pidfd: &OwnedFd) {
    while let Err(Errno::INTR) = waitid(WaitId::PidFd(pidfd.as_fd()), WaitIdOptions::EXITED) {}
}

/// Waits until a process is dead, after the process has closed its end of a channel to rrun. A
/// dying process closes its descriptors before its death. But [`explain_death`] can find the cause
/// only after the death.
pub(crate) fn await_death(pidfd: &OwnedFd) {
    let timeout = Timespec {
        tv_sec: DEATH_TIMEOUT.as_secs() as _,
        tv_nsec: 0,
    };
    let mut watched = [PollFd::new(pidfd, PollFlags::IN)];
    while let Err(Errno::INTR) = poll(&mut watched, Some(&timeout)) {}
}

/// Adds to `error` the signal that killed the process. Returns `error` unchanged if no signal
/// killed the process.
pub(crate) fn explain_death(error: Error, pidfd: &OwnedFd) -> Error {
    let options = WaitIdOptions::EXITED | WaitIdOptions::NOHANG | WaitIdOptions::NOWAIT;
    match waitid(WaitId::PidFd(pidfd.as_fd()), options) {
        Ok(Some(status)) => match status.terminating_signal() {
            Some(libc::SIGKILL) => error.while_doing(
                "killed by SIGKILL, perhaps because the memory limit is too low to start the container",
            ),
            // The process ended itself with [`trap`], and the error contains the reason.
            Some(libc::SIGILL) => error,
            Some(signal) => error.while_doing(format!("killed by signal {signal}")),
            None => error,
        },
        _ => error,
    }
}
