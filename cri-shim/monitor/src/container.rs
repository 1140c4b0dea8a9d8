//! A container's life while its first process lives: create, start, kill, update.

use std::ffi::OsStr;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::path::Path;
use std::sync::Arc;
use std::time::{Duration, Instant};

use rustix::event::epoll::EventFlags;
use rustix::fs::{Mode, OFlags};
use rustix::io::Errno;
use rustix::pipe::{PipeFlags, pipe_with};

use super::attach::Follower;
use super::cgroup::{self, OomCount};
use super::connection::ClientId;
use super::console::Console;
use super::container_log::{Buffers, Log, Pumped, Stream};
use super::create_rollback::Undone;
use super::own_log;
use super::runtime::{Call, Stdio, memory_file, path_of};
use super::serve::{MUCH, Monitor, Purpose, Source};
use super::termination::{Cleanup, Deletion, Ending};
use rrun_kernel::errno::describe;
use rrun_protocol::{Create, ExitRecord, Failure, FailureKind, Reply};

/// How often each stream is read at a container's end: a pipe holds much less, and a process
/// outside the container that writes on must not keep us.
const MAX_DRAIN: usize = 64;

/// Bytes, of a pipe that was found nearly full: the most that pipe(7) gives for the asking. The
/// container's writer goes on while we nap, and pays for the pages itself.
const WIDE: usize = 1 << 20;

pub(crate) struct Container {
    /// Ids can come back; this does not.
    pub serial: u64,
    pub spec: Create,
    pub state: State,
    pub pid: i32,
    /// A `start` is under way.
    pub(super) starting: bool,
    pub(super) output: Output,
    /// Our side of its stdin, for attach; a terminal's master does for both.
    pub(super) stdin: Option<OwnedFd>,
    /// With `stdin_once`, who has it.
    pub(super) stdin_client: Option<ClientId>,
    console: Option<Console>,
    pub(super) memory: Option<OomCount>,
    pub(super) oom_killed: bool,
    /// When it was last told that the kernel killed one of its processes for want of memory.
    pub(super) oom_told: Option<Instant>,
    /// Who waits for its log to be opened again.
    pub(super) reopening: Vec<ClientId>,
    pub(super) deletion: Option<Deletion>,
    pub(super) undone: Option<Undone>,
}

pub(crate) enum State {
    Creating,
    Created,
    /// `start` has been done.
    Running,
    /// The first process is gone.
    Ending(Ending),
    Exited {
        exit: ExitRecord,
        cleanup: Cleanup,
    },
}

/// The container's output and where it goes.
pub(super) struct Output {
    pub(super) log: Log,
    /// A pipe, or a terminal's master.
    pub(super) stdout: Option<OwnedFd>,
    stderr: Option<OwnedFd>,
    /// Which of them are not looked at while the log's file takes nothing.
    resting: Vec<Stream>,
    /// Which of them have been given a larger pipe, if they could be.
    widened: Vec<Stream>,
    pub(super) followers: Vec<Follower>,
}

/// The ends of the container's stdio that the runtime gets.
struct Given {
    stdin: OwnedFd,
    stdout: OwnedFd,
    stderr: OwnedFd,
}

impl Output {
    pub(super) fn pump(&mut self, stream: Stream, buffers: &mut Buffers) -> Pumped {
        let fd = match stream {
            Stream::Stdout => &self.stdout,
            Stream::Stderr => &self.stderr,
        };
        let Some(fd) = fd else {
            return Pumped::End;
        };
        let pumped = self.log.pump(fd, stream, buffers);
        let came = match pumped {
            Pumped::Data => buffers.fresh().len(),
            Pumped::Empty | Pumped::End => 0,
        };
        if came >= MUCH && !self.widened.contains(&stream) {
            self.widened.push(stream);
            // A terminal has no size, and some nodes allow no more than there is.
            let _ = rustix::pipe::fcntl_setpipe_size(fd, WIDE);
        }
        if pumped == Pumped::Data && !self.followers.is_empty() {
            for follower in &mut self.followers {
                follower.give(stream, buffers.fresh());
            }
        }
        pumped
    }

