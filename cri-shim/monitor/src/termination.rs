//! A container's end, and its removal.
//!
//! The end has three steps: the first process is reaped; when nothing is left in the cgroup, the
//! log is completed, the record written and everybody told; then the runtime cleans up. Nobody
//! who waits for the exit waits for that last step.

use std::path::Path;
use std::time::{Duration, Instant};

use rustix::event::epoll::EventFlags;

use super::cgroup;
use super::connection::ClientId;
use super::container::{Container, State};
use super::container_log::{Pumped, Stream};
use super::exit;
use super::own_log;
use super::runtime::{Call, Stdio};
use super::serve::{Monitor, Purpose, Source};
use rrun_kernel::errno::describe;
use rrun_protocol::{Event, ExitRecord, FailureKind, Reply};

/// How long the rest of a container may take to die after it was killed.
const DYING: Duration = Duration::from_secs(10);

/// How long a container's end waits for its log. A file system that takes longer hangs; the log
/// is completed when it does so no more.
const LOGGING: Duration = Duration::from_secs(5);

/// Of kills for want of memory that follow upon each other only the first is told.
const OOM_PAUSE: Duration = Duration::from_secs(10);

/// The first and the longest pause between two looks at a cgroup that is not empty yet.
const MIN_PAUSE: Duration = Duration::from_millis(1);
const MAX_PAUSE: Duration = Duration::from_millis(50);

/// What a runtime that starts a container which has ended meanwhile may still take.
const HURRY: Duration = Duration::from_secs(10);

/// The first process is gone; is the rest?
pub(crate) struct Ending {
    code: i32,
    finished_at: i64,
    /// When what was left in the cgroup is given up, once it has been killed.
    give_up: Option<Instant>,
    pause: Duration,
    next_look: Option<Instant>,
    /// When the log is waited for no longer, once all has been read that goes into it.
    log_until: Option<Instant>,
}

impl Ending {
    pub(crate) fn next_look(&self) -> Option<Instant> {
        self.next_look
    }
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Cleanup {
    Running,
    Done,
    Failed,
}

/// Those who asked for the container's removal.
pub(crate) struct Deletion {
    clients: Vec<ClientId>,
    /// When they are told that its first process does not die.
    give_up: Instant,
}

impl Deletion {
    pub(crate) fn give_up(&self) -> Instant {
        self.give_up
    }
}

impl Container {
    pub(super) fn delete_call(&self, timeout: Duration) -> std::io::Result<Call> {
        let arguments = ["--force".as_ref(), self.spec.id.as_ref()];
        let command = &self.spec.runtime;
        Call::start(
            command,
            "delete",
            &self.spec.id,
            &arguments,
            &Stdio::Log,
            None,
            timeout,
        )
    }
}

impl Monitor {
    pub(super) fn output_ready(&mut self, serial: u64, stream: Stream) {
        let Some(container) = self.containers.iter_mut().find(|c| c.serial == serial) else {
            return;
        };
        if !container.output.log.has_room() {
            container.output.rest(stream);
            let serial = container.serial;
            let container = self.containers.iter().find(|c| c.serial == serial);
            if let Some(fd) = container.and_then(|container| container.output.stream(stream)) {
                self.unwatch(fd);
            }
            return;
        }
        match container.output.pump(stream, &mut self.buffers) {
            Pumped::Data => self.came = self.came.max(Some(self.buffers.fresh().len())),
            Pumped::Empty => {}
            Pumped::End => container.output.close(stream),
        }
    }

    /// Some log has done what was waited for: taken lines, been opened again, been completed.
    pub(super) fn logs_ready(&mut self) {
        let _ = rustix::io::read(&self.logs, &mut [0_u8; 8]);
        let serials: Vec<u64> = self.containers.iter().map(|c| c.serial).collect();
        for serial in serials {
            self.log_reopened(serial);
            self.continue_output(serial);
            self.continue_ending(serial);
            self.continue_undoing(serial);
        }
    }

    fn continue_output(&mut self, serial: u64) {
        let streams = self
            .container(serial)
            .map(|container| container.output.rested());
        let Some(container) = self.containers.iter().find(|c| c.serial == serial) else {
            return;
        };
        for stream in streams.unwrap_or_default() {
            let source = match stream {
                Stream::Stdout => Source::Stdout(serial),
                Stream::Stderr => Source::Stderr(serial),
            };
            if let Some(fd) = container.output.stream(stream) {
                let _ = self.watch(fd, source, EventFlags::IN);
            }
        }
    }

