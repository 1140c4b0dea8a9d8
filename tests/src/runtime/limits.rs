//! Tests that check cgroup limits by their effect on a real kernel.

use std::fs;

use serde_json::json;

use crate::support::bundle::Bundle;
use crate::support::cgroup_use::{held_to, split_of_a_cpu};
use crate::support::machine::{Result, note, wait_for};
use crate::support::needs::{Need, Test};
use crate::support::refusals::nothing_made;
use crate::{ensure, ensure_eq, test};

const CPU: Need = Need::Controller("cpu");
const CPUSET: Need = Need::Controller("cpuset");
const MEMORY: Need = Need::Controller("memory");
const PIDS: Need = Need::Controller("pids");

pub(crate) const TESTS: &[Test] = &[
    test!(a_quota_of_half_a_cpu_allows_half_a_cpu, CPU),
    test!(
        cpu_requests_in_the_ratio_2_to_1_split_a_cpu_in_the_same_ratio,
        CPU,
        CPUSET
    ),
    test!(
        unified_weights_in_the_ratio_2_to_1_split_a_cpu_in_the_same_ratio,
        CPU,
        CPUSET
    ),
    test!(
        cpu_shares_are_converted_to_cgroup_v2_weights_as_in_runc,
        CPU
    ),
    test!(
        a_process_that_allocates_more_than_the_memory_limit_is_killed,
        MEMORY
    ),
    test!(an_allocation_below_the_memory_limit_succeeds, MEMORY),
    test!(
        a_memory_limit_that_is_too_low_to_start_a_container_is_reported,
        MEMORY,
        Need::Rrun
    ),
    test!(a_memory_reservation_is_written_to_memory_low, MEMORY),
    test!(the_cgroups_swap_limit_does_not_include_memory, MEMORY),
    test!(the_pids_limit_stops_a_fork_bomb, PIDS),
    test!(every_unified_key_is_written_to_its_file, MEMORY, PIDS),
    test!(a_cpuset_limits_the_process_to_its_cpus, CPUSET),
    test!(limits_apply_from_the_first_instruction, MEMORY, PIDS),
    test!(
        the_containers_limits_apply_to_processes_that_exec_starts,
        PIDS
    ),
    test!(
        an_update_takes_effect_on_the_running_container,
        CPU,
        MEMORY,
        PIDS
    ),
    test!(
        an_update_keeps_the_limit_on_the_sum_of_memory_and_swap,
        MEMORY,
        PIDS
    ),
    test!(a_cgroup_path_with_colons_is_a_plain_directory_name),
    test!(a_nested_cgroup_is_created_and_removed, PIDS),
    test!(a_unified_key_of_a_missing_controller_is_refused),
    test!(
        events_report_the_usage_of_a_container_without_limits,
        MEMORY,
        PIDS
    ),
    test!(events_report_an_oom_kill, MEMORY),
    test!(
        an_update_changes_the_cpu_burst_and_quota_in_an_order_that_the_kernel_accepts,
        CPU
    ),
    test!(an_update_replaces_the_device_rules, Need::Rrun),
    test!(
        a_resource_that_cgroup_v2_does_not_support_is_named_in_the_error,
        Need::Rrun
    ),
];

fn a_quota_of_half_a_cpu_allows_half_a_cpu() -> Result {
    let mut bundle = Bundle::new(&["spin", "600"])?;
    bundle.set(
        "/linux/resources/cpu",
        json!({ "quota": 50_000, "period": 100_000 }),
    );
    bundle.start()?;
    let used = held_to(0.5, &bundle.cgroup())?;
    ensure!(
        bundle.cgroup_count("cpu.stat", "nr_throttled")? > 0,
        "the container was never throttled"
    );
    note(format!(
        "with a quota of 50 %, a container used {:.1} % of a CPU over 5 s",
        used * 100.0
    ));
    bundle.end()?;
    Ok(())
}

