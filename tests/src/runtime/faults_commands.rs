//! Tests that let each system call of a command once fail, like the tests in faults.rs. The commands
//! in this file do not start a process in a container.

use std::fs;

use serde_json::{Value, json};

use crate::support::bundle::Bundle;
use crate::support::fault_runs::{Subject, is_one_of, not_created, stdout_of, words};
use crate::support::machine::Result;
use crate::support::needs::{Need, Test};
use crate::support::observed;
use crate::test;

pub(crate) const TESTS: &[Test] = &[
    test!(delete_reports_each_error, Need::Rrun),
    test!(forced_delete_reports_each_error, Need::Rrun),
    test!(kill_reports_each_error, Need::Rrun),
    test!(pause_reports_each_error, Need::Rrun),
    test!(resume_reports_each_error, Need::Rrun),
    test!(update_reports_each_error, Need::Rrun),
    test!(state_reports_each_error, Need::Rrun),
    test!(list_reports_each_error, Need::Rrun),
    test!(ps_reports_each_error, Need::Rrun),
    test!(events_reports_each_error, Need::Rrun),
    test!(features_reports_each_error, Need::Rrun),
    test!(help_reports_each_error, Need::Rrun),
    test!(spec_reports_each_error, Need::Rrun),
];

fn delete_reports_each_error() -> Result {
    let mut stopped = Bundle::new(&["exit", "0"])?;
    stopped.set("/hooks", json!({ "poststop": [{ "path": "/bin/true" }] }));
    let args = words(&["delete", stopped.id()]);
    delete("delete", &stopped, args, "stopped")
}

fn forced_delete_reports_each_error() -> Result {
    let running = Bundle::new(&["sleep", "600"])?;
    let args = words(&["delete", "--force", running.id()]);
    delete("delete --force", &running, args, "running")
}

fn delete(name: &str, bundle: &Bundle, args: Vec<String>, before: &str) -> Result {
    Subject {
        name,
        commands: vec![args],
        sample: 25,
        before: &|| {
            bundle.start()?;
            bundle.wait_status(before)
        },
        effect: &|| not_created(bundle).map(|()| Value::Null),
        ..Subject::new(bundle)
    }
    .run()
}

/// Tests a command that changes the status of a running container.
fn changes_status(args: &[&str], after: &str, paused: bool) -> Result {
    let bundle = Bundle::new(&["wait"])?;
    let id = bundle.id();
    let mut command = words(args);
    command.insert(1, id.to_owned());
    Subject {
        name: args[0],
        commands: vec![command],
        sample: 10,
        before: &|| {
            bundle.start()?;
            if paused {
                bundle.runtime(&["pause", id]).ok()?;
            }
            Ok(())
        },
        effect: &|| bundle.wait_status(after).map(|()| Value::Null),
        failed: &|_| is_one_of(&bundle, &["running", "paused", "stopped"]),
        ..Subject::new(&bundle)
    }
    .run()
}

fn kill_reports_each_error() -> Result {
    changes_status(&["kill", "KILL"], "stopped", false)
}

fn pause_reports_each_error() -> Result {
    changes_status(&["pause"], "paused", false)
}

fn resume_reports_each_error() -> Result {
    changes_status(&["resume"], "running", true)
}

fn update_reports_each_error() -> Result {
    let bundle = Bundle::new(&["sleep", "600"])?;
    let mut resources = json!({
        "devices": [{ "allow": false, "access": "rwm" },
                    { "allow": true, "type": "c", "major": 1, "minor": 3, "access": "rw" }],
    });
    if Need::Controller("pids").lacking().is_none() {
        resources["pids"] = json!({ "limit": 33 });
        resources["memory"] = json!({ "limit": 64 << 20 });
    }
    let file = bundle.join("resources");
    fs::write(&file, resources.to_string())?;
    Subject {
        name: "update",
        commands: vec![words(&[
            "update",
            "--resources",
            &file.to_string_lossy(),
            bundle.id(),
        ])],
        sample: 15,
        before: &|| bundle.start().map(drop),
        effect: &|| {
            Ok(json!({
                "programs": observed::device_programs(&bundle.cgroup())?,
                "pids": bundle.cgroup_file("pids.max").ok(),
                "memory": bundle.cgroup_file("memory.max").ok(),
            }))
        },
        failed: &|_| is_one_of(&bundle, &["running"]),
        ..Subject::new(&bundle)
    }
    .run()
}

