//! Commands that are killed on their way: at the entry of each of their system calls, and of each
//! of those of the processes that they make. Whatever was made by then goes with `delete --force`.
//!
//! A sample of the calls, all of them if RRUN_TEST_FULL is set.

use std::collections::BTreeMap;
use std::fs::{self, File};
use std::os::unix::process::CommandExt;
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use nix::errno::Errno;
use nix::sys::ptrace::{self, Event, Options};
use nix::sys::signal::{Signal, kill};
use nix::sys::wait::{WaitPidFlag, WaitStatus, waitpid};
use nix::unistd::Pid;
use serde_json::json;

use crate::support::bundle::{Bundle, runtime_program};
use crate::support::machine::{Failed, Result, deadline, full, note, wait_for};
use crate::support::needs::{Need, Test};
use crate::{ensure, ensure_eq, test};

pub(crate) const TESTS: &[Test] = &[
    test!(a_create_killed_at_any_step_leaves_nothing, Need::Rrun),
    test!(
        a_create_of_everything_killed_at_any_step_leaves_nothing,
        Need::Rrun
    ),
    test!(a_run_killed_at_any_step_leaves_nothing, Need::Rrun),
    test!(a_start_killed_at_any_step_leaves_nothing, Need::Rrun),
    test!(
        an_exec_killed_at_any_step_leaves_the_container_alone,
        Need::Rrun
    ),
    test!(a_delete_killed_at_any_step_can_be_repeated, Need::Rrun),
];

/// Who is killed: the command itself, or a process that it made and that has not become another
/// program yet.
#[derive(Clone, Copy, Debug, PartialEq)]
enum Victim {
    Command,
    Made,
}

/// What came of a command that was to be killed.
struct Traced {
    /// System calls that the victim came to.
    calls: usize,
    /// The command's exit code, if it was not the one killed.
    code: Option<i32>,
}

/// Runs the command and kills the victim when it is about to make its call number `at`.
fn kill_at(bundle: &Bundle, args: &[&str], victim: Victim, at: usize) -> Result<Traced> {
    let mut command = Command::new(runtime_program());
    command
        .arg("--root")
        .arg(bundle.root())
        .args(args)
        .current_dir(bundle.path())
        .stdin(Stdio::null())
        .stdout(Stdio::null())
        .stderr(File::create(bundle.join("said"))?);
    // A thread of its own: at its end the kernel lets go of everything that it traced.
    let thread = std::thread::spawn(move || traced(command, victim, at));
    match thread.join() {
        Ok(outcome) => Ok(outcome.map_err(|error| format!("trace {args:?}: {error}"))?),
        Err(_) => Err("the tracer panicked".into()),
    }
}

fn traced(mut command: Command, victim: Victim, at: usize) -> std::result::Result<Traced, String> {
    // SAFETY: between fork and exec, only a system call is made.
    unsafe { command.pre_exec(|| Ok(ptrace::traceme()?)) };
    let child = command.spawn().map_err(|error| error.to_string())?;
    let main = Pid::from_raw(i32::try_from(child.id()).unwrap_or(-1));
    let said = |errno: Errno| errno.to_string();
    waitpid(main, None).map_err(said)?;
    let options = Options::PTRACE_O_TRACESYSGOOD
        | Options::PTRACE_O_TRACEFORK
        | Options::PTRACE_O_TRACEVFORK
        | Options::PTRACE_O_TRACECLONE
        | Options::PTRACE_O_TRACEEXEC;
    ptrace::setoptions(main, options).map_err(said)?;
    ptrace::syscall(main, None).map_err(said)?;

    let mut outcome = Traced {
        calls: 0,
        code: None,
    };
    let mut inside: BTreeMap<Pid, bool> = BTreeMap::new();
    let mut killed = false;
    let mut ended: Option<Instant> = None;
    let started = Instant::now();
    loop {
        let flags = WaitPidFlag::__WALL | WaitPidFlag::__WNOTHREAD | WaitPidFlag::WNOHANG;
        let status = match waitpid(None, Some(flags)) {
            Ok(status) => status,
            Err(Errno::ECHILD) => return Ok(outcome),
            Err(errno) => return Err(said(errno)),
        };
        match status {
            WaitStatus::StillAlive => {
                // What is left over gets some time to come to its own end.
                if ended.is_some_and(|ended| ended.elapsed() > Duration::from_millis(5)) {
                    return Ok(outcome);
                }
                if started.elapsed() > deadline() {
                    let _ = kill(main, Signal::SIGKILL);
                    return Err(format!("did not end after its call {}", outcome.calls));
                }
                std::thread::sleep(Duration::from_micros(20));
            }
            WaitStatus::Exited(pid, code) if pid == main => {
                outcome.code = Some(code);
                ended = Some(Instant::now());
            }
            WaitStatus::Signaled(pid, ..) if pid == main => ended = Some(Instant::now()),
            WaitStatus::PtraceSyscall(pid) => {
                let entry = inside.entry(pid).or_default();
                *entry = !*entry;
                let is_victim = (pid == main) == (victim == Victim::Command);
                if *entry && is_victim && !killed {
                    outcome.calls += 1;
                    if outcome.calls == at {
                        killed = true;
                        let _ = kill(pid, Signal::SIGKILL);
                        continue;
                    }
                }
                go_on(pid, None, killed);
            }
            // What has become another program is no longer the runtime.
            WaitStatus::PtraceEvent(pid, _, event)
                if event == Event::PTRACE_EVENT_EXEC as i32 && pid != main =>
            {
                let _ = ptrace::detach(pid, None);
            }
            WaitStatus::PtraceEvent(pid, ..) => go_on(pid, None, killed),
            // A new process begins with one, and it is not meant for it.
            WaitStatus::Stopped(pid, Signal::SIGSTOP | Signal::SIGTRAP) => go_on(pid, None, killed),
            WaitStatus::Stopped(pid, signal) => go_on(pid, Some(signal), killed),
            _ => {}
        }
    }
}

