//! Tests that kill a command, or a child of the command. Each run kills the process at the entry of
//! a different system call. After each kill, `delete --force` must remove everything that the
//! command has created.
//!
//! If RRUN_TEST_FULL is set, the tests try every system call. Without RRUN_TEST_FULL, the tests try
//! only a sample of the system calls.

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
    test!(
        delete_removes_everything_if_create_is_killed_at_any_step,
        Need::Rrun
    ),
    test!(
        delete_removes_everything_if_a_create_with_hooks_is_killed_at_any_step,
        Need::Rrun
    ),
    test!(
        delete_removes_everything_if_run_is_killed_at_any_step,
        Need::Rrun
    ),
    test!(
        delete_removes_everything_if_start_is_killed_at_any_step,
        Need::Rrun
    ),
    test!(
        the_container_keeps_running_if_exec_is_killed_at_any_step,
        Need::Rrun
    ),
    test!(
        delete_can_be_repeated_if_it_is_killed_at_any_step,
        Need::Rrun
    ),
];

/// The process that the test kills: the command itself, or a child of the command. The test does
/// not kill a child after it has executed another program.
#[derive(Clone, Copy, Debug, PartialEq)]
enum Victim {
    Command,
    Child,
}

/// The result of a traced command.
struct Traced {
    /// The number of system calls that the victim entered.
    calls: usize,
    /// The command's exit code, or `None` if the command itself was killed.
    code: Option<i32>,
}

/// Runs the runtime with the arguments `args`, and kills the victim at the entry of its `at`-th
/// system call.
fn kill_at(bundle: &Bundle, args: &[&str], victim: Victim, at: usize) -> Result<Traced> {
    let mut command = Command::new(runtime_program());
    command
        .arg("--root")
        .arg(bundle.root())
        .args(args)
        .current_dir(bundle.path())
        .stdin(Stdio::null())
        .stdout(Stdio::null())
        .stderr(File::create(bundle.join("stderr"))?);
    // A separate thread traces the command. When this thread exits, the kernel detaches it from all
    // traced processes that still run.
    let thread = std::thread::spawn(move || traced(command, victim, at));
    match thread.join() {
        Ok(outcome) => Ok(outcome.map_err(|error| {
            format!("cannot trace the runtime with the arguments {args:?}: {error}")
        })?),
        Err(_) => Err("the thread that traced the command panicked".into()),
    }
}

fn traced(mut command: Command, victim: Victim, at: usize) -> std::result::Result<Traced, String> {
    // SAFETY: between fork and exec, the closure only makes a system call.
    unsafe { command.pre_exec(|| Ok(ptrace::traceme()?)) };
    let child = command.spawn().map_err(|error| error.to_string())?;
    let main = Pid::from_raw(i32::try_from(child.id()).unwrap_or(-1));
    let text = |errno: Errno| errno.to_string();
    waitpid(main, None).map_err(text)?;
    let options = Options::PTRACE_O_TRACESYSGOOD
        | Options::PTRACE_O_TRACEFORK
        | Options::PTRACE_O_TRACEVFORK
        | Options::PTRACE_O_TRACECLONE
        | Options::PTRACE_O_TRACEEXEC;
    ptrace::setoptions(main, options).map_err(text)?;
    ptrace::syscall(main, None).map_err(text)?;

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
            Err(errno) => return Err(text(errno)),
        };
        match status {
            WaitStatus::StillAlive => {
                // After the command has exited, the thread waits five milliseconds for the exit of
                // the command's child processes.
                if ended.is_some_and(|ended| ended.elapsed() > Duration::from_millis(5)) {
                    return Ok(outcome);
                }
                if started.elapsed() > deadline() {
                    let _ = kill(main, Signal::SIGKILL);
                    return Err(format!(
                        "the command did not exit before the deadline; the number of system calls that the victim had entered: {}",
                        outcome.calls
                    ));
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
            // After the execution of another program, a child can no longer be the victim.
            // Therefore, the thread detaches from the child.
            WaitStatus::PtraceEvent(pid, _, event)
                if event == Event::PTRACE_EVENT_EXEC as i32 && pid != main =>
            {
                let _ = ptrace::detach(pid, None);
            }
            WaitStatus::PtraceEvent(pid, ..) => go_on(pid, None, killed),
            // ptrace(2) stops a new process with SIGSTOP or SIGTRAP. The tracing thread must not
            // deliver this signal to the process.
            WaitStatus::Stopped(pid, Signal::SIGSTOP | Signal::SIGTRAP) => go_on(pid, None, killed),
            WaitStatus::Stopped(pid, signal) => go_on(pid, Some(signal), killed),
            _ => {}
        }
    }
}

fn go_on(pid: Pid, signal: Option<Signal>, untraced: bool) {
    // If another process has already killed this process, ptrace(2) fails. The test ignores this
    // error.
    let _ = if untraced {
        ptrace::detach(pid, signal)
    } else {
        ptrace::syscall(pid, signal)
    };
}

/// Returns the numbers of the system calls at which the test kills the victim. The victim's first
/// system call has the number 1.
fn steps(calls: usize) -> impl Iterator<Item = usize> {
    // The sample differs between runs, so repeated runs test every system call. The failure message
    // contains the number of the system call.
    let step = if full() { 1 } else { (calls / 12).max(1) };
    let first = std::process::id() as usize % step;
    (1 + first..=calls).step_by(step)
}

fn mounts() -> Result<usize> {
    Ok(fs::read_to_string("/proc/self/mountinfo")?.lines().count())
}