fn cpu_requests_in_the_ratio_2_to_1_split_a_cpu_in_the_same_ratio() -> Result {
    // kubelet sets these shares for CPU requests of 1000m and 500m. The runtime converts the shares
    // to the weights 100 and 59. The ratio of these weights is less than 2 to 1. Therefore, the
    // test allows a deviation of 10 %.
    let part = split_of_a_cpu(
        json!({ "cpu": { "shares": 1024 } }),
        json!({ "cpu": { "shares": 512 } }),
    )?;
    note(format!(
        "with CPU requests in the ratio 2 to 1, two containers used {:.1} % and {:.1} % of a CPU",
        part * 100.0,
        100.0 - part * 100.0
    ));
    ensure!(
        (2.0 / 3.0 * 0.9..=2.0 / 3.0 * 1.1).contains(&part),
        "the first container got {:.1} % of the CPU, not two thirds ± 10 %",
        part * 100.0
    );
    Ok(())
}

fn unified_weights_in_the_ratio_2_to_1_split_a_cpu_in_the_same_ratio() -> Result {
    let part = split_of_a_cpu(
        json!({ "unified": { "cpu.weight": "200" } }),
        json!({ "unified": { "cpu.weight": "100" } }),
    )?;
    note(format!(
        "with CPU weights in the ratio 2 to 1, two containers used {:.1} % and {:.1} % of a CPU",
        part * 100.0,
        100.0 - part * 100.0
    ));
    let ratio = part / (1.0 - part);
    ensure!(
        (1.8..=2.2).contains(&ratio),
        "the ratio of the containers' CPU times is not 2 to 1 ± 10 %, but {ratio:.2} to 1"
    );
    Ok(())
}

fn cpu_shares_are_converted_to_cgroup_v2_weights_as_in_runc() -> Result {
    for (shares, weight) in [(2, "1"), (102, "17"), (1024, "100"), (262_144, "10000")] {
        let mut bundle = Bundle::new(&["sleep", "600"])?;
        bundle.set("/linux/resources/cpu", json!({ "shares": shares }));
        bundle.start()?;
        ensure_eq!(
            bundle.cgroup_file("cpu.weight")?,
            weight,
            "the content of the cgroup file cpu.weight for {shares} CPU shares"
        );
        bundle.end()?;
    }
    Ok(())
}

fn a_process_that_allocates_more_than_the_memory_limit_is_killed() -> Result {
    let mut bundle = Bundle::new(&["allocate", "256"])?;
    bundle.set(
        "/linux/resources/memory",
        json!({ "limit": 48 << 20, "swap": 48 << 20 }),
    );
    let output = bundle.call(&["run"])?.exits(128 + 9)?;
    ensure!(
        output.stdout.contains("8 MB"),
        "the container could not allocate 8 MB:\n{}",
        output.told()
    );
    ensure!(
        !output.stdout.contains("56 MB"),
        "the container allocated more than its limit of 48 MB:\n{}",
        output.told()
    );

    bundle.start()?;
    bundle.wait_status("stopped")?;
    ensure!(
        bundle.cgroup_count("memory.events", "oom_kill")? > 0,
        "memory.events does not count the OOM kill"
    );
    bundle.delete()?;
    Ok(())
}

/// The memory limit is 4096 bytes. The kernel kills the container's first process before the
/// process can report an error.
fn a_memory_limit_that_is_too_low_to_start_a_container_is_reported() -> Result {
    let mut bundle = Bundle::new(&["exit", "0"])?;
    bundle.set("/linux/resources/memory", json!({ "limit": 4096 }));
    for _ in 0..10 {
        let output = bundle.call(&["run"])?.exits(1)?;
        ensure!(
            output.stderr.contains("SIGKILL"),
            "the error of `run` does not report that SIGKILL ended the process:\n{}",
            output.told()
        );
        nothing_made(&bundle, &output)?;
    }
    Ok(())
}

fn an_allocation_below_the_memory_limit_succeeds() -> Result {
    let mut bundle = Bundle::new(&["allocate", "24"])?;
    bundle.set("/linux/resources/memory", json!({ "limit": 64 << 20 }));
    bundle.run()?.says("24 MB")?;
    Ok(())
}

