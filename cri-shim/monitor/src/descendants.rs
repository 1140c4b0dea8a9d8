//! Killing one process of a container with all that came from it, where it has no cgroup of its
//! own ([`super::exec_cgroup`]).
//!
//! They are stopped before they are killed, so that none forks away meanwhile and none loses the
//! parent by which we find it. What has become a session of its own and lost that parent is missed.

use std::fs::File;
use std::io::{BufRead, BufReader};
use std::os::fd::OwnedFd;
use std::path::Path;

use rustix::process::{Pid, PidfdFlags, Signal, pidfd_open, pidfd_send_signal};

/// How deep below the container's cgroup we look: cgroups that the container made.
const MAX_CGROUP_DEPTH: u32 = 16;

/// How often we look for what was forked while we looked.
const MAX_PASSES: usize = 16;

/// The most processes that are stopped before the first is killed; what is found beyond dies at
/// once.
const MAX_STOPPED: usize = 512;

/// A process as /proc/PID/stat has it (proc_pid_stat(5)).
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

    /// The name, in brackets, can hold anything, brackets too.
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

/// Kills `leader`, which must be our unreaped child, the processes of `cgroup` that are in its
/// session or descend from it, and none of `init`'s session. False if there seemed to be no end.
pub(crate) fn kill(cgroup: &Path, leader: i32, init: i32) -> bool {
    let session = |pid| Process::read(pid).map(|process| process.session);
    let own = session(leader).filter(|own| session(init) != Some(*own));
    let mut family: Vec<i32> = Vec::new();
    let mut stopped: Vec<OwnedFd> = Vec::new();
    let mut complete = false;
    if let Some(pidfd) = stop(leader, None) {
        family.push(leader);
        stopped.push(pidfd);
    }
    for _ in 0..MAX_PASSES {
        let before = family.len();
        let mut processes = Vec::new();
        list(cgroup, 0, &mut processes);
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

/// Stops a process and holds on to it, if it is still the one that was seen.
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

fn list(cgroup: &Path, depth: u32, found: &mut Vec<Process>) {
    if let Ok(procs) = File::open(cgroup.join("cgroup.procs")) {
        for line in BufReader::with_capacity(4096, procs).lines() {
            let Some(pid) = line.ok().and_then(|line| line.parse().ok()) else {
                break;
            };
            found.extend(Process::read(pid));
        }
    }
    if depth < MAX_CGROUP_DEPTH {
        for entry in std::fs::read_dir(cgroup).into_iter().flatten().flatten() {
            if entry.file_type().is_ok_and(|kind| kind.is_dir()) {
                list(&entry.path(), depth + 1, found);
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_process_name_can_hold_brackets() {
        let stat = b"7 (a) b) S 3) R 12 13 14 34816 7 4194560 105 0";
        let process = Process::parse(7, stat).unwrap();
        assert_eq!((process.parent, process.session), (12, 14));
        assert_eq!(Process::parse(7, b"7 (a"), None);
    }
}
