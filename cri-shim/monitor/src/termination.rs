//! A container's end.
//!
//! It has three steps: the first process is reaped; when nothing is left in the cgroup, the log is
//! completed, the record written and everybody informed; then the runtime cleans up. A client that
//! waits for the exit does not wait for that last step.

use std::path::Path;
use std::time::{Duration, Instant};

use super::calls::Purpose;
use super::container::{Cleanup, Container, State, Termination};
use super::container_log::ReadBuffer;
use super::effect::Effect;
use super::exit;
use super::own_log;
use rrun_kernel::cgroup;
use rrun_kernel::errno::describe;
use rrun_protocol::{Event, ExitRecord, FailureKind};

/// How long the rest of a container may take to die after it was killed.
const KILL_TIMEOUT: Duration = Duration::from_secs(10);

/// How long a container's end waits for its log. A file system that takes longer hangs; the log
/// is completed when it does so no more.
const LOG_FLUSH_TIMEOUT: Duration = Duration::from_secs(5);

/// The first and the longest pause between two checks of a cgroup that is not empty yet.
const MIN_CGROUP_CHECK_INTERVAL: Duration = Duration::from_millis(1);
const MAX_CGROUP_CHECK_INTERVAL: Duration = Duration::from_millis(50);

impl Termination {
    fn new(code: i32, finished_at: i64) -> Self {
        Termination {
            code,
            finished_at,
            kill_deadline: None,
            check_interval: MIN_CGROUP_CHECK_INTERVAL,
            next_check: None,
            log_deadline: None,
        }
    }

    /// Whether nothing is left in the cgroup, or what is left does not die. Kills it at first.
    fn is_cgroup_done(&mut self, cgroup: &Path) -> bool {
        if !cgroup::is_populated(cgroup) {
            return true;
        }
        let now = Instant::now();
        let path = cgroup.display();
        let deadline = *self.kill_deadline.get_or_insert_with(|| {
            if let Err(errno) = cgroup::kill(cgroup) {
                own_log::write(&format!("kill all in {path}: {}", describe(&errno.into())));
            }
            now + KILL_TIMEOUT
        });
        if now < deadline {
            self.next_check = Some(now + self.check_interval);
            self.check_interval = (self.check_interval * 2).min(MAX_CGROUP_CHECK_INTERVAL);
            return false;
        }
        let seconds = KILL_TIMEOUT.as_secs();
        own_log::write(&format!(
            "processes in {path} are alive {seconds} s after they were killed"
        ));
        true
    }
}

impl Container {
    /// The first process has been reaped.
    pub(crate) fn init_exited(&mut self, code: i32) -> Vec<Effect> {
        self.state = State::Terminating(Termination::new(code, exit::now()));
        if self.starting {
            vec![Effect::ShortenStart(self.serial)]
        } else {
            Vec::new()
        }
    }

    /// Reports that the kernel killed for want of memory, if it did.
    pub(crate) fn check_oom(&mut self) -> Vec<Effect> {
        if !self.oom.check() {
            return Vec::new();
        }
        let id = self.id().to_owned();
        vec![Effect::Publish(Event::OutOfMemory { id })]
    }

    /// Goes on with the end as far as that is possible now. Check for out-of-memory kills before:
    /// the count must be read while the cgroup is there, and reported before the end is.
    pub(crate) fn continue_termination(&mut self, buffer: &mut ReadBuffer) -> Vec<Effect> {
        let State::Terminating(termination) = &mut self.state else {
            return Vec::new();
        };
        // The answer to Start comes first.
        if self.starting || !termination.is_cgroup_done(&self.spec.cgroup) {
            return Vec::new();
        }
        if !self.is_log_done(buffer) {
            return Vec::new();
        }
        self.terminated()
    }

    /// Whether all output is in the log, or its file system hangs. Reads the output at first.
    fn is_log_done(&mut self, buffer: &mut ReadBuffer) -> bool {
        let State::Terminating(termination) = &mut self.state else {
            return false;
        };
        let now = Instant::now();
        let deadline = *termination.log_deadline.get_or_insert_with(|| {
            self.output.drain(buffer);
            self.oom.close();
            now + LOG_FLUSH_TIMEOUT
        });
        if self.output.log().is_written() {
            return true;
        }
        if now < deadline {
            termination.next_check = Some(deadline);
            return false;
        }
        let (id, log) = (&self.spec.id, self.spec.log.as_deref());
        let path = log.unwrap_or(Path::new("")).display();
        own_log::write(&format!(
            "container {id}: its end is told, though its log is not written: the file system of {path} hangs"
        ));
        true
    }

    /// Records the exit, and then tells everybody.
    fn terminated(&mut self) -> Vec<Effect> {
        let State::Terminating(termination) = &self.state else {
            return Vec::new();
        };
        let exit = ExitRecord {
            code: termination.code,
            oom_killed: self.oom.has_killed(),
            finished_at: termination.finished_at,
        };
        let followers = self.output.end_followers();
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

    /// The runtime's `delete` has ended, with this reason if it failed.
    ///
    /// A runtime that fails to delete, or is not there any more, must not keep a container for
    /// ever: without processes and without a cgroup it is gone as far as the node goes. The
    /// runtime has a second chance when a client asks for the container's deletion.
    pub(crate) fn cleaned_up(&mut self, failure: Option<&str>) -> Vec<Effect> {
        if let Some(reason) = failure {
            own_log::write(&format!("delete container {}: {reason}", self.id()));
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
    fn an_exit_waits_for_the_answer_to_start_and_is_on_the_disk_when_it_is_published() {
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