fn a_memory_reservation_is_written_to_memory_low() -> Result {
    let mut bundle = Bundle::new(&["sleep", "600"])?;
    bundle.set(
        "/linux/resources",
        json!({
            "memory": { "limit": 64 << 20, "reservation": 32 << 20 },
            "unified": { "memory.min": "16777216" },
        }),
    );
    bundle.start()?;
    ensure_eq!(
        bundle.cgroup_file("memory.max")?,
        "67108864",
        "the value of memory.max, which the field `limit` sets"
    );
    ensure_eq!(
        bundle.cgroup_file("memory.low")?,
        "33554432",
        "the value of memory.low, which the field `reservation` sets"
    );
    ensure_eq!(
        bundle.cgroup_file("memory.min")?,
        "16777216",
        "the value of memory.min, which a unified key sets"
    );
    bundle.end()?;
    Ok(())
}

/// The specification's field `swap` is the sum of memory and swap, as in cgroup v1. In cgroup v2,
/// memory.swap.max limits only the swap.
fn the_cgroups_swap_limit_does_not_include_memory() -> Result {
    let mut bundle = Bundle::new(&["sleep", "600"])?;
    bundle.set(
        "/linux/resources/memory",
        json!({ "limit": 64 << 20, "swap": 96 << 20 }),
    );
    bundle.start()?;
    if let Ok(swap) = bundle.cgroup_file("memory.swap.max") {
        ensure_eq!(
            swap,
            (32u64 << 20).to_string(),
            "the value of memory.swap.max"
        );
    }
    bundle.end()?;
    Ok(())
}

fn the_pids_limit_stops_a_fork_bomb() -> Result {
    let mut bundle = Bundle::new(&["forks", "100"])?;
    bundle.set("/linux/resources/pids", json!({ "limit": 10 }));
    bundle
        .run()?
        .says("9 children, Resource temporarily unavailable")?;
    Ok(())
}

fn every_unified_key_is_written_to_its_file() -> Result {
    let mut bundle = Bundle::new(&["sleep", "600"])?;
    bundle.set(
        "/linux/resources/unified",
        json!({
            "memory.high": "50331648", "pids.max": "77", "memory.oom.group": "1",
        }),
    );
    bundle.start()?;
    for (key, value) in [
        ("memory.high", "50331648"),
        ("pids.max", "77"),
        ("memory.oom.group", "1"),
    ] {
        ensure_eq!(
            bundle.cgroup_file(key)?,
            value,
            "the content of the cgroup file {key}"
        );
    }
    bundle.end()?;
    Ok(())
}

fn a_cpuset_limits_the_process_to_its_cpus() -> Result {
    let mut bundle = Bundle::new(&[])?;
    bundle.set("/linux/resources/cpu", json!({ "cpus": "0" }));
    ensure_eq!(
        bundle.report()?["status"]["Cpus_allowed_list"],
        "0",
        "the CPUs on which the process is allowed to run"
    );
    Ok(())
}

fn limits_apply_from_the_first_instruction() -> Result {
    let mut bundle = Bundle::new(&[
        "cat",
        "/sys/fs/cgroup/memory.max",
        "/sys/fs/cgroup/pids.max",
    ])?;
    bundle.set(
        "/linux/resources",
        json!({
            "memory": { "limit": 64 << 20 }, "pids": { "limit": 33 },
        }),
    );
    ensure_eq!(
        bundle.run()?.text(),
        "67108864\n33",
        "the limits that the first process sees"
    );
    Ok(())
}

fn the_containers_limits_apply_to_processes_that_exec_starts() -> Result {
    let mut bundle = Bundle::new(&["sleep", "600"])?;
    bundle.set("/linux/resources/pids", json!({ "limit": 10 }));
    bundle.start()?;
    let output = bundle.exec(&[], &["forks", "100"]).ok()?;
    output.says("8 children, Resource temporarily unavailable")?;
    bundle.end()?;
    Ok(())
}

