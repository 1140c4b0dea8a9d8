//! Kills one process of a container together with all processes that this process started. The
//! monitor uses this module if an exec has no separate cgroup ([`super::exec_cgroup`]).
//!
//! The monitor first searches for all these processes and stops each of them with SIGSTOP. Then the
//! monitor kills all of them. A stopped process cannot fork during the search. A stopped process
//! also remains the parent of its children, so the search finds the children. The search does not
//! find a process that has created its own session and whose parent has exited.

use std::collections::{HashMap, HashSet, VecDeque};
use std::fs::File;
use std::io::{BufRead, BufReader};
use std::os::fd::OwnedFd;
use std::path::Path;

use rustix::fs::{Mode, OFlags};
use rustix::process::{Pid, PidfdFlags, Signal, pidfd_open, pidfd_send_signal};

use rrun_kernel::cgroup::CgroupTree;
use rrun_kernel::process_stat::ProcessStat;

/// The maximum number of cgroups below the container's cgroup in which the monitor searches for
/// processes. A container can create nested cgroups, and move its processes into them.
const MAX_CGROUPS: usize = 1024;

/// The maximum number of searches for processes in the container's cgroup. Processes can fork
/// during a search. The next search then finds the new processes.
const MAX_PASSES: usize = 16;

/// The maximum number of processes that remain stopped during the search. The monitor kills any
/// further process immediately.
const MAX_STOPPED: usize = 512;

/// A process of the container.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Process {
    pid: i32,
    parent: i32,
    session: i32,
}

impl Process {
    fn read(pid: i32) -> Option<Self> {
        let stat = ProcessStat::read(&format!("/proc/{pid}/stat")).ok()??;
        Some(Process {
            pid,
            parent: stat.parent,
            session: stat.session,
        })
    }
}

/// The processes that the monitor kills: the processes of a session, and the descendants of these
/// processes.
#[derive(Default)]
struct Family {
    session: Option<i32>,
    members: HashSet<i32>,
}

impl Family {
    /// Adds all processes that belong to the family, and returns them. In the result, each process
    /// precedes its children. The time for this call grows linearly with the number of processes.
    fn add(&mut self, processes: Vec<Process>) -> Vec<Process> {
        let mut children: HashMap<i32, Vec<Process>> = HashMap::new();
        let mut found: VecDeque<Process> = VecDeque::new();
        for process in processes {
            if self.session == Some(process.session) || self.members.contains(&process.parent) {
                found.push_back(process);
            } else {
                children.entry(process.parent).or_default().push(process);
            }
        }
        let mut added = Vec::new();
        while let Some(process) = found.pop_front() {
            found.extend(children.remove(&process.pid).unwrap_or_default());
            if self.members.insert(process.pid) {
                added.push(process);
            }
        }
        added
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
    let mut family = Family {
        session: own,
        members: HashSet::new(),
    };
    let mut stopped: Vec<OwnedFd> = Vec::new();
    let mut complete = false;
    if let Some(pidfd) = stop(leader, None) {
        family.members.insert(leader);
        stopped.push(pidfd);
    }
    for _ in 0..MAX_PASSES {
        let added = family.add(list(cgroup));
        if added.is_empty() {
            complete = true;
            break;
        }
        for process in added {
            match stop(process.pid, Some(process)) {
                Some(pidfd) if stopped.len() < MAX_STOPPED => stopped.push(pidfd),
                Some(pidfd) => drop(pidfd_send_signal(&pidfd, Signal::KILL)),
                None => {}
            }
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
    // Without PIDFD_NONBLOCK, a lease on the process's pidfds would stop the monitor for 45 s.
    let pidfd = pidfd_open(Pid::from_raw(pid)?, PidfdFlags::NONBLOCK).ok()?;
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
    // Without O_NONBLOCK, a lease on the file would stop the monitor for 45 s.
    let flags = OFlags::RDONLY | OFlags::NONBLOCK | OFlags::CLOEXEC;
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

    fn process(pid: i32, parent: i32, session: i32) -> Process {
        Process {
            pid,
            parent,
            session,
        }
    }

    /// The list contains each process before its parent, and a thousand processes of another family.
    /// An algorithm that is not linear would need hours.
    #[test]
    fn all_descendants_are_found_in_one_pass_through_a_long_list() {
        const LAST: i32 = 400_000;
        let mut family = Family::default();
        family.members.insert(1);
        let mut processes: Vec<Process> = (LAST..LAST + 1000)
            .map(|pid| process(pid + 1, LAST + 2000, 7))
            .collect();
        processes.extend((2..=LAST).rev().map(|pid| process(pid, pid - 1, pid)));
        let added: Vec<i32> = family.add(processes).iter().map(|it| it.pid).collect();
        assert_eq!(added, (2..=LAST).collect::<Vec<_>>());
    }

    #[test]
    fn a_family_consists_of_a_session_and_its_descendants() {
        let mut family = Family {
            session: Some(5),
            members: HashSet::from([5]),
        };
        let all = [
            process(9, 8, 9),
            process(5, 1, 5),
            process(6, 1, 6),
            process(8, 1, 5),
        ];
        assert_eq!(family.add(all.to_vec()), [all[3], all[0]]);
        assert_eq!(family.add(all.to_vec()), []);
    }
}
