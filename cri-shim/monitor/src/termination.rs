//! The termination of a container.
//!
//! A termination has three steps. First, the monitor reaps the container's first process. Second,
//! when the cgroup is empty, the monitor completes the log, writes the exit record and reports the
//! exit. Third, the runtime's `delete` cleans up. A client that waits for the container's exit does
//! not wait for the third step.

use std::path::Path;
use std::time::{Duration, Instant};

use super::calls::Purpose;
use super::container::{Cleanup, Container, State, Termination};
use super::container_log::ReadBuffer;
use super::effect::Effect;
use super::exit;
use super::own_log;
use rrun_kernel::cgroup::{self, Survivors};
use rrun_kernel::errno::describe;
use rrun_protocol::{Event, ExitRecord, FailureKind};

/// The time for which the monitor waits for the exit of a container's remaining processes. The wait
/// begins when the monitor has killed these processes.
const KILL_TIMEOUT: Duration = Duration::from_secs(10);

/// The maximum time for which the monitor waits for a complete log before it reports a container's
/// exit. If the log is still incomplete after this time, the monitor assumes that the log's file
/// system hangs. The monitor then reports the exit first, and completes the log when the file
/// system works again.
const LOG_FLUSH_TIMEOUT: Duration = Duration::from_secs(5);

/// The time for which the monitor waits until it can reap a container's first process that has
/// exited or was killed. Until another process that traces the first process ends the trace, the
/// monitor cannot reap it.
const TRACER_TIMEOUT: Duration = Duration::from_secs(5);

/// The shortest interval between two checks of a cgroup that is not empty yet.
const MIN_CGROUP_CHECK_INTERVAL: Duration = Duration::from_millis(1);

/// The longest interval between two checks of a cgroup that is not empty yet.
const MAX_CGROUP_CHECK_INTERVAL: Duration = Duration::from_millis(50);

impl Termination {
    fn new(code: i32, finished_at: i64) -> Self {
        Termination {
            code,
            finished_at,
            killed: None,
            check_interval: MIN_CGROUP_CHECK_INTERVAL,
            next_check: None,
            log_deadline: None,
        }
    }

    /// Returns true if the cgroup is empty. Also returns true if [`KILL_TIMEOUT`] has passed since
    /// the monitor sent SIGKILL to the processes in the cgroup. The first call sends SIGKILL to all
    /// processes in the cgroup.
    fn is_cgroup_done(&mut self, cgroup: &Path) -> bool {
        if !cgroup::is_populated(cgroup) {
            return true;
        }
        let now = Instant::now();
        let path = cgroup.display();
        let (deadline, survivors) = self.killed.get_or_insert_with(|| {
            if let Err(errno) = cgroup::kill(cgroup) {
                own_log::write(&format!(
                    "kill all processes in {path}: {}",
                    describe(&errno.into())
                ));
            }
            (now + KILL_TIMEOUT, Survivors::new())
        });
        survivors.kill_if_due(cgroup);
        if now < *deadline {
            self.next_check = Some(now + self.check_interval);
            self.check_interval = (self.check_interval * 2).min(MAX_CGROUP_CHECK_INTERVAL);
            return false;
        }
        let seconds = KILL_TIMEOUT.as_secs();
        own_log::write(&format!(
            "processes in {path} are still alive {seconds} s after the monitor sent SIGKILL to them"
        ));
        true
    }
}

impl Container {
    /// Prepares for the exit of the container's first process, which has been killed, or whose exit
    /// the kernel has reported through [`Container::pidfd`].
    pub(crate) fn expect_exit(&mut self) {
        let check = Instant::now() + TRACER_TIMEOUT;
        self.zombie_check.get_or_insert(check);
    }

