//! Processes whose main thread has exited, and that run on in another thread. In /proc, such a
//! process is a zombie.

use std::fs;
use std::time::Duration;

use nix::libc;
use nix::unistd::{ForkResult, fork};

use super::InsideError;

/// The number of processes that `headless multiply` keeps alive.
const CHAINS: usize = 8;

/// Runs `inside headless MODE`.
pub(crate) fn main(words: &[&str]) -> Result<(), InsideError> {
    match words {
        [] => run_without_main_thread(rest),
        // The child has a separate session, like a daemon.
        ["child"] => {
            start_child(&[])?;
            super::wait()
        }
        ["moved-child"] => {
            start_child(&["moved"])?;
            super::wait()
        }
        ["moved"] => run_without_main_thread(move_and_rest),
        ["multiply"] => {
            for _ in 0..CHAINS {
                start_child(&["chain"])?;
            }
            super::wait()
        }
        ["chain"] => run_without_main_thread(fork_forever),
        _ => Err("unknown mode".into()),
    }
}

fn start_child(mode: &[&str]) -> Result<(), InsideError> {
    std::process::Command::new("/proc/self/exe")
        .arg("headless")
        .args(mode)
        .env("RRUN_E2E_INSIDE", "1")
        .spawn()?;
    Ok(())
}

/// Runs `work` in a second thread, and ends the main thread.
fn run_without_main_thread(work: fn()) -> ! {
    let _ = nix::unistd::setsid();
    std::thread::spawn(work);
    end_thread()
}

fn end_thread() -> ! {
    // SAFETY: exit has only an integer argument.
    unsafe { libc::syscall(libc::SYS_exit, 0) };
    std::process::abort()
}

fn rest() {
    loop {
        std::thread::sleep(Duration::from_secs(3600));
    }
}

/// Moves this thread into a new cgroup. The main thread, which has exited, stays in the old cgroup.
fn move_and_rest() {
    while !fs::read_to_string("/proc/self/stat").is_ok_and(|stat| stat.contains(") Z ")) {
        std::thread::sleep(Duration::from_millis(1));
    }
    let moved = fs::create_dir("/sys/fs/cgroup/moved")
        .and_then(|()| fs::write("/sys/fs/cgroup/moved/cgroup.procs", "0"));
    if let Err(error) = moved {
        eprintln!("move into a new cgroup: {error}");
        std::process::exit(1);
    }
    rest();
}

/// Continues in a new process every two milliseconds. The main thread of each of these processes
/// exits immediately, so most of the time, no process has a main thread.
fn fork_forever() {
    loop {
        std::thread::sleep(Duration::from_millis(2));
        // SAFETY: the only other thread of this process has exited, or is about to exit and holds
        // no lock.
        match unsafe { fork() } {
            Ok(ForkResult::Child) => {
                std::thread::spawn(fork_forever);
                end_thread()
            }
            Ok(ForkResult::Parent { .. }) => std::process::exit(0),
            Err(_) => {}
        }
    }
}
