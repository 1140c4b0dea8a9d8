//! Runtime calls: the monitor runs commands of the OCI runtime. The monitor does not block during a
//! runtime call: SIGCHLD reports the runtime's exit, and a deadline limits the call's duration.
//!
//! The runtime's log, the process description for `exec` and the resources for `update` are memory
//! files, which need no cleanup. The runtime reads the resources from its stdin, and opens the
//! other two files as `/proc/MONITOR/fd/N`. The runtime inherits only its stdio, so no other
//! descriptor of the monitor can leak into a container.

use std::ffi::{CString, OsString};
use std::fs::File;
use std::io::{Seek, Write};
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};
use std::os::unix::fs::FileExt;
use std::path::Path;
use std::time::{Duration, Instant};

use nix::spawn::{
    PosixSpawnAttr, PosixSpawnFileActions, PosixSpawnFlags, posix_spawn, posix_spawnp,
};
use nix::sys::signal::{SigSet, Signal};
use rustix::fs::{MemfdFlags, OFlags};

use super::failure_reason::last_error;
use super::readonly_exec;
use rrun_kernel::errno::describe;
use rrun_kernel::signal::NONE_IGNORED;

/// The duration after which the monitor logs a runtime call as slow.
const SLOW_CALL_TIME: Duration = Duration::from_secs(10);

/// The maximum number of bytes that the monitor reads from the end of a runtime's log or stderr. In
/// these bytes, the monitor searches for the reason of a failure.
const MAX_LOG_BYTES: u64 = 16 << 10;

/// Returns a memory file with this content and the file offset 0.
pub(crate) fn memory_file(name: &str, content: &[u8]) -> std::io::Result<File> {
    let mut file = File::from(rustix::fs::memfd_create(name, MemfdFlags::CLOEXEC)?);
    if !content.is_empty() {
        file.write_all(content)?;
        file.rewind()?;
    }
    Ok(file)
}

/// Returns the path through which another process on this node can open one of the monitor's
/// descriptors.
pub(crate) fn path_of(fd: impl AsFd) -> String {
    format!("/proc/{}/fd/{}", std::process::id(), fd.as_fd().as_raw_fd())
}

/// Reads a process id from the pid file that a runtime wrote.
pub(crate) fn read_pid(path: &Path) -> Option<i32> {
    let text = std::fs::read_to_string(path).ok()?;
    text.trim().parse().ok().filter(|pid| *pid > 1)
}

/// The stdio of a runtime call.
#[derive(Debug)]
pub(crate) enum Stdio {
    /// An empty stdin (/dev/null). The runtime's stdout and stderr are appended to the runtime's
    /// log.
    Log,
    /// The same as `Log`, except that stdin is this file instead of /dev/null.
    Input(File),
    /// The stdio of the container or of the exec. The runtime's own output is written to the same
    /// streams.
    Container([OwnedFd; 3]),
}

/// A runtime's command line that has not been run yet.
#[derive(Debug)]
pub(crate) struct RuntimeCommand {
    /// The runtime's binary, followed by its global options.
    runtime: Vec<String>,
    verb: &'static str,
    /// The container's id.
    id: String,
    arguments: Vec<OsString>,
    stdio: Stdio,
    /// A file that the runtime opens through the path of one of the monitor's descriptors
    /// ([`path_of`]). The descriptor must remain open until the runtime call has finished.
    input: Option<OwnedFd>,
}

impl RuntimeCommand {
    /// Creates the command `RUNTIME… VERB` for the container with this id, without arguments.
    pub(crate) fn new(runtime: &[String], verb: &'static str, id: &str) -> Self {
        RuntimeCommand {
            runtime: runtime.to_vec(),
            verb,
            id: id.to_owned(),
            arguments: Vec::new(),
            stdio: Stdio::Log,
            input: None,
        }
    }

    pub(crate) fn argument(mut self, argument: impl Into<OsString>) -> Self {
        self.arguments.push(argument.into());
        self
    }

    /// Adds a flag and its value, if `value` is not `None`.
    pub(crate) fn option(self, flag: &str, value: Option<impl Into<OsString>>) -> Self {
        match value {
            Some(value) => self.argument(flag).argument(value),
            None => self,
        }
    }

    pub(crate) fn stdio(mut self, stdio: Stdio) -> Self {
        self.stdio = stdio;
        self
    }

