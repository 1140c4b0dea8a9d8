//! Tests of the systemd cgroup driver, which runs each container in a systemd scope. The tests
//! check the container through the runtime's commands, through systemd, and through the kernel's
//! cgroup files.

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
    test!(a_scope_exists_as_long_as_its_container, SYSTEMD),
    test!(limits_become_unit_properties_and_cgroup_files, SYSTEMD),
    test!(limits_survive_a_reload_of_systemd, SYSTEMD),
    test!(an_update_changes_unit_properties_and_cgroup_files, SYSTEMD),
    test!(allowed_devices_become_unit_properties, SYSTEMD),
    test!(annotations_become_unit_properties, SYSTEMD),
    test!(a_scope_works_with_a_pids_limit_of_1, SYSTEMD),
    test!(a_scope_is_paused_and_resumed, SYSTEMD),
    test!(a_process_that_exec_starts_is_in_the_scope, SYSTEMD),
    test!(a_killed_container_leaves_no_unit_behind, SYSTEMD),
    test!(
        a_limit_below_the_current_usage_is_named_in_the_error,
        SYSTEMD,
        Need::Rrun
    ),
    test!(create_leaves_no_unit_behind_if_it_fails, SYSTEMD),
    test!(
        a_container_without_a_cgroups_path_is_in_the_system_slice,
        SYSTEMD
    ),
    test!(
        a_scope_can_have_the_name_of_a_file_of_its_parent_cgroup,
        SYSTEMD,
        Need::Rrun
    ),
    test!(
        the_error_about_an_invalid_cgroups_path_names_the_field,
        Need::Rrun
    ),
    test!(
        delete_removes_the_scope_of_a_container_with_a_damaged_state_file,
        SYSTEMD,
        Need::Rrun
    ),
    test!(
        a_missing_systemd_is_reported_in_one_sentence,
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
        ensure_eq!(
            found,
            Some(*value),
            "the property {name} of the systemd unit {unit}"
        );
    }
    Ok(())
}

/// Returns whether systemd has loaded the unit. A failed unit also counts as loaded.
fn unit_exists(unit: &str) -> Result<bool> {
    let output = command(
        "systemctl",
        ["list-units", "--all", "--plain", "--no-legend", unit],
    )
    .ok()?;
    Ok(output.stdout.contains(unit))
}

fn ensure_removed(bundle: &Bundle) -> Result {
    wait_for("systemd to remove the scope", || {
        Ok((!unit_exists(&bundle.unit())? && !bundle.cgroup().exists()).then_some(()))
    })?;
    stop_slices()
}

/// Stops the slices that systemd has created on demand for the scopes. The runtime must not stop
/// slices, so the test must stop them.
fn stop_slices() -> Result {
    command("systemctl", ["stop", "e2epods.slice"]).ok()?;
    wait_for("systemd to remove the slices", || {
        Ok((!Path::new("/sys/fs/cgroup/e2epods.slice").exists()).then_some(()))
    })
}

fn a_scope_exists_as_long_as_its_container() -> Result {
    let bundle = Bundle::in_slice(SLICE, &["sleep", "600"])?;
    bundle.call(&["create"])?.ok()?;
    ensure_eq!(bundle.status()?, "created", "the container's status");
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
        "the processes in the scope's cgroup"
    );
    let group = fs::read_to_string(format!("/proc/{pid}/cgroup"))?;
    ensure!(
        group.trim_end().ends_with(&format!(
            "e2epods.slice/e2epods-burstable.slice/{SLICE}/{}",
            bundle.unit()
        )),
        "the container's cgroup is not its scope, but {group}"
    );
    bundle.end()?;
    ensure_removed(&bundle)?;

    // `run` must also remove the scope of its container.
    let bundle = Bundle::in_slice(SLICE, &["cat", "/proc/self/cgroup"])?;
    ensure_eq!(
        bundle.run()?.text(),
        "0::/",
        "the cgroup path that the container sees"
    );
    ensure_removed(&bundle)
}

/// Returns a bundle with every limit for which systemd has a unit property.
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
        ensure_eq!(
            bundle.cgroup_file(file)?,
            *value,
            "the content of the cgroup file {file}"
        );
    }
    Ok(())
}

