//! Commands that run with a deadline. If a command fails, the test's error message contains the
//! whole command line and the command's output.

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

/// Fails the test with a message unless the condition holds.
#[macro_export]
macro_rules! ensure {
    ($condition:expr, $($message:tt)+) => {
        let holds: bool = $condition;
        if !holds {
            return Err(format!($($message)+).into());
        }
    };
}

/// Fails the test unless the values `is` and `should` are equal. The error message begins with
/// `what`, a description of the compared value.
#[macro_export]
macro_rules! ensure_eq {
    ($is:expr, $should:expr, $($what:tt)+) => {
        // The macro uses `match` and not `let`, because temporary values in the expressions must
        // live until the end of the comparison.
        match (&$is, &$should) {
            (is, should) if is != should => {
                return Err(format!("{}: the observed value is {is:?}, but the expected value is {should:?}", format!($($what)+)).into());
            }
            _ => {}
        }
    };
}

/// Returns the longest time for which a test waits for an event. In the guest machine, programs are
/// twenty times slower than on a host. The time is therefore longer in the guest machine.
pub(crate) fn deadline() -> Duration {
    let guest = std::env::var("RRUN_TEST_VIEW").is_ok_and(|view| view.starts_with("vm"));
    Duration::from_secs(if guest { 120 } else { 30 })
}

/// Returns true in a run of `make test-full`.
pub(crate) fn full() -> bool {
    std::env::var_os("RRUN_TEST_FULL").is_some()
}

/// Returns how many times a test repeats a random attempt. `make test-full` uses `many`, the number
/// from the project's specification. Other runs use `few`.
pub(crate) fn rounds(few: u64, many: u64) -> u64 {
    if full() { many } else { few }
}

/// Returns the seed of the samples that tests draw. The seed is the number of the day since the Unix
/// epoch, so the samples are different every day, but equal on the same day. The environment
/// variable RRUN_TEST_SEED overrides the seed.
pub(crate) fn seed_of_the_day() -> u64 {
    let since = std::time::SystemTime::now().duration_since(std::time::UNIX_EPOCH);
    let today = || since.map_or(1, |since| since.as_secs() / 86400);
    given_seed().unwrap_or_else(today)
}

/// Returns the seed of the samples with which tests compare rrun with other programs. `make test`
/// always uses the same seed, because a new sample can show a difference that is not a mistake of
/// rrun. `make test-full` uses the [`seed_of_the_day`]. RRUN_TEST_SEED overrides both.
pub(crate) fn fixed_seed() -> u64 {
    if full() {
        seed_of_the_day()
    } else {
        given_seed().unwrap_or(20_786)
    }
}

fn given_seed() -> Option<u64> {
    std::env::var("RRUN_TEST_SEED").ok()?.parse().ok()
}

/// A random number generator: xorshift64, seeded from the clock. Failure messages contain the seed.
pub(crate) struct Dice {
    pub(crate) seed: u64,
    state: u64,
}

impl Dice {
    pub(crate) fn new() -> Self {
        let since = std::time::SystemTime::now().duration_since(std::time::UNIX_EPOCH);
        Dice::from_seed(since.map_or(1, |since| since.subsec_nanos()).into())
    }

    pub(crate) fn from_seed(seed: u64) -> Self {
        Dice {
            seed,
            // The state of the generator must not be 0.
            state: (seed | 1 << 63).wrapping_mul(0x9e37_79b9_7f4a_7c15),
        }
    }

    /// Returns a random number that is less than `end`.
    pub(crate) fn below(&mut self, end: u64) -> u64 {
        self.state ^= self.state << 13;
        self.state ^= self.state >> 7;
        self.state ^= self.state << 17;
        self.state % end
    }

    /// Returns true in one of `times` calls on average.
    pub(crate) fn one_in(&mut self, times: u64) -> bool {
        self.below(times) == 0
    }

    /// Returns one of the elements of `all`, which must not be empty.
    pub(crate) fn pick<T: Copy>(&mut self, all: &[T]) -> T {
        all[self.below(all.len() as u64) as usize]
    }

