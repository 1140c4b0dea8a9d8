//! Execs, which are processes that clients start in a running container.

use std::collections::BTreeMap;
use std::os::fd::OwnedFd;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use rustix::fs::FileType;
use rustix::io::Errno;
use rustix::pipe::{PipeFlags, pipe_with};
use rustix::process::{Pid, Signal, kill_process};

use super::calls::{Calls, Purpose};
use super::clients::Clients;
use super::connection::ClientId;
use super::console::Console;
use super::container::{Container, State};
use super::descendants;
use super::effect::Effect;
use super::exec_cgroup::ExecCgroup;
use super::killed_execs::KilledExecs;
use super::leftovers::Leftovers;
use super::own_log;
use super::relay::{Direction, Relay};
use super::runtime::{Call, RuntimeCommand, Stdio, memory_file, path_of, read_pid};
use rrun_kernel::errno::describe;
use rrun_protocol::{Exec, FailureKind};

/// The time between the kill of an exec and the check whether its first process has exited without
/// having been reaped. Also the time between two such checks.
const ZOMBIE_CHECK_INTERVAL: Duration = Duration::from_secs(1);

/// All execs of the pod.
#[derive(Default)]
pub(crate) struct Execs {
    /// The execs whose runtime call is still in progress, with the exec's number as the key.
    starting: BTreeMap<u64, StartingExec>,
    /// The running execs, with the pid of the exec's first process as the key.
    running: BTreeMap<i32, ExecProcess>,
    pub(crate) killed: KilledExecs,
    pub(crate) leftovers: Leftovers,
}

/// An exec whose runtime call is still in progress.
pub(crate) struct StartingExec {
    client: ClientId,
    pid_file: PathBuf,
    terminal: Option<StartingTerminal>,
    scope: Scope,
}

/// The terminal of an exec whose runtime call is still in progress.
struct StartingTerminal {
    /// The socket on which the runtime sends the terminal's master.
    console: Console,
    /// The client's socket for the terminal's data. `None` if the client is of an earlier version,
    /// which uses the master itself.
    socket: Option<OwnedFd>,
}

/// A running exec, with the pid of its first process.
pub(crate) struct ExecProcess {
    client: ClientId,
    pid: i32,
    scope: Scope,
    /// The time at which the monitor checks whether the killed first process has exited without
    /// having been reaped. `None` until the monitor kills the exec.
    zombie_check: Option<Instant>,
}

/// An exec that the runtime has started.
pub(crate) struct StartedExec {
    pub(crate) process: ExecProcess,
    /// `Ok(None)` if the exec has no terminal. `Err` if the monitor could not receive the terminal's
    /// master.
    pub(crate) terminal: Result<Option<StartedTerminal>, Errno>,
}

/// The terminal of an exec that the runtime has started.
pub(crate) enum StartedTerminal {
    /// The monitor transfers the data of the terminal.
    Relayed([Relay; 2]),
    /// The client, which is of an earlier version, uses the terminal's master itself.
    Passed(OwnedFd),
}

/// An exec whose runtime call failed or exceeded its deadline.
pub(crate) struct FailedExec {
    client: ClientId,
    reason: Box<str>,
    /// The pid of the exec's process, if the runtime reported a pid. Even a failed exec may have a
    /// process. For example, the runtime may already have started the process when the monitor
    /// kills the runtime at the deadline.
    pid: Option<i32>,
    scope: Scope,
}

/// The data with which the monitor finds and kills an exec's processes.
struct Scope {
    /// The serial number of the container.
    serial: u64,
    /// The pid of the container's first process.
    init: i32,
    /// The path of the container's cgroup.
    container: PathBuf,
    /// The separate cgroup of the exec. `None` if the monitor has not created this cgroup.
    own: Option<ExecCgroup>,
}

