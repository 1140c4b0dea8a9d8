//! The requests that clients send for an existing container: start, kill, reopen its log, update and
//! delete.

use std::os::fd::OwnedFd;
use std::sync::Arc;
use std::time::Instant;

use super::calls::Purpose;
use super::connection::ClientId;
use super::container::{Cleanup, Container, Deletion, State};
use super::create::open_log;
use super::effect::Effect;
use super::own_log;
use super::runtime::{Stdio, memory_file};
use rrun_kernel::signal as kernel_signal;
use rrun_protocol::{FailureKind, Reply};

impl Container {
    pub(crate) fn start(&mut self, client: ClientId) -> Vec<Effect> {
        let id = self.id();
        if !matches!(self.state, State::Created) || self.starting {
            let message =
                format!("start container {id}: the container is not in the created state");
            return vec![Effect::fail(client, FailureKind::WrongState, message)];
        }
        let (serial, command) = (self.serial, self.command("start").argument(id));
        self.starting = true;
        vec![Effect::run(command, Purpose::Start { serial, client })]
    }

    /// Handles the exit of the runtime's `start`. `failure` is the reason why the `start` failed,
    /// or `None` if it succeeded. While a `start` is in progress, a container's termination does
    /// not continue. The caller must therefore call [`Container::continue_termination`] after this
    /// function.
    pub(crate) fn start_ended(&mut self, client: ClientId, failure: Option<String>) -> Vec<Effect> {
        self.starting = false;
        if let Some(reason) = failure {
            return vec![Effect::fail(client, FailureKind::Runtime, reason)];
        }
        if matches!(self.state, State::Created) {
            self.state = State::Running;
        }
        vec![Effect::Reply(client, Reply::Done)]
    }

    /// Handles an error that prevented the runtime's `start` from being run.
    pub(crate) fn start_not_run(&mut self, client: ClientId, message: String) -> Vec<Effect> {
        self.starting = false;
        vec![Effect::fail(client, FailureKind::Monitor, message)]
    }

    pub(crate) fn kill(&mut self, client: ClientId, signal: i32, all: bool) -> Vec<Effect> {
        let id = self.id();
        if kernel_signal::by_number(signal).is_none() {
            let message = format!("kill container {id}: the signal {signal} does not exist");
            return vec![Effect::fail(client, FailureKind::Monitor, message)];
        }
        let done = vec![Effect::Reply(client, Reply::Done)];
        match self.state {
            State::Creating => {
                let message =
                    format!("kill container {id}: the runtime is still creating the container");
                return vec![Effect::fail(client, FailureKind::WrongState, message)];
            }
            State::Terminating(_) | State::Exited { .. } => return done,
            State::Created | State::Running => {}
        }
        if all && signal == libc::SIGKILL {
            self.kill_all();
            return done;
        }
        if self.spec.native && !all {
            self.signal_init(signal);
            if signal == libc::SIGKILL {
                self.expect_exit();
            }
            return done;
        }
        let mut command = self.command("kill");
        if all {
            command = command.argument("--all");
        }
        let command = command.argument(id).argument(signal.to_string());
        vec![Effect::run(command, Purpose::Request { client })]
    }

    /// Opens the container's log at its path again. After the exit of the container, the log can be
    /// closed already. But a log rotation may have moved the file away shortly before, and expects a
    /// new file.
    pub(crate) fn reopen_log(&mut self, client: ClientId, wake: &Arc<OwnedFd>) -> Vec<Effect> {
        if self.output.log().file().is_none() && self.spec.log.is_some() {
            match open_log(&self.spec, wake) {
                Ok(log) => self.output.replace_log(log),
                Err(message) => {
                    return vec![Effect::fail(client, FailureKind::Monitor, message)];
                }
            }
        }
        self.output.reopen_log(client)
    }

    pub(crate) fn update(&self, client: ClientId, resources: &str) -> Vec<Effect> {
        let id = self.id();
        if !self.has_init() {
            let message = format!("update container {id}: the container is not running");
            return vec![Effect::fail(client, FailureKind::WrongState, message)];
        }
        let command = self
            .command("update")
            .option("--resources", Some("-"))
            .argument(id);
        match memory_file("input", resources.as_bytes()) {
            Ok(file) => {
                let command = command.stdio(Stdio::Input(file));
                vec![Effect::run(command, Purpose::Request { client })]
            }
            Err(error) => {
                let message = command.not_run(&error);
                vec![Effect::fail(client, FailureKind::Monitor, message)]
            }
        }
    }

