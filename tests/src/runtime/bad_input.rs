//! Tests with wrong input. The runtime refuses wrong input with one sentence about the error, and
//! exits with runc's exit code. After each test, the harness checks that the runtime has left
//! nothing behind.

use std::fs;

use serde_json::{Value, json};

use crate::support::bundle::{Bundle, runtime_program};
use crate::support::machine::{Result, note, wait_for};
use crate::support::needs::{Need, Test};
use crate::support::refusals::{complaint, nothing_made, refused};
use crate::{ensure, ensure_eq, test};

pub(crate) const TESTS: &[Test] = &[
    test!(a_missing_configuration_is_refused),
    test!(a_broken_configuration_is_refused),
    test!(a_missing_root_file_system_is_refused),
    test!(an_illegal_id_is_refused),
    test!(a_duplicate_id_is_refused_and_the_first_container_keeps_running),
    test!(a_missing_program_is_refused),
    test!(a_program_that_is_not_executable_is_refused),
    test!(exec_of_a_program_that_can_not_be_executed_is_refused),
    test!(exec_into_a_stopped_container_is_refused),
    test!(delete_of_a_running_container_is_refused),
    test!(start_of_a_started_container_is_refused),
    test!(commands_on_a_missing_container_are_refused),
    test!(an_unknown_signal_is_refused),
    test!(kill_of_a_stopped_container_is_refused),
    test!(the_error_about_a_bad_field_names_the_field),
    test!(create_leaves_nothing_behind_if_it_fails_at_any_step),
    test!(
        the_error_about_an_unimplemented_field_names_the_field,
        Need::Rrun
    ),
    test!(a_damaged_state_file_is_reported, Need::Rrun),
    test!(exactly_one_of_two_concurrent_create_commands_with_the_same_id_succeeds),
    test!(a_terminal_without_a_console_socket_is_refused),
];

fn a_missing_configuration_is_refused() -> Result {
    let bundle = Bundle::new(&["exit", "0"])?;
    refused(&bundle, &["config.json"])
}

fn a_broken_configuration_is_refused() -> Result {
    let bundle = Bundle::new(&["exit", "0"])?;
    for text in [
        "",
        "{",
        "{broken",
        "[]",
        "null",
        "\"text\"",
        "{\"ociVersion\": 7}",
        "\0\0\0\0",
    ] {
        fs::write(bundle.join("config.json"), text)?;
        refused(&bundle, &[]).map_err(|failed| {
            format!(
                "the configuration was {text:?}; the failure: {}",
                failed.message().unwrap_or_default()
            )
        })?;
    }
    // The next configuration contains nested arrays with 1,048,576 levels. A recursive parser would
    // overflow its stack.
    fs::write(bundle.join("config.json"), "[".repeat(1 << 20))?;
    refused(&bundle, &[])?;
    fs::remove_file(bundle.join("config.json"))?;
    fs::create_dir(bundle.join("config.json"))?;
    refused(&bundle, &["config.json"])
}

fn a_missing_root_file_system_is_refused() -> Result {
    let mut bundle = Bundle::new(&["exit", "0"])?;
    bundle.set("/root/path", json!("nowhere")).write_config()?;
    refused(&bundle, &["nowhere"])?;
    bundle
        .set("/root/path", json!("rootfs/bin/inside"))
        .write_config()?;
    refused(&bundle, &["rootfs", "not a directory"])
}

fn an_illegal_id_is_refused() -> Result {
    let bundle = Bundle::new(&["exit", "0"])?;
    bundle.write_config()?;
    for id in [
        "", ".", "..", "a/b", "../up", "a b", "a\nb", "a$b", "ümlaut", "/",
    ] {
        let output = bundle.runtime(&["run", "--", id]).exits(1)?;
        complaint(&output, &[]).map_err(|failed| {
            format!(
                "the container id was {id:?}; the failure: {}",
                failed.message().unwrap_or_default()
            )
        })?;
    }
    let long = "x".repeat(1025);
    if runtime_program().ends_with("rrun") {
        complaint(&bundle.runtime(&["run", &long]).exits(1)?, &[])?;
    }
    Ok(())
}

