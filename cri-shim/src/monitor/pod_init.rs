//! The first process of a pod's PID namespace, when the pod's containers share one.
//!
//! It does nothing, and dies with the monitor. Its children, the orphans of the containers, are
//! reaped by the kernel. The containers can see it in /proc, so it has nothing to look at: no
//! descriptors, no capabilities, an empty root of its own.

use std::ffi::CStr;

use nix::sys::signal::{SigHandler, Signal};
use rustix::io::Errno;

use super::startup::close_from;

/// What `ps` in a container shows.
const NAME: &CStr = c"rrun-pod";

/// Starts it, in a new PID namespace, and returns its pid here.
pub fn start() -> Result<i32, Errno> {
    let flags = libc::CLONE_NEWPID | libc::CLONE_NEWNS;
    // SAFETY: clone_args is plain numbers, for which zero means absent.
    let mut arguments: libc::clone_args = unsafe { std::mem::zeroed() };
    arguments.flags = u64::try_from(flags).unwrap_or_default();
    arguments.exit_signal = u64::try_from(libc::SIGCHLD).unwrap_or_default();
    // SAFETY: without CLONE_VM this is a fork of a process with one thread; the child goes on
    // with memory of its own.
    let pid = unsafe {
        libc::syscall(
            libc::SYS_clone3,
            &raw mut arguments,
            size_of::<libc::clone_args>(),
        )
    };
    match pid {
        0 => be_init(),
        1.. => i32::try_from(pid).map_err(|_| Errno::OVERFLOW),
        _ => Err(Errno::from_raw_os_error(nix::errno::Errno::last_raw())),
    }
}

fn be_init() -> ! {
    let death = rustix::process::Signal::KILL;
    let _ = rustix::process::set_parent_process_death_signal(Some(death));
    close_from(0);
    let _ = rustix::thread::set_name(NAME);
    // SAFETY: no handler is installed. With SIGCHLD ignored the kernel reaps for us (wait(2)).
    let _ = unsafe { nix::sys::signal::signal(Signal::SIGCHLD, SigHandler::SigIgn) };
    loop {
        nix::unistd::pause();
    }
}
