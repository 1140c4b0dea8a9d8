//! The systemd cgroup driver: what the runtime's callers, systemd and the kernel see of a
//! container that is a scope.

use std::collections::BTreeMap;
use std::fs;
use std::path::Path;

use serde_json::json;

use crate::support::bundle::{Bundle, runtime_program};
use crate::support::machine::{Result, command, wait_for};
use crate::support::needs::{self, Need, Test};
use crate::{ensure, ensure_eq, test};

const SYSTEMD: Need = Need::Systemd;
const SLICE: &str = "e2epods-burstable-pod1.slice";

pub(crate) const TESTS: &[Test] = &[
    test!(a_scope_lives_and_goes_with_its_container, SYSTEMD),
    test!(limits_are_properties_and_files, SYSTEMD),
    test!(limits_survive_a_reload_of_systemd, SYSTEMD),
    test!(an_update_changes_properties_and_files, SYSTEMD),
    test!(devices_are_what_systemd_allows, SYSTEMD),
    test!(annotations_are_properties, SYSTEMD),
    test!(a_single_process_is_enough_for_a_scope, SYSTEMD),
    test!(a_scope_is_paused_and_resumed, SYSTEMD),
    test!(exec_is_in_the_scope, SYSTEMD),
    test!(what_dies_badly_leaves_no_unit, SYSTEMD),
    test!(
        a_limit_below_what_is_in_use_is_told_by_its_name,
        SYSTEMD,
        Need::Rrun
    ),
    test!(a_creation_that_fails_leaves_no_unit, SYSTEMD),
    test!(without_a_path_the_scope_is_in_the_system_slice, SYSTEMD),
    test!(
        what_is_no_path_of_a_scope_is_refused_by_its_field,
        Need::Rrun
    ),
    test!(
        a_scope_goes_with_a_container_whose_state_is_damaged,
        SYSTEMD,
        Need::Rrun
    ),
    test!(
        without_systemd_one_sentence_says_so,
        Need::Absent(needs::SYSTEMD),
        Need::Rrun
    ),
];

fn properties(unit: &str) -> Result<BTreeMap<String, String>> {
    let output = command("systemctl", ["show", unit]).ok()?;
    Ok(output
        .stdout
        .lines()
        .filter_map(|line| line.split_once('='))
        .map(|(name, value)| (name.to_owned(), value.to_owned()))
        .collect())
}

fn ensure_properties(unit: &str, expected: &[(&str, &str)]) -> Result {
    let properties = properties(unit)?;
    for (name, value) in expected {
        let found = properties.get(*name).map(String::as_str);
        ensure_eq!(found, Some(*value), "{name} of {unit}");
    }
    Ok(())
}

/// Whether systemd knows the unit, be it as failed.
fn known(unit: &str) -> Result<bool> {
    let output = command(
        "systemctl",
        ["list-units", "--all", "--plain", "--no-legend", unit],
    )
    .ok()?;
    Ok(output.stdout.contains(unit))
}

fn ensure_gone(bundle: &Bundle) -> Result {
    wait_for("systemd to forget the scope", || {
        Ok((!known(&bundle.unit())? && !bundle.cgroup().exists()).then_some(()))
    })?;
    forget_slices()
}

/// The slices were made on demand, and are not the runtime's to stop.
fn forget_slices() -> Result {
    command("systemctl", ["stop", "e2epods.slice"]).ok()?;
    wait_for("the slices to go", || {
        Ok((!Path::new("/sys/fs/cgroup/e2epods.slice").exists()).then_some(()))
    })
}

fn a_scope_lives_and_goes_with_its_container() -> Result {
    let bundle = Bundle::in_slice(SLICE, &["sleep", "600"])?;
    bundle.call(&["create"])?.ok()?;
    ensure_eq!(bundle.status()?, "created", "status");
    ensure_properties(
        &bundle.unit(),
        &[
            ("ActiveState", "active"),
            ("Slice", SLICE),
            ("Delegate", "yes"),
            (
                "Description",
                &format!("libcontainer container {}", bundle.id()),
            ),
            ("DefaultDependencies", "no"),
            ("MemoryAccounting", "yes"),
            ("TasksAccounting", "yes"),
            ("Transient", "yes"),
        ],
    )?;
    bundle.call(&["start"])?.ok()?;
    let pid = bundle.pid()?.to_string();
    ensure_eq!(
        bundle.cgroup_file("cgroup.procs")?,
        pid,
        "processes of the scope"
    );
    let group = fs::read_to_string(format!("/proc/{pid}/cgroup"))?;
    ensure!(
        group.trim_end().ends_with(&format!(
            "e2epods.slice/e2epods-burstable.slice/{SLICE}/{}",
            bundle.unit()
        )),
        "it is in {group}"
    );
    bundle.end()?;
    ensure_gone(&bundle)?;

    // And as `run` does it.
    let bundle = Bundle::in_slice(SLICE, &["cat", "/proc/self/cgroup"])?;
    ensure_eq!(bundle.run()?.text(), "0::/", "its own view of the cgroup");
    ensure_gone(&bundle)
}