    pub(super) fn stream(&self, stream: Stream) -> Option<BorrowedFd<'_>> {
        let fd = match stream {
            Stream::Stdout => &self.stdout,
            Stream::Stderr => &self.stderr,
        };
        fd.as_ref().map(AsFd::as_fd)
    }

    /// A stream is not looked at until the log's file takes more.
    pub(super) fn rest(&mut self, stream: Stream) {
        self.resting.push(stream);
    }

    /// The streams to look at again, once there is room in the log.
    pub(super) fn rested(&mut self) -> Vec<Stream> {
        if self.resting.is_empty() || !self.log.has_room() {
            return Vec::new();
        }
        std::mem::take(&mut self.resting)
    }

    pub(super) fn close(&mut self, stream: Stream) {
        match stream {
            Stream::Stdout => self.stdout = None,
            Stream::Stderr => self.stderr = None,
        }
    }

    /// Takes what is there, and closes.
    pub(super) fn drain(&mut self, buffers: &mut Buffers) {
        for stream in [Stream::Stdout, Stream::Stderr] {
            for _ in 0..MAX_DRAIN {
                if self.pump(stream, buffers) != Pumped::Data {
                    break;
                }
            }
            self.log.finish(stream);
        }
        (self.stdout, self.stderr) = (None, None);
        self.resting.clear();
    }
}

/// A process id from the file that a runtime wrote.
pub(crate) fn read_pid(path: &Path) -> Option<i32> {
    let text = std::fs::read_to_string(path).ok()?;
    text.trim().parse().ok().filter(|pid| *pid > 1)
}

/// The runtime's binary, for sentences.
fn program(command: &[String]) -> &str {
    command.first().map_or("the runtime", String::as_str)
}

impl Container {
    pub(crate) fn id(&self) -> &str {
        &self.spec.id
    }

    pub(crate) fn is_alive_as(&self, pid: i32) -> bool {
        self.pid == pid && matches!(self.state, State::Created | State::Running)
    }

    pub(crate) fn next_check(&self) -> Option<Instant> {
        match (&self.state, &self.deletion) {
            (State::Creating, _) => self.undone.as_ref().map(Undone::give_up),
            (State::Ending(ending), _) => ending.next_look(),
            (State::Created | State::Running, Some(deletion)) => Some(deletion.give_up()),
            _ => None,
        }
    }

    fn pid_file(&self) -> std::path::PathBuf {
        self.spec.bundle.join("init.pid")
    }

    /// Makes the stdio and starts the runtime on it.
    fn begin(
        spec: Create,
        after: Option<OwnedFd>,
        serial: u64,
        timeout: Duration,
        logs: &Arc<OwnedFd>,
    ) -> Result<(Self, Call), String> {
        let id = spec.id.clone();
        let failed = |what: &str, error: std::io::Error| {
            format!("{what} of container {id}: {}", describe(&error))
        };
        let log = Log::open(spec.log.clone(), logs)
            .map_err(|error| failed("start the thread for the log", error))?;
        let mut container = Container {
            serial,
            state: State::Creating,
            pid: 0,
            starting: false,
            output: Output {
                log,
                stdout: None,
                stderr: None,
                resting: Vec::new(),
                widened: Vec::new(),
                followers: Vec::new(),
            },
            stdin: None,
            stdin_client: None,
            console: None,
            memory: None,
            oom_killed: false,
            oom_told: None,
            reopening: Vec::new(),
            deletion: None,
            undone: None,
            spec,
        };
        let given = if container.spec.terminal {
            let console = Console::open(serial)
                .map_err(|errno| failed("make the console socket", errno.into()))?;
            container.console = Some(console);
            None
        } else {
            let given = container.make_pipes();
            Some(given.map_err(|errno| failed("make the stdio", errno.into()))?)
        };
        let stdio = given.as_ref().map_or(Stdio::Log, |given| {
            Stdio::Container([
                given.stdin.as_fd(),
                given.stdout.as_fd(),
                given.stderr.as_fd(),
            ])
        });
        let pid_file = container.pid_file();
        let console_path = container.console.as_ref().map(Console::path);
        let mut arguments: Vec<&OsStr> = vec![
            "--bundle".as_ref(),
            container.spec.bundle.as_os_str(),
            "--pid-file".as_ref(),
            pid_file.as_ref(),
        ];
        if let Some(path) = &console_path {
            arguments.extend(["--console-socket".as_ref(), path.as_os_str()]);
        }
        let after_path = after.as_ref().map(path_of);
        if let Some(path) = &after_path {
            arguments.extend(["--after".as_ref(), OsStr::new(path)]);
        }
        arguments.push(container.spec.id.as_ref());
        let command = &container.spec.runtime;
        let call = Call::start(
            command,
            "create",
            &container.spec.id,
            &arguments,
            &stdio,
            after,
            timeout,
        )
        .map_err(|error| failed(&format!("run {} for the create", program(command)), error))?;
        Ok((container, call))
    }

