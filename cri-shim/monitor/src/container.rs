//! A container: its state, and what all that is done with it needs.

use std::os::fd::OwnedFd;
use std::path::PathBuf;
use std::time::{Duration, Instant};

use super::connection::ClientId;
use super::console::Console;
use super::container_log::ContainerLog;
use super::oom::OomWatch;
use super::output::Output;
use super::own_log;
use super::runtime::RuntimeCommand;
use rrun_kernel::cgroup;
use rrun_kernel::errno::describe;
use rrun_kernel::signal as kernel_signal;
use rrun_protocol::{Create, ExitRecord, Failure, Phase};

pub(crate) struct Container {
    /// Ids can come back; this does not.
    pub(crate) serial: u64,
    pub(crate) spec: Create,
    pub(crate) state: State,
    /// The first process; 0 until it is there.
    pub(crate) pid: i32,
    /// A `start` is under way.
    pub(crate) starting: bool,
    pub(crate) output: Output,
    /// Our side of its stdin, for attach; a terminal's master does for both.
    pub(crate) stdin: Option<OwnedFd>,
    /// With `stdin_once`, the client that has it.
    pub(crate) stdin_client: Option<ClientId>,
    /// Where the runtime's `create` sends the terminal's master.
    pub(crate) console: Option<Console>,
    pub(crate) oom: OomWatch,
    pub(crate) deletion: Option<Deletion>,
    pub(crate) rollback: Option<Rollback>,
}

pub(crate) enum State {
    Creating,
    Created,
    /// `start` has been done.
    Running,
    /// The first process is gone.
    Terminating(Termination),
    Exited {
        exit: ExitRecord,
        cleanup: Cleanup,
    },
}

/// How far the end has come, once the first process is gone.
pub(crate) struct Termination {
    pub(crate) code: i32,
    pub(crate) finished_at: i64,
    /// When what was left in the cgroup is waited for no longer, once it has been killed.
    pub(crate) kill_deadline: Option<Instant>,
    /// Until the cgroup is checked again.
    pub(crate) check_interval: Duration,
    pub(crate) next_check: Option<Instant>,
    /// When the log is waited for no longer, once all has been read that goes into it.
    pub(crate) log_deadline: Option<Instant>,
}

/// The runtime's `delete` after a container's end.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Cleanup {
    Running,
    Done,
    Failed,
}

/// A removal that clients wait for.
pub(crate) struct Deletion {
    pub(crate) clients: Vec<ClientId>,
    /// When they get the answer that the first process does not die.
    pub(crate) deadline: Instant,
}

/// A create that failed and left nothing but, perhaps, an empty log.
pub(crate) struct Rollback {
    pub(crate) client: ClientId,
    pub(crate) failure: Failure,
    /// When the client is answered though the log is still there.
    pub(crate) deadline: Instant,
}

impl Container {
    /// A container whose create begins.
    pub(crate) fn new(serial: u64, spec: Create, log: ContainerLog) -> Self {
        Container {
            serial,
            spec,
            state: State::Creating,
            pid: 0,
            starting: false,
            output: Output::new(log),
            stdin: None,
            stdin_client: None,
            console: None,
            oom: OomWatch::default(),
            deletion: None,
            rollback: None,
        }
    }

    pub(crate) fn id(&self) -> &str {
        &self.spec.id
    }

    /// Whether its first process lives, as far as we know.
    pub(crate) fn has_init(&self) -> bool {
        matches!(self.state, State::Created | State::Running)
    }

    /// Whether this process is its first one.
    pub(crate) fn is_init(&self, pid: i32) -> bool {
        self.pid == pid && self.has_init()
    }

    /// As clients see its state; `None` while they can't.
    pub(crate) fn phase(&self) -> Option<Phase> {
        match &self.state {
            State::Creating => None,
            State::Created => Some(Phase::Created),
            State::Running | State::Terminating(_) => Some(Phase::Running),
            State::Exited { exit, .. } => Some(Phase::Exited(exit.clone())),
        }
    }

    /// When something is to be done though nothing has happened.
    pub(crate) fn next_check(&self) -> Option<Instant> {
        match (&self.state, &self.deletion) {
            (State::Creating, _) => self.rollback.as_ref().map(|rollback| rollback.deadline),
            (State::Terminating(termination), _) => termination.next_check,
            (State::Created | State::Running, Some(deletion)) => Some(deletion.deadline),
            _ => None,
        }
    }

    pub(crate) fn pid_file(&self) -> PathBuf {
        self.spec.bundle.join("init.pid")
    }

    /// `RUNTIME… VERB` for this container, without arguments yet.
    pub(crate) fn command(&self, verb: &'static str) -> RuntimeCommand {
        RuntimeCommand::new(&self.spec.runtime, verb, self.id())
    }

    pub(crate) fn delete_command(&self) -> RuntimeCommand {
        self.command("delete")
            .argument("--force")
            .argument(self.id())
    }

    /// Kills all that there is of the container. The end of the first process follows.
    pub(crate) fn kill_all(&self) {
        if let Err(errno) = cgroup::kill(&self.spec.cgroup) {
            own_log::write(&format!(
                "kill the cgroup of {}: {}",
                self.id(),
                describe(&errno.into())
            ));
        }
        if self.has_init() {
            self.signal_init(libc::SIGKILL);
        }
    }

    /// Signals the first process. Its pid is certain: only we could have reaped it.
    pub(crate) fn signal_init(&self, signal: i32) -> bool {
        let pid = rustix::process::Pid::from_raw(self.pid);
        match (pid, kernel_signal::by_number(signal)) {
            (Some(pid), Some(signal)) => rustix::process::kill_process(pid, signal).is_ok(),
            _ => false,
        }
    }
}

#[cfg(test)]
impl Container {
    /// A created container without processes, log or cgroup, and with a bundle of its own.
    pub(crate) fn for_test(name: &str) -> Self {
        let bundle = std::env::temp_dir().join(format!("rrun-{name}-{}", std::process::id()));
        let _ = std::fs::remove_dir_all(&bundle);
        std::fs::create_dir_all(&bundle).unwrap();
        let spec = Create {
            id: name.into(),
            cgroup: bundle.join("cgroup"),
            bundle,
            runtime: vec!["runtime".into()],
            log: None,
            terminal: false,
            stdin: false,
            stdin_once: false,
            native: true,
        };
        let wake = std::sync::Arc::new(std::fs::File::open("/dev/null").unwrap().into());
        let log = ContainerLog::open(None, &wake).unwrap();
        let mut container = Container::new(1, spec, log);
        container.state = State::Created;
        container
    }
}