    fn log_reopened(&mut self, serial: u64) {
        let Some(container) = self.container(serial) else {
            return;
        };
        if container.reopening.is_empty() {
            return;
        }
        let Some(file) = &container.output.log.file else {
            return;
        };
        let Some(reopened) = file.reopened() else {
            return;
        };
        let path = file.path().display();
        let failure = reopened.err().map(|unfit| {
            let id = container.id();
            format!("open the log {path} of container {id} again: {unfit}")
        });
        for client in std::mem::take(&mut container.reopening) {
            match &failure {
                None => self.reply(client, &Reply::Done),
                Some(message) => self.fail(client, FailureKind::Monitor, message.as_str()),
            }
        }
    }

    pub(super) fn memory_ready(&mut self, serial: u64) {
        let Some(container) = self.container(serial) else {
            return;
        };
        match container.memory.as_mut().map(|memory| memory.rose()) {
            None | Some(Ok(false)) => {}
            Some(Ok(true)) => {
                container.oom_killed = true;
                let now = Instant::now();
                let told = container.oom_told.replace(now);
                if told.is_some_and(|told| now < told + OOM_PAUSE) {
                    return;
                }
                let id = container.id().to_owned();
                self.publish(Event::OutOfMemory { id });
            }
            Some(Err(_)) => container.memory = None,
        }
    }

    /// The first process has been reaped.
    pub(super) fn init_ended(&mut self, serial: u64, code: i32) {
        let Some(container) = self.container(serial) else {
            return;
        };
        let starting = container.starting;
        container.state = State::Ending(Ending {
            code,
            finished_at: exit::now(),
            give_up: None,
            pause: MIN_PAUSE,
            next_look: None,
            log_until: None,
        });
        if starting {
            for (call, purpose) in self.calls.values_mut() {
                if matches!(purpose, Purpose::Start { serial: of, .. } if *of == serial) {
                    call.hurry(HURRY);
                }
            }
        }
        self.continue_ending(serial);
    }

    /// Goes on with a container's end as far as that is possible now.
    pub(super) fn continue_ending(&mut self, serial: u64) {
        // The count must be read while the cgroup is there, and told before the end is.
        self.memory_ready(serial);
        let Some(container) = self.containers.iter_mut().find(|c| c.serial == serial) else {
            return;
        };
        // The answer to Start comes first.
        let State::Ending(ending) = &mut container.state else {
            return;
        };
        if container.starting {
            return;
        }
        if cgroup::populated(&container.spec.cgroup) {
            let now = Instant::now();
            let cgroup = &container.spec.cgroup;
            let give_up = *ending.give_up.get_or_insert_with(|| {
                if let Err(error) = cgroup::kill(cgroup) {
                    own_log::write(&format!(
                        "kill all in {}: {}",
                        cgroup.display(),
                        describe(&error)
                    ));
                }
                now + DYING
            });
            if now < give_up {
                ending.next_look = Some(now + ending.pause);
                ending.pause = (ending.pause * 2).min(MAX_PAUSE);
                return;
            }
            let seconds = DYING.as_secs();
            own_log::write(&format!(
                "processes in {} are alive {seconds} s after they were killed",
                cgroup.display()
            ));
        }
        let now = Instant::now();
        let log_until = *ending.log_until.get_or_insert_with(|| {
            container.output.drain(&mut self.buffers);
            container.memory = None;
            now + LOGGING
        });
        if !container.output.log.is_written() {
            if now < log_until {
                ending.next_look = Some(log_until);
                return;
            }
            own_log::write(&format!(
                "container {}: its end is told, though its log is not written: the file system of {} hangs",
                container.spec.id,
                container
                    .spec
                    .log
                    .as_deref()
                    .unwrap_or(Path::new(""))
                    .display()
            ));
        }
        let followers = container.output.end_followers();
        container.stdin = None;
        let exit = ExitRecord {
            code: ending.code,
            oom_killed: container.oom_killed,
            finished_at: ending.finished_at,
        };
        if let Err(error) = exit::record(&container.spec.bundle, &exit) {
            let bundle = container.spec.bundle.display();
            let said = describe(&error);
            own_log::write(&format!("write the exit record in {bundle}: {said}"));
        }
        let id = container.id().to_owned();
        container.state = State::Exited {
            exit: exit.clone(),
            cleanup: Cleanup::Running,
        };
        self.publish(Event::Exited { id, exit });
        for (client, ended) in followers {
            self.reply(client, &ended);
            self.drop_client(client);
        }
        self.clean_up(serial);
    }

