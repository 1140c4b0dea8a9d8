//! A container's state, and the data that all operations on the container need.

use std::os::fd::OwnedFd;
use std::path::PathBuf;
use std::time::{Duration, Instant};

use rustix::io::Errno;
use rustix::process::{Pid, PidfdFlags, pidfd_open};

use super::connection::ClientId;
use super::console::Console;
use super::container_log::ContainerLog;
use super::joined::Owner;
use super::oom::OomWatch;
use super::output::Output;
use super::own_log;
use super::runtime::RuntimeCommand;
use rrun_kernel::cgroup::{self, Survivors};
use rrun_kernel::errno::describe;
use rrun_kernel::signal as kernel_signal;
use rrun_protocol::{Create, ExitRecord, Failure, Phase};

pub(crate) struct Container {
    /// The container's serial number, which the monitor never reuses. A container's id, by
    /// contrast, can be reused.
    pub(crate) serial: u64,
    pub(crate) spec: Create,
    pub(crate) state: State,
    /// The pid of the container's first process. The pid is 0 until the process exists.
    pub(crate) pid: i32,
    /// The time of the runtime's `create`. `None` until the `create` has ended.
    pub(crate) create_called: Option<Instant>,
    /// True while the runtime's `start` is in progress.
    pub(crate) starting: bool,
    pub(crate) output: Output,
    /// The monitor's end of the container's stdin pipe, to which attached clients write. `None` if
    /// the container has a terminal, because clients then write to the terminal's master.
    pub(crate) stdin: Option<OwnedFd>,
    /// The only client that is allowed to write to stdin. `None` if the container does not have
    /// `stdin_once`, or if no client has attached to stdin.
    pub(crate) stdin_client: Option<ClientId>,
    /// The socket on which the runtime's `create` sends the terminal's master.
    pub(crate) console: Option<Console>,
    pub(crate) oom: OomWatch,
    pub(crate) deletion: Option<Deletion>,
    pub(crate) rollback: Option<Rollback>,
    /// The processes whose namespaces the container enters ([`Create::namespaces_of`]).
    pub(crate) joined: Vec<Owner>,
    /// The descriptor through which the kernel reports the exit of the first process, even if the
    /// monitor cannot reap the process. `None` after this report.
    pub(crate) pidfd: Option<OwnedFd>,
    /// The time at which the monitor checks whether the first process has exited without having
    /// been reaped. `None` as long as the process is assumed to be alive.
    pub(crate) zombie_check: Option<Instant>,
}

pub(crate) enum State {
    Creating,
    Created,
    /// The runtime's `start` has succeeded.
    Running,
    /// The container's first process has exited, and the next steps of the termination are in
    /// progress.
    Terminating(Termination),
    Exited {
        exit: ExitRecord,
        cleanup: Cleanup,
    },
}

/// The progress of a container's termination after the exit of its first process.
pub(crate) struct Termination {
    pub(crate) code: i32,
    pub(crate) finished_at: i64,
    /// The deadline for the exit of the killed processes in the cgroup, and the search for those
    /// that survive the kill. `None` until the monitor has killed these processes.
    pub(crate) killed: Option<(Instant, Survivors)>,
    /// The interval until the next check of the cgroup.
    pub(crate) check_interval: Duration,
    pub(crate) next_check: Option<Instant>,
    /// The deadline for the completion of the log. `None` until the cgroup is empty.
    pub(crate) log_deadline: Option<Instant>,
}

/// The state of the runtime's `delete` after a container's exit.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Cleanup {
    Running,
    Done,
    Failed,
}

/// A deletion that is in progress, and the clients that wait for its result.
pub(crate) struct Deletion {
    pub(crate) clients: Vec<ClientId>,
    /// The deadline for the exit of the container's first process. After this deadline, the clients
    /// receive an error.
    pub(crate) deadline: Instant,
    /// True if the runtime's `delete` was repeated after a failure.
    pub(crate) repeated: bool,
}

/// A failed create request that the monitor has not answered yet. The log's thread first removes
/// the container's log file if the file is empty.
pub(crate) struct Rollback {
    pub(crate) client: ClientId,
    pub(crate) failure: Failure,
    /// The deadline for the removal of the log file. After this deadline, the monitor answers the
    /// client even if the file still exists.
    pub(crate) deadline: Instant,
}