    /// Keeps a file open until the runtime call has finished. The file's path is one of the
    /// runtime's arguments.
    pub(crate) fn input(mut self, file: Option<OwnedFd>) -> Self {
        self.input = file;
        self
    }

    /// Returns the name of the runtime's binary for error messages.
    fn program(&self) -> &str {
        self.runtime.first().map_or("the runtime", String::as_str)
    }

    /// Returns the error message for a runtime that could not be started.
    pub(crate) fn not_run(&self, error: &std::io::Error) -> String {
        let (program, verb, id) = (self.program(), self.verb, &self.id);
        let reason = describe(error);
        match verb {
            "exec" => format!("exec in container {id}: {reason}"),
            _ => format!("run {program} to {verb} container {id}: {reason}"),
        }
    }
}

/// A runtime call in progress, with the process of the runtime.
pub(crate) struct Call {
    pub(crate) pid: i32,
    /// The runtime's subcommand and the container's id, for error messages.
    what: String,
    log: File,
    pub(crate) started: Instant,
    deadline: Instant,
    slow_logged: bool,
    timed_out: bool,
    /// The file passed to [`RuntimeCommand::input`].
    _input: Option<OwnedFd>,
}

/// The result of [`Call::check`].
pub(crate) enum CallCheck {
    InTime,
    /// The call has been running for this many seconds, and has not been logged as slow yet.
    Slow(u64),
    /// The deadline has passed, and the runtime was killed after this many seconds.
    TimedOut(u64),
}

impl Call {
    /// Starts `RUNTIME… --log … VERB arguments…`. On success, the returned call becomes the owner
    /// of the file that `command` keeps open.
    pub(crate) fn start(command: &mut RuntimeCommand, timeout: Duration) -> std::io::Result<Self> {
        let log = memory_file("runtime-log", &[])?;
        rustix::fs::fcntl_setfl(&log, OFlags::APPEND)?;
        let log_path = path_of(&log);
        let (runtime, arguments) = (&command.runtime, &command.arguments);
        let mut line = Vec::with_capacity(runtime.len() + arguments.len() + 5);
        for argument in runtime {
            line.push(CString::new(argument.as_bytes())?);
        }
        for argument in ["--log", &log_path, "--log-format", "json", command.verb] {
            line.push(CString::new(argument)?);
        }
        for argument in arguments {
            line.push(CString::new(argument.as_encoded_bytes())?);
        }
        let null = File::open("/dev/null")?;
        let fds = match &command.stdio {
            Stdio::Log => [null.as_fd(), log.as_fd(), log.as_fd()],
            Stdio::Input(input) => [input.as_fd(), log.as_fd(), log.as_fd()],
            Stdio::Container([stdin, stdout, stderr]) => {
                [stdin.as_fd(), stdout.as_fd(), stderr.as_fd()]
            }
        };
        let pid = spawn(&line, fds)?;
        let now = Instant::now();
        Ok(Call {
            pid,
            what: format!("{} of container {}", command.verb, command.id),
            log,
            started: now,
            deadline: now + timeout,
            slow_logged: false,
            timed_out: false,
            _input: command.input.take(),
        })
    }

    pub(crate) fn what(&self) -> &str {
        &self.what
    }

    /// Returns the time at which [`Call::check`] must be called again.
    pub(crate) fn next_check(&self) -> Option<Instant> {
        match (self.timed_out, self.slow_logged) {
            (true, _) => None,
            (false, false) => Some(self.deadline.min(self.started + SLOW_CALL_TIME)),
            (false, true) => Some(self.deadline),
        }
    }

    /// Kills the runtime if the call's deadline has passed. Returns whether the call must be logged
    /// as slow or as killed.
    pub(crate) fn check(&mut self, now: Instant) -> CallCheck {
        let seconds = now.duration_since(self.started).as_secs();
        if !self.timed_out && now >= self.deadline {
            self.timed_out = true;
            self.kill();
            return CallCheck::TimedOut(seconds);
        }
        if !self.slow_logged && now >= self.started + SLOW_CALL_TIME {
            self.slow_logged = true;
            return CallCheck::Slow(seconds);
        }
        CallCheck::InTime
    }

    /// Shortens the remaining time of the runtime call to at most `timeout`.
    pub(crate) fn shorten(&mut self, timeout: Duration) {
        self.deadline = self.deadline.min(Instant::now() + timeout);
    }

