//! Kills one process of a container together with all processes that this process started. The
//! monitor uses this module if an exec has no separate cgroup ([`super::exec_cgroup`]).
//!
//! The monitor first searches for all these processes and stops each of them with SIGSTOP. Then the
//! monitor kills all of them. A stopped process cannot fork during the search. A stopped process
//! also remains the parent of its children, so the search finds the children. The search does not
//! find a process that has created its own session and whose parent has exited.

use std::fs::File;
use std::io::{BufRead, BufReader};
use std::os::fd::OwnedFd;
use std::path::Path;

use rustix::fs::{Mode, OFlags};
use rustix::process::{Pid, PidfdFlags, Signal, pidfd_open, pidfd_send_signal};

use rrun_kernel::cgroup::CgroupTree;

/// The maximum number of cgroups below the container's cgroup in which the monitor searches for
/// processes. A container can create nested cgroups, and move its processes into them.
const MAX_CGROUPS: usize = 1024;

/// The maximum number of searches for processes in the container's cgroup. Processes can fork
/// during a search. The next search then finds the new processes.
const MAX_PASSES: usize = 16;

/// The maximum number of processes that remain stopped during the search. The monitor kills any
/// further process immediately.
const MAX_STOPPED: usize = 512;

/// The properties of a process that the monitor reads from /proc/PID/stat (proc_pid_stat(5)).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Process {
    pid: i32,
    parent: i32,
    session: i32,
}

impl Process {
    fn read(pid: i32) -> Option<Self> {
        let stat = std::fs::read(format!("/proc/{pid}/stat")).ok()?;
        Process::parse(pid, &stat)
    }

    /// Parses the contents of /proc/PID/stat. The process name in this file is in parentheses, and
    /// can itself contain parentheses. For this reason, the last closing parenthesis in the file is
    /// the end of the name.
    fn parse(pid: i32, stat: &[u8]) -> Option<Self> {
        let name_end = stat.iter().rposition(|byte| *byte == b')')?;
        let rest = std::str::from_utf8(stat.get(name_end + 1..)?).ok()?;
        let mut fields = rest.split_ascii_whitespace().skip(1);
        let parent = fields.next()?.parse().ok()?;
        let session = fields.nth(1)?.parse().ok()?;
        Some(Process {
            pid,
            parent,
            session,
        })
    }
}

/// Kills the process `leader`, which must be an unreaped child of the monitor. Also kills the
/// descendants of `leader` in `cgroup`, and the processes of `cgroup` in the session of `leader`.
/// `init` is the container's first process. If `init` or the monitor is in the session of `leader`,
/// `kill` kills only `leader` and its descendants. Returns false if even the last of [`MAX_PASSES`]
/// searches found new processes.
pub(crate) fn kill(cgroup: &Path, leader: i32, init: i32) -> bool {
    let session = |pid| Process::read(pid).map(|process| process.session);
    let monitor = rustix::process::getpid().as_raw_nonzero().get();
    let own =
        session(leader).filter(|own| session(init) != Some(*own) && session(monitor) != Some(*own));
    let mut family: Vec<i32> = Vec::new();
    let mut stopped: Vec<OwnedFd> = Vec::new();
    let mut complete = false;
    if let Some(pidfd) = stop(leader, None) {
        family.push(leader);
        stopped.push(pidfd);
    }
    for _ in 0..MAX_PASSES {
        let before = family.len();
        let mut processes = list(cgroup);
        while let Some(at) = processes
            .iter()
            .position(|process| own == Some(process.session) || family.contains(&process.parent))
        {
            let process = processes.swap_remove(at);
            if family.contains(&process.pid) {
                continue;
            }
            family.push(process.pid);
            match stop(process.pid, Some(process)) {
                Some(pidfd) if stopped.len() < MAX_STOPPED => stopped.push(pidfd),
                Some(pidfd) => drop(pidfd_send_signal(&pidfd, Signal::KILL)),
                None => {}
            }
        }
        if family.len() == before {
            complete = true;
            break;
        }
    }
    for pidfd in stopped {
        let _ = pidfd_send_signal(&pidfd, Signal::KILL);
    }
    complete
}

/// Stops a process with SIGSTOP and returns a pidfd for it. `seen` contains the earlier properties
/// of the process, from the search in the cgroup. Returns `None` if the pid no longer exists. Also
/// returns `None` if the pid now belongs to a process in another session.
fn stop(pid: i32, seen: Option<Process>) -> Option<OwnedFd> {
    let pidfd = pidfd_open(Pid::from_raw(pid)?, PidfdFlags::empty()).ok()?;
    if let Some(seen) = seen
        && Process::read(pid).is_none_or(|now| now.session != seen.session)
    {
        return None;
    }
    let _ = pidfd_send_signal(&pidfd, Signal::STOP);
    Some(pidfd)
}

/// Returns the processes in the cgroup and in the first [`MAX_CGROUPS`] cgroups below it.
fn list(cgroup: &Path) -> Vec<Process> {
    let mut found = Vec::new();
    let Ok(Some(mut tree)) = CgroupTree::open(cgroup) else {
        return found;
    };
    let flags = OFlags::RDONLY | OFlags::CLOEXEC;
    for _ in 0..=MAX_CGROUPS {
        let procs = rustix::fs::openat(tree.directory(), "cgroup.procs", flags, Mode::empty());
        if let Ok(procs) = procs {
            for line in BufReader::with_capacity(4096, File::from(procs)).lines() {
                let Some(pid) = line.ok().and_then(|line| line.parse().ok()) else {
                    break;
                };
                found.extend(Process::read(pid));
            }
        }
        if !matches!(tree.advance(), Ok(true)) {
            break;
        }
    }
    found
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_process_name_can_contain_parentheses() {
        let stat = b"7 (a) b) S 3) R 12 13 14 34816 7 4194560 105 0";
        let process = Process::parse(7, stat).unwrap();
        assert_eq!((process.parent, process.session), (12, 14));
        assert_eq!(Process::parse(7, b"7 (a"), None);
    }
}
