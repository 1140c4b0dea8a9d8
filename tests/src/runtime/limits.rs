//! cgroup limits, by their effect on a real kernel.

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
    test!(half_a_cpu_of_quota_yields_half_a_cpu, CPU),
    test!(requests_of_two_to_one_split_a_cpu_two_to_one, CPU, CPUSET),
    test!(
        unified_weights_of_two_to_one_split_a_cpu_two_to_one,
        CPU,
        CPUSET
    ),
    test!(shares_become_weights_by_the_current_conversion, CPU),
    test!(an_allocation_over_the_limit_is_killed, MEMORY),
    test!(an_allocation_under_the_limit_lives, MEMORY),
    test!(
        a_memory_limit_too_low_to_start_in_is_told,
        MEMORY,
        Need::Rrun
    ),
    test!(a_memory_request_is_protected_memory, MEMORY),
    test!(the_swap_limit_is_swap_alone, MEMORY),
    test!(the_pids_limit_stops_a_fork_bomb, PIDS),
    test!(any_unified_key_is_written, MEMORY, PIDS),
    test!(a_cpuset_holds_the_process_to_its_cpus, CPUSET),
    test!(limits_hold_from_the_first_instruction, MEMORY, PIDS),
    test!(exec_is_held_by_the_containers_limits, PIDS),
    test!(
        an_update_takes_effect_on_the_running_container,
        CPU,
        MEMORY,
        PIDS
    ),
    test!(an_update_keeps_the_limit_on_memory_and_swap, MEMORY, PIDS),
    test!(a_cgroup_path_with_colons_is_a_name),
    test!(a_cgroup_path_below_others_is_made_and_unmade, PIDS),
    test!(a_unified_key_of_no_controller_is_refused),
    test!(
        events_tell_what_a_container_without_limits_uses,
        MEMORY,
        PIDS
    ),
    test!(
        events_say_that_a_process_was_killed_for_want_of_memory,
        MEMORY
    ),
    test!(burst_and_quota_change_in_either_order, CPU),
    test!(
        an_update_of_device_rules_takes_the_place_of_those_before,
        Need::Rrun
    ),
    test!(what_cgroup_v2_lacks_is_refused_by_its_field, Need::Rrun),
];

fn half_a_cpu_of_quota_yields_half_a_cpu() -> Result {
    let mut bundle = Bundle::new(&["spin", "600"])?;
    bundle.set(
        "/linux/resources/cpu",
        json!({ "quota": 50_000, "period": 100_000 }),
    );
    bundle.start()?;
    let used = held_to(0.5, &bundle.cgroup())?;
    ensure!(
        bundle.cgroup_count("cpu.stat", "nr_throttled")? > 0,
        "was never throttled"
    );
    note(format!(
        "50 % quota: used {:.1} % of a CPU over 5 s",
        used * 100.0
    ));
    bundle.end()?;
    Ok(())
}

fn requests_of_two_to_one_split_a_cpu_two_to_one() -> Result {
    // Requests of 1000m and 500m as kubelet gives them. The conversion bends the ratio a little:
    // weights 100 and 59.
    let part = split_of_a_cpu(
        json!({ "cpu": { "shares": 1024 } }),
        json!({ "cpu": { "shares": 512 } }),
    )?;
    note(format!(
        "requests 2:1: {:.1} % and {:.1} %",
        part * 100.0,
        100.0 - part * 100.0
    ));
    ensure!(
        (2.0 / 3.0 * 0.9..=2.0 / 3.0 * 1.1).contains(&part),
        "the first got {:.1} %, not two thirds ± 10 %",
        part * 100.0
    );
    Ok(())
}

fn unified_weights_of_two_to_one_split_a_cpu_two_to_one() -> Result {
    let part = split_of_a_cpu(
        json!({ "unified": { "cpu.weight": "200" } }),
        json!({ "unified": { "cpu.weight": "100" } }),
    )?;
    note(format!(
        "weights 2:1: {:.1} % and {:.1} %",
        part * 100.0,
        100.0 - part * 100.0
    ));
    let ratio = part / (1.0 - part);
    ensure!(
        (1.8..=2.2).contains(&ratio),
        "the split is {ratio:.2} to 1, not 2 ± 10 %"
    );
    Ok(())
}

fn shares_become_weights_by_the_current_conversion() -> Result {
    for (shares, weight) in [(2, "1"), (102, "17"), (1024, "100"), (262_144, "10000")] {
        let mut bundle = Bundle::new(&["sleep", "600"])?;
        bundle.set("/linux/resources/cpu", json!({ "shares": shares }));
        bundle.start()?;
        ensure_eq!(
            bundle.cgroup_file("cpu.weight")?,
            weight,
            "weight of {shares} shares"
        );
        bundle.end()?;
    }
    Ok(())
}

