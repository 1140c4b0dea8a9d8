//! Tests of the scheduler, I/O priority, CPU affinity, personality and memory policy of a
//! container's processes.

use std::fs;

use serde_json::{Value, json};

use crate::support::bundle::{Bundle, runtime_program};
use crate::support::machine::{Output, Result, command};
use crate::support::needs::{Need, Test};
use crate::{ensure, ensure_eq, test};

pub(crate) const TESTS: &[Test] = &[
    test!(the_scheduler_is_set_for_the_first_process_and_for_processes_that_exec_starts),
    test!(the_deadline_scheduler_is_set),
    test!(the_scheduler_is_set_in_a_user_namespace, Need::Rrun),
    test!(the_io_priority_is_set_for_the_first_process_and_for_processes_that_exec_starts),
    test!(the_container_does_not_inherit_the_callers_cpu_affinity),
    test!(a_process_that_exec_starts_runs_on_the_configured_cpus),
    test!(the_personality_is_set_for_the_first_process_and_for_processes_that_exec_starts),
    test!(
        the_memory_policy_is_set_for_the_first_process_and_for_processes_that_exec_starts,
        Need::Rrun,
        Need::File("/proc/self/numa_maps")
    ),
    test!(a_setting_that_the_kernel_does_not_support_is_named_in_the_error),
];

/// Returns the nice value, rt_priority and policy of the process that printed the report. The three
/// values are the fields 19, 40 and 41 in proc_pid_stat(5). The array `stat` of the report begins
/// with the third field.
fn scheduling(report: &Value) -> Vec<&str> {
    [19, 40, 41]
        .iter()
        .map(|field| report["stat"][field - 3].as_str().unwrap_or_default())
        .collect()
}

/// Returns the nice value of the test process. If the configuration of the scheduler contains no
/// nice value, the container's processes inherit this nice value.
fn own_nice() -> Result<String> {
    let stat = std::fs::read_to_string("/proc/self/stat")?;
    let after_name = stat.rsplit_once(") ").map(|(_, rest)| rest);
    let nice = after_name.and_then(|rest| rest.split(' ').nth(19 - 3));
    Ok(nice.ok_or("/proc/self/stat has no nice value")?.to_owned())
}

fn exec_report(bundle: &Bundle, options: &[&str]) -> Result<Value> {
    bundle.exec(options, &["report"]).ok()?.json()
}

fn the_scheduler_is_set_for_the_first_process_and_for_processes_that_exec_starts() -> Result {
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
            "the nice value, priority and policy of the first process if the configuration sets process.scheduler to {scheduler}"
        );
    }
    bundle.args(&["sleep", "600"]).start()?;
    ensure_eq!(
        scheduling(&exec_report(&bundle, &[])?),
        [own_nice, "7", "2"],
        "the nice value, priority and policy of the process that `exec` starts"
    );
    bundle.end()?;
    Ok(())
}

fn the_deadline_scheduler_is_set() -> Result {
    let mut bundle = Bundle::new(&["cat", "/proc/self/sched"])?;
    bundle.set(
        "/process/scheduler",
        json!({ "policy": "SCHED_DEADLINE", "runtime": 10_000_000, "deadline": 30_000_000,
                "period": 40_000_000 }),
    );
    let report = bundle.report()?;
    ensure_eq!(
        scheduling(&report)[2],
        "6",
        "the number of the scheduling policy of the first process"
    );
    Ok(())
}

fn the_scheduler_is_set_in_a_user_namespace() -> Result {
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
        "the nice value, priority and policy of the first process"
    );
    ensure_eq!(
        report["io_priority"],
        json!([1, 1]),
        "the I/O class and priority of the first process"
    );
    Ok(())
}

fn the_io_priority_is_set_for_the_first_process_and_for_processes_that_exec_starts() -> Result {
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
            "the I/O class and priority of the first process"
        );
    }
    bundle.args(&["sleep", "600"]).start()?;
    ensure_eq!(
        exec_report(&bundle, &[])?["io_priority"],
        json!([2, 6]),
        "the I/O class and priority of the process that `exec` starts"
    );
    bundle.end()?;
    Ok(())
}