fn go_on(pid: Pid, signal: Option<Signal>, untraced: bool) {
    // Who was killed meanwhile needs neither.
    let _ = if untraced {
        ptrace::detach(pid, signal)
    } else {
        ptrace::syscall(pid, signal)
    };
}

/// The numbers of the calls at which to kill, of so many.
fn steps(calls: usize) -> impl Iterator<Item = usize> {
    // Not always the same ones: what is left over shows in some run, and is told with its number.
    let step = if full() { 1 } else { (calls / 12).max(1) };
    let first = std::process::id() as usize % step;
    (1 + first..=calls).step_by(step)
}

fn mounts() -> Result<usize> {
    Ok(fs::read_to_string("/proc/self/mountinfo")?.lines().count())
}

/// After `delete --force`, which must succeed: no directory, cgroup, mount or process.
fn nothing_is_left(bundle: &Bundle, mounts_before: usize) -> Result {
    bundle.end()?;
    ensure!(!bundle.cgroup().exists(), "its cgroup is left");
    let left: Vec<_> = fs::read_dir(bundle.root())
        .into_iter()
        .flatten()
        .flatten()
        .map(|entry| entry.file_name())
        .collect();
    ensure!(left.is_empty(), "left in --root: {left:?}");
    ensure_eq!(mounts()?, mounts_before, "number of mounts");
    wait_for("its processes to go", || {
        let left = fs::read_dir("/proc")?.flatten().find(|entry| {
            fs::read(entry.path().join("cmdline"))
                .is_ok_and(|line| String::from_utf8_lossy(&line).contains(bundle.id()))
        });
        match left {
            Some(entry) => Err(format!("process {:?} is left", entry.file_name()).into()),
            None => Ok(Some(())),
        }
    })
}

/// Kills `args` at each of the sampled steps, `before` each of them and `after`.
fn each_step(
    bundle: &Bundle,
    args: &[&str],
    victim: Victim,
    before: impl Fn() -> Result,
    after: impl Fn(&Traced) -> Result,
) -> Result {
    bundle.write_config()?;
    let mounts_before = mounts()?;
    before()?;
    let whole = kill_at(bundle, args, victim, usize::MAX)?;
    let said = fs::read_to_string(bundle.join("said"))?;
    ensure_eq!(
        whole.code,
        Some(0),
        "exit code of {args:?}, not killed; {said}"
    );
    nothing_is_left(bundle, mounts_before)?;
    let mut killed = 0;
    for at in steps(whole.calls) {
        let context = |failed: Failed| {
            let why = failed.message().unwrap_or_default().to_owned();
            format!(
                "{victim:?} of {args:?} killed at system call {at} of {}: {why}",
                whole.calls
            )
        };
        before().map_err(context)?;
        let outcome = kill_at(bundle, args, victim, at).map_err(context)?;
        after(&outcome).map_err(context)?;
        nothing_is_left(bundle, mounts_before).map_err(context)?;
        killed += 1;
    }
    note(format!(
        "{} {victim:?}: killed at {killed} of {} system calls",
        args[0], whole.calls
    ));
    Ok(())
}