    /// Returns at most `most` elements of `all`, which it draws at random.
    pub(crate) fn draw<T>(&mut self, mut all: Vec<T>, most: usize) -> Vec<T> {
        for index in (1..all.len()).rev() {
            let other = self.below(index as u64 + 1) as usize;
            all.swap(index, other);
        }
        all.truncate(most);
        all
    }
}

pub(crate) const MIB: u64 = 1 << 20;

/// Returns the path of the program `name`. If `name` contains no slash, the function searches PATH.
pub(crate) fn program_path(name: &str) -> Option<PathBuf> {
    if name.contains('/') {
        return Some(PathBuf::from(name)).filter(|path| path.exists());
    }
    let path = std::env::var_os("PATH")?;
    std::env::split_paths(&path)
        .map(|dir| dir.join(name))
        .find(|path| path.is_file())
}

/// A command to run. The command writes its output to anonymous files, not to pipes. If the command
/// left a container behind, the container would keep a pipe open. The reader of the pipe would then
/// wait for the container's exit.
pub(crate) struct Run {
    command: Command,
    stdin: Option<Vec<u8>>,
    deadline: Duration,
}

/// The result of a command.
#[derive(Debug)]
pub(crate) struct Output {
    pub(crate) command: String,
    /// The exit code, or 128 plus the number of the signal that killed the command.
    pub(crate) code: i32,
    pub(crate) stdout: String,
    pub(crate) stderr: String,
    pub(crate) took: Duration,
}

/// Returns an strace command, to which a test adds a program and its arguments. strace records each
/// file that the program or one of its children opens. For each thread, strace writes a separate
/// trace file to the directory `traces`. In a single file for all threads, the lines for the system
/// calls of different threads would be mixed up.
pub(crate) fn strace_opens(traces: &Path) -> Result<Run> {
    std::fs::create_dir_all(traces)?;
    let calls = "trace=open,openat,openat2";
    Ok(command("strace", ["-ff", "-y", "-e", calls, "-o"]).arg(traces.join("of")))
}