    /// Deletes the container as soon as the operations in progress on it have finished. If the
    /// container's first process is still alive at `deadline`, the client receives an error.
    pub(crate) fn delete(&mut self, client: ClientId, deadline: Instant) -> Vec<Effect> {
        let deletion = self.deletion.get_or_insert_with(|| Deletion {
            clients: Vec::new(),
            deadline,
            repeated: false,
        });
        deletion.clients.push(client);
        match self.state {
            State::Creating
            | State::Terminating(_)
            | State::Exited {
                cleanup: Cleanup::Running,
                ..
            } => Vec::new(),
            State::Created | State::Running => {
                self.kill_all();
                Vec::new()
            }
            State::Exited {
                cleanup: Cleanup::Done,
                ..
            } => vec![Effect::Forget(self.serial)],
            State::Exited {
                cleanup: Cleanup::Failed,
                ..
            } => self.clean_up(),
        }
    }

    /// Handles a deletion whose deadline has passed while the container's first process is still
    /// alive.
    pub(crate) fn check_deletion(&mut self, now: Instant) -> Vec<Effect> {
        let is_overdue = |deletion: &mut Deletion| now >= deletion.deadline;
        let Some(deletion) = self.deletion.take_if(is_overdue) else {
            return Vec::new();
        };
        let (id, pid) = (self.id(), self.pid);
        let message = format!(
            "delete container {id}: the monitor killed its first process (pid {pid}), but the process has not exited"
        );
        own_log::write(&message);
        let fail = |client| Effect::fail(client, FailureKind::Monitor, message.as_str());
        deletion.clients.into_iter().map(fail).collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::container_log::ReadBuffer;

    fn exited_container(name: &str) -> Container {
        let mut container = Container::for_test(name);
        container.init_exited(0);
        let effects = container.continue_termination(&mut ReadBuffer::new());
        assert!(matches!(
            &effects[..],
            [Effect::Publish(_), Effect::Run(..)]
        ));
        container
    }

    #[test]
    fn a_deletion_waits_for_the_cleanup_in_progress() {
        let mut container = exited_container("delete-waits");
        for client in [5, 6] {
            assert!(container.delete(client, Instant::now()).is_empty());
        }
        assert!(matches!(
            &container.cleaned_up(None)[..],
            [Effect::Forget(1)]
        ));
        assert_eq!(container.deletion.unwrap().clients, [5, 6]);
        std::fs::remove_dir_all(&container.spec.bundle).unwrap();
    }

    #[test]
    fn a_deletion_repeats_a_failed_delete_of_the_runtime_once() {
        let mut container = exited_container("delete-twice");
        assert!(container.delete(5, Instant::now()).is_empty());
        let effects = container.cleaned_up(Some("the runtime failed"));
        assert!(matches!(
            &effects[..],
            [Effect::Run(_, Purpose::Delete { serial: 1 })]
        ));
        assert!(matches!(
            &container.cleaned_up(Some("the runtime failed again"))[..],
            [Effect::Forget(1)]
        ));
        std::fs::remove_dir_all(&container.spec.bundle).unwrap();
    }

    #[test]
    fn a_deletion_repeats_a_failed_cleanup_and_reports_the_remaining_cgroup() {
        let mut container = exited_container("delete-again");
        // This directory is used as the container's cgroup. The directory contains a regular file,
        // so the attempt to remove the cgroup fails.
        std::fs::create_dir(&container.spec.cgroup).unwrap();
        std::fs::write(container.spec.cgroup.join("file"), "").unwrap();
        assert!(container.cleaned_up(None).is_empty());
        let effects = container.delete(5, Instant::now());
        assert!(matches!(
            &effects[..],
            [Effect::Run(_, Purpose::Delete { serial: 1 })]
        ));
        let effects = container.cleaned_up(None);
        let [Effect::Reply(5, Reply::Error(failure))] = &effects[..] else {
            panic!("{effects:?}");
        };
        assert_eq!(failure.kind, FailureKind::Runtime);
        assert!(failure.message.contains("remove its cgroup"));
        std::fs::remove_dir_all(&container.spec.bundle).unwrap();
    }
}
