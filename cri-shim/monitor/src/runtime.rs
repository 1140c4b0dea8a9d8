//! Runs of the OCI runtime's command line. None is waited for: SIGCHLD tells of its end, and a
//! deadline ends it.
//!
//! What the runtime is to read or write besides the container's stdio (its log, a process, the
//! resources) are memory files, reached by `/proc/MONITOR/fd/N`: no name to clean up, and no
//! descriptor of ours that could leak into a container.

use std::ffi::{CString, OsStr};
use std::fs::File;
use std::io::{Seek, Write};
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};
use std::os::unix::fs::FileExt;
use std::time::{Duration, Instant};

use nix::spawn::{
    PosixSpawnAttr, PosixSpawnFileActions, PosixSpawnFlags, posix_spawn, posix_spawnp,
};
use nix::sys::signal::{SigSet, Signal};
use rustix::fs::{MemfdFlags, OFlags};
use serde::Deserialize;

use super::readonly_exec;

/// A wait for the runtime longer than this is noted.
const SLOW: Duration = Duration::from_secs(10);

/// How much of a runtime's log or of its stderr is looked at for a reason, from its end.
const MAX_REASON_INPUT: u64 = 16 << 10;

/// How long a reason may be, in bytes.
const MAX_REASON: usize = 2 << 10;

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