/// Tests a command that prints text about a running container.
fn prints(command: Vec<String>, bundle: &Bundle, shown: &dyn Fn(&str) -> Result<Value>) -> Result {
    let name = command[0].clone();
    Subject {
        name: &name,
        warns: name == "list",
        commands: vec![command],
        sample: 6,
        before: &|| bundle.start().map(drop),
        effect: &|| shown(&fs::read_to_string(stdout_of(bundle, 0))?),
        failed: &|_| is_one_of(bundle, &["running"]),
        ..Subject::new(bundle)
    }
    .run()
}

fn parsed(text: &str) -> Result<Value> {
    Ok(serde_json::from_str(text)
        .map_err(|error| format!("the output is not JSON ({error}): {text:?}"))?)
}

/// Returns the state of a container without the process id and the time of its creation.
fn without_times(state: &Value) -> Value {
    let mut state = state.clone();
    state["pid"] = Value::Null;
    state["created"] = Value::Null;
    state
}

fn state_reports_each_error() -> Result {
    let bundle = Bundle::new(&["sleep", "600"])?;
    prints(words(&["state", bundle.id()]), &bundle, &|text| {
        Ok(without_times(&parsed(text)?))
    })
}

fn list_reports_each_error() -> Result {
    let bundle = Bundle::new(&["sleep", "600"])?;
    prints(words(&["list", "--format", "json"]), &bundle, &|text| {
        Ok(without_times(&parsed(text)?[0]))
    })
}

fn ps_reports_each_error() -> Result {
    let bundle = Bundle::new(&["sleep", "600"])?;
    prints(words(&["ps", bundle.id()]), &bundle, &|text| {
        Ok(json!(text.lines().count()))
    })
}

fn events_reports_each_error() -> Result {
    let bundle = Bundle::new(&["sleep", "600"])?;
    prints(
        words(&["events", "--stats", bundle.id()]),
        &bundle,
        &|text| {
            let stats = parsed(text)?;
            let keys: Option<Vec<&String>> =
                stats["data"].as_object().map(|data| data.keys().collect());
            Ok(json!([stats["type"], keys]))
        },
    )
}

fn features_reports_each_error() -> Result {
    let bundle = Bundle::new(&["sleep", "600"])?;
    prints(words(&["features"]), &bundle, &|text| {
        let mut features = parsed(text)?;
        // A flag that the kernel refuses is not supported, whatever the error is.
        features["linux"]["seccomp"]["supportedFlags"] = Value::Null;
        // Without this annotation, rrun's callers do not use an optional flag.
        features["annotations"] = Value::Null;
        Ok(features)
    })
}

fn help_reports_each_error() -> Result {
    let bundle = Bundle::new(&["sleep", "600"])?;
    prints(words(&["--help"]), &bundle, &|text| Ok(json!(text)))
}

fn spec_reports_each_error() -> Result {
    let bundle = Bundle::new(&[])?;
    let directory = bundle.join("spec");
    fs::create_dir(&directory)?;
    let config = directory.join("config.json");
    Subject {
        name: "spec",
        commands: vec![words(&["spec", "--bundle", &directory.to_string_lossy()])],
        sample: 6,
        effect: &|| {
            let text = fs::read_to_string(&config)?;
            fs::remove_file(&config)?;
            Ok(json!(text))
        },
        ..Subject::new(&bundle)
    }
    .run()
}