fn a_duplicate_id_is_refused_and_the_first_container_keeps_running() -> Result {
    let bundle = Bundle::new(&["sleep", "600"])?;
    bundle.start()?;
    for command in ["run", "create"] {
        complaint(&bundle.call(&[command])?.exits(1)?, &["exist"])?;
    }
    ensure!(
        bundle.status()? == "running",
        "the status of the first container is not `running`, but `{}`",
        bundle.status()?
    );
    bundle.exec(&[], &["exit", "0"]).ok()?;
    bundle.end()?;
    Ok(())
}

/// containerd and podman derive the exit code 127 or 126 from the texts that this test expects.
fn a_missing_program_is_refused() -> Result {
    let mut bundle = Bundle::new(&[])?;
    bundle
        .set("/process/args", json!(["nowhere"]))
        .write_config()?;
    refused(&bundle, &["executable file not found in"])?;
    bundle
        .set("/process/args", json!(["/bin/nowhere"]))
        .write_config()?;
    refused(&bundle, &["no such file or directory"])
}

fn a_program_that_is_not_executable_is_refused() -> Result {
    let mut bundle = Bundle::new(&[])?;
    for path in ["/bin/no-program", "/bin"] {
        bundle.set("/process/args", json!([path])).write_config()?;
        refused(&bundle, &["ermission denied", "s a directory"])?;
    }
    Ok(())
}

fn exec_of_a_program_that_can_not_be_executed_is_refused() -> Result {
    let bundle = Bundle::new(&["sleep", "600"])?;
    bundle.start()?;
    for (program, words) in [
        ("nowhere", "executable file not found in"),
        ("/bin/nowhere", "no such file or directory"),
        ("/bin/no-program", "ermission denied"),
    ] {
        let output = bundle.runtime(&["exec", bundle.id(), program]).end()?;
        // `runc exec` exits with 255 for each of these programs. The shell's exit codes 126 and 127
        // are more precise, so the test also accepts them.
        ensure!(
            [255, 127, 126].contains(&output.code),
            "the exit code of `exec` is not 255, 127 or 126:\n{}",
            output.told()
        );
        complaint(&output, &[words])?;
    }
    ensure_eq!(bundle.status()?, "running", "the container's status");
    bundle.end()?;
    Ok(())
}

fn exec_into_a_stopped_container_is_refused() -> Result {
    let bundle = Bundle::new(&["exit", "0"])?;
    bundle.start()?;
    bundle.wait_status("stopped")?;
    let output = bundle.exec(&[], &["exit", "0"]).exits(255)?;
    complaint(&output, &["stopped", "not running"])?;
    bundle.delete()?;
    Ok(())
}

fn delete_of_a_running_container_is_refused() -> Result {
    let bundle = Bundle::new(&["sleep", "600"])?;
    bundle.start()?;
    complaint(
        &bundle.call(&["delete"])?.exits(1)?,
        &["not stopped", "running"],
    )?;
    ensure_eq!(bundle.status()?, "running", "the container's status");
    bundle.end()?;
    Ok(())
}

fn start_of_a_started_container_is_refused() -> Result {
    let bundle = Bundle::new(&["sleep", "600"])?;
    bundle.start()?;
    complaint(&bundle.call(&["start"])?.exits(1)?, &["running", "created"])?;
    bundle.end()?;
    Ok(())
}

fn commands_on_a_missing_container_are_refused() -> Result {
    let bundle = Bundle::new(&[])?;
    for (command, code) in [
        ("state", 1),
        ("start", 1),
        ("kill", 1),
        ("delete", 1),
        ("ps", 1),
    ] {
        let output = bundle.runtime(&[command, "nobody"]).exits(code)?;
        complaint(&output, &["does not exist", "not exist"])?;
    }
    complaint(
        &bundle.runtime(&["exec", "nobody", "true"]).exits(255)?,
        &["exist"],
    )
}

