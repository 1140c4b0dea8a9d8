//! Kills the processes of a cgroup.
//!
//! A write to cgroup.kill sends SIGKILL only to the main thread of each process. The signal has no
//! effect if the main thread has exited and another thread of the process runs on. Such a thread
//! can also move into another cgroup. The process is then missing in cgroup.procs there, because
//! its main thread stays in the old cgroup. If a cgroup does not become empty after a write to
//! cgroup.kill, this module therefore searches its threads, and sends SIGKILL to their processes
//! through pidfds. This signal reaches all threads of a process.

use std::collections::HashSet;
use std::fs::File;
use std::io::{BufRead, BufReader};
use std::path::Path;
use std::time::{Duration, Instant};

use rustix::fs::{Mode, OFlags};
use rustix::io::Errno;
use rustix::process::{Pid, PidfdFlags, Signal, kill_process, pidfd_open, pidfd_send_signal};
use rustix::time::{ClockId, clock_gettime};

use super::WITHOUT_WAITING;
use super::tree::CgroupTree;
use crate::process_stat::ProcessStat;

/// The time between the kill of the cgroup and the first search for survivors. Most processes exit
/// within this time, so that no search is necessary.
const FIRST_INTERVAL: Duration = Duration::from_millis(25);

/// The longest time between two searches. After each search, the time is doubled.
const MAX_INTERVAL: Duration = Duration::from_secs(1);

const READ: OFlags = OFlags::RDONLY.union(WITHOUT_WAITING);

/// Kills every process in the cgroup and in all cgroups below it. If one of these processes forks
/// at the same time, the kernel also kills the new child. `kill` does not wait until the processes
/// have exited. `kill` returns `Ok` if the cgroup does not exist.
///
/// # Errors
/// EAGAIN means that a process holds a lease on cgroup.kill. The kernel now begins to break the lease.
pub fn kill(cgroup: &Path) -> Result<(), Errno> {
    kill_with(cgroup, WITHOUT_WAITING)
}

/// Does the same as [`kill`], but waits until the kernel breaks the leases on cgroup.kill, usually for
/// 45 s. While this call waits, no process can take another lease on the file.
pub fn kill_after_leases(cgroup: &Path) -> Result<(), Errno> {
    kill_with(cgroup, OFlags::CLOEXEC)
}

fn kill_with(cgroup: &Path, flags: OFlags) -> Result<(), Errno> {
    match write_with(cgroup, "cgroup.kill", "1", flags) {
        // ENODEV means that the cgroup was removed after its file was opened.
        Err(Errno::NOENT | Errno::NODEV) => Ok(()),
        result => result,
    }
}

/// The search for processes that survive a kill of their cgroup. The caller begins the search when
/// it kills the cgroup, and repeats the search until the cgroup is empty.
#[derive(Debug)]
pub struct Survivors {
    /// The time of the next search.
    pub next: Instant,
    interval: Duration,
    /// True if this search has frozen the cgroup.
    froze: bool,
}

impl Survivors {
    /// Begins a search in a cgroup that the caller kills with [`kill`] at the same time.
    #[expect(clippy::new_without_default, reason = "the time of the call matters")]
    pub fn new() -> Self {
        Survivors {
            next: Instant::now() + FIRST_INTERVAL,
            interval: FIRST_INTERVAL,
            froze: false,
        }
    }

    /// Kills all processes in the cgroup and in all cgroups below it. Does nothing before the time
    /// [`Survivors::next`].
    ///
    /// This function also freezes the cgroup. Otherwise, the processes could fork faster than the
    /// search finds them. The kernel also kills frozen processes.
    pub fn kill_if_due(&mut self, cgroup: &Path) {
        if Instant::now() < self.next {
            return;
        }
        if !is_frozen(cgroup) {
            self.froze |= write(cgroup, "cgroup.freeze", "1").is_ok();
        }
        // This call kills the processes that the survivors have created.
        let _ = kill(cgroup);
        kill_threads(cgroup);
        self.interval = (self.interval * 2).min(MAX_INTERVAL);
        self.next = Instant::now() + self.interval;
    }

    /// Thaws the cgroup if the search has frozen it. Only a cgroup that the caller does not remove
    /// has to be thawed.
    pub fn thaw(self, cgroup: &Path) {
        if self.froze {
            let _ = write(cgroup, "cgroup.freeze", "0");
        }
    }
}

pub(super) fn write(cgroup: &Path, file: &str, value: &str) -> Result<(), Errno> {
    write_with(cgroup, file, value, WITHOUT_WAITING)
}

