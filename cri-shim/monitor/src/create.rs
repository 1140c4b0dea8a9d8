//! A container's create: its stdio and its log are made, and the runtime runs on them.

use std::os::fd::OwnedFd;
use std::sync::Arc;

use rustix::fs::{Mode, OFlags};
use rustix::io::Errno;
use rustix::pipe::{PipeFlags, pipe_with};

use super::connection::ClientId;
use super::console::Console;
use super::container::{Container, State};
use super::container_log::{ContainerLog, Stream};
use super::effect::Effect;
use super::runtime::{Call, RuntimeCommand, Stdio, path_of, read_pid};
use rrun_kernel::errno::describe;
use rrun_protocol::{Create, Failure, FailureKind, Reply};

impl Container {
    /// Makes the stdio, and the command that creates the container on it. `after` is the pipe of
    /// [`rrun_protocol::Request::Create`]; `wake` as in [`ContainerLog::open`].
    pub(crate) fn create(
        serial: u64,
        spec: Create,
        after: Option<OwnedFd>,
        wake: &Arc<OwnedFd>,
    ) -> Result<(Self, RuntimeCommand), String> {
        let id = spec.id.clone();
        let failed = |what: &str, error: std::io::Error| {
            format!("{what} of container {id}: {}", describe(&error))
        };
        let log = ContainerLog::open(spec.log.clone(), wake)
            .map_err(|error| failed("start the thread for the log", error))?;
        let mut container = Container::new(serial, spec, log);
        let stdio = if container.spec.terminal {
            let console = Console::open(serial)
                .map_err(|errno| failed("make the console socket", errno.into()))?;
            container.console = Some(console);
            Stdio::Log
        } else {
            let theirs = container.make_pipes();
            Stdio::Container(theirs.map_err(|errno| failed("make the stdio", errno.into()))?)
        };
        let command = container.create_command(stdio, after);
        Ok((container, command))
    }

    /// Keeps our ends of the container's stdio, and returns the container's: stdin, stdout and
    /// stderr.
    fn make_pipes(&mut self) -> Result<[OwnedFd; 3], Errno> {
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
        self.output.set_pipes(stdout_ours, stderr_ours);
        Ok([stdin, stdout, stderr])
    }

    fn create_command(&self, stdio: Stdio, after: Option<OwnedFd>) -> RuntimeCommand {
        self.command("create")
            .stdio(stdio)
            .option("--bundle", Some(&self.spec.bundle))
            .option("--pid-file", Some(self.pid_file()))
            .option("--console-socket", self.console.as_ref().map(Console::path))
            .option("--after", after.as_ref().map(path_of))
            .argument(self.id())
            .input(after)
    }

    /// The runtime's `create` has ended with this status.
    pub(crate) fn create_ended(&mut self, client: ClientId, call: &Call, code: i32) -> Vec<Effect> {
        let console = self.console.take();
        let pid = read_pid(&self.pid_file());
        let _ = std::fs::remove_file(self.pid_file());
        let failure = match pid {
            Some(pid) if code == 0 => {
                self.pid = pid;
                self.take_terminal(console.as_ref()).err()
            }
            _ => Some(self.create_failure(call, code)),
        };
        match failure.or_else(|| self.output.log_failure(self.id())) {
            Some(failure) => self.begin_rollback(client, failure),
            None => self.created(client),
        }
    }

    fn take_terminal(&mut self, console: Option<&Console>) -> Result<(), Failure> {
        let Some(console) = console else {
            return Ok(());
        };
        let master = console.receive().map_err(|errno| {
            let reason = describe(&errno.into());
            Failure {
                kind: FailureKind::Monitor,
                message: format!("take the terminal of container {}: {reason}", self.id()),
            }
        })?;
        let _ = rustix::io::ioctl_fionbio(&master, true);
        self.output.set_terminal(master);
        Ok(())
    }

    fn create_failure(&self, call: &Call, code: i32) -> Failure {
        let message = if code == 0 {
            "the runtime made a container, but did not tell its pid".into()
        } else {
            call.reason(code, self.output.stream(Stream::Stderr))
        };
        Failure {
            kind: FailureKind::Runtime,
            message,
        }
    }

    pub(crate) fn created(&mut self, client: ClientId) -> Vec<Effect> {
        self.state = State::Created;
        if self.deletion.is_some() {
            self.kill_all();
        }
        let created = Reply::Created { pid: self.pid };
        // The answer first: the client's next request is looked at when all here is done.
        vec![Effect::Reply(client, created), Effect::Watch(self.serial)]
    }
}