fn an_unknown_signal_is_refused() -> Result {
    let bundle = Bundle::new(&["sleep", "600"])?;
    bundle.start()?;
    for signal in ["NOSUCH", "SIG"] {
        complaint(&bundle.call(&["kill"])?.arg(signal).exits(1)?, &[signal])?;
    }
    ensure_eq!(bundle.status()?, "running", "the container's status");
    bundle.end()?;
    Ok(())
}

fn kill_of_a_stopped_container_is_refused() -> Result {
    let bundle = Bundle::new(&["exit", "0"])?;
    bundle.start()?;
    bundle.wait_status("stopped")?;
    // containerd and podman interpret "not running" as "the container has already exited".
    complaint(
        &bundle.call(&["kill"])?.arg("KILL").exits(1)?,
        &["not running"],
    )?;
    bundle.delete()?;
    Ok(())
}

/// Returns changes to a valid configuration, each of which the runtime must refuse. Each entry is a
/// JSON pointer to a field, an invalid value, and a word from the expected error.
fn bad_fields() -> Vec<(&'static str, Value, &'static str)> {
    vec![
        ("/process/args", json!([]), "args"),
        ("/process/args", json!("text"), ""),
        ("/process/cwd", json!("relative"), "cwd"),
        ("/process/cwd", json!(""), "cwd"),
        (
            "/process/rlimits",
            json!([{ "type": "RLIMIT_NOSUCH", "soft": 1, "hard": 1 }]),
            "RLIMIT_NOSUCH",
        ),
        ("/process/oomScoreAdj", json!(99_999), ""),
        ("/process/user", json!({ "uid": -5, "gid": 0 }), ""),
        ("/linux/namespaces", json!([{ "type": "nosuch" }]), "nosuch"),
        (
            "/linux/namespaces",
            json!([{ "type": "mount" }, { "type": "mount" }]),
            "linux.namespaces",
        ),
        (
            "/linux/sysctl",
            json!({ "vm.swappiness": "1" }),
            "vm.swappiness",
        ),
        ("/linux/rootfsPropagation", json!("nosuch"), "nosuch"),
        ("/linux/resources/memory/limit", json!("text"), ""),
    ]
}

fn the_error_about_a_bad_field_names_the_field() -> Result {
    for (pointer, value, word) in bad_fields() {
        let mut bundle = Bundle::new(&["exit", "0"])?;
        bundle.set(pointer, value.clone()).write_config()?;
        let words = [word];
        let words = if runtime_program().ends_with("rrun") {
            &words[..]
        } else {
            &[]
        };
        refused(&bundle, words).map_err(|failed| {
            format!(
                "the test set the configuration's field {pointer} to {value}; the failure: {}",
                failed.message().unwrap_or_default()
            )
        })?;
    }
    Ok(())
}

/// Returns changes to a valid configuration that only the kernel rejects. The changes make
/// different steps of a container's creation fail, from the first step to the last.
fn late_failures() -> Vec<(&'static str, Value)> {
    vec![
        (
            "/linux/namespaces/1",
            json!({ "type": "network", "path": "/proc/nowhere/ns/net" }),
        ),
        (
            "/linux/namespaces/1",
            json!({ "type": "network", "path": "/proc/self/ns/ipc" }),
        ),
        (
            "/linux/namespaces/1",
            json!({ "type": "network", "path": "/etc/passwd" }),
        ),
        (
            "/mounts/0",
            json!({ "destination": "/data", "type": "nosuchfs", "source": "x" }),
        ),
        (
            "/mounts/0",
            json!({ "destination": "/data", "type": "bind", "source": "/nowhere", "options": ["bind"] }),
        ),
        (
            "/mounts/0",
            json!({ "destination": "/bin/inside/below", "type": "tmpfs", "source": "x" }),
        ),
        (
            "/mounts/1",
            json!({ "destination": "/dev", "type": "tmpfs", "source": "x", "options": ["nosuchoption=1"] }),
        ),
        ("/linux/sysctl", json!({ "net.ipv4.no_such_key": "1" })),
        (
            "/linux/sysctl",
            json!({ "net.ipv4.ip_default_ttl": "not a number" }),
        ),
        ("/process/cwd", json!("/bin/inside")),
        (
            "/linux/devices",
            json!([{ "path": "/bin/inside/dev", "type": "c", "major": 1, "minor": 3 }]),
        ),
    ]
}