    /// Runs the runtime's `delete`, which also runs the poststop hooks.
    fn clean_up(&mut self, serial: u64) {
        let timeout = self.timeout;
        let Some(container) = self.container(serial) else {
            return;
        };
        match container.delete_call(timeout) {
            Ok(call) => {
                container.set_cleanup(Cleanup::Running);
                self.calls
                    .insert(call.pid, (call, Purpose::Delete { serial }));
            }
            Err(error) => {
                let reason = format!("run the runtime: {}", describe(&error));
                self.cleaned_up(serial, Some(&reason));
            }
        }
    }

    pub(super) fn delete_ended(&mut self, serial: u64, call: &Call, code: i32) {
        let failure = (code != 0).then(|| call.reason(code, None));
        self.cleaned_up(serial, failure.as_deref());
    }

    /// A runtime that fails to delete, or is not there any more, must not keep a container for
    /// ever: without processes and without a cgroup it is gone as far as the node goes. It has a
    /// second chance when the container's deletion is asked for.
    fn cleaned_up(&mut self, serial: u64, failure: Option<&str>) {
        let Some(container) = self.container(serial) else {
            return;
        };
        if let Some(reason) = failure {
            own_log::write(&format!("delete container {}: {reason}", container.id()));
        }
        let _ = cgroup::kill(&container.spec.cgroup);
        let removed = cgroup::remove(&container.spec.cgroup);
        let Some(deletion) = container.deletion.take() else {
            container.set_cleanup(match failure.is_none() && removed.is_ok() {
                true => Cleanup::Done,
                false => Cleanup::Failed,
            });
            return;
        };
        if let Err(error) = removed {
            let (id, path) = (container.id(), container.spec.cgroup.display());
            let said = describe(&error);
            let message = format!("delete container {id}: remove its cgroup {path}: {said}");
            container.set_cleanup(Cleanup::Failed);
            for client in deletion.clients {
                self.fail(client, FailureKind::Runtime, message.as_str());
            }
            return;
        }
        container.deletion = Some(deletion);
        self.forget(serial);
    }

    /// Removes all that the monitor has of a container, and tells those who asked for it.
    pub(super) fn forget(&mut self, serial: u64) {
        let Some(at) = self.containers.iter().position(|c| c.serial == serial) else {
            return;
        };
        let container = self.containers.remove(at);
        let cgroup = &container.spec.cgroup;
        self.left.retain(|_, left| !left.is_below(cgroup));
        exit::forget(&container.spec.bundle);
        for client in container.deletion.map(|d| d.clients).unwrap_or_default() {
            self.reply(client, &Reply::Done);
        }
    }

    pub(super) fn delete(&mut self, client: ClientId, id: &str) {
        let give_up = Instant::now() + self.timeout;
        let Some(container) = self.containers.iter_mut().find(|c| c.id() == id) else {
            return self.reply(client, &Reply::Done);
        };
        let serial = container.serial;
        let deletion = container.deletion.get_or_insert_with(|| Deletion {
            clients: Vec::new(),
            give_up,
        });
        deletion.clients.push(client);
        match container.state {
            // What is under way goes on from where it ends.
            State::Creating | State::Ending(_) => {}
            State::Created | State::Running => container.kill_all(),
            State::Exited { cleanup, .. } => match cleanup {
                Cleanup::Running => {}
                Cleanup::Done => self.forget(serial),
                Cleanup::Failed => self.clean_up(serial),
            },
        }
    }

    /// A container's time has come: see [`Container::next_check`].
    pub(super) fn container_due(&mut self, serial: u64) {
        let Some(container) = self.container(serial) else {
            return;
        };
        match container.state {
            State::Creating => return self.continue_undoing(serial),
            State::Ending(_) => return self.continue_ending(serial),
            _ => {}
        }
        let Some(deletion) = container.deletion.take() else {
            return;
        };
        let (id, pid) = (container.id(), container.pid);
        let message = format!("delete container {id}: its first process {pid} does not die");
        own_log::write(&message);
        for client in deletion.clients {
            self.fail(client, FailureKind::Monitor, message.as_str());
        }
    }
}

impl Container {
    fn set_cleanup(&mut self, to: Cleanup) {
        if let State::Exited { cleanup, .. } = &mut self.state {
            *cleanup = to;
        }
    }
}