impl Execs {
    /// Begins an exec. `number` identifies the exec within the monitor. `dir` is the monitor's
    /// directory. `fds` are the stdio of the exec's process.
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
            let message = format!("exec in container {id}: the container is not running");
            return vec![Effect::fail(client, FailureKind::WrongState, message)];
        }
        let pid_file = dir.join(format!("exec-{number}.pid"));
        // A container that is not native ([`Create::native`](rrun_protocol::Create::native)) runs
        // on a separate kernel. The cgroups of the node's kernel do not contain the container's
        // processes. For this reason, the monitor creates no cgroup for the exec.
        let own = if container.spec.native {
            ExecCgroup::make(&container.spec.cgroup, number)
        } else {
            None
        };
        let scope = Scope {
            serial: container.serial,
            init: container.pid,
            container: container.spec.cgroup.clone(),
            own,
        };
        let cgroup = scope.own.as_ref().map(ExecCgroup::name);
        match exec_command(container, (number, client), exec, fds, &pid_file, cgroup) {
            Ok((command, terminal, relays)) => {
                let starting = StartingExec {
                    client,
                    pid_file,
                    terminal,
                    scope,
                };
                self.starting.insert(number, starting);
                let relays = relays
                    .into_iter()
                    .map(|relay| Effect::Relay(Box::new(relay)));
                let run = Effect::run(command, Purpose::Exec { number });
                relays.chain([run]).collect()
            }
            Err(error) => {
                let message = format!("exec in container {id}: {}", describe(&error));
                vec![Effect::fail(client, FailureKind::Monitor, message)]
            }
        }
    }

    /// Removes and returns an exec whose runtime call has ended or could not be started.
    pub(crate) fn take_starting(&mut self, number: u64) -> Option<StartingExec> {
        self.starting.remove(&number)
    }

    pub(crate) fn add_running(&mut self, process: ExecProcess) {
        self.running.insert(process.pid, process);
    }

    /// Returns the client of a running exec of the container with the serial number `serial`. `pid` is
    /// the pid of the exec's first process.
    pub(crate) fn client_of(&self, pid: i32, serial: u64) -> Option<ClientId> {
        let process = self.running.get(&pid);
        let process = process.filter(|process| process.scope.serial == serial);
        process.map(|process| process.client)
    }

    /// Removes and returns an exec whose process has exited.
    pub(crate) fn take_running(&mut self, pid: i32) -> Option<ExecProcess> {
        self.running.remove(&pid)
    }

    /// Returns the pids of the first processes of the running execs.
    pub(crate) fn pids(&self) -> impl Iterator<Item = i32> {
        self.running.keys().copied()
    }

    /// Kills the execs of a client that has disconnected. No other client can read the output of
    /// these execs or stop them. If an exec's runtime call is still in progress, also kills the
    /// runtime. The container can have stopped the runtime's child, and the runtime would then wait
    /// until its deadline.
    pub(crate) fn client_gone(&mut self, client: ClientId, calls: &Calls) {
        for process in self.running.values_mut() {
            if process.client == client {
                process.kill(&mut self.killed);
            }
        }
        for (number, starting) in &self.starting {
            if starting.client == client
                && let Some(call) = calls.of_exec(*number)
            {
                // The runtime must still be the parent of its children at this time, because the
                // monitor may find them only through their parent.
                starting.scope.kill(call.pid, &mut self.killed);
                call.kill();
            }
        }
    }

    /// Returns the serial number of the container for each exec whose client has disconnected and
    /// whose processes have not exited yet.
    pub(crate) fn abandoned(&self, clients: &Clients) -> Vec<u64> {
        let starting = self
            .starting
            .values()
            .map(|it| (it.client, it.scope.serial));
        let running = self.running.values().map(|it| (it.client, it.scope.serial));
        let all = starting.chain(running);
        let gone = all.filter(|(client, _)| !clients.contains(*client));
        gone.map(|(_, serial)| serial).collect()
    }

    /// Returns the time at which [`Execs::due_zombie_checks`] must be called again.
    pub(crate) fn next_zombie_check(&self) -> Option<Instant> {
        self.running.values().filter_map(|it| it.zombie_check).min()
    }

    /// Returns the pids of the killed processes that the monitor must check at this time, and sets
    /// the time of their next check.
    pub(crate) fn due_zombie_checks(&mut self, now: Instant) -> Vec<i32> {
        let running = self.running.values_mut();
        let due = running.filter(|it| it.zombie_check.is_some_and(|check| now >= check));
        due.map(|process| {
            process.zombie_check = Some(now + ZOMBIE_CHECK_INTERVAL);
            process.pid
        })
        .collect()
    }
}

