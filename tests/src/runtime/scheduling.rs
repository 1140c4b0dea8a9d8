//! When and where a container's processes run, and as what: scheduler, I/O priority, CPU affinity,
//! personality, memory policy, session keyring.

use std::fs;

use serde_json::{Value, json};

use crate::support::bundle::{Bundle, runtime_program};
use crate::support::machine::{Output, Result, command};
use crate::support::needs::{Need, Test};
use crate::{ensure, ensure_eq, test};

pub(crate) const TESTS: &[Test] = &[
    test!(the_scheduler_is_set_for_the_first_process_and_exec),
    test!(a_deadline_scheduler_has_its_values),
    test!(
        a_scheduler_reaches_a_container_with_a_user_namespace,
        Need::Rrun
    ),
    test!(the_io_priority_is_set_for_the_first_process_and_exec),
    test!(the_callers_cpu_affinity_is_left_behind),
    test!(exec_starts_on_the_cpus_asked_for),
    test!(the_personality_is_set_for_the_first_process_and_exec),
    test!(
        the_memory_policy_is_set_for_the_first_process_and_exec,
        Need::Rrun,
        Need::File("/proc/self/numa_maps")
    ),
    test!(exec_joins_the_containers_session_keyring),
    test!(what_the_kernel_has_not_is_refused_by_name),
];

/// proc_pid_stat(5), counted from the third field: nice, rt_priority, policy.
fn scheduling(report: &Value) -> Vec<&str> {
    [19, 40, 41]
        .iter()
        .map(|field| report["stat"][field - 3].as_str().unwrap_or_default())
        .collect()
}

/// The nice value that the tests were started with, which the policies without one leave alone.
fn own_nice() -> Result<String> {
    let stat = std::fs::read_to_string("/proc/self/stat")?;
    let after_name = stat.rsplit_once(") ").map(|(_, rest)| rest);
    let nice = after_name.and_then(|rest| rest.split(' ').nth(19 - 3));
    Ok(nice.ok_or("no nice value")?.to_owned())
}

fn exec_report(bundle: &Bundle, options: &[&str]) -> Result<Value> {
    bundle.exec(options, &["report"]).ok()?.json()
}

fn the_scheduler_is_set_for_the_first_process_and_exec() -> Result {
    let mut bundle = Bundle::new(&[])?;
    let own_nice = &*own_nice()?;
    for (scheduler, expected) in [
        (
            json!({ "policy": "SCHED_BATCH", "nice": 5 }),
            ["5", "0", "3"],
        ),
        (json!({ "policy": "SCHED_IDLE" }), [own_nice, "0", "5"]),
        (
            json!({ "policy": "SCHED_OTHER", "nice": -7 }),
            ["-7", "0", "0"],
        ),
        (
            json!({ "policy": "SCHED_FIFO", "priority": 3 }),
            [own_nice, "3", "1"],
        ),
        (
            json!({ "policy": "SCHED_RR", "priority": 7, "flags": ["SCHED_FLAG_RESET_ON_FORK"] }),
            [own_nice, "7", "2"],
        ),
    ] {
        bundle.set("/process/scheduler", scheduler.clone());
        let report = bundle.report()?;
        ensure_eq!(
            scheduling(&report),
            expected,
            "{scheduler}: nice, priority, policy"
        );
    }
    bundle.args(&["sleep", "600"]).start()?;
    ensure_eq!(
        scheduling(&exec_report(&bundle, &[])?),
        [own_nice, "7", "2"],
        "nice, priority, policy of exec"
    );
    bundle.end()?;
    Ok(())
}

fn a_deadline_scheduler_has_its_values() -> Result {
    let mut bundle = Bundle::new(&["cat", "/proc/self/sched"])?;
    bundle.set(
        "/process/scheduler",
        json!({ "policy": "SCHED_DEADLINE", "runtime": 10_000_000, "deadline": 30_000_000,
                "period": 40_000_000 }),
    );
    let report = bundle.report()?;
    ensure_eq!(scheduling(&report)[2], "6", "policy");
    Ok(())
}

