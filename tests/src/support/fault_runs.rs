//! Runs of a command of the runtime, in each of which one system call fails.
//!
//! The first run injects no fault. It lists the system calls of the command and records the effect
//! of the command. Each further run injects one likely error into one of these system calls. The
//! command must then report the error in one sentence, or must have the same effect as without the
//! fault.

use std::collections::{BTreeMap, BTreeSet};
use std::fs::{self, File};
use std::os::unix::process::CommandExt as _;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use nix::errno::Errno;
use nix::libc;
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use serde_json::Value;

use crate::support::bundle::{Bundle, runtime_program};
use crate::support::fault_plan::plan;
use crate::support::inject::{Call, Fault, Traced, trace};
use crate::support::leak_check;
use crate::support::machine::{Dice, Result, deadline, full, note, seed_of_the_day, wait_for};
use crate::support::needs::Need;
use crate::support::observed;
use crate::{ensure, ensure_eq};

/// The length limit of an error sentence, in bytes.
const SENTENCE_BYTES_MAX: usize = 1000;

/// The number of failures that a test reports in full.
const REPORTED: usize = 40;

/// The directory to which a test writes a file with a line for each run.
const OUT: &str = "/out";

/// The commands in which the test injects faults.
pub(crate) struct Subject<'a> {
    pub(crate) name: &'a str,
    pub(crate) bundle: &'a Bundle,
    /// The arguments of each command, without the runtime's global options.
    pub(crate) commands: Vec<Vec<String>>,
    /// The user that runs the commands, if it is not root.
    pub(crate) user: Option<u32>,
    /// The number of runs without RRUN_TEST_FULL, and in the guest machine.
    pub(crate) sample: usize,
    /// Returns true for the faults that the test must not inject.
    pub(crate) skips: &'a dyn Fn(&Call, Fault) -> bool,
    /// Called before each run.
    pub(crate) before: &'a dyn Fn() -> Result,
    /// Returns what the commands have changed. Called after a run in which all commands succeeded.
    pub(crate) effect: &'a dyn Fn() -> Result<Value>,
    /// True if a command that succeeds can leave out a part of its output. It must then log a
    /// warning that names the error.
    pub(crate) warns: bool,
    /// Checks the state after a run in which a command failed. The argument is the index of this
    /// command.
    pub(crate) failed: &'a dyn Fn(usize) -> Result,
}

/// The runs of a subject, and their results.
struct Runs<'a> {
    subject: &'a Subject<'a>,
    /// The files in the bundle before the first run.
    files: BTreeSet<PathBuf>,
    /// The effect of the commands without a fault.
    effect: Value,
    errors: usize,
    successes: usize,
    deaths: usize,
    missed: usize,
    failures: Vec<String>,
    /// A line for each run.
    lines: String,
}

impl<'a> Subject<'a> {
    /// Returns a subject without commands, for the caller to complete.
    pub(crate) fn new(bundle: &'a Bundle) -> Self {
        Subject {
            name: "",
            bundle,
            commands: Vec::new(),
            user: None,
            sample: 0,
            skips: &|_, _| false,
            before: &|| Ok(()),
            effect: &|| Ok(Value::Null),
            warns: false,
            failed: &|_| Ok(()),
        }
    }

    /// Runs the commands without a fault and then with each fault, or with a sample of the faults.
    pub(crate) fn run(&self) -> Result {
        let first = self.run_without_fault();
        let (mut runs, calls) = first.map_err(|failed| {
            let why = failed.message().unwrap_or_default();
            format!("{} without a fault: {why}", self.name)
        })?;
        let mut plan = plan(&calls)?;
        plan.retain(|(call, fault)| !(self.skips)(call, *fault));
        let (seed, all) = (seed_of_the_day(), plan.len());
        // In the guest machine, all faults would take hours.
        let is_complete = full() && Need::OwnMachine.lacking().is_some();
        let most = if is_complete { all } else { self.sample };
        let plan = Dice::from_seed(seed).draw(plan, most);
        for (call, fault) in &plan {
            runs.run(call, *fault);
        }
        runs.report(plan.len(), all, seed)
    }

