//! Tests of containers in the user namespace of another container. The root user of such a user
//! namespace can trace every process that belongs to the namespace. The runtime's processes in the
//! namespace have files of the host open, so the kernel must protect them.

use std::fs;
use std::os::unix::fs::{MetadataExt, chown};
use std::path::PathBuf;

use serde_json::{Value, json};

use crate::support::bundle::{Bundle, runtime_program};
use crate::support::machine::{Result, Run, Running, command, wait_for};
use crate::support::needs::{Need, Test};
use crate::{ensure, ensure_eq, test};

pub(crate) const TESTS: &[Test] = &[
    test!(
        a_users_container_can_not_trace_a_process_of_the_runtime_in_its_user_namespace,
        Need::Rrun,
        Need::Program("strace")
    ),
    test!(
        only_root_can_trace_a_process_that_waits_for_start_in_a_joined_user_namespace,
        Need::Rrun
    ),
    test!(
        a_user_can_set_the_oom_score_adjustment_in_a_joined_user_namespace,
        Need::Rrun
    ),
    test!(
        a_process_that_waits_for_its_program_does_not_show_the_runtimes_arguments,
        Need::Rrun
    ),
];

/// The id of the user www-data, which exists on every Debian system.
const USER: u32 = 33;

/// Returns a bundle of the user [`USER`]. The container is in the host's PID and network
/// namespaces, and sees the host's /proc.
fn bundle(args: &[&str]) -> Result<Bundle> {
    let mut bundle = Bundle::new(args)?;
    bundle
        .without("/linux/cgroupsPath")
        .without("/linux/maskedPaths")
        .without("/linux/readonlyPaths")
        .without_namespace("pid")
        .without_namespace("network")
        .without_namespace("cgroup")
        .set("/process/oomScoreAdj", json!(300));
    if let Some(Value::Array(mounts)) = bundle.config.pointer_mut("/mounts") {
        mounts.retain(|mount| mount["destination"] == "/dev");
    }
    bundle.add(
        "/mounts",
        json!({ "destination": "/proc", "type": "none", "source": "/proc", "options": ["rbind"] }),
    );
    fs::create_dir(bundle.root())?;
    for path in [bundle.path(), &bundle.root(), &bundle.rootfs()] {
        chown(path, Some(USER), Some(USER))?;
    }
    for entry in fs::read_dir(bundle.rootfs())?.flatten() {
        chown(entry.path(), Some(USER), Some(USER))?;
    }
    Ok(bundle)
}

/// Returns a bundle whose container has a new user namespace. In this namespace, [`USER`] is root.
fn with_new_namespace(args: &[&str]) -> Result<Bundle> {
    let mut bundle = bundle(args)?;
    let own = json!([{ "containerID": 0, "hostID": USER, "size": 1 }]);
    bundle
        .add("/linux/namespaces", json!({ "type": "user" }))
        .set("/linux/uidMappings", own.clone())
        .set("/linux/gidMappings", own);
    Ok(bundle)
}

/// Returns a bundle whose container joins the user namespace of process `pid`.
fn with_namespace_of(pid: i32, args: &[&str]) -> Result<Bundle> {
    let mut bundle = bundle(args)?;
    let path = format!("/proc/{pid}/ns/user");
    bundle.add("/linux/namespaces", json!({ "type": "user", "path": path }));
    Ok(bundle)
}

/// Returns a command that calls the runtime with the arguments `args` as the user [`USER`]. The
/// words `before` precede the command.
fn runtime(bundle: &Bundle, before: &[&str], args: &[&str]) -> Result<Run> {
    bundle.write_config()?;
    let (id, program) = (USER.to_string(), runtime_program());
    let setpriv = ["setpriv", "--reuid", &id, "--regid", &id, "--clear-groups"];
    let words = [before, &setpriv, &[program.as_str(), "--root"]].concat();
    let (first, rest) = words.split_first().ok_or("the command is empty")?;
    Ok(command(first, rest)
        .arg(bundle.root())
        .args(args)
        .dir(bundle.path()))
}

fn started(bundle: &Bundle) -> Result<Running> {
    let running = runtime(bundle, &[], &["run", bundle.id()])?.start()?;
    bundle.wait_status("running")?;
    Ok(running)
}

/// Starts a container that tries to trace each process of its user namespace.
fn attacker(bundle: &mut Bundle) -> Result<Running> {
    let capabilities = json!(["CAP_SYS_PTRACE", "CAP_KILL"]);
    for set in ["bounding", "effective", "permitted"] {
        bundle.set(
            &format!("/process/capabilities/{set}"),
            capabilities.clone(),
        );
    }
    let mut running = started(bundle)?;
    wait_for("the attacker to start", || {
        Ok(running.stdout().contains("ready").then_some(()))
    })?;
    Ok(running)
}