fn limits_become_unit_properties_and_cgroup_files() -> Result {
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
    ensure_removed(&bundle)
}

fn limits_survive_a_reload_of_systemd() -> Result {
    let bundle = limited(&["sleep", "600"])?;
    bundle.start()?;
    command("systemctl", ["daemon-reload"]).ok()?;
    ensure_files(&bundle, LIMITED_FILES)?;
    // When another unit starts in the slice, systemd applies the slice's settings again.
    command("systemd-run", ["--wait", "--slice", SLICE, "true"]).ok()?;
    ensure_files(&bundle, LIMITED_FILES)?;
    ensure_eq!(
        bundle.status()?,
        "running",
        "the container's status after `systemctl daemon-reload`"
    );
    bundle.end()?;
    ensure_removed(&bundle)
}

fn an_update_changes_unit_properties_and_cgroup_files() -> Result {
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
    ensure_removed(&bundle)
}

fn allowed_devices_become_unit_properties() -> Result {
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
        "the scope's DevicePolicy"
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
            "the scope's property DeviceAllow does not contain the entry {entry}: {allowed}"
        );
    }
    // Two BPF programs check each open of a device: one from systemd and one from rrun. The
    // container can still open the allowed devices.
    bundle.exec(&[], &["stat", "/dev/null"]).ok()?;
    bundle.exec(&[], &["write", "/dev/null", "x"]).ok()?;
    bundle.end()?;
    ensure_removed(&bundle)
}

fn annotations_become_unit_properties() -> Result {
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
    ensure_removed(&bundle)
}

fn a_scope_works_with_a_pids_limit_of_1() -> Result {
    let mut bundle = Bundle::in_slice(SLICE, &["sleep", "600"])?;
    bundle.set("/linux/resources/pids", json!({ "limit": 1 }));
    bundle.start()?;
    ensure_files(&bundle, &[("pids.max", "1"), ("pids.current", "1")])?;
    ensure_properties(&bundle.unit(), &[("TasksMax", "1")])?;
    bundle.end()?;
    ensure_removed(&bundle)
}

fn a_scope_is_paused_and_resumed() -> Result {
    let bundle = Bundle::in_slice(SLICE, &["sleep", "600"])?;
    bundle.start()?;
    bundle.runtime(&["pause", bundle.id()]).ok()?;
    ensure_eq!(bundle.status()?, "paused", "the container's status");
    ensure_files(&bundle, &[("cgroup.freeze", "1")])?;
    bundle.runtime(&["resume", bundle.id()]).ok()?;
    ensure_eq!(bundle.status()?, "running", "the container's status");
    bundle.runtime(&["pause", bundle.id()]).ok()?;
    bundle.end()?;
    ensure_removed(&bundle)
}

fn a_process_that_exec_starts_is_in_the_scope() -> Result {
    let mut bundle = Bundle::in_slice(SLICE, &["sleep", "600"])?;
    bundle.set("/linux/resources/pids", json!({ "limit": 10 }));
    bundle.start()?;
    bundle
        .exec(&[], &["forks", "100"])
        .ok()?
        .says("children, Resource temporarily unavailable")?;
    bundle.end()?;
    ensure_removed(&bundle)
}

/// The new memory limit can make the kernel kill the container while rrun still writes other
/// limits. systemd can then remove the scope. Even then, the error of rrun must name the limit
/// instead of a missing file.
fn a_limit_below_the_current_usage_is_named_in_the_error() -> Result {
    for _ in 0..5 {
        let bundle = Bundle::in_slice(SLICE, &["allocate", "64"])?;
        bundle.start()?;
        wait_for("the container to use most of 64 MB", || {
            let used: u64 = bundle.cgroup_file("memory.current")?.parse()?;
            Ok((used > 48 << 20).then_some(()))
        })?;
        let output = bundle.call(&["update", "--memory", "8m"])?.end()?;
        ensure!(
            output.code == 0
                || output.stderr.contains("memory.limit") && output.stderr.contains("8388608"),
            "the error of the failed `update` does not name the memory limit:\n{}",
            output.told()
        );
        // The kernel has killed the container or, on a machine with swap, the container still runs.
        // In both cases, `delete` must succeed.
        let delete = ["delete", "--force", bundle.id()];
        bundle.runtime(&delete).ok()?;
        ensure_removed(&bundle)?;
    }
    Ok(())
}