    fn run_without_fault(&self) -> Result<(Runs<'_>, Vec<Call>)> {
        self.bundle.write_config()?;
        let files = files_below(self.bundle.path());
        (self.before)()?;
        let whole = self.trace(None)?;
        let result = self.result(&whole);
        ensure!(whole.code == Some(0), "the command failed ({result})");
        let runs = Runs {
            subject: self,
            files,
            effect: (self.effect)()?,
            errors: 0,
            successes: 0,
            deaths: 0,
            missed: 0,
            failures: Vec::new(),
            lines: String::new(),
        };
        runs.nothing_is_left()?;
        Ok((runs, whole.calls))
    }

    fn trace(&self, fault: Option<(&Call, Fault)>) -> Result<Traced> {
        let commands = self
            .commands
            .iter()
            .enumerate()
            .map(|(index, args)| {
                // A container's user can own the files of the previous run.
                let (stdout, stderr) =
                    (stdout_of(self.bundle, index), stderr_of(self.bundle, index));
                for file in [&stdout, &stderr] {
                    let _ = fs::remove_file(file);
                }
                let mut command = Command::new(runtime_program());
                command
                    .args(self.bundle.flags())
                    .args(args)
                    .current_dir(self.bundle.path())
                    .stdin(Stdio::null())
                    .stdout(File::create(stdout)?)
                    .stderr(File::create(stderr)?);
                if let Some(user) = self.user {
                    command.uid(user).gid(user);
                }
                Ok(command)
            })
            .collect::<Result<Vec<_>>>()?;
        trace(commands, fault.map(|(call, fault)| (call.place, fault)))
    }

    /// Returns the exit code and the standard error of the last command.
    fn result(&self, traced: &Traced) -> String {
        let text = fs::read_to_string(stderr_of(self.bundle, traced.command)).unwrap_or_default();
        format!("exit code {:?}, standard error: {text:?}", traced.code)
    }
}