/// The stdio of a run.
pub(crate) enum Stdio<'a> {
    /// Nothing to read; what it writes is its log, too.
    Log,
    /// As `Log`, but this to read.
    Input(BorrowedFd<'a>),
    /// The container's: what the runtime says itself goes the same way.
    Container([BorrowedFd<'a>; 3]),
}

/// A runtime that is running.
pub(crate) struct Call {
    pub pid: i32,
    /// The subcommand and the container, for sentences.
    what: String,
    log: File,
    started: Instant,
    deadline: Instant,
    noted: bool,
    expired: bool,
    /// A memory file that the runtime reads by path, and that must last as long.
    _input: Option<OwnedFd>,
}

/// What a clock found out about a call.
pub(crate) enum Lateness {
    None,
    /// It has been running for this many seconds, and nobody has been told.
    Slow(u64),
    /// Its deadline has passed; it has been killed.
    Expired(u64),
}

impl Call {
    /// Starts `command… --log … VERB arguments…` for the container with this id; `input` is kept
    /// until the call is dropped.
    pub(crate) fn start(
        command: &[String],
        verb: &'static str,
        id: &str,
        arguments: &[&OsStr],
        stdio: &Stdio<'_>,
        input: Option<OwnedFd>,
        timeout: Duration,
    ) -> std::io::Result<Self> {
        let log = memory_file("runtime-log", &[])?;
        rustix::fs::fcntl_setfl(&log, OFlags::APPEND)?;
        let log_path = path_of(&log);
        let mut line = Vec::with_capacity(command.len() + arguments.len() + 5);
        for argument in command {
            line.push(CString::new(argument.as_bytes())?);
        }
        for argument in ["--log", &log_path, "--log-format", "json", verb] {
            line.push(CString::new(argument)?);
        }
        for argument in arguments {
            line.push(CString::new(argument.as_encoded_bytes())?);
        }
        let null = File::open("/dev/null")?;
        let fds = match *stdio {
            Stdio::Log => [null.as_fd(), log.as_fd(), log.as_fd()],
            Stdio::Input(input) => [input, log.as_fd(), log.as_fd()],
            Stdio::Container(fds) => fds,
        };
        let pid = spawn(&line, fds)?;
        let now = Instant::now();
        Ok(Call {
            pid,
            what: format!("{verb} of container {id}"),
            log,
            started: now,
            deadline: now + timeout,
            noted: false,
            expired: false,
            _input: input,
        })
    }

    pub(crate) fn what(&self) -> &str {
        &self.what
    }

    /// When somebody should call [`Call::check`] again.
    pub(crate) fn next_check(&self) -> Option<Instant> {
        match (self.expired, self.noted) {
            (true, _) => None,
            (false, false) => Some(self.deadline.min(self.started + SLOW)),
            (false, true) => Some(self.deadline),
        }
    }

    /// Looks at the clock, and kills a call that has had its time.
    pub(crate) fn check(&mut self, now: Instant) -> Lateness {
        let seconds = now.duration_since(self.started).as_secs();
        if !self.expired && now >= self.deadline {
            self.expired = true;
            self.kill();
            return Lateness::Expired(seconds);
        }
        if !self.noted && now >= self.started + SLOW {
            self.noted = true;
            return Lateness::Slow(seconds);
        }
        Lateness::None
    }

    /// Leaves the call no more than this from now on.
    pub(crate) fn hurry(&mut self, timeout: Duration) {
        self.deadline = self.deadline.min(Instant::now() + timeout);
    }

    /// Kills the runtime with what it has forked: it leads a process group, and has not been
    /// reaped, so that its number is still its own.
    fn kill(&self) {
        let pid = nix::unistd::Pid::from_raw(self.pid);
        let _ = nix::sys::signal::killpg(pid, Signal::SIGKILL);
        let _ = nix::sys::signal::kill(pid, Signal::SIGKILL);
    }

    /// Why the call failed with this exit status: the runtime's own last word, from its log or
    /// else from what it wrote to `stderr`.
    pub(crate) fn reason(&self, code: i32, stderr: Option<BorrowedFd<'_>>) -> String {
        if self.expired {
            let seconds = self.started.elapsed().as_secs();
            return format!("{}: the runtime was killed after {seconds} s", self.what);
        }
        let mut log = vec![0; MAX_REASON_INPUT as usize];
        let length = self.log.metadata().map_or(0, |data| data.len());
        let start = length.saturating_sub(MAX_REASON_INPUT);
        let count = self.log.read_at(&mut log, start).unwrap_or(0);
        log.truncate(count);
        if let Some(reason) = last_word(&log) {
            return reason;
        }
        if let Some(stderr) = stderr {
            let mut said = vec![0; MAX_REASON_INPUT as usize];
            let count = rustix::io::read(stderr, &mut *said).unwrap_or(0);
            said.truncate(count);
            if let Some(reason) = last_word(&said) {
                return reason;
            }
        }
        format!(
            "{}: the runtime ended with status {code} and gave no reason",
            self.what
        )
    }
}

/// A runtime's log line: runc's form, which all others follow.
#[derive(Deserialize)]
struct LogLine {
    level: String,
    msg: String,
}

/// The last error in a log of JSON lines, or what stands at its end that is none: all lines of it,
/// since the first of several says what was being done and the last, often, only where.
fn last_word(log: &[u8]) -> Option<String> {
    let mut plain: Vec<String> = Vec::new();
    let mut told = false;
    for line in log.rsplit(|byte| *byte == b'\n') {
        match serde_json::from_slice::<LogLine>(line) {
            Ok(entry) if matches!(entry.level.as_str(), "error" | "fatal" | "panic") => {
                let lines: Vec<&str> = entry.msg.lines().map(str::trim).collect();
                return Some(bounded(&joined(&lines)));
            }
            Ok(_) => told = !plain.is_empty(),
            // The beginning of a JSON line may be cut off.
            Err(_) if told || line.ends_with(b"\"}") => {}
            Err(_) => {
                let text = String::from_utf8_lossy(line).trim().to_owned();
                if !text.is_empty() {
                    plain.push(text);
                }
            }
        }
    }
    plain.reverse();
    (!plain.is_empty()).then(|| bounded(&joined(&plain)))
}

/// Several lines as one.
fn joined<T: AsRef<str>>(lines: &[T]) -> String {
    let mut all = String::new();
    for line in lines
        .iter()
        .map(AsRef::as_ref)
        .filter(|line| !line.is_empty())
    {
        if !all.is_empty() {
            all.push_str(if all.ends_with(':') { " " } else { "; " });
        }
        all.push_str(line);
    }
    all
}

fn bounded(text: &str) -> String {
    let mut end = text.len().min(MAX_REASON);
    while !text.is_char_boundary(end) {
        end -= 1;
    }
    text.get(..end).unwrap_or_default().to_owned()
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
    let pid = match readonly_exec::path(program) {
        Some(path) => posix_spawn(path.as_c_str(), &actions, &attributes, line, &environment),
        None => posix_spawnp(program, &actions, &attributes, line, &environment),
    };
    Ok(pid?.as_raw())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_last_error_of_a_json_log_is_the_reason() {
        let log = br#"{"level":"error","msg":"first","time":"t"}
{"msg":"mount proc on /proc: Operation not permitted (EPERM)","level":"error"}
{"level":"info","msg":"bye"}
"#;
        assert_eq!(
            last_word(log).unwrap(),
            "mount proc on /proc: Operation not permitted (EPERM)"
        );
    }

    #[test]
    fn without_an_error_the_last_plain_lines_are_the_reason() {
        assert_eq!(
            last_word(b"before\n{\"level\":\"info\",\"msg\":\"x\"}\npanic: oh\n\n  dear\n")
                .unwrap(),
            "panic: oh; dear"
        );
        assert!(last_word(b"").is_none());
    }

    #[test]
    fn an_error_of_several_lines_is_told_whole() {
        let log = br#"{"level":"error","msg":"update cpu.max:\n  write: invalid\n"}
{"level":"warning","msg":"bye"}
"#;
        assert_eq!(last_word(log).unwrap(), "update cpu.max: write: invalid");
    }

    #[test]
    fn a_reason_is_bounded_at_a_character() {
        let long = "é".repeat(MAX_REASON);
        assert_eq!(bounded(&long).len(), MAX_REASON);
        assert_eq!(bounded(&format!("a{long}")).len(), MAX_REASON - 1);
    }

    #[test]
    fn a_failed_command_gives_its_last_line_as_the_reason() {
        let command = ["sh", "-c", "echo no such luck >&2; exit 3"].map(String::from);
        let call = Call::start(
            &command,
            "start",
            "a",
            &[],
            &Stdio::Log,
            None,
            Duration::from_secs(60),
        )
        .unwrap();
        let pid = rustix::process::Pid::from_raw(call.pid);
        rustix::process::waitpid(pid, rustix::process::WaitOptions::empty()).unwrap();
        assert_eq!(call.reason(3, None), "no such luck");
    }
}