/// Checks that the traced program opened files only with O_PATH if their paths end with `path`.
/// Returns whether the program opened such a file at all. `strace -y` prints the real path of each
/// opened file. The check therefore recognises the file even if the program used another path.
pub(crate) fn only_looked_up(traces: &Path, path: &str) -> Result<bool> {
    let mut looked_up = false;
    let (argument, result) = (format!("{path}\""), format!("{path}<"));
    for trace in std::fs::read_dir(traces)? {
        for line in std::fs::read_to_string(trace?.path())?.lines() {
            let (call, returned) = line.rsplit_once(" = ").unwrap_or((line, ""));
            let opened = returned.contains(&result) || returned.ends_with(&format!("{path}>"));
            if call.contains(&argument) || opened {
                looked_up = true;
                ensure!(
                    call.contains("O_PATH"),
                    "the traced program opened {path} without O_PATH: {line}"
                );
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

    fn command_line(&self) -> String {
        std::iter::once(self.command.get_program())
            .chain(self.command.get_args())
            .map(|word| word.to_string_lossy())
            .collect::<Vec<_>>()
            .join(" ")
    }

    /// Starts the command in the background.
    pub(crate) fn start(mut self) -> Result<Running> {
        let command_line = self.command_line();
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
            .map_err(|error| format!("cannot start the command {command_line}: {error}"))?;
        Ok(Running {
            command_line,
            child,
            out,
            err,
            started: Instant::now(),
        })
    }

    /// Runs the command until it exits. The command is allowed to fail.
    pub(crate) fn end(self) -> Result<Output> {
        let deadline = self.deadline;
        self.start()?.end_within(deadline)
    }

    /// Runs the command, which must exit with 0.
    pub(crate) fn ok(self) -> Result<Output> {
        self.exits(0)
    }

    /// Runs the command, which must exit with the code `code`.
    pub(crate) fn exits(self, code: i32) -> Result<Output> {
        let output = self.end()?;
        ensure!(
            output.code == code,
            "the command should exit with the exit code {code}:\n{}",
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
        serde_json::from_str(&self.stdout).map_err(|error| {
            format!(
                "the command's standard output is not JSON ({error}):\n{}",
                self.told()
            )
            .into()
        })
    }

    /// Returns the standard output without its final newlines.
    pub(crate) fn text(&self) -> &str {
        self.stdout.trim_end_matches('\n')
    }

    /// Fails unless the standard output contains `what`.
    pub(crate) fn says(self, what: &str) -> Result<Self> {
        ensure!(
            self.stdout.contains(what),
            "the standard output should contain {what:?}:\n{}",
            self.told()
        );
        Ok(self)
    }

    /// Fails unless the command failed and its standard error contains `why`.
    pub(crate) fn fails_with(&self, why: &str) -> Result {
        ensure!(
            self.code != 0 && self.stderr.contains(why),
            "the command should fail, and its standard error should contain {why:?}:\n{}",
            self.told()
        );
        Ok(())
    }
}

/// Returns at most the last `most` bytes of `text`.
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
        .map_err(|errno| format!("cannot create an anonymous file (memfd_create): {errno}"))?;
    Ok((File::from(end.try_clone()?), end))
}

fn contents(file: &mut File) -> String {
    // `file` and the running command share one file offset. If this function moved the offset, the
    // command would write to a wrong position. So this function opens the file again through /proc,
    // which creates a separate offset.
    let path = format!("/proc/self/fd/{}", std::os::fd::AsRawFd::as_raw_fd(file));
    let mut bytes = Vec::new();
    if let Ok(mut again) = File::open(path) {
        let _ = again.read_to_end(&mut bytes);
    }
    String::from_utf8_lossy(&bytes).into_owned()
}

/// A running command. Dropping the value kills the command.
pub(crate) struct Running {
    command_line: String,
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

    /// Returns whether the command is still running.
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
        let started = Instant::now();
        let mut pause = Duration::from_millis(1);
        let status = loop {
            if let Some(status) = self.child.try_wait()? {
                break status;
            }
            if started.elapsed() > deadline {
                let _ = self.child.kill();
                let _ = self.child.wait();
                let output = self.output(-1);
                return Err(format!(
                    "the command did not exit within {deadline:?}:\n{}",
                    output.told()
                )
                .into());
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
            command: self.command_line.clone(),
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

/// Calls `probe` until it returns a value. `what` describes the expected event in the message of a
/// timeout.
pub(crate) fn wait_for<T>(what: &str, mut probe: impl FnMut() -> Result<Option<T>>) -> Result<T> {
    wait_within(deadline(), what, &mut probe)
}

/// Like [`wait_for`], with a deadline that the caller specifies.
pub(crate) fn wait_within<T>(
    deadline: Duration,
    what: &str,
    mut probe: impl FnMut() -> Result<Option<T>>,
) -> Result<T> {
    let started = Instant::now();
    let mut last_failure = String::new();
    loop {
        match probe() {
            Ok(Some(value)) => return Ok(value),
            Ok(None) => {}
            Err(failed) => last_failure = failed.message().unwrap_or_default().to_owned(),
        }
        if started.elapsed() > deadline {
            return Err(format!(
                "timeout after {deadline:?} while waiting for {what}\n{last_failure}"
            )
            .into());
        }
        std::thread::sleep(Duration::from_millis(20));
    }
}

/// A temporary directory in /tmp. Dropping the value deletes the directory.
pub(crate) struct Directory(PathBuf);

impl Directory {
    pub(crate) fn new(name: &str) -> Result<Self> {
        let path = std::env::temp_dir().join(format!("rrun-e2e-{name}-XXXXXX"));
        let path = nix::unistd::mkdtemp(&path).map_err(|errno| {
            format!(
                "cannot create a temporary directory {}: {errno}",
                path.display()
            )
        })?;
        // mkdtemp creates the directory with mode 0700. But the directory must be searchable for
        // the root user of a container's user namespace. On the host, this user is unprivileged.
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

/// Records a measurement. The harness prints all measurements after the tests. A measurement must
/// not affect a test's result.
pub(crate) fn note(text: String) {
    if let Ok(mut notes) = NOTES.lock() {
        notes.push(text);
    }
}

pub(crate) fn notes() -> Vec<String> {
    NOTES.lock().map(|notes| notes.clone()).unwrap_or_default()
}