impl Runs<'_> {
    /// Runs the commands with a fault, and records the result.
    fn run(&mut self, call: &Call, fault: Fault) {
        let line = match self.try_run(call, fault) {
            Ok(result) => format!("{call}: {fault:?}: {result}\n"),
            Err(failed) => {
                let why = failed.message().unwrap_or_default();
                self.failures.push(format!("{call}: {fault:?}: {why}"));
                self.clean_up();
                format!("FAILED {call}: {fault:?}: {why}\n")
            }
        };
        self.lines.push_str(&line);
    }

    fn try_run(&mut self, call: &Call, fault: Fault) -> Result<String> {
        let subject = self.subject;
        (subject.before)()?;
        let traced = subject.trace(Some((call, fault)))?;
        ensure!(
            !traced.hung,
            "the command did not exit before the deadline ({})",
            subject.result(&traced)
        );
        let result = match traced.code {
            Some(0) => self.check_success(&traced, call, fault)?,
            Some(_) => self.check_error(&traced, call, fault)?,
            None => {
                ensure!(
                    takes_memory(call),
                    "a signal killed the command ({})",
                    subject.result(&traced)
                );
                self.deaths += 1;
                // A later command was killed, so the earlier commands have succeeded.
                if traced.command > 0 {
                    (subject.failed)(traced.command)?;
                }
                "killed".to_owned()
            }
        };
        self.nothing_is_left()
            .map_err(|failed| format!("{} ({result})", failed.message().unwrap_or_default()))?;
        Ok(result)
    }

    /// Checks that commands that succeeded have the same effect as without the fault.
    fn check_success(&mut self, traced: &Traced, call: &Call, fault: Fault) -> Result<String> {
        let subject = self.subject;
        let now = match (subject.effect)() {
            Ok(now) => now,
            Err(_) if takes_memory(call) && call.place.process > 0 => {
                // The container's program made the system call, and its allocator killed it.
                self.deaths += 1;
                return Ok("the program was killed".to_owned());
            }
            Err(failed) => {
                let why = failed.message().unwrap_or_default();
                let result = subject.result(traced);
                return Err(format!("the command succeeded, but {why} ({result})").into());
            }
        };
        let differences = differences("", &self.effect, &now);
        let log = fs::read_to_string(stderr_of(subject.bundle, traced.command))?;
        let warned = subject.warns
            && log.contains("level=warning")
            && names_the_error(&log, call, fault).is_ok();
        ensure!(
            differences.is_empty() || warned,
            "the command succeeded, but its effect is not the same as without the fault: {}",
            differences.join("; ")
        );
        if traced.injected.is_none() {
            self.missed += 1;
            return Ok("not made".to_owned());
        }
        self.successes += 1;
        Ok("success".to_owned())
    }

    /// Checks the error of a command that failed. Returns the error sentence.
    fn check_error(&mut self, traced: &Traced, call: &Call, fault: Fault) -> Result<String> {
        self.errors += 1;
        let text = fs::read_to_string(stderr_of(self.subject.bundle, traced.command))?;
        let sentence = if takes_memory(call) {
            // The C library itself reports errors of the program's start.
            text.trim().to_owned()
        } else {
            sentence(&text)?
        };
        names_the_error(&sentence, call, fault)?;
        (self.subject.failed)(traced.command)
            .map_err(|failed| format!("{} ({sentence})", failed.message().unwrap_or_default()))?;
        Ok(sentence)
    }

    /// Deletes the container with `delete --force`, and checks that nothing of the container is
    /// left.
    fn nothing_is_left(&self) -> Result {
        let bundle = self.subject.bundle;
        bundle.end()?;
        ensure!(
            !has_cgroup(bundle),
            "`delete --force` left the container's cgroup behind"
        );
        let left = fs::read_dir(bundle.root()).into_iter().flatten().flatten();
        let left: Vec<_> = left.map(|entry| entry.file_name()).collect();
        ensure!(
            left.is_empty(),
            "`delete --force` left files in the state directory: {left:?}"
        );
        let now = files_below(bundle.path());
        let new: Vec<_> = now.difference(&self.files).collect();
        ensure!(
            new.is_empty(),
            "the command left new files in the bundle: {new:?}"
        );
        ensure_eq!(
            leak_check::mounts_below(bundle.path()),
            Vec::<PathBuf>::new(),
            "the mounts that the command left in the bundle"
        );
        wait_for("the container's processes to exit", || {
            let left = processes_of(bundle);
            ensure!(left.is_empty(), "these processes still run: {left:?}");
            Ok(Some(()))
        })
    }

    /// Removes everything that a failed run may have left behind, so that the next run can start.
    fn clean_up(&self) {
        let bundle = self.subject.bundle;
        for new in files_below(bundle.path()).difference(&self.files) {
            leak_check::remove(new);
        }
        let _ = bundle.end();
        if has_cgroup(bundle) {
            let _ = fs::write(bundle.cgroup().join("cgroup.kill"), "1");
        }
        for (pid, _) in processes_of(bundle) {
            let _ = kill(Pid::from_raw(pid), Signal::SIGKILL);
        }
        let _ = wait_for("the cgroup to be empty", || {
            if has_cgroup(bundle) {
                leak_check::remove(&bundle.cgroup());
            }
            Ok((!has_cgroup(bundle)).then_some(()))
        });
        leak_check::remove(&bundle.root());
    }

    fn report(&self, drawn: usize, all: usize, seed: u64) -> Result {
        let name = self.subject.name;
        note(format!(
            "{name}: {drawn} of {all} faults, drawn with RRUN_TEST_SEED={seed}; {} runs reported an error, {} succeeded, {} were killed by their allocator, and {} did not make the system call",
            self.errors, self.successes, self.deaths, self.missed
        ));
        if Path::new(OUT).is_dir() {
            let file = format!("{OUT}/faults-{}.txt", name.replace(' ', "-"));
            fs::write(file, &self.lines)?;
        }
        ensure!(
            self.missed * 4 <= drawn,
            "{name}: {} of {drawn} runs did not make the system call that the first run made",
            self.missed
        );
        let reported: Vec<_> = self.failures.iter().take(REPORTED).cloned().collect();
        ensure!(
            self.failures.is_empty(),
            "{name}: {} of {drawn} runs failed, drawn with RRUN_TEST_SEED={seed}:\n{}",
            self.failures.len(),
            reported.join("\n")
        );
        Ok(())
    }
}