fn a_killed_container_leaves_no_unit_behind() -> Result {
    let mut bundle = Bundle::in_slice(SLICE, &["allocate", "256"])?;
    bundle.set(
        "/linux/resources/memory",
        json!({ "limit": 48 << 20, "swap": 48 << 20 }),
    );
    bundle.start()?;
    bundle.wait_status("stopped")?;
    bundle.delete()?;
    ensure_removed(&bundle)?;

    let bundle = Bundle::in_slice(SLICE, &["deaf"])?;
    bundle.start()?;
    command("kill", ["-KILL", &bundle.pid()?.to_string()]).ok()?;
    bundle.wait_status("stopped")?;
    bundle.delete()?;
    ensure_removed(&bundle)
}

fn create_leaves_no_unit_behind_if_it_fails() -> Result {
    let mut bundle = Bundle::in_slice(SLICE, &[])?;
    bundle.set("/process/args", json!(["/no/such/program"]));
    let output = bundle.call(&["create"])?.end()?;
    ensure!(
        output.code != 0,
        "`create` succeeded although the program does not exist"
    );
    ensure_removed(&bundle)?;

    // A container with the same id can be created again after it was deleted.
    let bundle = Bundle::in_slice(SLICE, &["sleep", "600"])?;
    bundle.start()?;
    bundle.end()?;
    bundle.start()?;
    bundle.end()?;
    ensure_removed(&bundle)
}

fn a_container_without_a_cgroups_path_is_in_the_system_slice() -> Result {
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
    ensure!(
        !unit_exists(&unit)?,
        "the systemd unit {unit} still exists after the container was deleted"
    );
    Ok(())
}

/// systemd adds a `_` to the names of such cgroups, and to names that begin with `_`.
fn a_scope_can_have_the_name_of_a_file_of_its_parent_cgroup() -> Result {
    for prefix in ["memory.max", "_e2e", "cgroup.e2e"] {
        let mut bundle = Bundle::in_slice(SLICE, &["sleep", "600"])?;
        let unit = format!("{prefix}-{}.scope", bundle.id());
        let path = format!("{SLICE}:{prefix}:{}", bundle.id());
        bundle.set("/linux/cgroupsPath", json!(path));
        bundle.start()?;
        let group = fs::read_to_string(format!("/proc/{}/cgroup", bundle.pid()?))?;
        ensure!(
            group.trim_end().ends_with(&format!("/_{unit}")),
            "the cgroup of the scope {unit} is {group}"
        );
        bundle.end()?;
        ensure!(
            !unit_exists(&unit)?,
            "the systemd unit {unit} still exists after the container was deleted"
        );
    }
    stop_slices()
}

fn the_error_about_an_invalid_cgroups_path_names_the_field() -> Result {
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
            "the error about the invalid cgroups path {path} does not name the field linux.cgroupsPath:\n{}",
            output.told()
        );
    }
    Ok(())
}

fn a_missing_systemd_is_reported_in_one_sentence() -> Result {
    let bundle = Bundle::in_slice(SLICE, &["exit", "0"])?;
    let output = bundle.call(&["create"])?.exits(1)?;
    ensure!(
        output
            .stderr
            .contains("connect to systemd at /run/systemd/private: No such file"),
        "the error of `create` does not report the missing systemd:\n{}",
        output.told()
    );
    Ok(())
}

fn delete_removes_the_scope_of_a_container_with_a_damaged_state_file() -> Result {
    let bundle = Bundle::in_slice(SLICE, &["sleep", "600"])?;
    bundle.start()?;
    ensure!(
        unit_exists(&bundle.unit())?,
        "the runtime created no systemd unit"
    );
    fs::write(
        bundle.root().join(bundle.id()).join("state.json"),
        "{ damaged",
    )?;
    bundle.end()?;
    ensure!(
        !unit_exists(&bundle.unit())?,
        "the container's systemd unit still exists"
    );
    ensure!(
        !bundle.cgroup().exists(),
        "the container's cgroup still exists"
    );
    stop_slices()
}