    /// Returns whether the monitor must check at this time whether the first process has exited
    /// without having been reaped. Sets the time of the next check.
    pub(crate) fn is_zombie_check_due(&mut self, now: Instant) -> bool {
        let is_due = self.zombie_check.is_some_and(|check| now >= check);
        if is_due {
            self.zombie_check = Some(now + TRACER_TIMEOUT);
        }
        is_due
    }

    /// Handles the exit of the container's first process. The monitor has reaped the process, or
    /// cannot reap it because another process traces it.
    pub(crate) fn init_exited(&mut self, code: i32) -> Vec<Effect> {
        self.pidfd = None;
        self.state = State::Terminating(Termination::new(code, exit::now()));
        if self.starting {
            vec![Effect::ShortenStart(self.serial)]
        } else {
            Vec::new()
        }
    }

    /// Reports an out-of-memory kill to the subscribers, if
    /// [`OomWatch::check`](super::oom::OomWatch::check) requires a report.
    pub(crate) fn check_oom(&mut self) -> Vec<Effect> {
        if !self.oom.check() {
            return Vec::new();
        }
        let id = self.id().to_owned();
        vec![Effect::Publish(Event::OutOfMemory { id })]
    }

    /// Continues the termination if its next step is possible now. After the exit was reported, this
    /// closes the log as soon as it is complete. The caller must call [`Container::check_oom`] first, for two reasons. The counter of out-of-memory kills exists
    /// only as long as the cgroup. The monitor must also report a kill before it reports the exit.
    pub(crate) fn continue_termination(&mut self, buffer: &mut ReadBuffer) -> Vec<Effect> {
        let termination = match &mut self.state {
            State::Terminating(termination) => termination,
            State::Exited { .. } => {
                self.output.close_written_log(buffer);
                return Vec::new();
            }
            _ => return Vec::new(),
        };
        // The monitor must answer the `start` in progress before it reports the exit.
        if self.starting || !termination.is_cgroup_done(&self.spec.cgroup) {
            return Vec::new();
        }
        if !self.is_log_done(buffer) {
            return Vec::new();
        }
        self.terminated(buffer)
    }

    /// Returns true if all output is in the log, or if the log's file system has hung for
    /// [`LOG_FLUSH_TIMEOUT`]. Reads the remaining output until the log accepts no more.
    fn is_log_done(&mut self, buffer: &mut ReadBuffer) -> bool {
        let State::Terminating(termination) = &mut self.state else {
            return false;
        };
        let now = Instant::now();
        let deadline = *termination.log_deadline.get_or_insert_with(|| {
            self.oom.close();
            now + LOG_FLUSH_TIMEOUT
        });
        if self.output.drain(buffer) && self.output.log().is_written() {
            return true;
        }
        if now < deadline {
            termination.next_check = Some(deadline);
            return false;
        }
        let (id, log) = (&self.spec.id, self.spec.log.as_deref());
        let path = log.unwrap_or(Path::new("")).display();
        own_log::write(&format!(
            "container {id}: the monitor reports its exit before its log is complete, because the file system of {path} hangs"
        ));
        true
    }

    /// Writes the exit record, and then reports the exit to all subscribers.
    fn terminated(&mut self, buffer: &mut ReadBuffer) -> Vec<Effect> {
        let State::Terminating(termination) = &self.state else {
            return Vec::new();
        };
        let exit = ExitRecord {
            code: termination.code,
            oom_killed: self.oom.has_killed(),
            finished_at: termination.finished_at,
        };
        let followers = self.output.end_followers();
        self.output.close_written_log(buffer);
        self.stdin = None;
        if let Err(error) = exit::record(&self.spec.bundle, &exit) {
            let bundle = self.spec.bundle.display();
            let reason = describe(&error);
            own_log::write(&format!("write the exit record in {bundle}: {reason}"));
        }
        let id = self.id().to_owned();
        self.state = State::Exited {
            exit: exit.clone(),
            cleanup: Cleanup::Running,
        };
        let mut effects = vec![Effect::Publish(Event::Exited { id, exit })];
        for (client, ended) in followers {
            effects.extend([Effect::Reply(client, ended), Effect::Disconnect(client)]);
        }
        effects.extend(self.clean_up());
        effects
    }