impl Container {
    /// Returns a container in the state `Creating`.
    pub(crate) fn new(serial: u64, spec: Create, log: ContainerLog) -> Self {
        Container {
            serial,
            spec,
            state: State::Creating,
            pid: 0,
            create_called: None,
            starting: false,
            output: Output::new(log),
            stdin: None,
            stdin_client: None,
            console: None,
            oom: OomWatch::default(),
            deletion: None,
            rollback: None,
            joined: Vec::new(),
            pidfd: None,
            zombie_check: None,
        }
    }

    pub(crate) fn id(&self) -> &str {
        &self.spec.id
    }

    /// Returns whether the container's first process is alive, according to the state that the
    /// monitor has recorded.
    pub(crate) fn has_init(&self) -> bool {
        matches!(self.state, State::Created | State::Running)
    }

    /// Returns whether the process with this pid is the container's first process.
    pub(crate) fn is_init(&self, pid: i32) -> bool {
        self.pid == pid && self.has_init()
    }

    /// Returns the container's state as clients see it. Returns `None` while the runtime is
    /// creating the container. Clients cannot see the container during this time.
    pub(crate) fn phase(&self) -> Option<Phase> {
        match &self.state {
            State::Creating => None,
            State::Created => Some(Phase::Created),
            State::Running | State::Terminating(_) => Some(Phase::Running),
            State::Exited { exit, .. } => Some(Phase::Exited(exit.clone())),
        }
    }

    /// Returns the time at which the event loop must check the container again, even if no event
    /// has arrived.
    pub(crate) fn next_check(&self) -> Option<Instant> {
        match (&self.state, &self.deletion) {
            (State::Creating, _) => self.rollback.as_ref().map(|rollback| rollback.deadline),
            (State::Terminating(termination), _) => termination.next_check,
            (State::Created | State::Running, deletion) => {
                let deadline = deletion.as_ref().map(|deletion| deletion.deadline);
                self.zombie_check.into_iter().chain(deadline).min()
            }
            _ => None,
        }
    }

    pub(crate) fn pid_file(&self) -> PathBuf {
        self.spec.bundle.join("init.pid")
    }

    /// Returns the command `RUNTIME… VERB` for this container, without further arguments.
    pub(crate) fn command(&self, verb: &'static str) -> RuntimeCommand {
        RuntimeCommand::new(&self.spec.runtime, verb, self.id())
    }

    pub(crate) fn delete_command(&self) -> RuntimeCommand {
        self.command("delete")
            .argument("--force")
            .argument(self.id())
    }

    /// Kills all processes of the container. The event loop handles the exit of the first process
    /// later, when it reaps that process.
    pub(crate) fn kill_all(&mut self) {
        if let Err(errno) = cgroup::kill(&self.spec.cgroup) {
            own_log::write(&format!(
                "kill all processes of container {}: {}",
                self.id(),
                describe(&errno.into())
            ));
        }
        if self.has_init() {
            self.signal_init(libc::SIGKILL);
            self.expect_exit();
        }
    }

    /// Opens [`Container::pidfd`], and returns it. The monitor has not reaped the first process yet.
    pub(crate) fn open_pidfd(&mut self) -> Result<&OwnedFd, Errno> {
        let pid = Pid::from_raw(self.pid).ok_or(Errno::SRCH)?;
        let pidfd = pidfd_open(pid, PidfdFlags::empty())?;
        Ok(self.pidfd.insert(pidfd))
    }

    /// Sends a signal to the container's first process. The pid still belongs to this process,
    /// because the monitor has not reaped the process yet. Only the monitor reaps this process.
    pub(crate) fn signal_init(&self, signal: i32) -> bool {
        let pid = Pid::from_raw(self.pid);
        match (pid, kernel_signal::by_number(signal)) {
            (Some(pid), Some(signal)) => rustix::process::kill_process(pid, signal).is_ok(),
            _ => false,
        }
    }
}

#[cfg(test)]
impl Container {
    /// Returns a container in the state `Created`, for a unit test. The container has a bundle in a
    /// temporary directory, but no processes, log or cgroup.
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
            namespaces_of: Vec::new(),
        };
        let wake = std::sync::Arc::new(std::fs::File::open("/dev/null").unwrap().into());
        let log = ContainerLog::open(None, &wake).unwrap();
        let mut container = Container::new(1, spec, log);
        container.state = State::Created;
        container
    }
}
