//! The exit statuses of child processes that the monitor cannot assign to a container or an exec
//! yet. These children exited before a runtime reported their pids to the monitor.

use std::collections::VecDeque;

/// The maximum number of exit statuses that the monitor keeps. If there are more exit statuses, the
/// monitor drops the oldest exit status.
const MAX_EARLY_EXITS: usize = 4096;

#[derive(Debug, Default)]
pub(crate) struct EarlyExits(VecDeque<(i32, i32)>);

impl EarlyExits {
    pub(crate) fn add(&mut self, pid: i32, code: i32) {
        if self.0.len() >= MAX_EARLY_EXITS {
            self.0.pop_front();
        }
        self.0.push_back((pid, code));
    }

    /// Removes and returns the exit status of a child whose pid a runtime has just reported.
    /// Returns `None` if the child has not exited.
    pub(crate) fn claim(&mut self, pid: i32) -> Option<i32> {
        let at = self.0.iter().rposition(|(ended, _)| *ended == pid)?;
        self.0.remove(at).map(|(_, code)| code)
    }

    /// Drops all exit statuses. Only a runtime call in progress can report the pid of an exited
    /// child. The event loop calls `clear` when no runtime call is in progress, because the monitor
    /// then no longer needs the exit statuses.
    pub(crate) fn clear(&mut self) {
        self.0.clear();
    }
}
