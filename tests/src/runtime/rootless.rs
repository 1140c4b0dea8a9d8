//! Containers of users other than root: in a user namespace of their own.

use std::fs;
use std::os::unix::fs::chown;

use serde_json::{Value, json};

use crate::support::bundle::{Bundle, runtime_program};
use crate::support::machine::{Result, Run, command};
use crate::support::needs::{Need, Test};
use crate::{ensure, ensure_eq, test};

pub(crate) const TESTS: &[Test] = &[
    test!(a_user_runs_a_container_as_its_root),
    test!(a_users_container_lives_from_create_to_delete),
    test!(
        a_user_maps_the_ids_that_he_was_granted,
        Need::Program("newuidmap"),
        Need::Rrun
    ),
    test!(
        ids_that_were_not_granted_are_refused,
        Need::Program("newuidmap"),
        Need::Rrun
    ),
    test!(what_a_user_can_not_have_is_refused_by_name),
    test!(a_users_states_are_kept_with_his_other_things),
];

/// www-data, whom every Debian has.
const USER: u32 = 33;
const GRANTED: u32 = 400_000;

/// A bundle of the user's, with a user namespace in which he is root.
fn bundle(args: &[&str]) -> Result<Bundle> {
    let mut bundle = Bundle::new(args)?;
    let own = json!([{ "containerID": 0, "hostID": USER, "size": 1 }]);
    bundle
        .without("/linux/cgroupsPath")
        .add("/linux/namespaces", json!({ "type": "user" }))
        .set("/linux/uidMappings", own.clone())
        .set("/linux/gidMappings", own);
    // Not mapped.
    for mount in bundle.config["mounts"].as_array_mut().into_iter().flatten() {
        if let Some(options) = mount["options"].as_array_mut() {
            options.retain(|option| option != "gid=5");
        }
    }
    fs::create_dir(bundle.root())?;
    for path in [bundle.path(), &bundle.root(), &bundle.rootfs()] {
        chown(path, Some(USER), Some(USER))?;
    }
    for entry in fs::read_dir(bundle.rootfs())?.flatten() {
        chown(entry.path(), Some(USER), Some(USER))?;
    }
    Ok(bundle)
}

fn as_user(program: &str) -> Run {
    let id = USER.to_string();
    command(
        "setpriv",
        ["--reuid", &id, "--regid", &id, "--clear-groups", program],
    )
}

/// The runtime with these arguments, as the user.
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

fn a_user_runs_a_container_as_its_root() -> Result {
    let bundle = bundle(&["report"])?;
    let report = report(&bundle)?;
    ensure_eq!(
        (&report["uid"], &report["gid"]),
        (&json!(0), &json!(0)),
        "user and group"
    );
    ensure_eq!(
        report["uid_map"],
        json!(["0", USER.to_string(), "1"]),
        "map of users"
    );
    ensure_eq!(report["hostname"], "rrun-e2e", "host name");
    ensure_eq!(report["pid"], json!(1), "process id");
    let names: Vec<&String> = report["fds"]
        .as_object()
        .into_iter()
        .flatten()
        .map(|(n, _)| n)
        .collect();
    ensure_eq!(names, ["0", "1", "2"], "descriptors");
    Ok(())
}

fn a_users_container_lives_from_create_to_delete() -> Result {
    let bundle = bundle(&["wait"])?;
    let id = bundle.id().to_owned();
    runtime(&bundle, &["create", &id])?.ok()?;
    runtime(&bundle, &["start", &id])?.ok()?;
    let state = runtime(&bundle, &["state", &id])?.ok()?.json()?;
    ensure_eq!(state["status"], "running", "status");
    if runtime_program().ends_with("rrun") {
        ensure_eq!(state["owner"], "www-data", "owner");
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
        "user and directory of exec"
    );
    ensure!(
        inside["namespaces"]["user"] != json!(fs::read_link("/proc/self/ns/user")?),
        "user namespace of exec"
    );
    let first = json!(fs::read_link(format!("/proc/{}/ns/pid", state["pid"]))?);
    ensure_eq!(inside["namespaces"]["pid"], first, "PID namespace of exec");
    runtime(&bundle, &["kill", &id, "KILL"])?.ok()?;
    bundle.wait_status("stopped")?;
    runtime(&bundle, &["delete", &id])?.ok()?;
    ensure!(!fs::exists(bundle.root().join(&id))?, "the state is left");
    Ok(())
}

/// Lines of /etc/subuid and /etc/subgid that go when this is dropped.
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

fn a_user_maps_the_ids_that_he_was_granted() -> Result {
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
        "user and group"
    );
    ensure_eq!(report["groups"], json!([9]), "additional groups");
    Ok(())
}

fn ids_that_were_not_granted_are_refused() -> Result {
    let mut bundle = bundle(&["exit", "0"])?;
    let map = json!([{ "containerID": 0, "hostID": 0, "size": 1 }]);
    bundle.set("/linux/uidMappings", map);
    let output = runtime(&bundle, &["run", bundle.id()])?.end()?;
    ensure!(output.code != 0, "{}", output.told());
    ensure!(output.stderr.contains("uid"), "{}", output.told());
    ensure!(
        !fs::exists(bundle.root().join(bundle.id()))?,
        "the state is left"
    );
    Ok(())
}

fn what_a_user_can_not_have_is_refused_by_name() -> Result {
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
        "{}",
        output.told()
    );
    Ok(())
}

fn a_users_states_are_kept_with_his_other_things() -> Result {
    let bundle = bundle(&["exit", "0"])?;
    bundle.write_config()?;
    let program = runtime_program();
    let told = as_user("env")
        .arg(format!("XDG_RUNTIME_DIR={}", bundle.path().display()))
        .args([program.as_str(), "create", bundle.id()])
        .dir(bundle.path())
        .ok();
    let kept = bundle.path().join(&program).join(bundle.id());
    let is_there = fs::exists(&kept)?;
    as_user("env")
        .arg(format!("XDG_RUNTIME_DIR={}", bundle.path().display()))
        .args([program.as_str(), "delete", "--force", bundle.id()])
        .ok()?;
    told?;
    ensure!(is_there, "there is no {}", kept.display());
    Ok(())
}