/// All that systemd has a property for.
fn limited(args: &[&str]) -> Result<Bundle> {
    let mut bundle = Bundle::in_slice(SLICE, args)?;
    bundle.set(
        "/linux/resources",
        json!({
            "memory": { "limit": 64 << 20, "swap": 96 << 20, "reservation": 32 << 20 },
            "cpu": { "shares": 102, "quota": 15_500, "period": 50_000, "cpus": "0", "mems": "0" },
            "pids": { "limit": 33 },
            "unified": { "memory.min": "16777216", "memory.high": "50331648", "memory.oom.group": "1" },
        }),
    );
    Ok(bundle)
}

const LIMITED_FILES: &[(&str, &str)] = &[
    ("memory.max", "67108864"),
    ("memory.low", "33554432"),
    ("memory.min", "16777216"),
    ("memory.high", "50331648"),
    ("memory.oom.group", "1"),
    ("cpu.weight", "17"),
    ("cpu.max", "15500 50000"),
    ("cpuset.cpus", "0"),
    ("cpuset.mems", "0"),
    ("pids.max", "33"),
];

fn ensure_files(bundle: &Bundle, expected: &[(&str, &str)]) -> Result {
    for (file, value) in expected {
        ensure_eq!(bundle.cgroup_file(file)?, *value, "{file}");
    }
    Ok(())
}

fn limits_are_properties_and_files() -> Result {
    let bundle = limited(&["sleep", "600"])?;
    bundle.start()?;
    ensure_properties(
        &bundle.unit(),
        &[
            ("MemoryMax", "67108864"),
            ("MemoryLow", "33554432"),
            ("MemoryMin", "16777216"),
            ("MemoryHigh", "50331648"),
            ("MemorySwapMax", "33554432"),
            ("CPUWeight", "17"),
            ("CPUQuotaPerSecUSec", "310ms"),
            ("CPUQuotaPeriodUSec", "50ms"),
            ("AllowedCPUs", "0"),
            ("AllowedMemoryNodes", "0"),
            ("TasksMax", "33"),
        ],
    )?;
    ensure_files(&bundle, LIMITED_FILES)?;
    bundle.end()?;
    ensure_gone(&bundle)
}

fn limits_survive_a_reload_of_systemd() -> Result {
    let bundle = limited(&["sleep", "600"])?;
    bundle.start()?;
    command("systemctl", ["daemon-reload"]).ok()?;
    ensure_files(&bundle, LIMITED_FILES)?;
    // Another unit beside it makes systemd look at the slice again.
    command("systemd-run", ["--wait", "--slice", SLICE, "true"]).ok()?;
    ensure_files(&bundle, LIMITED_FILES)?;
    ensure_eq!(bundle.status()?, "running", "status after the reload");
    bundle.end()?;
    ensure_gone(&bundle)
}

fn an_update_changes_properties_and_files() -> Result {
    let bundle = limited(&["sleep", "600"])?;
    bundle.start()?;
    let update = json!({
        "memory": { "limit": 128 << 20, "swap": 128 << 20 },
        "cpu": { "shares": 1024, "quota": 50_000, "period": 100_000 },
        "pids": { "limit": 44 },
    });
    bundle
        .runtime(&["update", "--resources", "-", bundle.id()])
        .stdin(update.to_string())
        .ok()?;
    let properties = [
        ("MemoryMax", "134217728"),
        ("MemorySwapMax", "0"),
        ("CPUWeight", "100"),
        ("CPUQuotaPerSecUSec", "500ms"),
        ("TasksMax", "44"),
        ("AllowedCPUs", "0"),
    ];
    let files = [
        ("memory.max", "134217728"),
        ("cpu.weight", "100"),
        ("cpu.max", "50000 100000"),
        ("pids.max", "44"),
    ];
    ensure_properties(&bundle.unit(), &properties)?;
    ensure_files(&bundle, &files)?;
    command("systemctl", ["daemon-reload"]).ok()?;
    ensure_properties(&bundle.unit(), &properties)?;
    ensure_files(&bundle, &files)?;
    bundle.end()?;
    ensure_gone(&bundle)
}

