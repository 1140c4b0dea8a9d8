//! Out-of-memory kills in a container's cgroup, and the decision when to report them.

use std::os::fd::{AsFd, BorrowedFd};
use std::path::Path;
use std::time::{Duration, Instant};

use rrun_kernel::cgroup::OomKills;

/// The monitor reports an out-of-memory kill only if at least this time has passed since it
/// detected the previous kill.
const OOM_EVENT_INTERVAL: Duration = Duration::from_secs(10);

#[derive(Default)]
pub(crate) struct OomWatch {
    /// The kernel's counter of out-of-memory kills. `None` if the memory controller is not enabled
    /// or the cgroup no longer exists.
    count: Option<OomKills>,
    killed: bool,
    last_kill_at: Option<Instant>,
}

impl OomWatch {
    pub(crate) fn open(&mut self, cgroup: &Path) {
        self.count = OomKills::open(cgroup);
    }

    pub(crate) fn close(&mut self) {
        self.count = None;
    }

    /// Returns a descriptor for which the kernel reports `POLLPRI` when the cgroup's counters have
    /// changed. The event loop must then call [`OomWatch::check`].
    pub(crate) fn fd(&self) -> Option<BorrowedFd<'_>> {
        self.count.as_ref().map(AsFd::as_fd)
    }

    /// Returns whether the kernel has ever killed a process of the container because memory ran
    /// out.
    pub(crate) fn has_killed(&self) -> bool {
        self.killed
    }

    /// Returns true if the monitor must report an out-of-memory kill. The kill must have happened
    /// after the last check, and at least [`OOM_EVENT_INTERVAL`] must have passed since the monitor
    /// detected the previous kill.
    pub(crate) fn check(&mut self) -> bool {
        match self.count.as_mut().map(OomKills::rose) {
            None | Some(Ok(false)) => false,
            Some(Ok(true)) => {
                self.killed = true;
                self.is_due(Instant::now())
            }
            Some(Err(_)) => {
                self.close();
                false
            }
        }
    }

    fn is_due(&mut self, now: Instant) -> bool {
        let last = self.last_kill_at.replace(now);
        last.is_none_or(|last| now >= last + OOM_EVENT_INTERVAL)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn kills_in_quick_succession_are_reported_once() {
        let (mut watch, start) = (OomWatch::default(), Instant::now());
        let after = |seconds| start + Duration::from_secs(seconds);
        assert!(watch.is_due(start));
        assert!(!watch.is_due(after(9)));
        // Each kill restarts the interval, even if the kill is not reported.
        assert!(!watch.is_due(after(18)));
        assert!(watch.is_due(after(28)));
    }
}