/// Returns the path of the file that contains the standard output of the command with the number
/// `index`.
pub(crate) fn stdout_of(bundle: &Bundle, index: usize) -> PathBuf {
    bundle.join(&format!("stdout-{index}"))
}

fn stderr_of(bundle: &Bundle, index: usize) -> PathBuf {
    bundle.join(&format!("stderr-{index}"))
}

/// Returns whether the container's cgroup exists. The containers of users other than root have no
/// cgroup.
fn has_cgroup(bundle: &Bundle) -> bool {
    bundle.config["linux"]["cgroupsPath"].is_string() && bundle.cgroup().exists()
}

/// Returns true if a failure of the system call can kill a process by its memory allocator.
fn takes_memory(call: &Call) -> bool {
    matches!(
        call.place.number,
        libc::SYS_mmap | libc::SYS_mremap | libc::SYS_mprotect
    )
}

/// Returns the error sentence in the log of a command. The log must contain exactly one error.
fn sentence(log: &str) -> Result<String> {
    let mut errors = Vec::new();
    for line in log.lines() {
        let message = line
            .split_once(" level=")
            .and_then(|(_, rest)| rest.split_once(" msg="));
        match message {
            Some(("error", message)) => errors.push(serde_json::from_str::<String>(message)?),
            Some(("warning", _)) => {}
            _ => {
                return Err(
                    format!("the command wrote a line that is not a log line: {line:?}").into(),
                );
            }
        }
    }
    let [sentence] = errors.as_slice() else {
        return Err(format!(
            "the command failed with {} errors in its log: {log:?}",
            errors.len()
        )
        .into());
    };
    ensure!(
        sentence.len() <= SENTENCE_BYTES_MAX && !sentence.contains('\n'),
        "the error is too long: {sentence:?}"
    );
    for bad in ["panicked", "unwrap", "RUST_BACKTRACE", "os error"] {
        ensure!(
            !sentence.contains(bad),
            "the error contains {bad:?}: {sentence:?}"
        );
    }
    ensure!(
        sentence.split(' ').count() >= 4
            && sentence.starts_with(|first: char| first.is_lowercase() || first == '-'),
        "the error does not describe what the command was doing: {sentence:?}"
    );
    Ok(sentence.clone())
}

/// Checks that the sentence names the error that the test injected, or explains it.
fn names_the_error(sentence: &str, call: &Call, fault: Fault) -> Result {
    let Fault::Error(errno) = fault else {
        return Ok(());
    };
    let explained = EXPLANATIONS
        .iter()
        .any(|(explained, words)| *explained == errno && sentence.contains(words));
    ensure!(
        takes_memory(call) || explained || sentence.contains(&format!("({errno:?})")),
        "the sentence does not name the injected error: {sentence:?}"
    );
    Ok(())
}

/// The words with which the runtime explains an error instead of naming it.
const EXPLANATIONS: &[(Errno, &str)] = &[
    (Errno::ELOOP, "leads through a symbolic link"),
    (Errno::ENODEV, "the kernel does not support the file system"),
    (Errno::EAGAIN, "did not reply within"),
];

