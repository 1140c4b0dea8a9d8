//! Processes that make their parent their tracer, with PTRACE_TRACEME of ptrace(2). A container's
//! process can do so without the knowledge of its parent, which is a process of the host. A process
//! can also trace another process of the container and never read its exit status.

use std::collections::VecDeque;
use std::fs;
use std::sync::mpsc;

use nix::errno::Errno;
use nix::libc;
use nix::sys::ptrace;
use nix::sys::signal::{Signal, raise};
use nix::unistd::{ForkResult, Pid, fork};

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
        ["flood"] => flood(),
        // The kernel stops this process before it exits, until its child lets it continue.
        ["exit-stop"] => stop_before_exit(),
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

/// Waits in a process that a child traces. The child never handles a stop of this process.
fn stop_before_exit() -> Result<(), InsideError> {
    // SAFETY: this process has one thread, so the child may call any function.
    if let ForkResult::Parent { .. } = unsafe { fork()? } {
        return wait();
    }
    ptrace::seize(nix::unistd::getppid(), ptrace::Options::PTRACE_O_TRACEEXIT)?;
    say("traces")?;
    loop {
        nix::unistd::pause();
    }
}

/// The number of threads that each thread of [`flood`] keeps alive.
const ALIVE: usize = 2_500;

/// The number of threads, with those that the tracer has not reaped, above which [`flood`] creates no
/// further threads.
const MOST: usize = 6_000;

/// Creates threads that make the parent of this process their tracer, without end. The oldest thread
/// exits whenever a new one exists.
fn flood() -> Result<(), InsideError> {
    let makers = [(); 2].map(|()| {
        let (full, is_full) = mpsc::channel();
        std::thread::spawn(|| make_threads(full));
        is_full
    });
    for is_full in makers {
        is_full.recv()?;
    }
    say("ready")?;
    loop {
        std::thread::park();
    }
}

/// Creates the threads, and reports when [`ALIVE`] threads exist.
fn make_threads(full: mpsc::Sender<()>) {
    let (mut alive, mut made) = (VecDeque::new(), 0_u32);
    loop {
        let (end, ended) = mpsc::channel::<()>();
        let traced = std::thread::Builder::new()
            .stack_size(16 << 10)
            .spawn(move || {
                let _ = ptrace::traceme();
                let _ = ended.recv();
            });
        match traced {
            Ok(_) => alive.push_back(end),
            Err(_) => std::thread::yield_now(),
        }
        if alive.len() > ALIVE {
            let _ = full.send(());
            alive.pop_front();
        }
        made += 1;
        while made % 32 == 0 && thread_count().is_none_or(|count| count > MOST) {
            std::thread::yield_now();
        }
    }
}

/// Returns the number of threads of this process, with those that the tracer has not reaped.
fn thread_count() -> Option<usize> {
    let status = fs::read_to_string("/proc/self/status").ok()?;
    let mut lines = status.lines();
    let count = lines.find_map(|line| line.strip_prefix("Threads:"))?;
    count.trim().parse().ok()
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
