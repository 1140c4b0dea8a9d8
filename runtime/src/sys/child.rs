//! The end of a process that is a copy of rrun, seen from inside it and from its parent.

use std::os::fd::{AsFd, OwnedFd};

use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::io::Errno;
use rustix::process::{WaitId, WaitIdOptions, waitid};

use crate::error::Error;
use crate::sys::syscalls::pidfd_send_signal;

/// Ends the process without running anything that it has as a copy of its parent.
pub(crate) fn exit_now() -> ! {
    // SAFETY: exit_group takes an integer, runs no handlers and flushes nothing.
    unsafe { libc::syscall(libc::SYS_exit_group, 1) };
    // A filter may refuse that call, and a C library's _exit would repeat it for ever. abort() at
    // last executes an instruction that the processor refuses.
    std::process::abort()
}

/// Ends the process by an instruction that the processor refuses. A filter can hold or refuse every
/// system call, exit_group(2) included, but not this.
pub(crate) fn trap() -> ! {
    #[cfg(target_arch = "x86_64")]
    // SAFETY: the instruction raises SIGILL, which has its default disposition and ends the process.
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

/// Ends the process when dropped, on return or unwinding, so that a copy of rrun never returns into
/// the parent's code.
pub(crate) struct NeverReturn;

impl Drop for NeverReturn {
    fn drop(&mut self) {
        exit_now()
    }
}

/// Kills a child and takes its status, so that nothing is left of it.
pub(crate) fn kill_and_reap(pidfd: &OwnedFd) {
    let _ = pidfd_send_signal(pidfd.as_fd(), libc::SIGKILL);
    while let Err(Errno::INTR) = waitid(WaitId::PidFd(pidfd.as_fd()), WaitIdOptions::EXITED) {}
}

/// Waits until a process is dead that has closed its end of the channel, which it does on its
/// way there: only then [`explain_death`] can tell of what.
pub(crate) fn await_death(pidfd: &OwnedFd) {
    const DEATH_TIMEOUT: Timespec = Timespec {
        tv_sec: 10,
        tv_nsec: 0,
    };
    let mut watched = [PollFd::new(pidfd, PollFlags::IN)];
    while let Err(Errno::INTR) = poll(&mut watched, Some(&DEATH_TIMEOUT)) {}
}

/// Adds to the error the signal that killed the process, if one did.
pub(crate) fn explain_death(error: Error, pidfd: &OwnedFd) -> Error {
    let options = WaitIdOptions::EXITED | WaitIdOptions::NOHANG | WaitIdOptions::NOWAIT;
    match waitid(WaitId::PidFd(pidfd.as_fd()), options) {
        Ok(Some(status)) => match status.terminating_signal() {
            Some(libc::SIGKILL) => error.while_doing(
                "killed by SIGKILL, perhaps because its memory limit is too low to start in",
            ),
            // It ended itself ([`trap`]), and the error says why.
            Some(libc::SIGILL) => error,
            Some(signal) => error.while_doing(format!("killed by signal {signal}")),
            None => error,
        },
        _ => error,
    }
}
