//! Tests of `exec` in a container whose first process has left the container's user namespace. A
//! process needs no privileges to create a user namespace, in which it can then mount files over
//! the programs that `exec` executes.

use std::fs;

use serde_json::{Value, json};

use crate::support::bundle::{Bundle, runtime_program};
use crate::support::machine::{Result, command, wait_for};
use crate::support::needs::{Need, Test};
use crate::{ensure, ensure_eq, test};

const USER_NAMESPACES: Need = Need::Works(
    "user namespaces for unprivileged users",
    "setpriv --reuid 1000 --regid 1000 --clear-groups unshare --user --mount true",
);

pub(crate) const TESTS: &[Test] = &[
    test!(
        exec_does_not_enter_the_mounts_that_an_unprivileged_first_process_made,
        Need::Rrun,
        USER_NAMESPACES
    ),
    test!(
        exec_of_a_user_does_not_enter_the_mounts_of_a_further_user_namespace,
        Need::Rrun,
        USER_NAMESPACES
    ),
    test!(exec_accepts_a_state_without_the_user_namespace, Need::Rrun),
];

/// Returns a bundle whose first process covers /data/real with /data/forged in further
/// namespaces.
fn leaver(user: u32) -> Result<Bundle> {
    let mut bundle = Bundle::new(&["leave-user-namespace", "/data/forged", "/data/real"])?;
    fs::write(bundle.rootfs().join("data/real"), "real")?;
    fs::write(bundle.rootfs().join("data/forged"), "forged")?;
    bundle
        .set("/process/user", json!({ "uid": user, "gid": user }))
        .set("/process/noNewPrivileges", json!(true));
    Ok(bundle)
}

fn user_namespace(bundle: &mut Bundle, host: u32, size: u32, path: Option<String>) {
    let ids = json!([{ "containerID": 0, "hostID": host, "size": size }]);
    let mut namespace = json!({ "type": "user" });
    if let Some(path) = path {
        namespace["path"] = json!(path);
    } else {
        bundle
            .set("/linux/uidMappings", ids.clone())
            .set("/linux/gidMappings", ids);
    }
    bundle.add("/linux/namespaces", namespace);
}

fn namespace(pid: i32, kind: &str) -> Result<std::path::PathBuf> {
    Ok(fs::read_link(format!("/proc/{pid}/ns/{kind}"))?)
}

/// Waits until the first process has covered the file.
fn wait_until_covered(pid: i32, kind: &str, before: &std::path::Path) -> Result {
    wait_for("the first process to leave its namespace", || {
        let mounts = fs::read_to_string(format!("/proc/{pid}/mountinfo"))?;
        let is_covered = mounts.contains(" /data/real ");
        Ok((is_covered && namespace(pid, kind)? != before).then_some(()))
    })
}

const REFUSAL: &str = "its first process has entered another user namespace";

fn exec_does_not_enter_the_mounts_that_an_unprivileged_first_process_made() -> Result {
    let mut owner = Bundle::new(&["sleep", "600"])?;
    user_namespace(&mut owner, 100_000, 65_536, None);
    owner.start()?;
    let joined = format!("/proc/{}/ns/user", owner.pid()?);
    for kind in ["the host's", "its own", "a joined"] {
        let mut bundle = leaver(1000)?;
        match kind {
            "its own" => user_namespace(&mut bundle, 100_000, 65_536, None),
            "a joined" => user_namespace(&mut bundle, 0, 0, Some(joined.clone())),
            _ => {}
        }
        bundle.call(&["create"])?.ok()?;
        let pid = bundle.pid()?;
        let before = namespace(pid, "user")?;
        let read = |bundle: &Bundle| {
            bundle
                .exec(&["--user", "0:0"], &["cat", "/data/real"])
                .end()
        };
        ensure_eq!(
            read(&bundle)?.text(),
            "real",
            "the file before the start, with {kind} user namespace"
        );
        bundle.runtime(&["start", bundle.id()]).ok()?;
        wait_until_covered(pid, "user", &before)?;
        let output = read(&bundle)?;
        ensure!(
            !output.stdout.contains("forged"),
            "with {kind} user namespace, `exec` sees the file of the first process"
        );
        output.fails_with(REFUSAL)?;
        bundle.end()?;
    }
    owner.end()?;
    Ok(())
}

fn exec_of_a_user_does_not_enter_the_mounts_of_a_further_user_namespace() -> Result {
    const USER: u32 = 1000;
    let mut bundle = leaver(0)?;
    user_namespace(&mut bundle, USER, 1, None);
    bundle.give_to(USER)?;
    bundle.write_config()?;
    let runtime = |words: &[&str]| {
        let user = USER.to_string();
        let setpriv = ["--reuid", &user, "--regid", &user, "--clear-groups"];
        command("setpriv", setpriv)
            .arg(runtime_program())
            .arg("--root")
            .arg(bundle.root())
            .args(words)
            .dir(bundle.path())
    };
    let read = || runtime(&["exec", bundle.id(), "/bin/inside", "cat", "/data/real"]).end();
    runtime(&["create", bundle.id()]).ok()?;
    let state: Value = runtime(&["state", bundle.id()]).ok()?.json()?;
    let pid = i32::try_from(state["pid"].as_i64().unwrap_or_default())?;
    let before = namespace(pid, "user")?;
    runtime(&["start", bundle.id()]).ok()?;
    wait_until_covered(pid, "user", &before)?;
    let output = read()?;
    ensure!(
        !output.stdout.contains("forged"),
        "`exec` sees the file of the first process"
    );
    // The kernel refuses.
    output.fails_with("enter the namespaces")?;
    runtime(&["delete", "--force", bundle.id()]).ok()?;
    Ok(())
}

/// Versions of rrun before this check did not write the field.
fn exec_accepts_a_state_without_the_user_namespace() -> Result {
    let bundle = Bundle::new(&["sleep", "600"])?;
    bundle.start()?;
    let path = bundle.root().join(bundle.id()).join("state.json");
    let mut state: Value = serde_json::from_slice(&fs::read(&path)?)?;
    let field = state
        .as_object_mut()
        .and_then(|it| it.remove("userNamespace"));
    ensure!(field.is_some(), "the state has no field userNamespace");
    fs::write(&path, state.to_string())?;
    bundle.exec(&[], &["exit", "0"]).ok()?;
    bundle.end()?;
    Ok(())
}
