//! The exit statuses of child processes that the monitor cannot assign to a container or an exec
//! yet. These children exited before a runtime reported their pids to the monitor.
//!
//! A container can also create children of the monitor: a process of an exec creates its siblings
//! with clone(2) and CLONE_PARENT. The kernel can give the pid of such a sibling, after its exit, to
//! the first process of another container. So the monitor accepts an exit status only if the
//! process exited during the runtime call that reported the pid, and if the pid no longer belongs
//! to a child of the monitor.

use std::collections::VecDeque;
use std::time::Instant;

use rustix::io::Errno;
use rustix::process::{Pid, WaitId, WaitIdOptions, waitid};

/// The maximum number of exit statuses that the monitor keeps. If there are more exit statuses, the
/// monitor drops the oldest exit status.
const MAX_EARLY_EXITS: usize = 4096;

/// The exit status that the monitor reports for an exited child whose exit status was dropped.
const UNKNOWN_CODE: i32 = 255;

#[derive(Debug, Default)]
pub(crate) struct EarlyExits {
    exits: VecDeque<EarlyExit>,
    /// True if the monitor has dropped an exit status because there were too many.
    is_incomplete: bool,
}

#[derive(Debug)]
struct EarlyExit {
    pid: i32,
    code: i32,
    reaped: Instant,
}

impl EarlyExits {
    pub(crate) fn add(&mut self, pid: i32, code: i32) {
        if self.exits.len() >= MAX_EARLY_EXITS {
            self.exits.pop_front();
            self.is_incomplete = true;
        }
        let reaped = Instant::now();
        self.exits.push_back(EarlyExit { pid, code, reaped });
    }

    /// Removes and returns the exit status of a child whose pid a runtime has just reported.
    /// `called` is the time of the runtime call, which is before the child's creation. Returns
    /// `None` if the child has not exited.
    pub(crate) fn claim(&mut self, pid: i32, called: Instant) -> Option<i32> {
        let newest = self.exits.iter().rev().find(|it| it.pid == pid);
        let code = newest.filter(|it| it.reaped >= called).map(|it| it.code);
        if newest.is_some() {
            self.exits.retain(|it| it.pid != pid);
        }
        if code.is_none() && !self.is_incomplete {
            return None;
        }
        (!is_child(pid)).then(|| code.unwrap_or(UNKNOWN_CODE))
    }

    /// Drops all exit statuses. Only a runtime call in progress can report the pid of an exited
    /// child. The event loop calls `clear` when no runtime call is in progress, because the monitor
    /// then no longer needs the exit statuses.
    pub(crate) fn clear(&mut self) {
        self.exits.clear();
        self.is_incomplete = false;
    }
}

/// Returns whether the pid belongs to a child that the monitor has not reaped.
fn is_child(pid: i32) -> bool {
    let options = WaitIdOptions::EXITED | WaitIdOptions::NOHANG | WaitIdOptions::NOWAIT;
    let state = Pid::from_raw(pid).map(|pid| waitid(WaitId::Pid(pid), options));
    !matches!(state, None | Some(Err(Errno::CHILD)))
}

#[cfg(test)]
mod tests {
    use std::process::{Child, Command};

    use super::*;

    /// A pid above every pid that the kernel assigns (`PID_MAX_LIMIT`).
    const NO_CHILD: i32 = 1 << 23;

    fn child() -> (Child, i32) {
        let child = Command::new("sleep").arg("1000").spawn().unwrap();
        let pid = child.id().cast_signed();
        (child, pid)
    }

    #[test]
    fn a_child_that_exited_before_its_pid_was_reported_has_its_newest_exit_status() {
        let mut exits = EarlyExits::default();
        let called = Instant::now();
        exits.add(NO_CHILD, 42);
        exits.add(NO_CHILD, 3);
        exits.add(NO_CHILD + 1, 5);
        assert_eq!(exits.claim(NO_CHILD, called), Some(3));
        assert_eq!(exits.claim(NO_CHILD, called), None);
        assert_eq!(exits.claim(NO_CHILD + 1, called), Some(5));
    }

    #[test]
    fn a_living_child_does_not_get_the_exit_status_of_an_earlier_process_with_its_pid() {
        let (mut child, pid) = child();
        let mut exits = EarlyExits::default();
        let called = Instant::now();
        exits.add(pid, 42);
        assert_eq!(exits.claim(pid, called), None);
        child.kill().unwrap();
        child.wait().unwrap();
        assert_eq!(exits.claim(pid, called), None);
        exits.add(pid, 137);
        assert_eq!(exits.claim(pid, called), Some(137));
    }

    #[test]
    fn an_exit_before_the_runtime_call_does_not_belong_to_the_reported_process() {
        let mut exits = EarlyExits::default();
        exits.add(NO_CHILD, 42);
        assert_eq!(exits.claim(NO_CHILD, Instant::now()), None);
    }

    /// The processes of a container can have so many siblings that the monitor drops the exit
    /// status of another container's process.
    #[test]
    fn a_process_whose_exit_status_was_dropped_still_counts_as_exited() {
        let (mut child, pid) = child();
        let mut exits = EarlyExits::default();
        let called = Instant::now();
        exits.add(NO_CHILD, 3);
        for sibling in 1..=MAX_EARLY_EXITS as i32 {
            exits.add(NO_CHILD + sibling, 42);
        }
        assert_eq!(exits.claim(NO_CHILD, called), Some(UNKNOWN_CODE));
        assert_eq!(exits.claim(pid, called), None);
        exits.clear();
        assert_eq!(exits.claim(NO_CHILD, called), None);
        child.kill().unwrap();
        child.wait().unwrap();
    }
}