fn a_users_container_can_not_trace_a_process_of_the_runtime_in_its_user_namespace() -> Result {
    let mut first = with_new_namespace(&["attack", "trace"])?;
    let mut attacker = attacker(&mut first)?;
    let second = with_namespace_of(first.pid()?, &["sleep", "600"])?;
    // The runtime sets the limits of the container's first process while this process waits in the
    // user namespace. strace delays this step by a second, and does not trace the first process.
    let delay = "inject=prlimit64:delay_enter=1000000";
    let strace = ["strace", "-o", "/dev/null", "-e", delay];
    runtime(&second, &strace, &["create", second.id()])?.ok()?;
    let pid = second.pid()?;
    let seen = format!("trace {pid}\n");
    let traced = |attacker: &mut Running| -> Result {
        let output = attacker.stdout();
        ensure!(
            !output.contains("traces"),
            "a container traced a process of the runtime; the container's output:\n{output}"
        );
        Ok(())
    };
    wait_for("the attacker to see the first process", || {
        traced(&mut attacker)?;
        Ok(attacker.stdout().contains(&seen).then_some(()))
    })?;
    runtime(&second, &[], &["start", second.id()])?.ok()?;
    for _ in 0..20 {
        let exec = ["exec", second.id(), "/bin/inside", "exit", "0"];
        runtime(&second, &[], &exec)?.ok()?;
    }
    traced(&mut attacker)?;
    ensure!(
        attacker.lives(),
        "the attacker exited before the end of the test"
    );
    for bundle in [&second, &first] {
        runtime(bundle, &[], &["delete", "--force", bundle.id()])?.ok()?;
    }
    attacker.end()?;
    Ok(())
}

fn only_root_can_trace_a_process_that_waits_for_start_in_a_joined_user_namespace() -> Result {
    const FIRST: u32 = 200_000;
    let mut first = Bundle::new(&["sleep", "600"])?;
    let map = json!([{ "containerID": 0, "hostID": FIRST, "size": 65536 }]);
    first
        .add("/linux/namespaces", json!({ "type": "user" }))
        .set("/linux/uidMappings", map.clone())
        .set("/linux/gidMappings", map);
    first.start()?;
    let mut second = Bundle::new(&["sleep", "600"])?;
    second.add(
        "/linux/namespaces",
        json!({ "type": "user", "path": format!("/proc/{}/ns/user", first.pid()?) }),
    );
    second.call(&["create"])?.ok()?;
    // The owner of this file is root if the process is not dumpable, and otherwise the user of the
    // process, proc(5).
    let environ = PathBuf::from(format!("/proc/{}/environ", second.pid()?));
    ensure_eq!(
        fs::metadata(&environ)?.uid(),
        0,
        "the owner of the environment of the process that waits for `start`"
    );
    second.runtime(&["start", second.id()]).ok()?;
    ensure_eq!(
        fs::metadata(&environ)?.uid(),
        FIRST,
        "the owner of the environment of the container's program"
    );
    second.end()?;
    first.end()?;
    Ok(())
}

/// The arguments can contain secrets, such as the variables of `exec --env`. Every process in the
/// container can read the arguments of a process that has not executed its program yet.
fn a_process_that_waits_for_its_program_does_not_show_the_runtimes_arguments() -> Result {
    let bundle = Bundle::new(&["sleep", "600"])?;
    bundle.call(&["create"])?.ok()?;
    let first = bundle.pid()?;
    ensure_eq!(
        arguments_of(first)?,
        "",
        "the arguments of the first process"
    );
    bundle.runtime(&["start", bundle.id()]).ok()?;
    // The kernel creates a process in a frozen cgroup, but the process does not run.
    bundle.runtime(&["pause", bundle.id()]).ok()?;
    let exec = bundle
        .exec(&["--ignore-paused", "--env", "SECRET=1"], &["exit", "0"])
        .start()?;
    let second = wait_for("`exec` to create a process", || {
        let procs = bundle.cgroup_file("cgroup.procs")?;
        let mut pids = procs.lines().filter_map(|line| line.parse().ok());
        Ok(pids.find(|pid| *pid != first))
    })?;
    ensure_eq!(
        arguments_of(second)?,
        "",
        "the arguments of the second process"
    );
    ensure!(
        arguments_of(exec.pid())?.contains("SECRET=1"),
        "the runtime itself does not show its arguments on the host"
    );
    bundle.runtime(&["resume", bundle.id()]).ok()?;
    ensure_eq!(exec.end()?.code, 0, "the exit code of `exec`");
    bundle.end()?;
    Ok(())
}

/// Returns the command line of a process without the name of the program, and without NUL.
fn arguments_of(pid: i32) -> Result<String> {
    let line = fs::read_to_string(format!("/proc/{pid}/cmdline"))?;
    let arguments = line.split('\0').skip(1);
    Ok(arguments.collect::<Vec<_>>().join(" ").trim().to_owned())
}

fn a_user_can_set_the_oom_score_adjustment_in_a_joined_user_namespace() -> Result {
    let score = "/proc/self/oom_score_adj";
    let first = with_new_namespace(&["sleep", "600"])?;
    let running = started(&first)?;
    let second = with_namespace_of(first.pid()?, &["cat", score])?;
    let exec = ["exec", first.id(), "/bin/inside", "cat", score];
    for (bundle, args) in [(&second, &["run", second.id()][..]), (&first, &exec)] {
        let output = runtime(bundle, &[], args)?.ok()?;
        ensure_eq!(
            output.text(),
            "300",
            "the OOM score adjustment of the process that `{}` starts",
            args[0]
        );
    }
    runtime(&first, &[], &["delete", "--force", first.id()])?.ok()?;
    running.end()?;
    Ok(())
}
