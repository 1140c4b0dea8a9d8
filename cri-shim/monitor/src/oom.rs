//! Out-of-memory kills in a container's cgroup: what of them is reported, and when.

use std::os::fd::{AsFd, BorrowedFd};
use std::path::Path;
use std::time::{Duration, Instant};

use rrun_kernel::cgroup::OomKills;

/// At most one kill in this time is reported.
const OOM_EVENT_INTERVAL: Duration = Duration::from_secs(10);

#[derive(Default)]
pub(crate) struct OomWatch {
    /// None where the memory controller is not enabled, or the cgroup is gone.
    count: Option<OomKills>,
    killed: bool,
    reported_at: Option<Instant>,
}

impl OomWatch {
    pub(crate) fn open(&mut self, cgroup: &Path) {
        self.count = OomKills::open(cgroup);
    }

    pub(crate) fn close(&mut self) {
        self.count = None;
    }

    /// Becomes ready with `POLLPRI` when [`OomWatch::check`] could find something.
    pub(crate) fn fd(&self) -> Option<BorrowedFd<'_>> {
        self.count.as_ref().map(AsFd::as_fd)
    }

    /// Whether the kernel has ever killed one of the container's processes for want of memory.
    pub(crate) fn has_killed(&self) -> bool {
        self.killed
    }

    /// Whether the kernel has killed since the last check, and that is to be reported.
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
        let last = self.reported_at.replace(now);
        last.is_none_or(|last| now >= last + OOM_EVENT_INTERVAL)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn kills_that_follow_each_other_are_reported_once() {
        let (mut watch, start) = (OomWatch::default(), Instant::now());
        let after = |seconds| start + Duration::from_secs(seconds);
        assert!(watch.is_due(start));
        assert!(!watch.is_due(after(9)));
        // The interval begins again with each kill.
        assert!(!watch.is_due(after(18)));
        assert!(watch.is_due(after(28)));
    }
}