fn a_scheduler_reaches_a_container_with_a_user_namespace() -> Result {
    let mut bundle = Bundle::new(&[])?;
    bundle
        .add("/linux/namespaces", json!({ "type": "user" }))
        .set(
            "/linux/uidMappings",
            json!([{ "containerID": 0, "hostID": 100_000, "size": 65536 }]),
        )
        .set(
            "/linux/gidMappings",
            json!([{ "containerID": 0, "hostID": 100_000, "size": 65536 }]),
        )
        .set(
            "/process/scheduler",
            json!({ "policy": "SCHED_FIFO", "priority": 2 }),
        )
        .set(
            "/process/ioPriority",
            json!({ "class": "IOPRIO_CLASS_RT", "priority": 1 }),
        );
    let report = bundle.report()?;
    ensure_eq!(
        scheduling(&report),
        [&*own_nice()?, "2", "1"],
        "nice, priority, policy"
    );
    ensure_eq!(
        report["io_priority"],
        json!([1, 1]),
        "I/O class and priority"
    );
    Ok(())
}

fn the_io_priority_is_set_for_the_first_process_and_exec() -> Result {
    let mut bundle = Bundle::new(&[])?;
    for (class, priority, number) in [
        ("IOPRIO_CLASS_RT", 2, 1),
        ("IOPRIO_CLASS_IDLE", 7, 3),
        ("IOPRIO_CLASS_BE", 6, 2),
    ] {
        bundle.set(
            "/process/ioPriority",
            json!({ "class": class, "priority": priority }),
        );
        ensure_eq!(
            bundle.report()?["io_priority"],
            json!([number, priority]),
            "I/O class and priority"
        );
    }
    bundle.args(&["sleep", "600"]).start()?;
    ensure_eq!(
        exec_report(&bundle, &[])?["io_priority"],
        json!([2, 6]),
        "I/O class and priority of exec"
    );
    bundle.end()?;
    Ok(())
}

/// The CPUs that this process may use.
fn cpus() -> Result<String> {
    let status = fs::read_to_string("/proc/self/status")?;
    let list = status
        .lines()
        .find_map(|line| line.strip_prefix("Cpus_allowed_list:"));
    Ok(list.unwrap_or_default().trim().to_owned())
}

/// Runs the runtime bound to CPU 0.
fn bound(bundle: &Bundle, args: &[&str]) -> Result<Output> {
    bundle.write_config()?;
    command("taskset", ["--cpu-list", "0", &runtime_program()])
        .arg("--root")
        .arg(bundle.root())
        .args(args)
        .dir(bundle.path())
        .ok()
}

fn the_callers_cpu_affinity_is_left_behind() -> Result {
    let all = cpus()?;
    let mut bundle = Bundle::new(&["report"])?;
    let report = bound(&bundle, &["run", bundle.id()])?.json()?;
    ensure_eq!(report["status"]["Cpus_allowed_list"], all.as_str(), "CPUs");
    bundle.args(&["sleep", "600"]).start()?;
    let report = bound(&bundle, &["exec", bundle.id(), "/bin/inside", "report"])?.json()?;
    ensure_eq!(
        report["status"]["Cpus_allowed_list"],
        all.as_str(),
        "CPUs of exec"
    );
    bundle.end()?;
    Ok(())
}

fn exec_starts_on_the_cpus_asked_for() -> Result {
    let all = cpus()?;
    for (affinity, expected) in [
        (json!({ "initial": "1", "final": "0" }), "0"),
        (json!({ "initial": "1" }), "1"),
        (json!({ "final": "0-1" }), "0-1"),
    ] {
        let mut bundle = Bundle::new(&["report"])?;
        bundle.set("/process/execCPUAffinity", affinity.clone());
        ensure_eq!(
            bundle.report()?["status"]["Cpus_allowed_list"],
            all.as_str(),
            "the first process's CPUs, of which {affinity} does not speak"
        );
        bundle.args(&["sleep", "600"]).start()?;
        ensure_eq!(
            exec_report(&bundle, &[])?["status"]["Cpus_allowed_list"],
            expected,
            "CPUs of exec with {affinity}"
        );
        bundle.end()?;
    }
    Ok(())
}

