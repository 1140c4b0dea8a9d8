//! Tests of containers that a user other than root creates. Each container has a separate user
//! namespace.

use std::fs;
use std::os::unix::fs::chown;
use std::path::Path;

use serde_json::{Value, json};

use crate::support::bundle::{Bundle, runtime_program};
use crate::support::machine::{Result, Run, command, wait_for};
use crate::support::needs::{Need, Test};
use crate::{ensure, ensure_eq, test};

pub(crate) const TESTS: &[Test] = &[
    test!(a_user_is_root_in_the_users_own_container),
    test!(a_user_other_than_root_controls_a_container_from_create_to_delete),
    test!(
        a_user_can_map_granted_subordinate_ids,
        Need::Program("newuidmap"),
        Need::Rrun
    ),
    test!(
        the_runtime_refuses_ids_that_were_not_granted_to_the_user,
        Need::Program("newuidmap"),
        Need::Rrun
    ),
    test!(a_signal_reaches_a_container_that_has_no_cgroup, Need::Rrun),
    test!(a_setting_that_requires_root_is_named_in_the_error),
    test!(the_state_of_a_rootless_container_is_stored_in_xdg_runtime_dir),
    test!(cve_2023_25809_a_rootless_container_can_not_write_to_the_users_cgroup),
    test!(
        a_users_container_can_not_replace_the_session_keyring_of_the_runtime,
        Need::Rrun
    ),
];

/// The id of the user www-data, which exists on every Debian system.
const USER: u32 = 33;
const GRANTED: u32 = 400_000;

/// Returns a bundle whose files the user [`USER`] owns. In the container's user namespace, this
/// user is root.
fn bundle(args: &[&str]) -> Result<Bundle> {
    let mut bundle = Bundle::new(args)?;
    let own = json!([{ "containerID": 0, "hostID": USER, "size": 1 }]);
    bundle
        .add("/linux/namespaces", json!({ "type": "user" }))
        .set("/linux/uidMappings", own.clone())
        .set("/linux/gidMappings", own);
    bundle.give_to(USER)?;
    Ok(bundle)
}

fn as_user(program: &str) -> Run {
    let id = USER.to_string();
    command(
        "setpriv",
        ["--reuid", &id, "--regid", &id, "--clear-groups", program],
    )
}

/// Returns a command that calls the runtime with the arguments `args` as the user [`USER`].
fn runtime(bundle: &Bundle, args: &[&str]) -> Result<Run> {
    bundle.write_config()?;
    Ok(as_user(&runtime_program())
        .arg("--root")
        .arg(bundle.root())
        .args(args)
        .dir(bundle.path()))
}

fn report(bundle: &Bundle) -> Result<Value> {
    runtime(bundle, &["run", bundle.id()])?.ok()?.json()
}

fn a_user_is_root_in_the_users_own_container() -> Result {
    let bundle = bundle(&["report"])?;
    let report = report(&bundle)?;
    ensure_eq!(
        (&report["uid"], &report["gid"]),
        (&json!(0), &json!(0)),
        "the user id and group id in the container"
    );
    ensure_eq!(
        report["uid_map"],
        json!(["0", USER.to_string(), "1"]),
        "the uid_map of the user namespace"
    );
    ensure_eq!(
        report["hostname"],
        "rrun-e2e",
        "the host name in the container"
    );
    ensure_eq!(
        report["pid"],
        json!(1),
        "the process id that the container's program sees for itself"
    );
    let names: Vec<&String> = report["fds"]
        .as_object()
        .into_iter()
        .flatten()
        .map(|(n, _)| n)
        .collect();
    ensure_eq!(
        names,
        ["0", "1", "2"],
        "the open descriptors of the container's process"
    );
    Ok(())
}

fn a_users_container_can_not_replace_the_session_keyring_of_the_runtime() -> Result {
    let bundle = bundle(&["keys", "to-parent"])?;
    let output = runtime(&bundle, &["run", bundle.id()])?.ok()?;
    ensure_eq!(output.text(), "Err(EPERM)", "the kernel's answer to `run`");
    Ok(())
}