fn an_update_takes_effect_on_the_running_container() -> Result {
    let mut bundle = Bundle::new(&["spin", "600"])?;
    bundle.set(
        "/linux/resources",
        json!({
            "cpu": { "quota": 10_000, "period": 100_000 }, "memory": { "limit": 64 << 20 },
        }),
    );
    bundle.start()?;
    let update = json!({
        "cpu": { "quota": 50_000, "period": 100_000, "shares": 102 },
        "memory": { "limit": 96 << 20 }, "pids": { "limit": 44 },
    });
    bundle
        .runtime(&["update", "--resources", "-", bundle.id()])
        .stdin(update.to_string())
        .ok()?;
    for (key, value) in [
        ("cpu.max", "50000 100000"),
        ("cpu.weight", "17"),
        ("memory.max", "100663296"),
        ("pids.max", "44"),
    ] {
        ensure_eq!(
            bundle.cgroup_file(key)?,
            value,
            "the content of the cgroup file {key} after `update`"
        );
    }
    held_to(0.5, &bundle.cgroup())?;
    bundle.end()?;
    Ok(())
}

/// As in runc, an update of only the memory limit does not change the limit on the sum of memory
/// and swap. docker depends on this behaviour.
fn an_update_keeps_the_limit_on_the_sum_of_memory_and_swap() -> Result {
    let mut bundle = Bundle::new(&["sleep", "600"])?;
    let megabytes = |count: u64| (count << 20).to_string();
    bundle.set(
        "/linux/resources/memory",
        json!({ "limit": 64 << 20, "swap": 128 << 20 }),
    );
    bundle.start()?;
    let limits = |bundle: &Bundle| -> Result<(String, String)> {
        let file = |name| bundle.cgroup_file(name);
        Ok((file("memory.max")?, file("memory.swap.max")?))
    };
    for (options, memory, swap) in [
        (&["--memory", "80m"][..], megabytes(80), megabytes(48)),
        (&["--memory", "64M"], megabytes(64), megabytes(64)),
        (&["--memory-swap", "96m"], megabytes(64), megabytes(32)),
        (&["--memory", "90m"], megabytes(90), megabytes(6)),
        (&["--pids-limit", "30"], megabytes(90), megabytes(6)),
        (&["--pids-limit", "0"], megabytes(90), megabytes(6)),
        (&["--memory-swap", "-1"], megabytes(90), "max".to_owned()),
        (&["--memory", "100m"], megabytes(100), "max".to_owned()),
        (
            &["--memory", "64m", "--memory-swap", "96m"],
            megabytes(64),
            megabytes(32),
        ),
    ] {
        bundle.call(&[&["update"], options].concat())?.ok()?;
        ensure_eq!(
            limits(&bundle)?,
            (memory, swap),
            "the contents of memory.max and memory.swap.max after `update` with the options {options:?}"
        );
    }
    // Like runc 1.3, the runtime treats a pids limit of 0 as unspecified, so the limit of 30
    // remains.
    ensure_eq!(
        bundle.cgroup_file("pids.max")?,
        "30",
        "the value of pids.max after an update with `--pids-limit 0`"
    );
    let nothing = json!({ "pids": { "limit": 0 } }).to_string();
    bundle
        .runtime(&["update", "--resources", "-", bundle.id()])
        .stdin(nothing)
        .ok()?;
    ensure_eq!(
        bundle.cgroup_file("pids.max")?,
        "30",
        "the value of pids.max after an update with a pids limit of 0"
    );
    let refused = bundle.call(&["update", "--memory", "97m"])?.exits(1)?;
    ensure!(
        refused.stderr.contains("swap"),
        "the error of `update` does not name the swap limit:\n{}",
        refused.told()
    );
    ensure_eq!(
        limits(&bundle)?,
        (megabytes(64), megabytes(32)),
        "memory.max and memory.swap.max after the refused update"
    );
    bundle.call(&["update", "--memory", "-1"])?.ok()?;
    ensure_eq!(
        limits(&bundle)?,
        ("max".to_owned(), "max".to_owned()),
        "memory.max and memory.swap.max after the limit was removed"
    );
    bundle.end()?;
    Ok(())
}

