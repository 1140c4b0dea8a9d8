//! Processes that are started in a running container.

use std::collections::BTreeMap;
use std::os::fd::OwnedFd;
use std::path::{Path, PathBuf};

use rustix::event::epoll::EventFlags;
use rustix::io::Errno;

use super::calls::Purpose;
use super::connection::ClientId;
use super::console::Console;
use super::container::{Container, State};
use super::descendants;
use super::effect::Effect;
use super::exec_cgroup::{ExecCgroup, LeftoverCgroup, MAX_LEFTOVERS};
use super::own_log;
use super::poller::{EventSource, Poller};
use super::runtime::{Call, RuntimeCommand, Stdio, memory_file, path_of, read_pid};
use super::serials::Serials;
use rrun_kernel::errno::describe;
use rrun_protocol::{Exec, FailureKind};

/// All execs of the pod.
#[derive(Default)]
pub(crate) struct Execs {
    /// By their numbers, those whose runtime is at work.
    starting: BTreeMap<u64, StartingExec>,
    /// By their pids, those that run.
    running: BTreeMap<i32, ExecProcess>,
    /// The cgroups of execs that have ended and left something behind.
    leftovers: BTreeMap<u64, LeftoverCgroup>,
}

/// An exec whose runtime is still at work.
pub(crate) struct StartingExec {
    client: ClientId,
    pid_file: PathBuf,
    console: Option<Console>,
    scope: Scope,
}

/// An exec's process.
pub(crate) struct ExecProcess {
    client: ClientId,
    pid: i32,
    scope: Scope,
}

/// An exec that the runtime has started.
pub(crate) struct StartedExec {
    pub(crate) process: ExecProcess,
    /// The terminal's master, if there is one, or why it could not be had.
    pub(crate) terminal: Result<Option<OwnedFd>, Errno>,
}

/// An exec that the runtime did not start, or not in time.
pub(crate) struct FailedExec {
    client: ClientId,
    reason: String,
    /// A runtime that was killed for its slowness may have got so far as to start the process.
    pid: Option<i32>,
    scope: Scope,
}

/// Where an exec's processes are.
struct Scope {
    /// The container's first process and its cgroup.
    init: i32,
    container: PathBuf,
    /// The exec's own cgroup, where there could be one.
    own: Option<ExecCgroup>,
}

impl Execs {
    /// Begins an exec. `number` is given once in the monitor's life, `dir` is the monitor's,
    /// `fds` are the process's stdio.
    pub(crate) fn begin(
        &mut self,
        number: u64,
        client: ClientId,
        exec: &Exec,
        fds: Vec<OwnedFd>,
        container: &Container,
        dir: &Path,
    ) -> Vec<Effect> {
        let id = &exec.id;
        if !matches!(container.state, State::Running) {
            let message = format!("exec in container {id}: it is not running");
            return vec![Effect::fail(client, FailureKind::WrongState, message)];
        }
        let pid_file = dir.join(format!("exec-{number}.pid"));
        // What runs in a kernel of its own is in no cgroup of this one.
        let own = if container.spec.native {
            ExecCgroup::make(&container.spec.cgroup, number)
        } else {
            None
        };
        let scope = Scope {
            init: container.pid,
            container: container.spec.cgroup.clone(),
            own,
        };
        let cgroup = scope.own.as_ref().map(ExecCgroup::name);
        match exec_command(container, number, exec, fds, &pid_file, cgroup) {
            Ok((command, console)) => {
                let starting = StartingExec {
                    client,
                    pid_file,
                    console,
                    scope,
                };
                self.starting.insert(number, starting);
                vec![Effect::run(command, Purpose::Exec { number })]
            }
            Err(error) => {
                let message = format!("exec in container {id}: {}", describe(&error));
                vec![Effect::fail(client, FailureKind::Monitor, message)]
            }
        }
    }

    /// Takes an exec whose runtime has ended, or could not be run.
    pub(crate) fn take_starting(&mut self, number: u64) -> Option<StartingExec> {
        self.starting.remove(&number)
    }

    pub(crate) fn add_running(&mut self, process: ExecProcess) {
        self.running.insert(process.pid, process);
    }

    /// Takes an exec whose process has ended.
    pub(crate) fn take_running(&mut self, pid: i32) -> Option<ExecProcess> {
        self.running.remove(&pid)
    }

    /// The client is gone, and so nobody is left to end or read its process.
    pub(crate) fn client_gone(&mut self, client: ClientId) {
        for process in self.running.values() {
            if process.client == client {
                process.kill();
            }
        }
    }

