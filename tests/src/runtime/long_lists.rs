//! Tests of configurations with long lists. The CPU time of the runtime must not grow with the
//! square of a list's length.

use std::fs;

use serde_json::{Value, json};

use crate::support::bundle::{Bundle, runtime_program};
use crate::support::machine::{Output, Result, command};
use crate::support::needs::{Need, Test};
use crate::support::refusals::{complaint, nothing_made};
use crate::{ensure, test};

pub(crate) const TESTS: &[Test] = &[
    test!(
        a_container_can_have_tens_of_thousands_of_devices,
        Need::Rrun
    ),
    test!(
        a_list_of_tens_of_thousands_of_entries_is_processed_quickly,
        Need::Rrun
    ),
    test!(
        a_container_with_the_largest_configuration_can_be_deleted,
        Need::Rrun
    ),
    test!(
        device_rules_that_do_not_fit_into_a_program_are_refused,
        Need::Rrun
    ),
];

const ENTRIES: u64 = 50_000;

/// The CPU time, in seconds, after which the kernel kills the runtime. An unoptimised runtime needs
/// about two seconds for a list. If the time grew with the square of the list's length, the runtime
/// would need several minutes.
const CPU_SECONDS: &str = "60";

fn entries(entry: impl Fn(u64) -> Value) -> Value {
    (0..ENTRIES).map(entry).collect()
}

fn run(bundle: &Bundle) -> Result<Output> {
    bundle.write_config()?;
    let limit = "ulimit -t \"$1\" && shift && exec \"$@\"";
    let program = runtime_program();
    command(
        "/bin/sh",
        ["-c", limit, "sh", CPU_SECONDS, &program, "--root"],
    )
    .arg(bundle.root())
    .args(["run", bundle.id()])
    .dir(bundle.path())
    .within(std::time::Duration::from_secs(600))
    .end()
}

fn a_container_can_have_tens_of_thousands_of_devices() -> Result {
    for directory in ["/dev", "/dev/deep/er"] {
        let mut bundle = Bundle::new(&["stat", &format!("{directory}/49999")])?;
        let null =
            |n| json!({ "path": format!("{directory}/{n}"), "type": "c", "major": 1, "minor": 3 });
        bundle.set("/linux/devices", entries(null));
        let output = run(&bundle)?;
        ensure!(
            output.code == 0 && output.stdout.contains("character device"),
            "the last of {ENTRIES} devices in {directory} does not exist:\n{}",
            output.told()
        );
    }
    Ok(())
}

fn a_list_of_tens_of_thousands_of_entries_is_processed_quickly() -> Result {
    // The runtime merges the rules for block devices with the rules for character devices.
    let rule = |n: u64| {
        let (kind, n) = if n < ENTRIES / 2 {
            ("b", n)
        } else {
            ("c", n - ENTRIES / 2)
        };
        json!({ "allow": true, "type": kind, "major": n % 1000, "minor": n / 1000, "access": "rw" })
    };
    let argument = |n: u64| json!({ "index": 0, "op": "SCMP_CMP_EQ", "value": n });
    let syscalls = json!([{
        "names": vec!["acct"; 50_000], "action": "SCMP_ACT_ERRNO", "args": entries(argument),
    }]);
    let seccomp = json!({ "defaultAction": "SCMP_ACT_ALLOW", "syscalls": syscalls });
    let by_name = |prefix: &str, value: &Value| -> Value {
        let pair = |n: u64| (format!("{prefix}{n}"), value.clone());
        Value::Object((0..ENTRIES).map(pair).collect())
    };
    let controllers = |n: u64| (format!("x{n}.y"), json!("1"));
    let controllers = Value::Object((0..ENTRIES).map(controllers).collect());
    // The error of a container with such a list, or an empty string if the container starts.
    let lists = [
        ("/linux/resources/devices", entries(rule), ""),
        ("/linux/readonlyPaths", entries(|_| json!("/proc/sys")), ""),
        ("/process/env", entries(|n| json!(format!("V{n}=1"))), ""),
        (
            "/linux/netDevices",
            by_name("e", &json!({})),
            "linux.netDevices",
        ),
        (
            "/linux/resources/unified",
            controllers,
            "linux.resources.unified",
        ),
        ("/linux/seccomp", seccomp, "linux.seccomp.syscalls[0]"),
        (
            "/process/execCPUAffinity",
            json!({ "final": vec!["0-8191"; 50_000].join(",") }),
            "",
        ),
    ];
    for (field, list, error) in lists {
        let mut bundle = Bundle::new(&["exit", "0"])?;
        bundle.set(field, list);
        let output = run(&bundle)?;
        if error.is_empty() {
            ensure!(
                output.code == 0,
                "the container with {ENTRIES} entries in {field} does not start:\n{}",
                output.told()
            );
        } else {
            complaint(&output, &[error])?;
            nothing_made(&bundle, &output)?;
        }
    }
    Ok(())
}

/// The container's state contains the annotations of config.json and the compiled seccomp filter,
/// which is longer than the profile. So the state can be larger than the largest config.json.
fn a_container_with_the_largest_configuration_can_be_deleted() -> Result {
    let mut bundle = Bundle::new(&["exit", "0"])?;
    let arguments: Value = (0..1000)
        .map(|n| json!({ "index": 0, "op": "SCMP_CMP_EQ", "value": n }))
        .collect();
    let acct = json!({ "names": ["acct"], "action": "SCMP_ACT_ERRNO", "args": arguments });
    bundle.set(
        "/linux/seccomp",
        json!({ "defaultAction": "SCMP_ACT_ALLOW", "syscalls": [acct] }),
    );
    bundle.set("/annotations/large", json!(""));
    let rest = bundle.config.to_string().len();
    bundle.set("/annotations/large", json!("x".repeat((16 << 20) - rest)));
    fs::write(bundle.join("config.json"), bundle.config.to_string())?;
    bundle.runtime(&["create", bundle.id()]).ok()?;
    bundle.runtime(&["kill", bundle.id(), "KILL"]).ok()?;
    let output = bundle.end()?;
    nothing_made(&bundle, &output)
}

/// The distance of a jump in the program has 16 bits. If rrun truncated the distance, a rule could
/// allow other devices.
fn device_rules_that_do_not_fit_into_a_program_are_refused() -> Result {
    let rule =
        |n: u64| json!({ "allow": true, "type": "c", "major": 240, "minor": n, "access": "rwm" });
    let mut bundle = Bundle::new(&["exit", "0"])?;
    bundle.set("/linux/resources/devices", entries(rule));
    let output = run(&bundle)?;
    complaint(
        &output,
        &["linux.resources.devices: the rules need a program"],
    )?;
    nothing_made(&bundle, &output)
}