/// Returns the runtime's `exec` command, the exec's terminal, and the relays of the client's other
/// streams. `number` and `client` identify the exec and its client. `cgroup` is the path of the exec's
/// cgroup relative to the container's cgroup.
fn exec_command(
    container: &Container,
    (number, client): (u64, ClientId),
    exec: &Exec,
    fds: Vec<OwnedFd>,
    pid_file: &Path,
    cgroup: Option<&str>,
) -> std::io::Result<(RuntimeCommand, Option<StartingTerminal>, Vec<Relay>)> {
    let process = OwnedFd::from(memory_file("process", exec.process.as_bytes())?);
    let mut relays = Vec::new();
    let (stdio, terminal) = if exec.terminal {
        let terminal = StartingTerminal {
            console: Console::open(number)?,
            socket: terminal_socket(fds)?,
        };
        (Stdio::Log, Some(terminal))
    } else {
        let stdio = <[OwnedFd; 3]>::try_from(fds).map_err(|fds| wrong_count(&fds, "3"))?;
        let stdio = relayed(stdio, client, &mut relays)?;
        (Stdio::Container(stdio), None)
    };
    let console = terminal.as_ref().map(|terminal| terminal.console.path());
    let command = container
        .command("exec")
        .stdio(stdio)
        .argument("--detach")
        .option("--process", Some(path_of(&process)))
        .option("--pid-file", Some(pid_file))
        .option("--console-socket", console)
        .option("--cgroup", cgroup)
        .argument(&exec.id)
        .input(Some(process));
    Ok((command, terminal, relays))
}

/// Returns the client's socket for the data of a terminal.
fn terminal_socket(mut fds: Vec<OwnedFd>) -> std::io::Result<Option<OwnedFd>> {
    if fds.len() > 1 {
        return Err(wrong_count(&fds, "1 or, from an earlier version, 0"));
    }
    let socket = fds.pop();
    if let Some(socket) = &socket
        && !is_socket(socket)?
    {
        let message = "the descriptor for the terminal's data is not a socket";
        return Err(std::io::Error::other(message));
    }
    Ok(socket)
}

fn wrong_count(fds: &[OwnedFd], expected: &str) -> std::io::Error {
    let count = fds.len();
    let message = format!("the request carries {count} descriptors, but it must carry {expected}");
    std::io::Error::other(message)
}

fn is_socket(fd: &OwnedFd) -> Result<bool, Errno> {
    let mode = rustix::fs::fstat(fd)?.st_mode;
    Ok(FileType::from_raw_mode(mode) == FileType::Socket)
}

/// Replaces each socket in `stdio` by a pipe, and adds a relay between the socket and the pipe to
/// `relays`. Processes expect pipes: open(2) of /dev/stdout fails if it is a socket. Servers of earlier
/// versions pass their own pipes.
fn relayed(
    stdio: [OwnedFd; 3],
    client: ClientId,
    relays: &mut Vec<Relay>,
) -> std::io::Result<[OwnedFd; 3]> {
    let [stdin, stdout, stderr] = stdio;
    let mut replace = |fd: OwnedFd, direction: Direction| {
        if !is_socket(&fd)? {
            return Ok(fd);
        }
        let (read, write) = pipe_with(PipeFlags::CLOEXEC)?;
        let (relay, theirs) = match direction {
            Direction::Input => (Relay::new(client, direction, fd, write)?, read),
            Direction::Output => (Relay::new(client, direction, read, fd)?, write),
        };
        relays.push(relay);
        Ok::<_, std::io::Error>(theirs)
    };
    Ok([
        replace(stdin, Direction::Input)?,
        replace(stdout, Direction::Output)?,
        replace(stderr, Direction::Output)?,
    ])
}

impl StartingExec {
    pub(crate) fn client(&self) -> ClientId {
        self.client
    }

    /// Handles the exit of the runtime's `exec`. `code` is the exit status of the `exec`.
    pub(crate) fn finish(self, call: &Call, code: i32) -> Result<StartedExec, FailedExec> {
        let pid = read_pid(&self.pid_file);
        let _ = std::fs::remove_file(&self.pid_file);
        let (client, scope) = (self.client, self.scope);
        match pid {
            Some(pid) if code == 0 => {
                let terminal = self.terminal.map(|terminal| terminal.receive(client));
                let terminal = terminal.transpose();
                let process = ExecProcess {
                    client,
                    pid,
                    scope,
                    zombie_check: None,
                };
                Ok(StartedExec { process, terminal })
            }
            pid => {
                let reason = if code == 0 {
                    "the runtime started the process, but wrote no valid pid file".into()
                } else {
                    call.reason(code, None)
                };
                Err(FailedExec {
                    client,
                    reason: reason.into(),
                    pid,
                    scope,
                })
            }
        }
    }
}

