//! Runs of the OCI runtime's command line. None is waited for: SIGCHLD tells of its end, and a
//! deadline ends it.
//!
//! What the runtime is to read or write besides the container's stdio (its log, a process, the
//! resources) are memory files, reached by `/proc/MONITOR/fd/N`: no name to clean up, and no
//! descriptor of ours that could leak into a container.

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

/// A call that takes longer than this is logged.
const SLOW_CALL_TIME: Duration = Duration::from_secs(10);

/// How much of a runtime's log or of its stderr is searched for a reason, from its end.
const MAX_LOG_BYTES: u64 = 16 << 10;

/// A file in memory with this content, from its start.
pub(crate) fn memory_file(name: &str, content: &[u8]) -> std::io::Result<File> {
    let mut file = File::from(rustix::fs::memfd_create(name, MemfdFlags::CLOEXEC)?);
    if !content.is_empty() {
        file.write_all(content)?;
        file.rewind()?;
    }
    Ok(file)
}

/// How another process of this node finds one of our descriptors.
pub(crate) fn path_of(fd: impl AsFd) -> String {
    format!("/proc/{}/fd/{}", std::process::id(), fd.as_fd().as_raw_fd())
}

/// A process id from the file that a runtime wrote.
pub(crate) fn read_pid(path: &Path) -> Option<i32> {
    let text = std::fs::read_to_string(path).ok()?;
    text.trim().parse().ok().filter(|pid| *pid > 1)
}

/// The stdio of a call.
#[derive(Debug)]
pub(crate) enum Stdio {
    /// Nothing to read; what the runtime writes is its log, too.
    Log,
    /// As `Log`, but this to read.
    Input(File),
    /// The container's or the exec's: what the runtime itself writes goes the same way.
    Container([OwnedFd; 3]),
}

/// A runtime's command line, not yet run.
#[derive(Debug)]
pub(crate) struct RuntimeCommand {
    /// The binary and its global options.
    runtime: Vec<String>,
    verb: &'static str,
    /// The container's.
    id: String,
    arguments: Vec<OsString>,
    stdio: Stdio,
    /// A file that the runtime reads by path, and that must last as long as the call.
    input: Option<OwnedFd>,
}

impl RuntimeCommand {
    /// `RUNTIME… VERB` for the container with this id, without arguments yet.
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

    /// A flag with its value, if there is one.
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

    /// Keeps a file open that an argument names by its path.
    pub(crate) fn input(mut self, file: Option<OwnedFd>) -> Self {
        self.input = file;
        self
    }

    /// The runtime's binary, for sentences.
    fn program(&self) -> &str {
        self.runtime.first().map_or("the runtime", String::as_str)
    }

    /// The sentence for a runtime that could not be started.
    pub(crate) fn not_run(&self, error: &std::io::Error) -> String {
        let (program, verb, id) = (self.program(), self.verb, &self.id);
        let reason = describe(error);
        match verb {
            "create" => format!("run {program} for the create of container {id}: {reason}"),
            "exec" => format!("exec in container {id}: {reason}"),
            _ => format!("run {program} to {verb} container {id}: {reason}"),
        }
    }
}

/// A runtime that is running.
pub(crate) struct Call {
    pub(crate) pid: i32,
    /// The subcommand and the container, for sentences.
    what: String,
    log: File,
    started: Instant,
    deadline: Instant,
    slow_logged: bool,
    timed_out: bool,
    /// See [`RuntimeCommand::input`].
    _input: Option<OwnedFd>,
}

/// What [`Call::check`] found.
pub(crate) enum CallCheck {
    InTime,
    /// The call has been running for this many seconds, which has not been logged yet.
    Slow(u64),
    /// The deadline has passed, and the runtime has been killed, after this many seconds.
    TimedOut(u64),
}

impl Call {
    /// Starts `RUNTIME… --log … VERB arguments…`. On success what the command keeps for the
    /// runtime is the call's.
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

    /// When somebody should call [`Call::check`] again.
    pub(crate) fn next_check(&self) -> Option<Instant> {
        match (self.timed_out, self.slow_logged) {
            (true, _) => None,
            (false, false) => Some(self.deadline.min(self.started + SLOW_CALL_TIME)),
            (false, true) => Some(self.deadline),
        }
    }

    /// Kills the runtime if the call's deadline has passed.
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

    /// Brings the deadline forward to at most this from now on.
    pub(crate) fn shorten(&mut self, timeout: Duration) {
        self.deadline = self.deadline.min(Instant::now() + timeout);
    }

    /// Kills the runtime with what it has forked: it leads a process group, and has not been
    /// reaped, so that its number is still its own.
    fn kill(&self) {
        let pid = nix::unistd::Pid::from_raw(self.pid);
        let _ = nix::sys::signal::killpg(pid, Signal::SIGKILL);
        let _ = nix::sys::signal::kill(pid, Signal::SIGKILL);
    }

    /// Why the call failed, if it did by this exit status.
    pub(crate) fn failure(&self, code: i32) -> Option<String> {
        (code != 0).then(|| self.reason(code, None))
    }

    /// Why the call failed with this exit status: the last error in the runtime's log or, without
    /// one, in what it wrote to `stderr`.
    pub(crate) fn reason(&self, code: i32, stderr: Option<BorrowedFd<'_>>) -> String {
        if self.timed_out {
            let seconds = self.started.elapsed().as_secs();
            return format!("{}: the runtime was killed after {seconds} s", self.what);
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
            "{}: the runtime ended with status {code} and gave no reason",
            self.what
        )
    }
}

/// Runs a command found by the search path, in a process group of its own, with our environment
/// and these descriptors only.
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
    // All are as by default but SIGPIPE; to be told so spares the C library a look at each.
    attributes.set_sigdefault(&SigSet::all())?;
    attributes.set_flags(
        PosixSpawnFlags::POSIX_SPAWN_SETPGROUP
            | PosixSpawnFlags::POSIX_SPAWN_SETSIGMASK
            | PosixSpawnFlags::POSIX_SPAWN_SETSIGDEF,
    )?;
    let mut environment = Vec::new();
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
    fn a_failed_command_gives_its_last_line_as_the_reason() {
        let command = ["sh", "-c", "echo no such luck >&2; exit 3"].map(String::from);
        let mut command = RuntimeCommand::new(&command, "start", "a");
        let call = Call::start(&mut command, Duration::from_secs(60)).unwrap();
        let pid = rustix::process::Pid::from_raw(call.pid);
        rustix::process::waitpid(pid, rustix::process::WaitOptions::empty()).unwrap();
        assert_eq!(call.reason(3, None), "no such luck");
    }
}