    fn make_pipes(&mut self) -> Result<Given, Errno> {
        let stdin = if self.spec.stdin {
            let (theirs, ours) = pipe_with(PipeFlags::CLOEXEC)?;
            rustix::io::ioctl_fionbio(&ours, true)?;
            self.stdin = Some(ours);
            theirs
        } else {
            let flags = OFlags::RDONLY | OFlags::CLOEXEC;
            rustix::fs::open("/dev/null", flags, Mode::empty())?
        };
        let (stdout_ours, stdout) = pipe_with(PipeFlags::CLOEXEC)?;
        let (stderr_ours, stderr) = pipe_with(PipeFlags::CLOEXEC)?;
        // Only our ends: the container's must block.
        rustix::io::ioctl_fionbio(&stdout_ours, true)?;
        rustix::io::ioctl_fionbio(&stderr_ours, true)?;
        self.output.stdout = Some(stdout_ours);
        self.output.stderr = Some(stderr_ours);
        Ok(Given {
            stdin,
            stdout,
            stderr,
        })
    }

    /// Why the log could not be opened, if that is known. Where the file system hangs it is not,
    /// and the container waits for its log with its first line.
    fn log_failure(&self) -> Option<Failure> {
        let file = self.output.log.file.as_ref()?;
        let unfit = file.opened()?.err()?;
        Some(Failure {
            kind: FailureKind::Monitor,
            message: format!(
                "open the log {} of container {}: {unfit}",
                file.path().display(),
                self.id(),
            ),
        })
    }

    /// Kills all that there is of the container. The first process's end will tell.
    pub(super) fn kill_all(&self) {
        if let Err(error) = cgroup::kill(&self.spec.cgroup) {
            own_log::write(&format!(
                "kill the cgroup of {}: {}",
                self.id(),
                describe(&error)
            ));
        }
        if self.is_alive_as(self.pid) {
            self.signal_init(libc::SIGKILL);
        }
    }

    /// Signals the first process. Its pid is certain: only we could have reaped it.
    fn signal_init(&self, signal: i32) -> bool {
        let pid = rustix::process::Pid::from_raw(self.pid);
        match (pid, cgroup::checked(signal)) {
            (Some(pid), Some(signal)) => rustix::process::kill_process(pid, signal).is_ok(),
            _ => false,
        }
    }
}

impl Monitor {
    pub(super) fn container(&mut self, serial: u64) -> Option<&mut Container> {
        self.containers.iter_mut().find(|c| c.serial == serial)
    }

    fn serial_of(&self, id: &str) -> Option<u64> {
        let container = self.containers.iter().find(|c| c.id() == id)?;
        Some(container.serial)
    }

    pub(super) fn not_found(&mut self, client: ClientId, id: &str) {
        let message = format!("there is no container {id} in this pod");
        self.fail(client, FailureKind::NotFound, message);
    }