fn create_leaves_nothing_behind_if_it_fails_at_any_step() -> Result {
    for (pointer, value) in late_failures() {
        let mut bundle = Bundle::new(&["exit", "0"])?;
        bundle.set(pointer, value.clone()).write_config()?;
        refused(&bundle, &[]).map_err(|failed| {
            format!(
                "the test set the configuration's field {pointer} to {value}; the failure: {}",
                failed.message().unwrap_or_default()
            )
        })?;
    }
    Ok(())
}

/// The field `vm` is part of the specification, but only for runtimes that start virtual machines.
fn the_error_about_an_unimplemented_field_names_the_field() -> Result {
    for (pointer, value, word) in [(
        "/vm",
        json!({ "kernel": { "path": "/boot/vmlinuz" } }),
        "vm",
    )] {
        let mut bundle = Bundle::new(&["exit", "0"])?;
        bundle.set(pointer, value).write_config()?;
        let output = bundle.runtime(&["run", bundle.id()]).end()?;
        if output.code == 0 {
            note(format!(
                "the runtime no longer refuses the configuration's field {word}, so this test should check the field's effect"
            ));
            continue;
        }
        complaint(&output, &[word])?;
        nothing_made(&bundle, &output)?;
    }
    Ok(())
}

fn a_damaged_state_file_is_reported() -> Result {
    let bundle = Bundle::new(&["sleep", "600"])?;
    bundle.start()?;
    let pid = bundle.pid()?;
    let directory = bundle.root().join(bundle.id());
    let mut damaged = 0;
    for entry in fs::read_dir(&directory)?.flatten() {
        if entry.file_type()?.is_file() {
            fs::write(entry.path(), "{ damaged")?;
            damaged += 1;
        }
    }
    ensure!(
        damaged > 0,
        "there is no state file in the directory {}",
        directory.display()
    );
    for command in ["state", "start", "kill", "delete"] {
        let output = bundle.runtime(&[command, bundle.id()]).exits(1)?;
        complaint(&output, &[bundle.id()])?;
    }
    // The damaged state was the only record of the container's cgroup, so the runtime cannot find
    // the cgroup. The test itself must remove the cgroup.
    fs::remove_dir_all(&directory)?;
    let group = bundle.cgroup();
    fs::write(group.join("cgroup.kill"), "1")?;
    wait_for("the container's cgroup to become empty", || {
        Ok(fs::remove_dir(&group).ok())
    })?;
    wait_for("the container's process to exit", || {
        Ok((!fs::exists(format!("/proc/{pid}"))?).then_some(()))
    })
}

fn exactly_one_of_two_concurrent_create_commands_with_the_same_id_succeeds() -> Result {
    let bundle = Bundle::new(&["sleep", "600"])?;
    for _ in 0..5 {
        let both = [
            bundle.call(&["create"])?.start()?,
            bundle.call(&["create"])?.start()?,
        ];
        let mut codes = Vec::new();
        for one in both {
            codes.push(one.end()?.code);
        }
        codes.sort_unstable();
        ensure!(
            codes == [0, 1],
            "the exit codes of the two `create` calls are not 0 and 1, but {codes:?}"
        );
        ensure!(
            bundle.status()? == "created",
            "after the successful `create`, the container's status is not `created`, but `{}`",
            bundle.status()?
        );
        bundle.end()?;
    }
    Ok(())
}

fn a_terminal_without_a_console_socket_is_refused() -> Result {
    let mut bundle = Bundle::new(&["exit", "0"])?;
    bundle.set("/process/terminal", json!(true));
    let output = bundle.call(&["create"])?.exits(1)?;
    complaint(&output, &["console"])?;
    nothing_made(&bundle, &output)?;
    bundle.set("/process/terminal", json!(false));
    let socket = bundle.join("console");
    let output = bundle
        .call(&["create", "--console-socket", &socket.to_string_lossy()])?
        .exits(1)?;
    complaint(&output, &["console"])?;
    nothing_made(&bundle, &output)
}