/// Runs `delete --force`, and checks that it succeeds. Then checks that no directory, cgroup, mount
/// or process of the container is left.
fn nothing_is_left(bundle: &Bundle, mounts_before: usize) -> Result {
    bundle.end()?;
    ensure!(
        !bundle.cgroup().exists(),
        "the container's cgroup still exists"
    );
    let left: Vec<_> = fs::read_dir(bundle.root())
        .into_iter()
        .flatten()
        .flatten()
        .map(|entry| entry.file_name())
        .collect();
    ensure!(
        left.is_empty(),
        "the state directory is not empty, but contains {left:?}"
    );
    ensure_eq!(mounts()?, mounts_before, "the number of mounts on the host");
    wait_for("the container's processes to exit", || {
        let left = fs::read_dir("/proc")?.flatten().find(|entry| {
            fs::read(entry.path().join("cmdline"))
                .is_ok_and(|line| String::from_utf8_lossy(&line).contains(bundle.id()))
        });
        match left {
            Some(entry) => Err(format!(
                "the container's process with the id {:?} still exists",
                entry.file_name()
            )
            .into()),
            None => Ok(Some(())),
        }
    })
}

/// Runs the runtime with the arguments `args` once for each sampled system call. Each run kills the
/// victim at one of these system calls. `before` is called before each run, and `after` after each
/// run.
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
    let stderr = fs::read_to_string(bundle.join("stderr"))?;
    ensure_eq!(
        whole.code,
        Some(0),
        "the exit code of the runtime with the arguments {args:?} if the test kills no process (standard error: {stderr})"
    );
    nothing_is_left(bundle, mounts_before)?;
    let mut killed = 0;
    for at in steps(whole.calls) {
        let context = |failed: Failed| {
            let why = failed.message().unwrap_or_default().to_owned();
            format!(
                "the test ran the runtime with the arguments {args:?} and killed its process ({victim:?}) at system call {at} of {}; the failure: {why}",
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
        "the test killed `{}` {killed} times; the killed process ({victim:?}) makes {} system calls",
        args[0], whole.calls
    ));
    Ok(())
}

fn create_killed(bundle: &Bundle) -> Result {
    let id = bundle.id();
    let args = ["create", "--pid-file", "pid", id];
    let nothing = || Ok(());
    each_step(bundle, &args, Victim::Command, nothing, |_| Ok(()))?;
    each_step(bundle, &args, Victim::Child, nothing, |outcome| {
        // If its child is killed, `create` must fail and remove what it has created. But if the
        // test kills the child late, `create` may have succeeded already.
        if outcome.code != Some(0) {
            ensure_eq!(
                outcome.code,
                Some(1),
                "the exit code of `create` after its child was killed"
            );
            ensure!(
                !bundle.root().join(id).exists(),
                "the container's directory still exists"
            );
            ensure!(
                !bundle.cgroup().exists(),
                "the container's cgroup still exists"
            );
        }
        Ok(())
    })
}

fn delete_removes_everything_if_create_is_killed_at_any_step() -> Result {
    create_killed(&Bundle::new(&["sleep", "600"])?)
}

/// The `create` of this test starts helper processes, runs hooks and joins namespaces.
fn delete_removes_everything_if_a_create_with_hooks_is_killed_at_any_step() -> Result {
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

fn delete_removes_everything_if_run_is_killed_at_any_step() -> Result {
    let bundle = Bundle::new(&["exit", "0"])?;
    let args = ["run", bundle.id()];
    let nothing = || Ok(());
    each_step(&bundle, &args, Victim::Command, nothing, |_| Ok(()))?;
    each_step(&bundle, &args, Victim::Child, nothing, |_| Ok(()))
}

fn delete_removes_everything_if_start_is_killed_at_any_step() -> Result {
    let bundle = Bundle::new(&["sleep", "600"])?;
    let created = || bundle.call(&["create"])?.ok().map(drop);
    each_step(
        &bundle,
        &["start", bundle.id()],
        Victim::Command,
        created,
        |_| {
            // If the container's process already executes `sleep`, the status must be `running`.
            // Otherwise, the status can be `created` or `running`. A second `start` must not hang.
            let command = std::fs::read_to_string(format!("/proc/{}/cmdline", bundle.pid()?))?;
            let started = command.contains("sleep");
            let status = bundle.status()?;
            let expected = if started {
                &["running"][..]
            } else {
                &["created", "running"]
            };
            ensure!(
                expected.contains(&&*status),
                "the container's status is `{status}`, although the container's process executes the command line {command:?}"
            );
            bundle.runtime(&["start", bundle.id()]).end().map(drop)
        },
    )
}

fn the_container_keeps_running_if_exec_is_killed_at_any_step() -> Result {
    let bundle = Bundle::new(&["sleep", "600"])?;
    let started = || bundle.start().map(drop);
    let args = ["exec", bundle.id(), "/bin/inside", "exit", "0"];
    for victim in [Victim::Command, Victim::Child] {
        each_step(&bundle, &args, victim, started, |outcome| {
            ensure!(
                outcome.code != Some(0) || victim == Victim::Child,
                "`exec` succeeded although the test killed it"
            );
            ensure_eq!(
                bundle.status()?,
                "running",
                "the container's status after the test killed `exec` or its child"
            );
            bundle.exec(&[], &["exit", "0"]).ok().map(drop)
        })?;
    }
    Ok(())
}

fn delete_can_be_repeated_if_it_is_killed_at_any_step() -> Result {
    let bundle = Bundle::new(&["sleep", "600"])?;
    let started = || bundle.start().map(drop);
    let args = ["delete", "--force", bundle.id()];
    each_step(&bundle, &args, Victim::Command, started, |_| Ok(()))
}