    /// Kills the runtime's process group. This group contains the runtime and the processes that
    /// the runtime has forked. The pid cannot belong to another process, because the monitor has
    /// not reaped the runtime yet.
    pub(crate) fn kill(&self) {
        let pid = nix::unistd::Pid::from_raw(self.pid);
        let _ = nix::sys::signal::killpg(pid, Signal::SIGKILL);
        let _ = nix::sys::signal::kill(pid, Signal::SIGKILL);
    }

    /// Returns the reason why the runtime call failed, or `None` if this exit status means success.
    pub(crate) fn failure(&self, code: i32) -> Option<String> {
        (code != 0).then(|| self.reason(code, None))
    }

    /// Returns the reason why the runtime call failed with this exit status: the last error in the
    /// runtime's log. If the log contains no error, the function returns the last error in
    /// `stderr`.
    pub(crate) fn reason(&self, code: i32, stderr: Option<BorrowedFd<'_>>) -> String {
        if self.timed_out {
            let seconds = self.started.elapsed().as_secs();
            return format!(
                "{}: the monitor killed the runtime, because it had not finished after {seconds} s",
                self.what
            );
        }
        let mut log = vec![0; MAX_LOG_BYTES as usize];
        let length = self.log.metadata().map_or(0, |data| data.len());
        let start = length.saturating_sub(MAX_LOG_BYTES);
        let count = self.log.read_at(&mut log, start).unwrap_or(0);
        log.truncate(count);
        if let Some(reason) = last_error(&log) {
            return reason;
        }
        if let Some(stderr) = stderr {
            let mut written = vec![0; MAX_LOG_BYTES as usize];
            let count = rustix::io::read(stderr, &mut *written).unwrap_or(0);
            written.truncate(count);
            if let Some(reason) = last_error(&written) {
                return reason;
            }
        }
        format!(
            "{}: the runtime exited with status {code} and reported no reason",
            self.what
        )
    }
}

/// Runs the command `line` in a new process group, with the monitor's environment. The command
/// inherits only the descriptors `fds`, as its stdin, stdout and stderr. If the program is not
/// executed from the monitor's read-only file system, the C library finds it through PATH.
fn spawn(line: &[CString], fds: [BorrowedFd<'_>; 3]) -> std::io::Result<i32> {
    let program = line
        .first()
        .ok_or_else(|| std::io::Error::other("the runtime's command line is empty"))?;
    let mut actions = PosixSpawnFileActions::init()?;
    for (number, fd) in (0..).zip(fds) {
        actions.add_dup2(fd.as_raw_fd(), number)?;
    }
    let mut attributes = PosixSpawnAttr::init()?;
    attributes.set_pgroup(nix::unistd::Pid::from_raw(0))?;
    attributes.set_sigmask(&SigSet::empty())?;
    // Only SIGPIPE must be reset to its default action, because all other signals already have
    // their default action. The C library queries the action of each signal that is not in this
    // set. For this reason, a set of all signals is cheaper than a set with only SIGPIPE.
    attributes.set_sigdefault(&SigSet::all())?;
    attributes.set_flags(
        PosixSpawnFlags::POSIX_SPAWN_SETPGROUP
            | PosixSpawnFlags::POSIX_SPAWN_SETSIGMASK
            | PosixSpawnFlags::POSIX_SPAWN_SETSIGDEF,
    )?;
    let mut environment = vec![CString::new(format!("{NONE_IGNORED}=1"))?];
    for (name, value) in std::env::vars_os() {
        let mut entry = name.into_encoded_bytes();
        entry.push(b'=');
        entry.extend_from_slice(value.as_encoded_bytes());
        environment.push(CString::new(entry)?);
    }
    let pid = match readonly_exec::executable_path(program) {
        Some(path) => posix_spawn(path.as_c_str(), &actions, &attributes, line, &environment),
        None => posix_spawnp(program, &actions, &attributes, line, &environment),
    };
    Ok(pid?.as_raw())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_reason_of_a_failed_call_is_the_last_line_of_the_runtimes_output() {
        let command = ["sh", "-c", "echo disk quota exceeded >&2; exit 3"].map(String::from);
        let mut command = RuntimeCommand::new(&command, "start", "a");
        let call = Call::start(&mut command, Duration::from_secs(60)).unwrap();
        let pid = rustix::process::Pid::from_raw(call.pid);
        rustix::process::waitpid(pid, rustix::process::WaitOptions::empty()).unwrap();
        assert_eq!(call.reason(3, None), "disk quota exceeded");
    }
}