/// As in runc, the cgroupfs driver treats a path of the form `SLICE:PREFIX:NAME` as a plain
/// directory name. Only the systemd driver parses this form.
fn a_cgroup_path_with_colons_is_a_plain_directory_name() -> Result {
    let mut bundle = Bundle::new(&["sleep", "600"])?;
    let name = format!("e2e.slice:of:{}", bundle.id());
    bundle.set("/linux/cgroupsPath", json!(name));
    bundle.start()?;
    let own = fs::read_to_string(format!("/proc/{}/cgroup", bundle.pid()?))?;
    ensure!(
        own.trim_end().ends_with(&format!("/{name}")),
        "the container's process is not in the cgroup /{name}, but in the cgroup {own}"
    );
    bundle.end()?;
    Ok(())
}

fn a_nested_cgroup_is_created_and_removed() -> Result {
    let above = format!("/sys/fs/cgroup/e2e-above-{}", std::process::id());
    fs::create_dir(&above)?;
    let mut bundle = Bundle::new(&["sleep", "600"])?;
    let path = format!("{}/container", above.trim_start_matches("/sys/fs/cgroup"));
    bundle.set("/linux/cgroupsPath", json!(path));
    bundle.set("/linux/resources/pids", json!({ "limit": 33 }));
    bundle.start()?;
    ensure_eq!(
        bundle.cgroup_file("pids.max")?,
        "33",
        "the value of pids.max of the nested cgroup"
    );
    bundle.end()?;
    wait_for("the runtime to remove the container's cgroup", || {
        Ok((!bundle.cgroup().exists()).then_some(()))
    })?;
    Ok(fs::remove_dir(&above)?)
}

fn a_unified_key_of_a_missing_controller_is_refused() -> Result {
    let mut bundle = Bundle::new(&["exit", "0"])?;
    bundle.set("/linux/resources/unified", json!({ "no.such.key": "1" }));
    let output = bundle.call(&["run"])?.exits(1)?;
    ensure!(
        output.stderr.contains("no.such.key"),
        "the error of `run` does not name the unified key no.such.key:\n{}",
        output.told()
    );
    Ok(())
}

fn events_report_the_usage_of_a_container_without_limits() -> Result {
    let bundle = Bundle::new(&["sleep", "600"])?;
    bundle.start()?;
    let event = bundle
        .runtime(&["events", "--stats", bundle.id()])
        .ok()?
        .json()?;
    ensure_eq!(event["type"], "stats", "the type of the event");
    ensure_eq!(event["id"], bundle.id(), "the container's id in the event");
    for pointer in [
        "/data/cpu/usage/total",
        "/data/memory/usage/usage",
        "/data/memory/usage/limit",
        "/data/memory/raw/anon",
        "/data/pids/current",
    ] {
        let value = event.pointer(pointer).and_then(serde_json::Value::as_u64);
        ensure!(
            value.is_some_and(|value| value > 0),
            "the field {pointer} is not greater than 0 in the event that `events --stats` prints: {event}"
        );
    }
    bundle.end()?;
    Ok(())
}