fn create_killed(bundle: &Bundle) -> Result {
    let id = bundle.id();
    let args = ["create", "--pid-file", "pid", id];
    let nothing = || Ok(());
    each_step(bundle, &args, Victim::Command, nothing, |_| Ok(()))?;
    each_step(bundle, &args, Victim::Made, nothing, |outcome| {
        // The command lives and unmakes what it made; or it was done with it.
        if outcome.code != Some(0) {
            ensure_eq!(outcome.code, Some(1), "exit code");
            ensure!(!bundle.root().join(id).exists(), "its directory is left");
            ensure!(!bundle.cgroup().exists(), "its cgroup is left");
        }
        Ok(())
    })
}

fn a_create_killed_at_any_step_leaves_nothing() -> Result {
    create_killed(&Bundle::new(&["sleep", "600"])?)
}

/// With helpers, hooks and namespaces to join.
fn a_create_of_everything_killed_at_any_step_leaves_nothing() -> Result {
    let mut first = Bundle::new(&["sleep", "600"])?;
    let maps = json!([{ "containerID": 0, "hostID": 100_000, "size": 65_536 }]);
    first
        .add("/linux/namespaces", json!({ "type": "user" }))
        .set("/linux/uidMappings", maps.clone())
        .set("/linux/gidMappings", maps.clone());
    first.start()?;
    let mut bundle = Bundle::new(&["sleep", "600"])?;
    let source = bundle.path().to_owned();
    bundle.without_namespace("network");
    let net = format!("/proc/{}/ns/net", first.pid()?);
    let user = format!("/proc/{}/ns/user", first.pid()?);
    bundle
        .add("/linux/namespaces", json!({ "type": "user", "path": user }))
        .add("/linux/namespaces", json!({ "type": "network", "path": net }))
        .add("/linux/namespaces", json!({ "type": "time" }))
        .set("/linux/timeOffsets", json!({ "monotonic": { "secs": 5 } }))
        .add(
            "/mounts",
            json!({
                "destination": "/data", "type": "bind", "source": source,
                "options": ["rbind", "idmap"], "uidMappings": maps, "gidMappings": maps,
            }),
        )
        .set(
            "/hooks",
            json!({ "createRuntime": [{ "path": "/bin/true" }], "poststop": [{ "path": "/bin/true" }] }),
        );
    create_killed(&bundle)?;
    first.end()?;
    Ok(())
}

fn a_run_killed_at_any_step_leaves_nothing() -> Result {
    let bundle = Bundle::new(&["exit", "0"])?;
    let args = ["run", bundle.id()];
    let nothing = || Ok(());
    each_step(&bundle, &args, Victim::Command, nothing, |_| Ok(()))?;
    each_step(&bundle, &args, Victim::Made, nothing, |_| Ok(()))
}

fn a_start_killed_at_any_step_leaves_nothing() -> Result {
    let bundle = Bundle::new(&["sleep", "600"])?;
    let created = || bundle.call(&["create"])?.ok().map(drop);
    each_step(
        &bundle,
        &["start", bundle.id()],
        Victim::Command,
        created,
        |_| {
            // Started or not: it is known, and a second start does not hang.
            let command = std::fs::read_to_string(format!("/proc/{}/cmdline", bundle.pid()?))?;
            let begun = command.contains("sleep");
            let status = bundle.status()?;
            let known = if begun {
                &["running"][..]
            } else {
                &["created", "running"]
            };
            ensure!(known.contains(&&*status), "it is {status}: {command:?}");
            bundle.runtime(&["start", bundle.id()]).end().map(drop)
        },
    )
}

fn an_exec_killed_at_any_step_leaves_the_container_alone() -> Result {
    let bundle = Bundle::new(&["sleep", "600"])?;
    let started = || bundle.start().map(drop);
    let args = ["exec", bundle.id(), "/bin/inside", "exit", "0"];
    for victim in [Victim::Command, Victim::Made] {
        each_step(&bundle, &args, victim, started, |outcome| {
            ensure!(
                outcome.code != Some(0) || victim == Victim::Made,
                "it succeeded"
            );
            ensure_eq!(bundle.status()?, "running", "status");
            bundle.exec(&[], &["exit", "0"]).ok().map(drop)
        })?;
    }
    Ok(())
}

fn a_delete_killed_at_any_step_can_be_repeated() -> Result {
    let bundle = Bundle::new(&["sleep", "600"])?;
    let started = || bundle.start().map(drop);
    let args = ["delete", "--force", bundle.id()];
    each_step(&bundle, &args, Victim::Command, started, |_| Ok(()))
}
