//! Tests that kill a command, or a child of the command. Each run kills the process at the entry of
//! a different system call. After each kill, `delete --force` must remove everything that the
//! command has created.
//!
//! If RRUN_TEST_FULL is set, the tests try every system call. Without RRUN_TEST_FULL, the tests try
//! only a sample of the system calls, which is different every day.

use std::fs::{self, File};
use std::process::{Command, Stdio};

use serde_json::json;

use crate::support::bundle::{Bundle, runtime_program};
use crate::support::inject::{Fault, Place, Traced, trace};
use crate::support::machine::{Dice, Failed, Result, full, note, seed_of_the_day, wait_for};
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

/// The process that the test kills: the command itself, or one of its descendants. The test does not
/// kill a descendant after it has executed another program.
#[derive(Clone, Copy, Debug, PartialEq)]
enum Victim {
    Command,
    Child,
}

/// The number of system calls at which a test kills the victim, without RRUN_TEST_FULL.
const SAMPLE: usize = 12;

/// Runs the runtime with the arguments `args`. If `at` is given, kills the process at the entry of
/// this system call.
fn kill_at(bundle: &Bundle, args: &[&str], at: Option<Place>) -> Result<Traced> {
    let mut command = Command::new(runtime_program());
    command
        .arg("--root")
        .arg(bundle.root())
        .args(args)
        .current_dir(bundle.path())
        .stdin(Stdio::null())
        .stdout(Stdio::null())
        .stderr(File::create(bundle.join("stderr"))?);
    let traced = trace(vec![command], at.map(|at| (at, Fault::Kill)))?;
    ensure!(
        !traced.hung,
        "the runtime with the arguments {args:?} did not exit before the deadline"
    );
    Ok(traced)
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
    let whole = kill_at(bundle, args, None)?;
    let stderr = fs::read_to_string(bundle.join("stderr"))?;
    ensure_eq!(
        whole.code,
        Some(0),
        "the exit code of the runtime with the arguments {args:?} if the test kills no process (standard error: {stderr})"
    );
    nothing_is_left(bundle, mounts_before)?;
    let is_victim = |process: usize| (process == 0) == (victim == Victim::Command);
    let calls = whole.calls.into_iter();
    let calls: Vec<_> = calls.filter(|call| is_victim(call.place.process)).collect();
    let (all, seed) = (calls.len(), seed_of_the_day());
    let most = if full() { all } else { SAMPLE };
    let calls = Dice::from_seed(seed).draw(calls, most);
    for call in &calls {
        let context = |failed: Failed| {
            let why = failed.message().unwrap_or_default().to_owned();
            format!(
                "the test ran the runtime with the arguments {args:?} and killed its process ({victim:?}) at the system call {call}, drawn with RRUN_TEST_SEED={seed}; the failure: {why}"
            )
        };
        before().map_err(context)?;
        let outcome = kill_at(bundle, args, Some(call.place)).map_err(context)?;
        after(&outcome).map_err(context)?;
        nothing_is_left(bundle, mounts_before).map_err(context)?;
    }
    note(format!(
        "the test killed `{}` {} times; the killed process ({victim:?}) makes {all} system calls; RRUN_TEST_SEED={seed}",
        args[0],
        calls.len()
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
        // test kills the child late, `create` may have succeeded already. The kill of a thread of
        // `create` kills `create` itself, which then has no exit code.
        if let Some(code) = outcome.code.filter(|code| *code != 0) {
            ensure_eq!(
                code,
                1,
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
