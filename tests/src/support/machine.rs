//! Running commands: with a deadline, with their output kept, and told in full when they fail.

use std::ffi::OsStr;
use std::fs::File;
use std::io::{Read, Seek, Write};
use std::os::fd::OwnedFd;
use std::os::unix::process::ExitStatusExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use nix::sys::memfd::{MFdFlags, memfd_create};
use serde_json::Value;

pub(crate) use libtest_mimic::Failed;

pub(crate) type Result<T = ()> = std::result::Result<T, Failed>;

/// Ends the test with a message unless the condition holds.
#[macro_export]
macro_rules! ensure {
    ($condition:expr, $($message:tt)+) => {
        let holds: bool = $condition;
        if !holds {
            return Err(format!($($message)+).into());
        }
    };
}

/// Ends the test unless both are equal; the message says what they are of.
#[macro_export]
macro_rules! ensure_eq {
    ($is:expr, $should:expr, $($what:tt)+) => {
        // A match, not a let: what the expressions borrow from lives as long as it.
        match (&$is, &$should) {
            (is, should) if is != should => {
                return Err(format!("{}: is {is:?}, should be {should:?}", format!($($what)+)).into());
            }
            _ => {}
        }
    };
}

/// Nothing that is waited for may take longer; the guest computes twenty times slower than a host.
pub(crate) fn deadline() -> Duration {
    let guest = std::env::var("RRUN_TEST_VIEW").is_ok_and(|view| view.starts_with("vm"));
    Duration::from_secs(if guest { 120 } else { 30 })
}

/// Whether this is `make test-full`.
pub(crate) fn full() -> bool {
    std::env::var_os("RRUN_TEST_FULL").is_some()
}

/// How often something random is tried: seldom, or, for `make test-full`, as often as the
/// specification has it.
pub(crate) fn rounds(few: u64, many: u64) -> u64 {
    if full() { many } else { few }
}

/// Numbers of no pattern: xorshift64 from the clock. The seed is told with a failure.
pub(crate) struct Dice {
    pub(crate) seed: u64,
    state: u64,
}

impl Dice {
    pub(crate) fn new() -> Self {
        let since = std::time::SystemTime::now().duration_since(std::time::UNIX_EPOCH);
        let seed = since.map_or(1, |since| since.subsec_nanos()) | 1;
        Dice {
            seed: seed.into(),
            state: u64::from(seed).wrapping_mul(0x9e37_79b9_7f4a_7c15),
        }
    }

    /// From 0 to below `end`.
    pub(crate) fn below(&mut self, end: u64) -> u64 {
        self.state ^= self.state << 13;
        self.state ^= self.state >> 7;
        self.state ^= self.state << 17;
        self.state % end
    }
}

pub(crate) const MIB: u64 = 1 << 20;

/// Where PATH has this program.
pub(crate) fn program_path(name: &str) -> Option<PathBuf> {
    if name.contains('/') {
        return Some(PathBuf::from(name)).filter(|path| path.exists());
    }
    let path = std::env::var_os("PATH")?;
    std::env::split_paths(&path)
        .map(|dir| dir.join(name))
        .find(|path| path.is_file())
}

/// A command to run. Its output goes to anonymous files, not pipes: a container that it leaves
/// behind holds them open, and nobody must wait for that.
pub(crate) struct Run {
    command: Command,
    stdin: Option<Vec<u8>>,
    deadline: Duration,
}

/// What a command did.
#[derive(Debug)]
pub(crate) struct Output {
    pub(crate) command: String,
    /// The exit code, or 128 + the signal's number.
    pub(crate) code: i32,
    pub(crate) stdout: String,
    pub(crate) stderr: String,
    pub(crate) took: Duration,
}

/// `strace` of all opens of a program and its children. Each thread gets a trace of its own in the
/// directory, because a shared one would contain interrupted lines.
pub(crate) fn strace_opens(traces: &Path) -> Result<Run> {
    std::fs::create_dir_all(traces)?;
    let calls = "trace=open,openat,openat2";
    Ok(command("strace", ["-ff", "-y", "-e", calls, "-o"]).arg(traces.join("of")))
}

/// Fails if a traced program opened a file whose path ends with `path`, other than with O_PATH. This
/// includes an open through a descriptor: `strace -y` adds the path of the opened file to its number.
/// Returns whether a program looked the file up.
pub(crate) fn only_looked_up(traces: &Path, path: &str) -> Result<bool> {
    let mut looked_up = false;
    let (argument, result) = (format!("{path}\""), format!("{path}<"));
    for trace in std::fs::read_dir(traces)? {
        for line in std::fs::read_to_string(trace?.path())?.lines() {
            let (call, returned) = line.rsplit_once(" = ").unwrap_or((line, ""));
            let opened = returned.contains(&result) || returned.ends_with(&format!("{path}>"));
            if call.contains(&argument) || opened {
                looked_up = true;
                ensure!(call.contains("O_PATH"), "{path} was opened: {line}");
            }
        }
    }
    Ok(looked_up)
}

