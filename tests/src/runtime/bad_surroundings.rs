//! Tests with a valid configuration that the runtime cannot apply, for example on a full disk. The
//! runtime prints one sentence about the error, exits with runc's exit code, and leaves nothing
//! behind.

use std::fs;
use std::os::unix::net::UnixListener;

use nix::mount::{MntFlags, MsFlags, mount, umount2};
use serde_json::json;

use crate::support::bundle::{Bundle, runtime_program};
use crate::support::machine::{Directory, Output, Result, command, note};
use crate::support::needs::{Need, Test};
use crate::support::refusals::{complaint, nothing_made, refused};
use crate::{ensure, ensure_eq, test};

pub(crate) const TESTS: &[Test] = &[
    test!(a_missing_bundle_is_refused),
    test!(an_unsupported_oci_version_is_refused, Need::Rrun),
    test!(a_huge_configuration_is_refused, Need::Rrun),
    test!(a_deeply_nested_configuration_does_not_crash_the_runtime),
    test!(fields_that_contradict_each_other_are_refused),
    test!(a_root_file_system_behind_a_link_is_refused),
    test!(a_missing_cgroup_controller_is_reported),
    test!(
        missing_permissions_of_the_caller_are_reported,
        Need::Program("setpriv")
    ),
    test!(a_full_disk_is_reported),
    test!(a_log_that_can_not_be_written_is_reported),
    test!(a_pid_file_that_can_not_be_written_is_reported),
    test!(a_console_socket_without_a_server_is_reported),
    test!(exec_into_a_paused_container_is_refused),
    test!(exec_works_in_a_container_that_waits_for_start),
    test!(commands_that_a_stopped_container_does_not_support_are_refused),
    test!(commands_that_a_running_container_does_not_support_are_refused),
    test!(a_container_can_not_use_the_cgroup_of_another_container),
    test!(a_directory_that_can_not_be_created_is_reported),
];