fn write_with(cgroup: &Path, file: &str, value: &str, flags: OFlags) -> Result<(), Errno> {
    let path = cgroup.join(file);
    let file = rustix::fs::open(path, OFlags::WRONLY | flags, Mode::empty())?;
    rustix::io::write(&file, value.as_bytes())?;
    Ok(())
}

fn is_frozen(cgroup: &Path) -> bool {
    let mut state = [0];
    rustix::fs::open(cgroup.join("cgroup.freeze"), READ, Mode::empty())
        .and_then(|file| rustix::io::read(&file, &mut state))
        .is_ok_and(|_| state == *b"1")
}

/// Kills the processes of all threads in the cgroup and in all cgroups below it. Ignores errors,
/// because the caller detects a remaining process when the cgroup does not become empty.
fn kill_threads(cgroup: &Path) {
    let Ok(Some(mut tree)) = CgroupTree::open(cgroup) else {
        return;
    };
    let mut killed = HashSet::new();
    loop {
        let before = clock_ticks_after_boot();
        let threads = rustix::fs::openat(tree.directory(), "cgroup.threads", READ, Mode::empty());
        if let Ok(threads) = threads {
            let lines = BufReader::new(File::from(threads)).lines();
            for thread in lines.map_while(Result::ok) {
                if let Ok(thread) = thread.parse() {
                    kill_process_of(thread, before, &mut killed);
                }
            }
        }
        if !matches!(tree.advance(), Ok(true)) {
            return;
        }
    }
}

/// Kills the process of `thread`, and adds the process to `killed`. The thread's id was in the
/// cgroup at a time after `listed_after`, in clock ticks after boot.
///
/// If the thread has exited, the kernel can have given its id to a thread outside the cgroup, which
/// must not be killed. That thread started after `listed_after`. So this function kills no process
/// whose thread started then. The next search kills the processes that are omitted for this reason.
fn kill_process_of(thread: i32, listed_after: u64, killed: &mut HashSet<i32>) -> Option<()> {
    let process = process_of(thread)?;
    if killed.contains(&process) {
        return None;
    }
    // Open the process before the check of the thread. The pidfd then refers to the thread's
    // process.
    let pid = Pid::from_raw(process)?;
    let pidfd = match pidfd_open(pid, PidfdFlags::NONBLOCK) {
        // A process holds a lease on the pidfds of this process.
        Err(Errno::AGAIN) => None,
        opened => Some(opened.ok()?),
    };
    let stat = ProcessStat::read(&format!("/proc/{process}/task/{thread}/stat")).ok()??;
    if stat.start_time < listed_after {
        let _ = match pidfd {
            Some(pidfd) => pidfd_send_signal(&pidfd, Signal::KILL),
            None => kill_process(pid, Signal::KILL),
        };
        killed.insert(process);
    }
    Some(())
}

/// Returns the id of a thread's process.
fn process_of(thread: i32) -> Option<i32> {
    let mut buffer = [0; 512];
    let status = format!("/proc/{thread}/status");
    let file = rustix::fs::open(status, READ, Mode::empty()).ok()?;
    let length = rustix::io::read(&file, &mut buffer).ok()?;
    let text = String::from_utf8_lossy(buffer.get(..length)?);
    let id = text.lines().find_map(|line| line.strip_prefix("Tgid:"))?;
    id.trim().parse().ok()
}

fn clock_ticks_after_boot() -> u64 {
    let now = clock_gettime(ClockId::Boottime);
    let ticks = rustix::param::clock_ticks_per_second();
    let (seconds, nanoseconds) = (now.tv_sec as u64, now.tv_nsec as u64);
    seconds * ticks + nanoseconds * ticks / 1_000_000_000
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_process_of_a_thread_is_killed_only_if_the_thread_is_older_than_the_list() {
        let mut child = std::process::Command::new("sleep")
            .arg("1000")
            .spawn()
            .unwrap();
        let id = child.id() as i32;
        let stat = ProcessStat::read(&format!("/proc/{id}/stat"))
            .unwrap()
            .unwrap();
        assert!(stat.start_time <= clock_ticks_after_boot());
        let mut killed = HashSet::new();
        kill_process_of(id, stat.start_time, &mut killed);
        assert!(killed.is_empty());
        kill_process_of(id, stat.start_time + 1, &mut killed);
        assert_eq!(killed, HashSet::from([id]));
        assert!(!child.wait().unwrap().success());
        assert_eq!(process_of(id), None);
        let thread =
            std::thread::spawn(|| process_of(rustix::thread::gettid().as_raw_nonzero().get()));
        assert_eq!(thread.join().unwrap(), Some(std::process::id() as i32));
    }
}