fn a_user_other_than_root_controls_a_container_from_create_to_delete() -> Result {
    let bundle = bundle(&["wait"])?;
    let id = bundle.id().to_owned();
    runtime(&bundle, &["create", &id])?.ok()?;
    runtime(&bundle, &["start", &id])?.ok()?;
    let state = runtime(&bundle, &["state", &id])?.ok()?.json()?;
    ensure_eq!(
        state["status"],
        "running",
        "the container's status after `start`"
    );
    if runtime_program().ends_with("rrun") {
        ensure_eq!(state["owner"], "www-data", "the container's owner");
    }
    let inside = runtime(
        &bundle,
        &["exec", "--cwd", "/data", &id, "/bin/inside", "report"],
    )?
    .ok()?
    .json()?;
    ensure_eq!(
        (&inside["uid"], &inside["cwd"]),
        (&json!(0), &json!("/data")),
        "the user id and working directory of the process that `exec` starts"
    );
    ensure!(
        inside["namespaces"]["user"] != json!(fs::read_link("/proc/self/ns/user")?),
        "the process that `exec` starts is in the host's user namespace"
    );
    let first = json!(fs::read_link(format!("/proc/{}/ns/pid", state["pid"]))?);
    ensure_eq!(
        inside["namespaces"]["pid"],
        first,
        "the PID namespace of the process that `exec` starts"
    );
    runtime(&bundle, &["kill", &id, "KILL"])?.ok()?;
    bundle.wait_status("stopped")?;
    runtime(&bundle, &["delete", &id])?.ok()?;
    ensure!(
        !fs::exists(bundle.root().join(&id))?,
        "the container's state still exists after `delete`"
    );
    Ok(())
}

fn a_signal_reaches_a_container_that_has_no_cgroup() -> Result {
    let all = |bundle: &Bundle, args: &[&str]| runtime(bundle, &[args, &[bundle.id()]].concat());
    let mut shared = bundle(&["sleep", "600"])?;
    // Without a new PID namespace, the user may not mount a new procfs.
    shared.without_namespace("pid");
    for mount in shared
        .mounts()
        .filter(|mount| mount["destination"] == "/proc")
    {
        *mount = json!({
            "destination": "/proc", "type": "bind", "source": "/proc", "options": ["rbind"],
        });
    }
    shared
        .without("/linux/maskedPaths")
        .without("/linux/readonlyPaths");
    let running = all(&shared, &["run"])?.start()?;
    shared.wait_status("running")?;
    all(&shared, &["kill"])?.arg("KILL").ok()?;
    ensure_eq!(
        running.end()?.code,
        137,
        "the exit code of `run` after `kill ID KILL`"
    );

    let bundle = bundle(&["wait"])?;
    let mut running = all(&bundle, &["run"])?.start()?;
    wait_for("the program to print its first line", || {
        Ok(running.stdout().contains("ready").then_some(()))
    })?;
    all(&bundle, &["ps"])?
        .exits(1)?
        .fails_with("the container has no cgroup")?;
    all(&bundle, &["kill", "--all"])?
        .arg("USR1")
        .exits(1)?
        .fails_with("only the first process received the signal")?;
    wait_for("the first process to receive the signal", || {
        Ok(running.stdout().contains("SIGUSR1").then_some(()))
    })?;
    all(&bundle, &["kill", "--all"])?.arg("KILL").ok()?;
    ensure_eq!(
        running.end()?.code,
        137,
        "the exit code of `run` after `kill --all ID KILL`"
    );
    Ok(())
}