impl StartingTerminal {
    /// Receives the terminal's master from the runtime, which has exited.
    fn receive(self, client: ClientId) -> Result<StartedTerminal, Errno> {
        let master = self.console.receive()?;
        Ok(match self.socket {
            Some(socket) => {
                StartedTerminal::Relayed(Relay::of_exec_terminal(client, master, socket)?)
            }
            None => StartedTerminal::Passed(master),
        })
    }
}

impl FailedExec {
    pub(crate) fn client(&self) -> ClientId {
        self.client
    }

    /// Returns the reason why the exec failed.
    pub(crate) fn reason(&self) -> &str {
        &self.reason
    }

    /// Returns the pid of the exec's process, if the runtime reported a pid.
    pub(crate) fn pid(&self) -> Option<i32> {
        self.pid
    }

    /// Kills the exec's processes, and returns the exec's cgroup. `reaped` is true if the monitor
    /// has reaped the exec's first process. The pid of the first process can then belong to another
    /// process, so this function kills only the processes in the exec's cgroup.
    pub(crate) fn kill(self, reaped: bool, killed: &mut KilledExecs) -> Option<ExecCgroup> {
        match self.pid {
            Some(pid) if !reaped => self.scope.kill(pid, killed),
            _ => drop(self.scope.kill_cgroup(killed)),
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

    /// Kills the exec's first process, and all processes that the first process started. The
    /// monitor must not have reaped the first process yet.
    pub(crate) fn kill(&mut self, killed: &mut KilledExecs) {
        self.scope.kill(self.pid, killed);
        let check = Instant::now() + ZOMBIE_CHECK_INTERVAL;
        self.zombie_check.get_or_insert(check);
    }

    /// Returns the cgroup of an exec whose process has exited.
    pub(crate) fn into_cgroup(self) -> Option<ExecCgroup> {
        self.scope.own
    }
}

impl Scope {
    /// Kills the exec's first process, which has this pid and must not have been reaped. Also kills
    /// all processes that the first process started.
    fn kill(&self, pid: i32, killed: &mut KilledExecs) {
        if self.kill_cgroup(killed) {
            // The first process can have left the cgroup, if the container can write to cgroups.
            if let Some(pid) = Pid::from_raw(pid) {
                let _ = kill_process(pid, Signal::KILL);
            }
            return;
        }
        if !descendants::kill(&self.container, pid, self.init) {
            own_log::write(&format!(
                "kill the exec process {pid} and its descendants: they fork faster than the monitor can kill them"
            ));
        }
    }

    /// Kills all processes in the exec's own cgroup. Returns false if the cgroup does not exist or
    /// is empty, or if the kill failed. The cgroup is empty if the runtime ignores the option
    /// `--cgroup`.
    fn kill_cgroup(&self, killed: &mut KilledExecs) -> bool {
        let own = self.own.as_ref();
        own.is_some_and(|own| killed.kill(own.path()))
    }
}

#[cfg(test)]
mod tests {
    use super::super::clients::{MAX_CONTAINER_SESSIONS, MAX_SESSIONS};
    use super::super::poller::Poller;
    use super::*;

    #[test]
    fn an_exec_counts_until_its_processes_have_exited() {
        let scope = || Scope {
            serial: 3,
            init: 0,
            container: PathBuf::new(),
            own: None,
        };
        let poller = Poller::new().unwrap();
        let (listener, _other) = rustix::pipe::pipe().unwrap();
        let mut clients = Clients::new(listener, &poller).unwrap();
        let mut execs = Execs::default();
        // Neither of the clients 7 and 8 is connected.
        let starting = StartingExec {
            client: 7,
            pid_file: PathBuf::new(),
            terminal: None,
            scope: scope(),
        };
        execs.starting.insert(1, starting);
        execs.add_running(ExecProcess {
            client: 8,
            pid: 9,
            scope: scope(),
            zombie_check: None,
        });
        assert_eq!(execs.abandoned(&clients), [3, 3]);
        execs.take_starting(1);
        assert_eq!(execs.abandoned(&clients), [3]);
        execs.take_running(9);
        assert!(execs.abandoned(&clients).is_empty());
        let mut begin = |container, sessions| {
            let begun = clients.begin_session(10, container, &vec![3; sessions]);
            begun.err().unwrap_or_default()
        };
        assert_eq!(begin(3, MAX_CONTAINER_SESSIONS - 1), "");
        assert!(begin(3, MAX_CONTAINER_SESSIONS).contains("the container already has 224"));
        assert_eq!(begin(4, MAX_SESSIONS - 1), "");
        assert!(begin(4, MAX_SESSIONS).contains("the pod already has 256"));
    }
}