fn events_report_an_oom_kill() -> Result {
    let mut bundle = Bundle::new(&["allocate", "256"])?;
    bundle.set(
        "/linux/resources/memory",
        json!({ "limit": 48 << 20, "swap": 48 << 20 }),
    );
    bundle.call(&["create"])?.ok()?;
    let mut events = bundle
        .runtime(&["events", "--interval", "100ms", bundle.id()])
        .start()?;
    // `events` watches for OOM kills only after it has printed its first statistics. Therefore, the
    // test first waits for these statistics.
    wait_for("`events` to print its first statistics", || {
        Ok(events.stdout().contains("stats").then_some(()))
    })?;
    bundle.call(&["start"])?.ok()?;
    let output = events.end()?;
    ensure!(
        output.stdout.contains(r#""type":"oom""#),
        "`events` reports no OOM kill:\n{}",
        output.told()
    );
    bundle.wait_status("stopped")?;
    bundle.delete()?;
    Ok(())
}

fn an_update_changes_the_cpu_burst_and_quota_in_an_order_that_the_kernel_accepts() -> Result {
    let mut bundle = Bundle::new(&["sleep", "600"])?;
    bundle.set(
        "/linux/resources/cpu",
        json!({ "quota": 50_000, "period": 100_000, "burst": 50_000 }),
    );
    bundle.start()?;
    ensure_eq!(
        bundle.cgroup_file("cpu.max.burst")?,
        "50000",
        "the initial value of cpu.max.burst"
    );
    for (quota, burst) in [(20_000, 10_000), (80_000, 80_000)] {
        let update = json!({ "cpu": { "quota": quota, "period": 100_000, "burst": burst } });
        bundle
            .runtime(&["update", "--resources", "-", bundle.id()])
            .stdin(update.to_string())
            .ok()?;
        ensure_eq!(
            bundle.cgroup_file("cpu.max.burst")?,
            burst.to_string(),
            "the content of cpu.max.burst after the update to the quota {quota} and the burst {burst}"
        );
        ensure_eq!(
            bundle.cgroup_file("cpu.max")?,
            format!("{quota} 100000"),
            "the content of cpu.max after the update to the quota {quota} and the burst {burst}"
        );
    }
    bundle.end()?;
    Ok(())
}

fn an_update_replaces_the_device_rules() -> Result {
    let mut bundle = Bundle::new(&["sleep", "600"])?;
    bundle.set("/root/readonly", json!(false));
    bundle.add(
        "/linux/devices",
        json!({ "path": "/dev/kernel-log", "type": "c", "major": 1, "minor": 11, "fileMode": 438 }),
    );
    bundle.set(
        "/linux/resources/devices",
        json!([{ "allow": false, "access": "rwm" }]),
    );
    bundle.start()?;
    let write = || {
        bundle
            .exec(&[], &["write", "/dev/kernel-log", "rrun-e2e"])
            .end()
    };
    ensure!(
        write()?.code != 0,
        "the container can open the device before a rule allows it"
    );
    for (rules, allowed) in [
        (
            json!([{ "allow": false }, { "allow": true, "type": "c", "major": 1, "minor": 11, "access": "rw" }]),
            true,
        ),
        (json!([{ "allow": false }]), false),
        (
            json!([{ "allow": true, "type": "a", "access": "rwm" }]),
            true,
        ),
        (json!([{ "allow": false }]), false),
    ] {
        bundle
            .runtime(&["update", "--resources", "-", bundle.id()])
            .stdin(json!({ "devices": rules }).to_string())
            .ok()?;
        ensure_eq!(
            write()?.code == 0,
            allowed,
            "whether the container can open the device after `update` with the device rules {rules}"
        );
    }
    bundle.end()?;
    Ok(())
}

fn a_resource_that_cgroup_v2_does_not_support_is_named_in_the_error() -> Result {
    for (resources, field) in [
        (
            json!({ "cpu": { "realtimeRuntime": 1000 } }),
            "linux.resources.cpu.realtimeRuntime",
        ),
        (
            json!({ "memory": { "swappiness": 3 } }),
            "linux.resources.memory.swappiness",
        ),
        (
            json!({ "blockIO": { "leafWeight": 10 } }),
            "linux.resources.blockIO.leafWeight",
        ),
        (
            json!({ "unified": { "cgroup.freeze": "1" } }),
            "cgroup.freeze",
        ),
    ] {
        let mut bundle = Bundle::new(&["exit", "0"])?;
        bundle.set("/linux/resources", resources);
        let output = bundle.call(&["create"])?.exits(1)?;
        ensure!(
            output.stderr.contains(field),
            "the error of `create` does not name the unsupported field {field}:\n{}",
            output.told()
        );
    }
    Ok(())
}