fn the_personality_is_set_for_the_first_process_and_exec() -> Result {
    let mut bundle = Bundle::new(&[])?;
    ensure_eq!(bundle.report()?["personality"], "00000000", "personality");
    // The specification has no flags; what is none is passed over.
    bundle.set(
        "/linux/personality",
        json!({ "domain": "LINUX32", "flags": ["NONE"] }),
    );
    let report = bundle.report()?;
    ensure_eq!(report["personality"], "00000008", "personality");
    if cfg!(target_arch = "x86_64") {
        ensure_eq!(report["machine"], "i686", "the machine that uname tells");
    }
    bundle.args(&["sleep", "600"]).start()?;
    ensure_eq!(
        exec_report(&bundle, &[])?["personality"],
        "00000008",
        "personality of exec"
    );
    bundle.end()?;
    Ok(())
}

fn the_memory_policy_is_set_for_the_first_process_and_exec() -> Result {
    let mut bundle = Bundle::new(&[])?;
    for (policy, expected) in [
        (json!({ "mode": "MPOL_BIND", "nodes": "0" }), "bind:0"),
        (
            json!({ "mode": "MPOL_BIND", "nodes": "0", "flags": ["MPOL_F_STATIC_NODES"] }),
            "bind=static:0",
        ),
        (
            json!({ "mode": "MPOL_INTERLEAVE", "nodes": "0" }),
            "interleave:0",
        ),
    ] {
        bundle.set("/linux/memoryPolicy", policy.clone());
        ensure_eq!(bundle.report()?["memory_policy"], expected, "{policy}");
    }
    bundle.args(&["sleep", "600"]).start()?;
    ensure_eq!(
        exec_report(&bundle, &[])?["memory_policy"],
        "interleave:0",
        "policy of exec"
    );
    bundle.end()?;
    Ok(())
}

fn exec_joins_the_containers_session_keyring() -> Result {
    let mut bundle = Bundle::new(&["report"])?;
    let own = format!("_ses.{}", bundle.id());
    let keyring = |report: &Value| report["keyring"].as_str().unwrap_or_default().to_owned();
    let first = keyring(&bundle.report()?);
    ensure!(
        first.ends_with(&own),
        "the session keyring is {first}, not {own}"
    );
    bundle.args(&["sleep", "600"]).start()?;
    let further = keyring(&exec_report(&bundle, &[])?);
    ensure!(
        further.ends_with(&own),
        "exec has session keyring {further}, not {own}"
    );
    bundle.end()?;

    let shared = bundle
        .args(&["report"])
        .call(&["run", "--no-new-keyring"])?
        .ok()?
        .json()?;
    ensure!(
        !keyring(&shared).ends_with(&own),
        "with --no-new-keyring there is {own} all the same"
    );
    Ok(())
}

fn what_the_kernel_has_not_is_refused_by_name() -> Result {
    let mut all = vec![
        (
            "/process/scheduler",
            json!({ "policy": "SCHED_ISO" }),
            "scheduler",
        ),
        (
            "/process/scheduler",
            json!({ "policy": "SCHED_FIFO", "priority": 100 }),
            "scheduler",
        ),
        (
            "/process/ioPriority",
            json!({ "class": "IOPRIO_CLASS_BE", "priority": 9 }),
            "Priority",
        ),
        (
            "/linux/personality",
            json!({ "domain": "XENIX" }),
            "personality",
        ),
    ];
    if runtime_program().ends_with("rrun") && !fs::exists("/sys/fs/resctrl/schemata")? {
        all.push((
            "/linux/intelRdt",
            json!({ "closID": "guaranteed" }),
            "ntelRdt",
        ));
    }
    if !fs::exists("/sys/fs/selinux/enforce")? {
        all.push(("/process/selinuxLabel", json!("u:r:t:s0"), "elinux"));
    }
    for (pointer, value, word) in all {
        let mut bundle = Bundle::new(&["exit", "0"])?;
        let output = bundle.set(pointer, value.clone()).call(&["run"])?.end()?;
        ensure!(output.code != 0, "{pointer} = {value} is not refused");
        ensure!(output.stderr.contains(word), "{}", output.told());
    }
    Ok(())
}