fn devices_are_what_systemd_allows() -> Result {
    let mut bundle = Bundle::in_slice(SLICE, &["sleep", "600"])?;
    bundle.set(
        "/linux/resources/devices",
        json!([
            { "allow": false, "access": "rwm" },
            { "allow": true, "type": "b", "major": 7, "minor": 3, "access": "r" },
        ]),
    );
    bundle.start()?;
    let properties = properties(&bundle.unit())?;
    ensure_eq!(
        properties.get("DevicePolicy").map(String::as_str),
        Some("strict"),
        "DevicePolicy"
    );
    let allowed = command("systemctl", ["show", "-p", "DeviceAllow", &bundle.unit()])
        .ok()?
        .stdout;
    for entry in [
        "/dev/block/7:3 r",
        "/dev/char/1:3 rwm",
        "char-* m",
        "block-* m",
    ] {
        ensure!(
            allowed.contains(entry),
            "{entry} is not among what is allowed:\n{allowed}"
        );
    }
    // In the container: what is allowed can be opened, under systemd's program and rrun's.
    bundle.exec(&[], &["stat", "/dev/null"]).ok()?;
    bundle.exec(&[], &["write", "/dev/null", "x"]).ok()?;
    bundle.end()?;
    ensure_gone(&bundle)
}

fn annotations_are_properties() -> Result {
    let mut bundle = Bundle::in_slice(SLICE, &["sleep", "600"])?;
    bundle.set(
        "/annotations",
        json!({
            "org.systemd.property.TimeoutStopUSec": "uint64 7000000",
            "org.systemd.property.CollectMode": "'inactive-or-failed'",
            "org.systemd.property.Description": "'of the test'",
        }),
    );
    bundle.start()?;
    ensure_properties(
        &bundle.unit(),
        &[
            ("TimeoutStopUSec", "7s"),
            ("CollectMode", "inactive-or-failed"),
            ("Description", "of the test"),
        ],
    )?;
    bundle.end()?;
    ensure_gone(&bundle)
}

fn a_single_process_is_enough_for_a_scope() -> Result {
    let mut bundle = Bundle::in_slice(SLICE, &["sleep", "600"])?;
    bundle.set("/linux/resources/pids", json!({ "limit": 1 }));
    bundle.start()?;
    ensure_files(&bundle, &[("pids.max", "1"), ("pids.current", "1")])?;
    ensure_properties(&bundle.unit(), &[("TasksMax", "1")])?;
    bundle.end()?;
    ensure_gone(&bundle)
}

fn a_scope_is_paused_and_resumed() -> Result {
    let bundle = Bundle::in_slice(SLICE, &["sleep", "600"])?;
    bundle.start()?;
    bundle.runtime(&["pause", bundle.id()]).ok()?;
    ensure_eq!(bundle.status()?, "paused", "status");
    ensure_files(&bundle, &[("cgroup.freeze", "1")])?;
    bundle.runtime(&["resume", bundle.id()]).ok()?;
    ensure_eq!(bundle.status()?, "running", "status");
    bundle.runtime(&["pause", bundle.id()]).ok()?;
    bundle.end()?;
    ensure_gone(&bundle)
}

fn exec_is_in_the_scope() -> Result {
    let mut bundle = Bundle::in_slice(SLICE, &["sleep", "600"])?;
    bundle.set("/linux/resources/pids", json!({ "limit": 10 }));
    bundle.start()?;
    bundle
        .exec(&[], &["forks", "100"])
        .ok()?
        .says("children, Resource temporarily unavailable")?;
    bundle.end()?;
    ensure_gone(&bundle)
}