/// Describes the differences between two JSON values.
fn differences(at: &str, before: &Value, now: &Value) -> Vec<String> {
    match (before, now) {
        (Value::Object(one), Value::Object(other)) => {
            let keys: BTreeSet<&String> = one.keys().chain(other.keys()).collect();
            keys.into_iter()
                .flat_map(|key| differences(&format!("{at}/{key}"), &before[key], &now[key]))
                .collect()
        }
        (Value::Array(one), Value::Array(other)) if at.ends_with("/mounts") => {
            let lost = one.iter().filter(|line| !other.contains(line));
            let new = other.iter().filter(|line| !one.contains(line));
            lost.map(|line| format!("{at} lacks {line}"))
                .chain(new.map(|line| format!("{at} has also {line}")))
                .collect()
        }
        _ if before == now => Vec::new(),
        _ => vec![format!("{at} is {now} instead of {before}")],
    }
}

/// Returns all files below a directory, except the files that this module itself creates and the
/// runtime's state directory. Does not enter mounts.
fn files_below(directory: &Path) -> BTreeSet<PathBuf> {
    fn add(directory: &Path, all: &mut BTreeSet<PathBuf>) {
        for entry in fs::read_dir(directory).into_iter().flatten().flatten() {
            if entry.file_type().is_ok_and(|kind| kind.is_dir()) {
                add(&entry.path(), all);
            }
            all.insert(entry.path());
        }
    }
    let mut all = BTreeSet::new();
    add(directory, &mut all);
    all.retain(|path| {
        let name = path
            .strip_prefix(directory)
            .unwrap_or(path)
            .to_string_lossy();
        !["stdout-", "stderr-", "state"]
            .iter()
            .any(|own| name.starts_with(own))
    });
    all
}

/// Returns the processes whose command line contains the container's id, and the processes in the
/// container's mount namespace.
fn processes_of(bundle: &Bundle) -> BTreeMap<i32, String> {
    let own = std::process::id().to_string();
    // mountinfo contains the path of the container's root below the root of its file system.
    let rootfs = bundle.rootfs().to_string_lossy().into_owned();
    let mut all = BTreeMap::new();
    for entry in fs::read_dir("/proc").into_iter().flatten().flatten() {
        let name = entry.file_name().to_string_lossy().into_owned();
        let Ok(pid) = name.parse() else { continue };
        let read = |file: &str| fs::read(entry.path().join(file)).unwrap_or_default();
        let line = String::from_utf8_lossy(&read("cmdline")).replace('\0', " ");
        let mounts = read("mountinfo");
        let is_inside = String::from_utf8_lossy(&mounts).contains(&*rootfs);
        if name != own && (line.contains(bundle.id()) || is_inside) {
            all.insert(pid, line);
        }
    }
    all
}

/// Returns the arguments of a command.
pub(crate) fn words(words: &[&str]) -> Vec<String> {
    words.iter().map(|word| (*word).to_owned()).collect()
}

/// Waits until the container's program has written a report to the standard output of the command
/// with the number `index`. Returns the properties in the report.
pub(crate) fn reported(bundle: &Bundle, index: usize) -> Result<Value> {
    let started = Instant::now();
    loop {
        let text = fs::read_to_string(stdout_of(bundle, index))?;
        if text.ends_with('\n') || started.elapsed() > deadline() {
            return observed::of_report(&text);
        }
        std::thread::sleep(Duration::from_millis(1));
    }
}

/// Checks that the container does not exist.
pub(crate) fn not_created(bundle: &Bundle) -> Result {
    ensure!(
        !bundle.root().join(bundle.id()).exists(),
        "the command left the container's directory behind"
    );
    ensure!(
        !has_cgroup(bundle),
        "the command left the container's cgroup behind"
    );
    Ok(())
}

/// Checks that the container has one of the given statuses.
pub(crate) fn is_one_of(bundle: &Bundle, expected: &[&str]) -> Result {
    let status = bundle.status()?;
    ensure!(
        expected.contains(&&*status),
        "the container's status is `{status}` after the failure"
    );
    Ok(())
}
