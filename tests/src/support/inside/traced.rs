//! Processes that make their parent their tracer, with PTRACE_TRACEME of ptrace(2). A container's
//! process can do so without the knowledge of its parent, which is a process of the host. A process
//! can also trace another process of the container and never read its exit status.

use std::fs;
use std::sync::mpsc;

use nix::errno::Errno;
use nix::libc;
use nix::sys::ptrace;
use nix::sys::signal::{Signal, raise};
use nix::unistd::Pid;

use super::{InsideError, say, wait};

pub(crate) fn main(args: &[&str]) -> Result<(), InsideError> {
    match args {
        // A signal stops the process, until the tracer lets it continue.
        ["stop"] => {
            ptrace::traceme()?;
            say("stops")?;
            raise(Signal::SIGUSR1)?;
            say("continues")
        }
        // The kernel reports the exit of this process only after the tracer has reaped the thread.
        ["exit", code] => {
            leave_zombie()?;
            std::process::exit(code.parse()?)
        }
        ["wait"] => {
            leave_zombie()?;
            wait()
        }
        ["hold"] => hold(),
        _ => Err("unknown operation".into()),
    }
}

/// Traces each other process of the container, and prints its id.
fn hold() -> Result<(), InsideError> {
    let own = nix::unistd::getpid();
    loop {
        for entry in fs::read_dir("/proc")?.flatten() {
            let id = entry.file_name().to_str().and_then(|id| id.parse().ok());
            let Some(process) = id.map(Pid::from_raw).filter(|process| *process != own) else {
                continue;
            };
            if ptrace::seize(process, ptrace::Options::empty()).is_ok() {
                say(&process.to_string())?;
            }
        }
    }
}

/// Starts a thread that exits while the parent of this process traces it.
fn leave_zombie() -> Result<(), InsideError> {
    let (sender, receiver) = mpsc::channel();
    std::thread::spawn(move || {
        let traced = ptrace::traceme();
        let _ = sender.send((traced, nix::unistd::gettid()));
        // SAFETY: the call ends only this thread, which owns nothing.
        let _ = Errno::result(unsafe { libc::syscall(libc::SYS_exit, 0) });
    });
    let (traced, thread) = receiver.recv()?;
    traced?;
    let stat = format!("/proc/self/task/{thread}/stat");
    let is_running = |stat: String| !stat.contains(") Z ");
    while fs::read_to_string(&stat).is_ok_and(is_running) {
        std::thread::yield_now();
    }
    Ok(())
}