    /// Removes an exec's cgroup now, or when what was left in it has ended.
    pub(crate) fn remove_cgroup(
        &mut self,
        cgroup: Option<ExecCgroup>,
        poller: &Poller,
        serials: &mut Serials,
    ) {
        let Some(leftover) = cgroup.and_then(ExecCgroup::into_leftover) else {
            return;
        };
        if leftover.is_gone() || self.leftovers.len() >= MAX_LEFTOVERS {
            return;
        }
        let number = serials.next();
        let source = EventSource::ExecCgroup(number);
        if poller.watch(&leftover, source, EventFlags::PRI).is_ok() {
            self.leftovers.insert(number, leftover);
        }
    }

    pub(crate) fn cgroup_changed(&mut self, number: u64) {
        let leftover = self.leftovers.get(&number);
        if leftover.is_some_and(LeftoverCgroup::is_gone) {
            self.leftovers.remove(&number);
        }
    }

    /// The container whose cgroup this is has been removed.
    pub(crate) fn container_gone(&mut self, cgroup: &Path) {
        self.leftovers
            .retain(|_, leftover| !leftover.is_below(cgroup));
    }
}

/// The runtime's command, and the socket on which it sends the terminal, if there is one.
/// `cgroup` is relative to the container's.
fn exec_command(
    container: &Container,
    number: u64,
    exec: &Exec,
    fds: Vec<OwnedFd>,
    pid_file: &Path,
    cgroup: Option<&str>,
) -> std::io::Result<(RuntimeCommand, Option<Console>)> {
    let process = OwnedFd::from(memory_file("process", exec.process.as_bytes())?);
    let console = exec.terminal.then(|| Console::open(number)).transpose()?;
    let stdio = match <[OwnedFd; 3]>::try_from(fds) {
        Ok(stdio) if !exec.terminal => Stdio::Container(stdio),
        Err(none) if none.is_empty() && exec.terminal => Stdio::Log,
        other => {
            let count = other.map_or_else(|fds| fds.len(), |fds| fds.len());
            let message = format!("{count} descriptors came with the request");
            return Err(std::io::Error::other(message));
        }
    };
    let command = container
        .command("exec")
        .stdio(stdio)
        .argument("--detach")
        .option("--process", Some(path_of(&process)))
        .option("--pid-file", Some(pid_file))
        .option("--console-socket", console.as_ref().map(Console::path))
        .option("--cgroup", cgroup)
        .argument(&exec.id)
        .input(Some(process));
    Ok((command, console))
}

impl StartingExec {
    pub(crate) fn client(&self) -> ClientId {
        self.client
    }

    /// The runtime has ended with this status.
    pub(crate) fn finish(self, call: &Call, code: i32) -> Result<StartedExec, FailedExec> {
        let pid = read_pid(&self.pid_file);
        let _ = std::fs::remove_file(&self.pid_file);
        let (client, scope) = (self.client, self.scope);
        match pid {
            Some(pid) if code == 0 => {
                let terminal = self.console.as_ref().map(Console::receive).transpose();
                let process = ExecProcess { client, pid, scope };
                Ok(StartedExec { process, terminal })
            }
            pid => {
                let reason = if code == 0 {
                    "the runtime started a process, but did not tell its pid".into()
                } else {
                    call.reason(code, None)
                };
                Err(FailedExec {
                    client,
                    reason,
                    pid,
                    scope,
                })
            }
        }
    }
}

impl FailedExec {
    pub(crate) fn client(&self) -> ClientId {
        self.client
    }

    /// Why it failed.
    pub(crate) fn reason(&self) -> &str {
        &self.reason
    }

    /// The process, if the runtime got so far as to start it.
    pub(crate) fn pid(&self) -> Option<i32> {
        self.pid
    }

    /// Kills what there is of it, and returns its cgroup. `reaped`: its first process is gone.
    pub(crate) fn kill(self, reaped: bool) -> Option<ExecCgroup> {
        match self.pid {
            Some(pid) if !reaped => self.scope.kill(pid),
            _ => {
                if let Some(own) = &self.scope.own {
                    own.kill();
                }
            }
        }
        self.scope.own
    }
}

impl ExecProcess {
    pub(crate) fn client(&self) -> ClientId {
        self.client
    }

    pub(crate) fn pid(&self) -> i32 {
        self.pid
    }

    /// Kills the process, which has not been reaped, and what came from it.
    pub(crate) fn kill(&self) {
        self.scope.kill(self.pid);
    }

    /// Its cgroup, once it has ended.
    pub(crate) fn into_cgroup(self) -> Option<ExecCgroup> {
        self.scope.own
    }
}

impl Scope {
    /// Kills the exec's first process, which has not been reaped, and what came from it.
    fn kill(&self, pid: i32) {
        if self.own.as_ref().is_some_and(ExecCgroup::kill) {
            return;
        }
        if !descendants::kill(&self.container, pid, self.init) {
            own_log::write(&format!("exec {pid} forks faster than it can be killed"));
        }
    }
}