    pub(super) fn create(&mut self, client: ClientId, spec: Create, mut fds: Vec<OwnedFd>) {
        let id = spec.id.clone();
        if self.serial_of(&id).is_some() || self.is_shutting_down() {
            let message = format!("create container {id}: it exists, or the pod is being ended");
            return self.fail(client, FailureKind::WrongState, message);
        }
        let serial = self.number();
        match Container::begin(spec, fds.pop(), serial, self.timeout, &self.logs) {
            Ok((container, call)) => {
                self.containers.push(container);
                let purpose = Purpose::Create { serial, client };
                self.calls.insert(call.pid, (call, purpose));
            }
            Err(message) => self.fail(client, FailureKind::Monitor, message),
        }
    }

    pub(super) fn create_ended(&mut self, serial: u64, client: ClientId, call: &Call, code: i32) {
        let Some(container) = self.container(serial) else {
            return;
        };
        let console = container.console.take();
        let pid = read_pid(&container.pid_file());
        let _ = std::fs::remove_file(container.pid_file());
        let failure = match pid {
            Some(pid) if code == 0 => {
                container.pid = pid;
                match console.map(|console| console.receive()).transpose() {
                    Ok(None) => None,
                    Ok(Some(master)) => {
                        let _ = rustix::io::ioctl_fionbio(&master, true);
                        container.output.stdout = Some(master);
                        None
                    }
                    Err(errno) => Some(Failure {
                        kind: FailureKind::Monitor,
                        message: format!(
                            "take the terminal of container {}: {}",
                            container.id(),
                            describe(&errno.into())
                        ),
                    }),
                }
            }
            _ => {
                let stderr = container.output.stderr.as_ref().map(AsFd::as_fd);
                let message = match code {
                    0 => "the runtime made a container, but did not tell its pid".into(),
                    _ => call.reason(code, stderr),
                };
                Some(Failure {
                    kind: FailureKind::Runtime,
                    message,
                })
            }
        };
        let failure = failure.or_else(|| container.log_failure());
        match failure {
            Some(failure) => self.undo_create(serial, client, failure),
            None => self.created(serial, client),
        }
    }

    fn created(&mut self, serial: u64, client: ClientId) {
        let Some(container) = self.container(serial) else {
            return;
        };
        container.state = State::Created;
        let pid = container.pid;
        if container.deletion.is_some() {
            container.kill_all();
        }
        // First of all: the client's next request is looked at when all here is done.
        self.reply(client, &Reply::Created { pid });
        if let Some(container) = self.container(serial) {
            container.memory = OomCount::open(&container.spec.cgroup);
        }
        self.watch_container(serial);
        if let Some(code) = self.claim(pid) {
            self.init_ended(serial, code);
        }
    }

    fn watch_container(&mut self, serial: u64) {
        let Some(container) = self.containers.iter().find(|c| c.serial == serial) else {
            return;
        };
        let watches = [
            (
                container.output.stdout.as_ref().map(AsFd::as_fd),
                Source::Stdout(serial),
                EventFlags::IN,
            ),
            (
                container.output.stderr.as_ref().map(AsFd::as_fd),
                Source::Stderr(serial),
                EventFlags::IN,
            ),
            (
                container.memory.as_ref().map(OomCount::as_fd),
                Source::Memory(serial),
                EventFlags::PRI,
            ),
        ];
        for (fd, source, flags) in watches {
            if let Some(fd) = fd
                && let Err(errno) = self.watch(fd, source, flags)
            {
                let said = describe(&errno.into());
                own_log::write(&format!("watch {source:?} of {}: {said}", container.id()));
            }
        }
    }

    pub(super) fn start(&mut self, client: ClientId, id: &str) {
        let timeout = self.timeout;
        let Some(container) = self.containers.iter_mut().find(|c| c.id() == id) else {
            return self.not_found(client, id);
        };
        if !matches!(container.state, State::Created) || container.starting {
            let message = format!("start container {id}: it is not in the created state");
            return self.fail(client, FailureKind::WrongState, message);
        }
        let serial = container.serial;
        let command = &container.spec.runtime;
        match Call::start(
            command,
            "start",
            id,
            &[id.as_ref()],
            &Stdio::Log,
            None,
            timeout,
        ) {
            Ok(call) => {
                container.starting = true;
                let purpose = Purpose::Start { serial, client };
                self.calls.insert(call.pid, (call, purpose));
            }
            Err(error) => {
                let (program, said) = (program(command), describe(&error));
                let message = format!("run {program} to start container {id}: {said}");
                self.fail(client, FailureKind::Monitor, message);
            }
        }
    }

