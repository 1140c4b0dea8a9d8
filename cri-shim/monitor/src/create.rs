//! The creation of a container. The monitor opens the container's stdio and log, and runs the
//! runtime's `create` with this stdio.

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

/// Opens a container's log, or returns a sentence about the failure.
pub(crate) fn open_log(spec: &Create, wake: &Arc<OwnedFd>) -> Result<ContainerLog, String> {
    ContainerLog::open(spec.log.clone(), wake).map_err(|error| {
        let (id, reason) = (&spec.id, describe(&error));
        format!("start the thread that writes the log of container {id}: {reason}")
    })
}

impl Container {
    /// Opens the container's log and stdio. Returns the container, and the runtime's `create`
    /// command with this stdio. `after` is the pipe that [`rrun_protocol::Request::Create`]
    /// describes. [`LogFile::open`](super::log_file::LogFile::open) describes `wake`.
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
        let log = open_log(&spec, wake)?;
        let mut container = Container::new(serial, spec, log);
        let stdio = if container.spec.terminal {
            let console = Console::open(serial)
                .map_err(|errno| failed("create the console socket", errno.into()))?;
            container.console = Some(console);
            Stdio::Log
        } else {
            let theirs = container.make_pipes();
            Stdio::Container(
                theirs.map_err(|errno| failed("create the stdio pipes", errno.into()))?,
            )
        };
        let command = container.create_command(stdio, after);
        Ok((container, command))
    }

    /// Creates the pipes of the container's stdio. Keeps the monitor's ends and returns the
    /// container's ends, which are its stdin, stdout and stderr.
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
        // Only the monitor's ends become non-blocking, because programs in the container expect
        // blocking stdio.
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

    /// Handles the exit of the runtime's `create`. `code` is the exit status of the `create`, and
    /// `joined` is the result of [`joined::failure`](super::joined::failure).
    pub(crate) fn create_ended(
        &mut self,
        client: ClientId,
        call: &Call,
        code: i32,
        joined: Option<Failure>,
    ) -> Vec<Effect> {
        let console = self.console.take();
        let pid = read_pid(&self.pid_file());
        let _ = std::fs::remove_file(self.pid_file());
        let failure = match pid {
            Some(pid) if code == 0 => {
                self.pid = pid;
                self.create_called = Some(call.started);
                self.take_terminal(console.as_ref()).err()
            }
            _ => Some(self.create_failure(call, code)),
        };
        match joined
            .or(failure)
            .or_else(|| self.output.log_failure(self.id()))
        {
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
                message: format!(
                    "receive the terminal of container {} from the runtime: {reason}",
                    self.id()
                ),
            }
        })?;
        let _ = rustix::io::ioctl_fionbio(&master, true);
        self.output.set_terminal(master);
        Ok(())
    }

    fn create_failure(&self, call: &Call, code: i32) -> Failure {
        let message = if code == 0 {
            "the runtime created the container, but wrote no valid pid file".into()
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
        // `Reply` is the first effect, so the client does not wait for `Watch`. This order is safe:
        // the monitor carries out both effects before it processes the client's next request.
        vec![Effect::Reply(client, created), Effect::Watch(self.serial)]
    }
}
