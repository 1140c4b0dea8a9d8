//! The cgroups of killed execs. Processes can survive the kill of their cgroup ([`Survivors`]), so
//! the monitor kills them again until the cgroup is empty.

use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use rustix::io::Errno;

use super::own_log;
use rrun_kernel::cgroup::{self, Survivors};

/// The time for which the monitor kills the remaining processes of a killed exec.
const KILL_TIMEOUT: Duration = Duration::from_secs(10);

#[derive(Default)]
pub(crate) struct KilledExecs(Vec<KilledExec>);

struct KilledExec {
    cgroup: PathBuf,
    survivors: Survivors,
    deadline: Instant,
}

impl KilledExecs {
    /// Kills all processes in the cgroup. Returns false if the cgroup was empty or the kill failed. If
    /// a process holds a lease on cgroup.kill, [`KilledExecs::check`] kills the processes.
    pub(crate) fn kill(&mut self, cgroup: &Path) -> bool {
        if !cgroup::is_populated(cgroup) {
            return false;
        }
        if !matches!(cgroup::kill(cgroup), Ok(()) | Err(Errno::AGAIN)) {
            return false;
        }
        if !self.0.iter().any(|it| it.cgroup == cgroup) {
            self.0.push(KilledExec {
                cgroup: cgroup.to_owned(),
                survivors: Survivors::new(),
                deadline: Instant::now() + KILL_TIMEOUT,
            });
        }
        true
    }

    /// Returns the time at which [`KilledExecs::check`] must be called again.
    pub(crate) fn next_check(&self) -> Option<Instant> {
        self.0.iter().map(|it| it.survivors.next).min()
    }

    /// Kills the processes that are still in the cgroups.
    pub(crate) fn check(&mut self, now: Instant) {
        self.0.retain_mut(|it| {
            if now < it.survivors.next {
                return true;
            }
            if !cgroup::is_populated(&it.cgroup) {
                return false;
            }
            it.survivors.kill_if_due(&it.cgroup);
            let in_time = now < it.deadline;
            if !in_time {
                own_log::write(&format!(
                    "processes in {} are still alive {} s after the monitor sent SIGKILL to them",
                    it.cgroup.display(),
                    KILL_TIMEOUT.as_secs()
                ));
            }
            in_time
        });
    }
}