    pub(super) fn start_ended(&mut self, serial: u64, client: ClientId, call: &Call, code: i32) {
        if let Some(container) = self.container(serial) {
            container.starting = false;
            if code == 0 && matches!(container.state, State::Created) {
                container.state = State::Running;
            }
        }
        match code {
            0 => self.reply(client, &Reply::Done),
            _ => self.fail(client, FailureKind::Runtime, call.reason(code, None)),
        }
        self.continue_ending(serial);
    }

    pub(super) fn kill(&mut self, client: ClientId, id: &str, signal: i32, all: bool) {
        let Some(container) = self.containers.iter().find(|c| c.id() == id) else {
            return self.not_found(client, id);
        };
        if cgroup::checked(signal).is_none() {
            let message = format!("kill container {id}: there is no signal {signal}");
            return self.fail(client, FailureKind::Monitor, message);
        }
        match container.state {
            State::Creating => {
                let message = format!("kill container {id}: it is still being created");
                return self.fail(client, FailureKind::WrongState, message);
            }
            State::Ending(_) | State::Exited { .. } => return self.reply(client, &Reply::Done),
            State::Created | State::Running => {}
        }
        if all && signal == libc::SIGKILL {
            container.kill_all();
        } else if container.spec.native && !all {
            container.signal_init(signal);
        } else {
            let number = signal.to_string();
            let arguments: &[&OsStr] = match all {
                true => &["--all".as_ref(), id.as_ref(), number.as_ref()],
                false => &[id.as_ref(), number.as_ref()],
            };
            let command = container.spec.runtime.clone();
            return self.plain_call(client, id, &command, "kill", arguments, None);
        }
        self.reply(client, &Reply::Done);
    }

    pub(super) fn update(&mut self, client: ClientId, id: &str, resources: &str) {
        let Some(container) = self.containers.iter().find(|c| c.id() == id) else {
            return self.not_found(client, id);
        };
        if !matches!(container.state, State::Created | State::Running) {
            let message = format!("update container {id}: it is not running");
            return self.fail(client, FailureKind::WrongState, message);
        }
        let command = container.spec.runtime.clone();
        let arguments: &[&OsStr] = &["--resources".as_ref(), "-".as_ref(), id.as_ref()];
        self.plain_call(client, id, &command, "update", arguments, Some(resources));
    }

    fn plain_call(
        &mut self,
        client: ClientId,
        id: &str,
        command: &[String],
        verb: &'static str,
        arguments: &[&OsStr],
        input: Option<&str>,
    ) {
        let started = input
            .map(|text| memory_file("input", text.as_bytes()))
            .transpose()
            .and_then(|file| {
                let stdio = match &file {
                    Some(file) => Stdio::Input(file.as_fd()),
                    None => Stdio::Log,
                };
                Call::start(command, verb, id, arguments, &stdio, None, self.timeout)
            });
        match started {
            Ok(call) => {
                let purpose = Purpose::Plain { client };
                self.calls.insert(call.pid, (call, purpose));
            }
            Err(error) => {
                let (program, said) = (program(command), describe(&error));
                let message = format!("run {program} to {verb} container {id}: {said}");
                self.fail(client, FailureKind::Monitor, message);
            }
        }
    }

    pub(super) fn reopen_log(&mut self, client: ClientId, id: &str) {
        let Some(container) = self.containers.iter_mut().find(|c| c.id() == id) else {
            return self.not_found(client, id);
        };
        match &container.output.log.file {
            None => self.reply(client, &Reply::Done),
            Some(file) => {
                file.reopen();
                container.reopening.push(client);
            }
        }
    }
}