    /// Runs the runtime's `delete`, which also runs the poststop hooks.
    pub(crate) fn clean_up(&mut self) -> Vec<Effect> {
        self.set_cleanup(Cleanup::Running);
        let serial = self.serial;
        vec![Effect::run(
            self.delete_command(),
            Purpose::Delete { serial },
        )]
    }

    /// Handles the exit of the runtime's `delete`. `failure` is the reason why the `delete` failed,
    /// or `None` if it succeeded.
    ///
    /// The `delete` can fail, for example because the runtime has been uninstalled. Even then, the
    /// container must not remain for ever. For this reason, the monitor treats a container without
    /// processes and without a cgroup as deleted. After a failure, the monitor runs the runtime's
    /// `delete` again when a client requests the container's deletion, but at most once for each
    /// request. The runtime's files of the container would otherwise remain after a failure whose
    /// cause has passed.
    pub(crate) fn cleaned_up(&mut self, failure: Option<&str>) -> Vec<Effect> {
        if let Some(reason) = failure {
            own_log::write(&format!("delete container {}: {reason}", self.id()));
            if let Some(deletion) = self.deletion.as_mut().filter(|it| !it.repeated) {
                deletion.repeated = true;
                return self.clean_up();
            }
        }
        let _ = cgroup::kill(&self.spec.cgroup);
        let removed = cgroup::remove_tree(&self.spec.cgroup);
        if self.deletion.is_none() {
            self.set_cleanup(if failure.is_none() && removed.is_ok() {
                Cleanup::Done
            } else {
                Cleanup::Failed
            });
            return Vec::new();
        }
        let Err((_, errno)) = removed else {
            return vec![Effect::Forget(self.serial)];
        };
        let (id, path) = (self.id(), self.spec.cgroup.display());
        let reason = describe(&errno.into());
        let message = format!("delete container {id}: remove its cgroup {path}: {reason}");
        self.set_cleanup(Cleanup::Failed);
        let clients = self
            .deletion
            .take()
            .map(|it| it.clients)
            .unwrap_or_default();
        let fail = |client| Effect::fail(client, FailureKind::Runtime, message.as_str());
        clients.into_iter().map(fail).collect()
    }

    fn set_cleanup(&mut self, to: Cleanup) {
        if let State::Exited { cleanup, .. } = &mut self.state {
            *cleanup = to;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use rrun_protocol::Reply;

    #[test]
    fn an_exit_is_published_after_the_answer_to_start_and_after_its_record_is_on_disk() {
        let mut buffer = ReadBuffer::new();
        let mut container = Container::for_test("exit-after-start");
        let effects = container.start(7);
        assert!(matches!(
            &effects[..],
            [Effect::Run(_, Purpose::Start { client: 7, .. })]
        ));
        assert!(matches!(
            &container.start(8)[..],
            [Effect::Reply(8, Reply::Error(_))]
        ));

        assert!(matches!(
            &container.init_exited(137)[..],
            [Effect::ShortenStart(1)]
        ));
        assert!(container.continue_termination(&mut buffer).is_empty());
        let effects = container.start_ended(7, None);
        assert!(matches!(&effects[..], [Effect::Reply(7, Reply::Done)]));

        let effects = container.continue_termination(&mut buffer);
        let [
            Effect::Publish(Event::Exited { exit, .. }),
            Effect::Run(_, purpose),
        ] = &effects[..]
        else {
            panic!("{effects:?}");
        };
        assert_eq!(exit.code, 137);
        assert!(matches!(purpose, Purpose::Delete { serial: 1 }));
        let bundle = &container.spec.bundle;
        assert!(bundle.join("exit.json").is_file());
        std::fs::remove_dir_all(bundle).unwrap();
    }
}