/// The kernel may kill the container for it, and systemd take its scope away, before all limits are
/// written: what is told then is the limit, not a file that is gone.
fn a_limit_below_what_is_in_use_is_told_by_its_name() -> Result {
    for _ in 0..5 {
        let bundle = Bundle::in_slice(SLICE, &["allocate", "64"])?;
        bundle.start()?;
        wait_for("it to use much of 64 MB", || {
            let used: u64 = bundle.cgroup_file("memory.current")?.parse()?;
            Ok((used > 48 << 20).then_some(()))
        })?;
        let output = bundle.call(&["update", "--memory", "8m"])?.end()?;
        ensure!(
            output.code == 0
                || output.stderr.contains("memory.limit") && output.stderr.contains("8388608"),
            "{}",
            output.told()
        );
        // Dead or, where there is swap, alive.
        let delete = ["delete", "--force", bundle.id()];
        bundle.runtime(&delete).ok()?;
        ensure_gone(&bundle)?;
    }
    Ok(())
}

fn what_dies_badly_leaves_no_unit() -> Result {
    let mut bundle = Bundle::in_slice(SLICE, &["allocate", "256"])?;
    bundle.set(
        "/linux/resources/memory",
        json!({ "limit": 48 << 20, "swap": 48 << 20 }),
    );
    bundle.start()?;
    bundle.wait_status("stopped")?;
    bundle.delete()?;
    ensure_gone(&bundle)?;

    let bundle = Bundle::in_slice(SLICE, &["deaf"])?;
    bundle.start()?;
    command("kill", ["-KILL", &bundle.pid()?.to_string()]).ok()?;
    bundle.wait_status("stopped")?;
    bundle.delete()?;
    ensure_gone(&bundle)
}

fn a_creation_that_fails_leaves_no_unit() -> Result {
    let mut bundle = Bundle::in_slice(SLICE, &[])?;
    bundle.set("/process/args", json!(["/no/such/program"]));
    let output = bundle.call(&["create"])?.end()?;
    ensure!(output.code != 0, "it was made");
    ensure_gone(&bundle)?;

    // The same name again: nothing is in its way.
    let bundle = Bundle::in_slice(SLICE, &["sleep", "600"])?;
    bundle.start()?;
    bundle.end()?;
    bundle.start()?;
    bundle.end()?;
    ensure_gone(&bundle)
}

fn without_a_path_the_scope_is_in_the_system_slice() -> Result {
    let mut bundle = Bundle::in_slice(SLICE, &["sleep", "600"])?;
    bundle.without("/linux/cgroupsPath");
    bundle.start()?;
    let runtime = runtime_program();
    let unit = format!(
        "{}-{}.scope",
        runtime.rsplit('/').next().unwrap_or_default(),
        bundle.id()
    );
    ensure_properties(
        &unit,
        &[("ActiveState", "active"), ("Slice", "system.slice")],
    )?;
    bundle.end()?;
    ensure!(!known(&unit)?, "{unit} is still known");
    Ok(())
}

fn what_is_no_path_of_a_scope_is_refused_by_its_field() -> Result {
    let mut bundle = Bundle::in_slice(SLICE, &["exit", "0"])?;
    for path in [
        "/some/path",
        "a:b",
        "a.slice:b:c:d",
        "noslice:b:c",
        "a--b.slice:b:c",
    ] {
        bundle.set("/linux/cgroupsPath", json!(path));
        let output = bundle.call(&["create"])?.exits(1)?;
        ensure!(
            output.stderr.contains("linux.cgroupsPath"),
            "{path}: the field is not named:\n{}",
            output.told()
        );
    }
    Ok(())
}

fn without_systemd_one_sentence_says_so() -> Result {
    let bundle = Bundle::in_slice(SLICE, &["exit", "0"])?;
    let output = bundle.call(&["create"])?.exits(1)?;
    ensure!(
        output
            .stderr
            .contains("reach systemd at /run/systemd/private: No such file"),
        "{}",
        output.told()
    );
    Ok(())
}

fn a_scope_goes_with_a_container_whose_state_is_damaged() -> Result {
    let bundle = Bundle::in_slice(SLICE, &["sleep", "600"])?;
    bundle.start()?;
    ensure!(known(&bundle.unit())?, "no unit was made");
    fs::write(
        bundle.root().join(bundle.id()).join("state.json"),
        "{ damaged",
    )?;
    bundle.end()?;
    ensure!(!known(&bundle.unit())?, "the unit is left");
    ensure!(!bundle.cgroup().exists(), "the cgroup is left");
    forget_slices()
}