pub(crate) fn command<S: AsRef<OsStr>>(program: &str, args: impl IntoIterator<Item = S>) -> Run {
    let mut command = Command::new(program);
    command.args(args);
    Run {
        command,
        stdin: None,
        deadline: deadline(),
    }
}

impl Run {
    pub(crate) fn arg(mut self, arg: impl AsRef<OsStr>) -> Self {
        self.command.arg(arg);
        self
    }

    pub(crate) fn args<S: AsRef<OsStr>>(mut self, args: impl IntoIterator<Item = S>) -> Self {
        self.command.args(args);
        self
    }

    pub(crate) fn dir(mut self, dir: &Path) -> Self {
        self.command.current_dir(dir);
        self
    }

    pub(crate) fn stdin(mut self, text: impl Into<Vec<u8>>) -> Self {
        self.stdin = Some(text.into());
        self
    }

    pub(crate) fn within(mut self, deadline: Duration) -> Self {
        self.deadline = deadline;
        self
    }

    fn told(&self) -> String {
        std::iter::once(self.command.get_program())
            .chain(self.command.get_args())
            .map(|word| word.to_string_lossy())
            .collect::<Vec<_>>()
            .join(" ")
    }

    /// Starts it and leaves it running.
    pub(crate) fn start(mut self) -> Result<Running> {
        let told = self.told();
        let (out, out_end) = output_file()?;
        let (err, err_end) = output_file()?;
        let stdin = match &self.stdin {
            None => Stdio::null(),
            Some(text) => {
                let (mut file, end) = output_file()?;
                file.write_all(text)?;
                file.rewind()?;
                drop(file);
                Stdio::from(end)
            }
        };
        let child = self
            .command
            .stdin(stdin)
            .stdout(out_end)
            .stderr(err_end)
            .spawn()
            .map_err(|error| format!("{told}: {error}"))?;
        Ok(Running {
            told,
            child,
            out,
            err,
            started: Instant::now(),
        })
    }

    /// Runs it to its end, whatever that is.
    pub(crate) fn end(self) -> Result<Output> {
        let deadline = self.deadline;
        self.start()?.end_within(deadline)
    }

    /// Runs it; it must succeed.
    pub(crate) fn ok(self) -> Result<Output> {
        self.exits(0)
    }

    /// Runs it; it must exit with this code.
    pub(crate) fn exits(self, code: i32) -> Result<Output> {
        let output = self.end()?;
        ensure!(
            output.code == code,
            "should exit with {code}:\n{}",
            output.told()
        );
        Ok(output)
    }
}

impl Output {
    pub(crate) fn told(&self) -> String {
        let mut text = format!(
            "$ {}\nexit code {} after {:?}",
            self.command, self.code, self.took
        );
        for (name, output) in [("stdout", &self.stdout), ("stderr", &self.stderr)] {
            if !output.is_empty() {
                text += &format!("\n{name}: {}", tail(output.trim_end(), 6000));
            }
        }
        text
    }

    pub(crate) fn json(&self) -> Result<Value> {
        serde_json::from_str(&self.stdout)
            .map_err(|error| format!("not JSON ({error}):\n{}", self.told()).into())
    }

    /// Standard output without the last newline.
    pub(crate) fn text(&self) -> &str {
        self.stdout.trim_end_matches('\n')
    }

    /// Standard output must have this in it.
    pub(crate) fn says(self, what: &str) -> Result<Self> {
        ensure!(
            self.stdout.contains(what),
            "should say {what:?}:\n{}",
            self.told()
        );
        Ok(self)
    }

    /// It must have failed, and told why on standard error in these words.
    pub(crate) fn fails_with(&self, why: &str) -> Result {
        ensure!(
            self.code != 0 && self.stderr.contains(why),
            "should fail and tell {why:?}:\n{}",
            self.told()
        );
        Ok(())
    }
}

/// The end of a text, at most `most` bytes of it.
pub(crate) fn tail(text: &str, most: usize) -> String {
    if text.len() <= most {
        return text.to_owned();
    }
    let mut start = text.len() - most;
    while !text.is_char_boundary(start) {
        start += 1;
    }
    format!(
        "[… {start} bytes …]{}",
        text.get(start..).unwrap_or_default()
    )
}

fn output_file() -> Result<(File, OwnedFd)> {
    let end = memfd_create(c"output", MFdFlags::MFD_CLOEXEC)
        .map_err(|errno| format!("memfd_create: {errno}"))?;
    Ok((File::from(end.try_clone()?), end))
}