fn an_allocation_over_the_limit_is_killed() -> Result {
    let mut bundle = Bundle::new(&["allocate", "256"])?;
    bundle.set(
        "/linux/resources/memory",
        json!({ "limit": 48 << 20, "swap": 48 << 20 }),
    );
    let output = bundle.call(&["run"])?.exits(128 + 9)?;
    ensure!(
        output.stdout.contains("8 MB"),
        "it got nothing at all:\n{}",
        output.told()
    );
    ensure!(
        !output.stdout.contains("56 MB"),
        "it got over its limit:\n{}",
        output.told()
    );

    bundle.start()?;
    bundle.wait_status("stopped")?;
    ensure!(
        bundle.cgroup_count("memory.events", "oom_kill")? > 0,
        "no oom_kill is counted"
    );
    bundle.delete()?;
    Ok(())
}

/// The first process dies of it before it can say anything.
fn a_memory_limit_too_low_to_start_in_is_told() -> Result {
    let mut bundle = Bundle::new(&["exit", "0"])?;
    bundle.set("/linux/resources/memory", json!({ "limit": 4096 }));
    for _ in 0..10 {
        let output = bundle.call(&["run"])?.exits(1)?;
        ensure!(output.stderr.contains("SIGKILL"), "{}", output.told());
        nothing_made(&bundle, &output)?;
    }
    Ok(())
}

fn an_allocation_under_the_limit_lives() -> Result {
    let mut bundle = Bundle::new(&["allocate", "24"])?;
    bundle.set("/linux/resources/memory", json!({ "limit": 64 << 20 }));
    bundle.run()?.says("24 MB")?;
    Ok(())
}

fn a_memory_request_is_protected_memory() -> Result {
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
        "memory.max of the limit"
    );
    ensure_eq!(
        bundle.cgroup_file("memory.low")?,
        "33554432",
        "memory.low of the reservation"
    );
    ensure_eq!(
        bundle.cgroup_file("memory.min")?,
        "16777216",
        "memory.min of the unified key"
    );
    bundle.end()?;
    Ok(())
}

/// The specification's swap is memory and swap together, as cgroup v1 had it.
fn the_swap_limit_is_swap_alone() -> Result {
    let mut bundle = Bundle::new(&["sleep", "600"])?;
    bundle.set(
        "/linux/resources/memory",
        json!({ "limit": 64 << 20, "swap": 96 << 20 }),
    );
    bundle.start()?;
    if let Ok(swap) = bundle.cgroup_file("memory.swap.max") {
        ensure_eq!(swap, (32u64 << 20).to_string(), "memory.swap.max");
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

fn any_unified_key_is_written() -> Result {
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
        ensure_eq!(bundle.cgroup_file(key)?, value, "{key}");
    }
    bundle.end()?;
    Ok(())
}

fn a_cpuset_holds_the_process_to_its_cpus() -> Result {
    let mut bundle = Bundle::new(&[])?;
    bundle.set("/linux/resources/cpu", json!({ "cpus": "0" }));
    ensure_eq!(
        bundle.report()?["status"]["Cpus_allowed_list"],
        "0",
        "CPUs allowed"
    );
    Ok(())
}

fn limits_hold_from_the_first_instruction() -> Result {
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
        "the limits that it sees"
    );
    Ok(())
}

fn exec_is_held_by_the_containers_limits() -> Result {
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
        ensure_eq!(bundle.cgroup_file(key)?, value, "{key} after the update");
    }
    held_to(0.5, &bundle.cgroup())?;
    bundle.end()?;
    Ok(())
}

/// runc's memory and swap are one limit, which is kept when that of memory changes; docker counts
/// on it.
fn an_update_keeps_the_limit_on_memory_and_swap() -> Result {
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
        ensure_eq!(limits(&bundle)?, (memory, swap), "after {options:?}");
    }
    // runc 1.3 takes 0 for nothing that is said.
    ensure_eq!(bundle.cgroup_file("pids.max")?, "30", "pids.max");
    let nothing = json!({ "pids": { "limit": 0 } }).to_string();
    bundle
        .runtime(&["update", "--resources", "-", bundle.id()])
        .stdin(nothing)
        .ok()?;
    ensure_eq!(bundle.cgroup_file("pids.max")?, "30", "pids.max");
    let refused = bundle.call(&["update", "--memory", "97m"])?.exits(1)?;
    ensure!(refused.stderr.contains("swap"), "{}", refused.told());
    ensure_eq!(
        limits(&bundle)?,
        (megabytes(64), megabytes(32)),
        "after the refusal"
    );
    bundle.call(&["update", "--memory", "-1"])?.ok()?;
    ensure_eq!(
        limits(&bundle)?,
        ("max".to_owned(), "max".to_owned()),
        "without a limit"
    );
    bundle.end()?;
    Ok(())
}