/// A grant of subordinate ids in /etc/subuid and /etc/subgid. Dropping the value restores the
/// previous content of both files.
struct Grant(Vec<(&'static str, Option<String>)>);

impl Grant {
    fn new() -> Result<Grant> {
        let mut before = Vec::new();
        for file in ["/etc/subuid", "/etc/subgid"] {
            before.push((file, fs::read_to_string(file).ok()));
            fs::write(file, format!("www-data:{GRANTED}:65536\n"))?;
        }
        Ok(Grant(before))
    }
}

impl Drop for Grant {
    fn drop(&mut self) {
        for (file, text) in &self.0 {
            let _ = match text {
                Some(text) => fs::write(file, text),
                None => fs::remove_file(file),
            };
        }
    }
}

fn a_user_can_map_granted_subordinate_ids() -> Result {
    let _grant = Grant::new()?;
    let mut bundle = bundle(&["report"])?;
    let map = json!([
        { "containerID": 0, "hostID": USER, "size": 1 },
        { "containerID": 1, "hostID": GRANTED, "size": 1000 },
    ]);
    bundle
        .set("/linux/uidMappings", map.clone())
        .set("/linux/gidMappings", map)
        .set(
            "/process/user",
            json!({ "uid": 7, "gid": 8, "additionalGids": [9] }),
        );
    let report = report(&bundle)?;
    ensure_eq!(
        (&report["uid"], &report["gid"]),
        (&json!(7), &json!(8)),
        "the user id and group id in the container"
    );
    ensure_eq!(
        report["groups"],
        json!([9]),
        "the additional groups in the container"
    );
    Ok(())
}

fn the_runtime_refuses_ids_that_were_not_granted_to_the_user() -> Result {
    let mut bundle = bundle(&["exit", "0"])?;
    let map = json!([{ "containerID": 0, "hostID": 0, "size": 1 }]);
    bundle.set("/linux/uidMappings", map);
    let output = runtime(&bundle, &["run", bundle.id()])?.end()?;
    ensure!(
        output.code != 0,
        "`run` accepts ids that were not granted to the user:\n{}",
        output.told()
    );
    ensure!(
        output.stderr.contains("uid"),
        "the error of `run` does not name the uid mapping:\n{}",
        output.told()
    );
    ensure!(
        !fs::exists(bundle.root().join(bundle.id()))?,
        "the container's state still exists after the failed `run`"
    );
    Ok(())
}

fn a_setting_that_requires_root_is_named_in_the_error() -> Result {
    let mut limited = bundle(&["exit", "0"])?;
    limited.set("/linux/resources", json!({ "pids": { "limit": 10 } }));
    let output = runtime(&limited, &["run", limited.id()])?.end()?;
    output.fails_with("cgroup")?;

    let mut bare = bundle(&["exit", "0"])?;
    bare.without_namespace("user")
        .without("/linux/uidMappings")
        .without("/linux/gidMappings");
    let output = runtime(&bare, &["run", bare.id()])?.end()?;
    ensure!(
        output.code != 0
            && output.stderr.contains("user namespace")
            && output.stderr.contains("rrun spec --rootless"),
        "`run` without a user namespace does not fail with the advice to use `rrun spec --rootless`:\n{}",
        output.told()
    );
    Ok(())
}

fn the_state_of_a_rootless_container_is_stored_in_xdg_runtime_dir() -> Result {
    let bundle = bundle(&["exit", "0"])?;
    bundle.write_config()?;
    let program = runtime_program();
    let created = as_user("env")
        .arg(format!("XDG_RUNTIME_DIR={}", bundle.path().display()))
        .args([program.as_str(), "create", bundle.id()])
        .dir(bundle.path())
        .ok();
    let state = bundle.path().join(&program).join(bundle.id());
    let exists = fs::exists(&state)?;
    as_user("env")
        .arg(format!("XDG_RUNTIME_DIR={}", bundle.path().display()))
        .args([program.as_str(), "delete", "--force", bundle.id()])
        .ok()?;
    created?;
    ensure!(
        exists,
        "the container's state directory {} did not exist after `create`",
        state.display()
    );
    Ok(())
}

/// In CVE-2023-25809, runc ignored the option `ro` of the cgroup mount of a rootless container
/// without a cgroup namespace. The container could then write to every cgroup of the user.
fn cve_2023_25809_a_rootless_container_can_not_write_to_the_users_cgroup() -> Result {
    let own = Path::new("/sys/fs/cgroup/e2e-of-the-user");
    fs::create_dir(own)?;
    let tested = (|| {
        for path in [own.to_owned(), own.join("cgroup.procs")] {
            chown(path, Some(USER), Some(USER))?;
        }
        let mut bundle = bundle(&["mkdir", "/sys/fs/cgroup/new"])?;
        bundle
            .without_namespace("cgroup")
            .set("/linux/cgroupsPath", json!("/e2e-of-the-user/container"))
            .write_config()?;
        let id = USER.to_string();
        let join = "echo $$ >/sys/fs/cgroup/e2e-of-the-user/cgroup.procs && exec \"$@\"";
        let output = command("sh", ["-c", join, "sh", "setpriv"])
            .args(["--reuid", &id, "--regid", &id, "--clear-groups"])
            .arg(runtime_program())
            .arg("--root")
            .arg(bundle.root())
            .args(["run", bundle.id()])
            .dir(bundle.path())
            .end()?;
        ensure!(
            output.code != 0 && output.told().contains("Read-only file system"),
            "the container can create a directory in its cgroup mount:\n{}",
            output.told()
        );
        Ok(())
    })();
    fs::remove_dir(own)?;
    tested
}