/// Returns `words` if the runtime under test is rrun. For another runtime, returns an empty list.
/// The test then accepts any error message.
fn ours<'a>(words: &'a [&'a str]) -> &'a [&'a str] {
    if runtime_program().ends_with("rrun") {
        words
    } else {
        &[]
    }
}

fn a_missing_bundle_is_refused() -> Result {
    let bundle = Bundle::new(&[])?;
    for path in ["/nowhere/at/all", "/etc/passwd"] {
        for verb in ["run", "create"] {
            let output = bundle
                .runtime(&[verb, "--bundle", path, bundle.id()])
                .exits(1)?;
            complaint(&output, &[path])?;
            nothing_made(&bundle, &output)?;
        }
    }
    Ok(())
}

fn an_unsupported_oci_version_is_refused() -> Result {
    let mut bundle = Bundle::new(&["exit", "0"])?;
    for version in ["", "2.0.0", "0.9.0", "1", "one", "1.0.x", "-1.0.0"] {
        bundle.set("/ociVersion", json!(version)).write_config()?;
        refused(&bundle, &["ociVersion"])?;
    }
    bundle.without("/ociVersion").write_config()?;
    refused(&bundle, &["ociVersion"])
}

fn a_huge_configuration_is_refused() -> Result {
    let mut bundle = Bundle::new(&["exit", "0"])?;
    bundle
        .set("/annotations", json!({ "a": "x".repeat(17 << 20) }))
        .write_config()?;
    refused(&bundle, &["larger than 16 MB"])
}

/// The configuration contains an unknown field. The value is an array with 100,000 levels. A
/// recursive parser would overflow its stack. The runtime is allowed to ignore or to refuse the
/// field, but must not crash.
fn a_deeply_nested_configuration_does_not_crash_the_runtime() -> Result {
    let bundle = Bundle::new(&["exit", "0"])?;
    let text = serde_json::to_string(&bundle.config)?;
    let deep = format!("{}{}", "[".repeat(100_000), "]".repeat(100_000));
    fs::write(
        bundle.join("config.json"),
        format!(
            "{},\"unknown\":{deep}}}",
            text.trim_end_matches('}').to_owned() + "}"
        ),
    )?;
    let output = bundle.runtime(&["run", bundle.id()]).end()?;
    ensure!(
        output.code == 0 || output.code == 1,
        "the runtime neither ran the container nor refused its configuration:\n{}",
        output.told()
    );
    nothing_made(&bundle, &output)
}

fn fields_that_contradict_each_other_are_refused() -> Result {
    let ids = json!([{ "containerID": 0, "hostID": 0, "size": 1 }]);
    let rows = [
        (
            "network",
            "/linux/sysctl",
            json!({ "net.ipv4.ip_forward": "1" }),
        ),
        ("ipc", "/linux/sysctl", json!({ "kernel.shmmax": "1000" })),
        ("uts", "/hostname", json!("a-name")),
        ("user", "/linux/uidMappings", ids),
        (
            "none",
            "/linux/timeOffsets",
            json!({ "monotonic": { "secs": 1 } }),
        ),
        ("mount", "/linux/maskedPaths", json!(["/proc/kcore"])),
    ];
    for (without, pointer, value) in rows {
        // Without a user namespace, runc ignores id mappings. Therefore, the test skips this case
        // for runc.
        if without == "user" && !runtime_program().ends_with("rrun") {
            continue;
        }
        let mut bundle = Bundle::new(&["exit", "0"])?;
        bundle.without_namespace(without).set(pointer, value);
        bundle.write_config()?;
        let field = pointer.trim_start_matches('/').replace('/', ".");
        let field = if without == "mount" {
            "linux.namespaces"
        } else {
            &*field
        };
        refused(&bundle, ours(&[field])).map_err(|failed| {
            format!(
                "the test set the configuration's field {pointer} (removed namespace: {without}); the failure: {}",
                failed.message().unwrap_or_default()
            )
        })?;
    }
    Ok(())
}

fn a_root_file_system_behind_a_link_is_refused() -> Result {
    let mut bundle = Bundle::new(&["exit", "0"])?;
    std::os::unix::fs::symlink("rootfs", bundle.join("link"))?;
    bundle.set("/root/path", json!("link")).write_config()?;
    refused(&bundle, &["symlink", "symbolic link"])
}

fn a_missing_cgroup_controller_is_reported() -> Result {
    let available = fs::read_to_string("/sys/fs/cgroup/cgroup.controllers")?;
    let rows = [
        (
            "memory",
            "/linux/resources/memory",
            json!({ "limit": 100 << 20 }),
        ),
        ("pids", "/linux/resources/pids", json!({ "limit": 10 })),
        (
            "cpu",
            "/linux/resources/cpu",
            json!({ "quota": 10_000, "period": 100_000 }),
        ),
        (
            "hugetlb",
            "/linux/resources/hugepageLimits",
            json!([{ "pageSize": "2MB", "limit": 0 }]),
        ),
        (
            "rdma",
            "/linux/resources/rdma",
            json!({ "mlx5_1": { "hcaHandles": 1 } }),
        ),
    ];
    let mut tried = 0;
    for (name, pointer, value) in rows {
        if available.split_whitespace().any(|it| it == name) {
            continue;
        }
        let mut bundle = Bundle::new(&["exit", "0"])?;
        bundle.set(pointer, value).write_config()?;
        refused(&bundle, ours(&[name])).map_err(|failed| {
            format!(
                "the configuration has a limit that requires the missing cgroup controller {name}; the failure: {}",
                failed.message().unwrap_or_default()
            )
        })?;
        tried += 1;
    }
    if tried == 0 {
        note(
            "the refusal was not tested, because this machine has all cgroup controllers of the test"
                .to_owned(),
        );
    }
    Ok(())
}

fn missing_permissions_of_the_caller_are_reported() -> Result {
    let bundle = Bundle::new(&["exit", "0"])?;
    bundle.write_config()?;
    fs::create_dir(bundle.root())?;
    let output = command(
        "setpriv",
        ["--reuid=65534", "--regid=65534", "--clear-groups"],
    )
    .arg(runtime_program())
    .arg("--root")
    .arg(bundle.root())
    .args(["run", "--bundle"])
    .arg(bundle.path())
    .arg(bundle.id())
    .exits(1)?;
    complaint(&output, &[])?;
    nothing_made(&bundle, &output)
}

/// A tiny, full file system for the state directory (`--root`). Dropping the value unmounts the
/// file system.
struct Full(Directory);

impl Full {
    fn new() -> Result<Self> {
        let dir = Directory::new("full")?;
        mount(
            Some("full"),
            dir.path(),
            Some("tmpfs"),
            MsFlags::empty(),
            Some("size=4k"),
        )
        .map_err(|errno| format!("cannot mount a tmpfs on {}: {errno}", dir.path().display()))?;
        fs::write(dir.join("filling"), [0; 4096])?;
        Ok(Full(dir))
    }
}

impl Drop for Full {
    fn drop(&mut self) {
        let _ = umount2(self.0.path(), MntFlags::MNT_DETACH);
    }
}

fn a_full_disk_is_reported() -> Result {
    let full = Full::new()?;
    let bundle = Bundle::new(&["exit", "0"])?;
    bundle.write_config()?;
    for verb in ["run", "create"] {
        let output = command(&runtime_program(), ["--root"])
            .arg(full.0.path())
            .args([verb, "--bundle"])
            .arg(bundle.path())
            .arg(bundle.id())
            .exits(1)?;
        complaint(&output, &["no space left", "No space left"])?;
        nothing_made(&bundle, &output)?;
        ensure!(
            !full.0.join(bundle.id()).exists(),
            "the container's state directory still exists on the full disk:\n{}",
            output.told()
        );
    }
    Ok(())
}

fn with_flags(bundle: &Bundle, flags: &[&str]) -> Result<Output> {
    bundle.write_config()?;
    command(&runtime_program(), flags)
        .arg("--root")
        .arg(bundle.root())
        .args(["run", "--bundle"])
        .arg(bundle.path())
        .arg(bundle.id())
        .end()
}

fn a_log_that_can_not_be_written_is_reported() -> Result {
    let bundle = Bundle::new(&["exit", "0"])?;
    for (path, word) in [("/nowhere/log", "/nowhere/log"), ("/", "/")] {
        let output = with_flags(&bundle, &["--log", path])?;
        ensure_eq!(
            output.code,
            1,
            "the exit code of `run` with the log file {path} ({})",
            output.told()
        );
        complaint(&output, &[word])?;
        nothing_made(&bundle, &output)?;
    }
    let output = with_flags(&bundle, &["--log-format", "nosuch"])?;
    ensure_eq!(
        output.code,
        1,
        "the exit code of `run` with an unknown log format ({})",
        output.told()
    );
    complaint(&output, &["nosuch"])
}

fn a_pid_file_that_can_not_be_written_is_reported() -> Result {
    let bundle = Bundle::new(&["sleep", "600"])?;
    for verb in ["create", "run"] {
        let path = "/nowhere/at/all/pid";
        let output = bundle.call(&[verb, "--pid-file", path])?.exits(1)?;
        complaint(&output, &["/nowhere/at/all"])?;
        nothing_made(&bundle, &output)?;
    }
    bundle.start()?;
    let output = bundle
        .exec(&["--pid-file", "/nowhere/at/all/pid"], &["sleep", "600"])
        .exits(255)?;
    complaint(&output, &["/nowhere/at/all"])?;
    bundle.end()?;
    Ok(())
}

fn a_console_socket_without_a_server_is_reported() -> Result {
    let mut bundle = Bundle::new(&["exit", "0"])?;
    bundle.set("/process/terminal", json!(true));
    // `dead` is the socket file of a server that no longer exists.
    drop(UnixListener::bind(bundle.join("dead"))?);
    fs::write(bundle.join("file"), "no socket")?;
    for name in ["dead", "file", "missing"] {
        let path = bundle.join(name).to_string_lossy().into_owned();
        let output = bundle
            .call(&["create", "--console-socket", &path])?
            .exits(1)?;
        complaint(&output, ours(&[&path]))?;
        nothing_made(&bundle, &output)?;
    }
    Ok(())
}

fn exec_into_a_paused_container_is_refused() -> Result {
    let bundle = Bundle::new(&["sleep", "600"])?;
    bundle.start()?;
    bundle.call(&["pause"])?.ok()?;
    let output = bundle.exec(&[], &["exit", "0"]).exits(255)?;
    complaint(&output, &["paused"])?;
    complaint(
        &bundle.call(&["pause"])?.exits(1)?,
        &["paused", "not running"],
    )?;
    bundle.call(&["resume"])?.ok()?;
    bundle.exec(&[], &["exit", "0"]).ok()?;
    bundle.end()?;
    Ok(())
}

fn exec_works_in_a_container_that_waits_for_start() -> Result {
    let bundle = Bundle::new(&["sleep", "600"])?;
    bundle.call(&["create"])?.ok()?;
    bundle.exec(&[], &["exit", "0"]).ok()?;
    bundle.end()?;
    Ok(())
}

fn commands_that_a_stopped_container_does_not_support_are_refused() -> Result {
    let bundle = Bundle::new(&["exit", "0"])?;
    bundle.start()?;
    bundle.wait_status("stopped")?;
    for verb in ["start", "pause", "resume", "kill"] {
        complaint(
            &bundle.call(&[verb])?.exits(1)?,
            ours(&["stopped", "not running"]),
        )?;
    }
    complaint(
        &bundle
            .runtime(&["events", "--stats", bundle.id()])
            .exits(1)?,
        ours(&["stopped", "not running"]),
    )?;
    bundle.delete()?;
    complaint(&bundle.call(&["delete"])?.exits(1)?, &["not exist"])?;
    Ok(())
}

fn commands_that_a_running_container_does_not_support_are_refused() -> Result {
    let bundle = Bundle::new(&["sleep", "600"])?;
    bundle.start()?;
    for verb in ["start", "resume", "delete"] {
        complaint(&bundle.call(&[verb])?.exits(1)?, &[])?;
    }
    for user in ["nobody:nogroup", "-1", "0:x"] {
        let output = bundle.exec(&["--user", user], &["exit", "0"]).exits(255)?;
        complaint(&output, &[])?;
    }
    ensure_eq!(bundle.status()?, "running", "the container's status");
    bundle.end()?;
    Ok(())
}

/// Like runc, rrun refuses a cgroup that contains the processes of another container.
fn a_container_can_not_use_the_cgroup_of_another_container() -> Result {
    let first = Bundle::new(&["sleep", "600"])?;
    first.start()?;
    let mut second = Bundle::new(&["exit", "0"])?;
    second
        .set(
            "/linux/cgroupsPath",
            first.config["linux"]["cgroupsPath"].clone(),
        )
        .write_config()?;
    for verb in ["run", "create"] {
        let output = second.runtime(&[verb, second.id()]).exits(1)?;
        complaint(&output, &[])?;
    }
    ensure_eq!(
        first.status()?,
        "running",
        "the status of the first container"
    );
    first.exec(&[], &["exit", "0"]).ok()?;
    first.end()?;
    Ok(())
}

/// The root directory belongs to the host's root, who is not a user of the user namespace.
fn a_directory_that_can_not_be_created_is_reported() -> Result {
    let mut bundle = Bundle::new(&["exit", "0"])?;
    bundle
        .map_users(65536)
        .add(
            "/mounts",
            json!({ "destination": "/new/directory", "type": "tmpfs", "source": "tmpfs" }),
        )
        .write_config()?;
    refused(
        &bundle,
        ours(&["/new/directory", "Permission denied (EACCES)"]),
    )
}