/// As runc has it: the form that the systemd driver takes apart is a name to the other.
fn a_cgroup_path_with_colons_is_a_name() -> Result {
    let mut bundle = Bundle::new(&["sleep", "600"])?;
    let name = format!("e2e.slice:of:{}", bundle.id());
    bundle.set("/linux/cgroupsPath", json!(name));
    bundle.start()?;
    let own = fs::read_to_string(format!("/proc/{}/cgroup", bundle.pid()?))?;
    ensure!(own.trim_end().ends_with(&format!("/{name}")), "{own}");
    bundle.end()?;
    Ok(())
}

fn a_cgroup_path_below_others_is_made_and_unmade() -> Result {
    let above = format!("/sys/fs/cgroup/e2e-above-{}", std::process::id());
    fs::create_dir(&above)?;
    let mut bundle = Bundle::new(&["sleep", "600"])?;
    let path = format!("{}/container", above.trim_start_matches("/sys/fs/cgroup"));
    bundle.set("/linux/cgroupsPath", json!(path));
    bundle.set("/linux/resources/pids", json!({ "limit": 33 }));
    bundle.start()?;
    ensure_eq!(bundle.cgroup_file("pids.max")?, "33", "pids.max");
    bundle.end()?;
    wait_for("the container's group to go", || {
        Ok((!bundle.cgroup().exists()).then_some(()))
    })?;
    Ok(fs::remove_dir(&above)?)
}

fn a_unified_key_of_no_controller_is_refused() -> Result {
    let mut bundle = Bundle::new(&["exit", "0"])?;
    bundle.set("/linux/resources/unified", json!({ "no.such.key": "1" }));
    let output = bundle.call(&["run"])?.exits(1)?;
    ensure!(
        output.stderr.contains("no.such.key"),
        "the key is not named:\n{}",
        output.told()
    );
    Ok(())
}

fn events_tell_what_a_container_without_limits_uses() -> Result {
    let bundle = Bundle::new(&["sleep", "600"])?;
    bundle.start()?;
    let event = bundle
        .runtime(&["events", "--stats", bundle.id()])
        .ok()?
        .json()?;
    ensure_eq!(event["type"], "stats", "type");
    ensure_eq!(event["id"], bundle.id(), "id");
    for pointer in [
        "/data/cpu/usage/total",
        "/data/memory/usage/usage",
        "/data/memory/usage/limit",
        "/data/memory/raw/anon",
        "/data/pids/current",
    ] {
        let value = event.pointer(pointer).and_then(serde_json::Value::as_u64);
        ensure!(value.is_some_and(|value| value > 0), "{pointer} in {event}");
    }
    bundle.end()?;
    Ok(())
}

fn events_say_that_a_process_was_killed_for_want_of_memory() -> Result {
    let mut bundle = Bundle::new(&["allocate", "256"])?;
    bundle.set(
        "/linux/resources/memory",
        json!({ "limit": 48 << 20, "swap": 48 << 20 }),
    );
    bundle.call(&["create"])?.ok()?;
    let mut events = bundle
        .runtime(&["events", "--interval", "100ms", bundle.id()])
        .start()?;
    // It watches by the time that it tells a first number.
    wait_for("the first statistics", || {
        Ok(events.stdout().contains("stats").then_some(()))
    })?;
    bundle.call(&["start"])?.ok()?;
    let output = events.end()?;
    ensure!(
        output.stdout.contains(r#""type":"oom""#),
        "no oom is told:\n{}",
        output.told()
    );
    bundle.wait_status("stopped")?;
    bundle.delete()?;
    Ok(())
}

fn burst_and_quota_change_in_either_order() -> Result {
    let mut bundle = Bundle::new(&["sleep", "600"])?;
    bundle.set(
        "/linux/resources/cpu",
        json!({ "quota": 50_000, "period": 100_000, "burst": 50_000 }),
    );
    bundle.start()?;
    ensure_eq!(bundle.cgroup_file("cpu.max.burst")?, "50000", "burst");
    for (quota, burst) in [(20_000, 10_000), (80_000, 80_000)] {
        let update = json!({ "cpu": { "quota": quota, "period": 100_000, "burst": burst } });
        bundle
            .runtime(&["update", "--resources", "-", bundle.id()])
            .stdin(update.to_string())
            .ok()?;
        ensure_eq!(
            bundle.cgroup_file("cpu.max.burst")?,
            burst.to_string(),
            "burst"
        );
        ensure_eq!(
            bundle.cgroup_file("cpu.max")?,
            format!("{quota} 100000"),
            "quota"
        );
    }
    bundle.end()?;
    Ok(())
}

fn an_update_of_device_rules_takes_the_place_of_those_before() -> Result {
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
    ensure!(write()?.code != 0, "it can be opened before it is allowed");
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
        ensure_eq!(write()?.code == 0, allowed, "under {rules}");
    }
    bundle.end()?;
    Ok(())
}

fn what_cgroup_v2_lacks_is_refused_by_its_field() -> Result {
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
        ensure!(output.stderr.contains(field), "{}", output.told());
    }
    Ok(())
}