/// Returns the CPUs that the test process is allowed to use.
fn cpus() -> Result<String> {
    let status = fs::read_to_string("/proc/self/status")?;
    let list = status
        .lines()
        .find_map(|line| line.strip_prefix("Cpus_allowed_list:"));
    Ok(list.unwrap_or_default().trim().to_owned())
}

/// Calls the runtime with the arguments `args`, and restricts the runtime to CPU 0.
fn bound(bundle: &Bundle, args: &[&str]) -> Result<Output> {
    bundle.write_config()?;
    command("taskset", ["--cpu-list", "0", &runtime_program()])
        .arg("--root")
        .arg(bundle.root())
        .args(args)
        .dir(bundle.path())
        .ok()
}

fn the_container_does_not_inherit_the_callers_cpu_affinity() -> Result {
    let all = cpus()?;
    let mut bundle = Bundle::new(&["report"])?;
    let report = bound(&bundle, &["run", bundle.id()])?.json()?;
    ensure_eq!(
        report["status"]["Cpus_allowed_list"],
        all.as_str(),
        "the CPUs that the first process is allowed to use"
    );
    bundle.args(&["sleep", "600"]).start()?;
    let report = bound(&bundle, &["exec", bundle.id(), "/bin/inside", "report"])?.json()?;
    ensure_eq!(
        report["status"]["Cpus_allowed_list"],
        all.as_str(),
        "the CPUs that the process started by `exec` is allowed to use"
    );
    bundle.end()?;
    Ok(())
}

fn a_process_that_exec_starts_runs_on_the_configured_cpus() -> Result {
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
            "the CPUs of the first process if execCPUAffinity is {affinity}"
        );
        bundle.args(&["sleep", "600"]).start()?;
        ensure_eq!(
            exec_report(&bundle, &[])?["status"]["Cpus_allowed_list"],
            expected,
            "the CPUs of the process that `exec` starts if execCPUAffinity is {affinity}"
        );
        bundle.end()?;
    }
    Ok(())
}

fn the_personality_is_set_for_the_first_process_and_for_processes_that_exec_starts() -> Result {
    let mut bundle = Bundle::new(&[])?;
    ensure_eq!(
        bundle.report()?["personality"],
        "00000000",
        "the default personality"
    );
    // The specification defines no flags for a personality, so the runtime ignores unknown flags.
    bundle.set(
        "/linux/personality",
        json!({ "domain": "LINUX32", "flags": ["NONE"] }),
    );
    let report = bundle.report()?;
    ensure_eq!(report["personality"], "00000008", "the personality LINUX32");
    if cfg!(target_arch = "x86_64") {
        ensure_eq!(
            report["machine"],
            "i686",
            "the machine name that uname(2) returns"
        );
    }
    bundle.args(&["sleep", "600"]).start()?;
    ensure_eq!(
        exec_report(&bundle, &[])?["personality"],
        "00000008",
        "the personality of the process that `exec` starts"
    );
    bundle.end()?;
    Ok(())
}

fn the_memory_policy_is_set_for_the_first_process_and_for_processes_that_exec_starts() -> Result {
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
        ensure_eq!(
            bundle.report()?["memory_policy"],
            expected,
            "the memory policy of a container whose configuration requests {policy}"
        );
    }
    bundle.args(&["sleep", "600"]).start()?;
    ensure_eq!(
        exec_report(&bundle, &[])?["memory_policy"],
        "interleave:0",
        "the memory policy of the process that `exec` starts"
    );
    bundle.end()?;
    Ok(())
}

fn a_setting_that_the_kernel_does_not_support_is_named_in_the_error() -> Result {
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
        ensure!(
            output.code != 0,
            "the runtime accepts a configuration whose field {pointer} is {value}"
        );
        ensure!(
            output.stderr.contains(word),
            "the error about the field {pointer} does not contain {word:?}:\n{}",
            output.told()
        );
    }
    Ok(())
}