fn contents(file: &mut File) -> String {
    // The offset is shared with the writer: read by a path of its own.
    let path = format!("/proc/self/fd/{}", std::os::fd::AsRawFd::as_raw_fd(file));
    let mut bytes = Vec::new();
    if let Ok(mut again) = File::open(path) {
        let _ = again.read_to_end(&mut bytes);
    }
    String::from_utf8_lossy(&bytes).into_owned()
}

/// A command that runs. Dropped, it is killed.
pub(crate) struct Running {
    told: String,
    child: Child,
    out: File,
    err: File,
    started: Instant,
}

impl Running {
    pub(crate) fn pid(&self) -> i32 {
        i32::try_from(self.child.id()).unwrap_or(-1)
    }

    pub(crate) fn stdout(&mut self) -> String {
        contents(&mut self.out)
    }

    pub(crate) fn stderr(&mut self) -> String {
        contents(&mut self.err)
    }

    /// Whether it has not ended yet.
    pub(crate) fn lives(&mut self) -> bool {
        matches!(self.child.try_wait(), Ok(None))
    }

    pub(crate) fn signal(&self, signal: nix::sys::signal::Signal) {
        let _ = nix::sys::signal::kill(nix::unistd::Pid::from_raw(self.pid()), signal);
    }

    pub(crate) fn end(self) -> Result<Output> {
        self.end_within(deadline())
    }

    pub(crate) fn end_within(mut self, deadline: Duration) -> Result<Output> {
        let asked = Instant::now();
        let mut pause = Duration::from_millis(1);
        let status = loop {
            if let Some(status) = self.child.try_wait()? {
                break status;
            }
            if asked.elapsed() > deadline {
                let _ = self.child.kill();
                let _ = self.child.wait();
                let output = self.output(-1);
                return Err(format!("did not end within {deadline:?}:\n{}", output.told()).into());
            }
            std::thread::sleep(pause);
            pause = (pause * 2).min(Duration::from_millis(20));
        };
        let code = status
            .code()
            .unwrap_or_else(|| 128 + status.signal().unwrap_or(0));
        Ok(self.output(code))
    }

    fn output(&mut self, code: i32) -> Output {
        Output {
            command: self.told.clone(),
            code,
            stdout: contents(&mut self.out),
            stderr: contents(&mut self.err),
            took: self.started.elapsed(),
        }
    }
}

impl Drop for Running {
    fn drop(&mut self) {
        if self.lives() {
            let _ = self.child.kill();
            let _ = self.child.wait();
        }
    }
}

/// Waits until this gives a value; `what` says what was waited for in vain.
pub(crate) fn wait_for<T>(what: &str, mut probe: impl FnMut() -> Result<Option<T>>) -> Result<T> {
    wait_within(deadline(), what, &mut probe)
}

/// As [`wait_for`], with a deadline of the caller's own.
pub(crate) fn wait_within<T>(
    deadline: Duration,
    what: &str,
    mut probe: impl FnMut() -> Result<Option<T>>,
) -> Result<T> {
    let started = Instant::now();
    let mut last = String::new();
    loop {
        match probe() {
            Ok(Some(value)) => return Ok(value),
            Ok(None) => {}
            Err(failed) => last = failed.message().unwrap_or_default().to_owned(),
        }
        if started.elapsed() > deadline {
            return Err(format!("waited {deadline:?} in vain for {what}\n{last}").into());
        }
        std::thread::sleep(Duration::from_millis(20));
    }
}

/// A directory under /tmp that goes with its owner.
pub(crate) struct Directory(PathBuf);

impl Directory {
    pub(crate) fn new(name: &str) -> Result<Self> {
        let path = std::env::temp_dir().join(format!("rrun-e2e-{name}-XXXXXX"));
        let path = nix::unistd::mkdtemp(&path)
            .map_err(|errno| format!("mkdtemp {}: {errno}", path.display()))?;
        // mkdtemp makes it 0700; a user namespace's root must be able to pass.
        std::fs::set_permissions(&path, std::os::unix::fs::PermissionsExt::from_mode(0o755))?;
        Ok(Directory(path))
    }

    pub(crate) fn path(&self) -> &Path {
        &self.0
    }

    pub(crate) fn join(&self, name: &str) -> PathBuf {
        self.0.join(name)
    }
}

impl Drop for Directory {
    fn drop(&mut self) {
        let _ = std::fs::remove_dir_all(&self.0);
    }
}

static NOTES: std::sync::Mutex<Vec<String>> = std::sync::Mutex::new(Vec::new());

/// A figure worth reading, shown after all tests; nothing may depend on it.
pub(crate) fn note(text: String) {
    if let Ok(mut notes) = NOTES.lock() {
        notes.push(text);
    }
}

pub(crate) fn notes() -> Vec<String> {
    NOTES.lock().map(|notes| notes.clone()).unwrap_or_default()
}
