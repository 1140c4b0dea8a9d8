//! Tests with a state that another user can change. The runtime must not act on such a state with the
//! rights of its caller.

use std::fs::{self, Permissions};
use std::os::unix::fs::{PermissionsExt as _, chown, symlink};
use std::path::{Path, PathBuf};

use serde_json::{Value, json};

use crate::support::bundle::{Bundle, runtime_program};
use crate::support::machine::{Result, only_looked_up, strace_opens};
use crate::support::needs::{Need, Test};
use crate::{ensure, ensure_eq, test};

pub(crate) const TESTS: &[Test] = &[
    test!(
        root_does_not_act_on_a_container_that_another_user_can_change,
        Need::Rrun
    ),
    test!(
        a_state_is_opened_only_if_it_is_a_regular_file,
        Need::Rrun,
        Need::Program("strace")
    ),
    test!(
        a_state_with_the_id_or_the_cgroup_of_something_else_is_refused,
        Need::Rrun
    ),
];

const USER: u32 = 1000;

fn directory(bundle: &Bundle) -> PathBuf {
    bundle.root().join(bundle.id())
}

/// Replaces the field `field` of the container's state.
fn forge(bundle: &Bundle, field: &str, value: Value) -> Result {
    let path = directory(bundle).join("state.json");
    let mut state: Value = serde_json::from_slice(&fs::read(&path)?)?;
    state[field] = value;
    Ok(fs::write(&path, state.to_string())?)
}

/// The commands that act on a container, with their arguments before and after the container's id.
const ACTIONS: [(&[&str], &[&str]); 11] = [
    (&["start"], &[]),
    (&["exec"], &["/bin/inside", "exit", "0"]),
    (&["ps"], &[]),
    (&["events", "--stats"], &[]),
    (&["pause"], &[]),
    (&["resume"], &[]),
    (&["update", "--memory-swap", "100000000"], &[]),
    (&["kill"], &["KILL"]),
    (&["kill", "--all"], &["KILL"]),
    (&["delete"], &[]),
    (&["delete", "--force"], &[]),
];

fn fail(bundle: &Bundle, actions: &[(&[&str], &[&str])], why: &str) -> Result {
    for (before, after) in actions {
        let words = [*before, &[bundle.id()], *after].concat();
        bundle.runtime(&words).end()?.fails_with(why)?;
    }
    Ok(())
}

fn root_does_not_act_on_a_container_that_another_user_can_change() -> Result {
    let bundle = Bundle::new(&["sleep", "600"])?;
    bundle.start()?;
    let proof = bundle.join("proof");
    let hook =
        json!({ "path": "/bin/sh", "args": ["sh", "-c", format!("touch {}", proof.display())] });
    forge(&bundle, "hooks", json!({ "poststop": [hook] }))?;
    let path = directory(&bundle);
    let give = |user: u32, mode: u32| -> Result {
        for path in [bundle.root(), path.join("state.json"), path.clone()] {
            chown(path, Some(user), Some(user))?;
        }
        Ok(fs::set_permissions(&path, Permissions::from_mode(mode))?)
    };
    for (user, mode) in [(USER, 0o700), (0, 0o770), (0, 0o702)] {
        give(user, mode)?;
        fail(&bundle, &ACTIONS, "--any-owner")?;
        // These commands only print the state.
        bundle.runtime(&["list"]).ok()?.says(bundle.id())?;
        ensure_eq!(bundle.status()?, "running", "the status of the container");
    }
    give(USER, 0o700)?;
    ensure!(!proof.exists(), "the hook of the other user ran as root");
    bundle
        .runtime(&["--any-owner", "delete", "--force", bundle.id()])
        .ok()?;
    ensure!(!path.exists(), "the container was not deleted");
    Ok(())
}

/// Opening a device calls its driver. Opening a FIFO can block.
fn a_state_is_opened_only_if_it_is_a_regular_file() -> Result {
    let bundle = Bundle::new(&["sleep", "600"])?;
    bundle.start()?;
    let path = directory(&bundle);
    let state = path.join("state.json");
    fs::rename(&state, bundle.join("saved"))?;
    for directory in [&path, &bundle.root()] {
        chown(directory, Some(USER), Some(USER))?;
    }
    let device = |path: &Path| {
        let mode = nix::sys::stat::Mode::S_IRWXU;
        let null = nix::sys::stat::makedev(1, 3);
        nix::sys::stat::mknod(path, nix::sys::stat::SFlag::S_IFCHR, mode, null)
    };
    for kind in ["FIFO", "character device", "symbolic link"] {
        match kind {
            "FIFO" => nix::unistd::mkfifo(&state, nix::sys::stat::Mode::S_IRWXU)?,
            "character device" => device(&state)?,
            _ => symlink("/dev/null", &state)?,
        }
        for words in [&["list"][..], &["state", bundle.id()]] {
            let traces = bundle.join(&format!("{kind} {}", words[0]));
            let output = strace_opens(&traces)?
                .arg(runtime_program())
                .args(bundle.flags())
                .args(words)
                .end()?;
            ensure!(
                output.stderr.contains("it is not a regular file"),
                "the error does not report the type of the file:\n{}",
                output.told()
            );
            ensure!(
                only_looked_up(&traces, "/state.json")?,
                "{words:?} did not find the file"
            );
        }
        fs::remove_file(&state)?;
    }
    for directory in [&path, &bundle.root()] {
        chown(directory, Some(0), Some(0))?;
    }
    fs::rename(bundle.join("saved"), &state)?;
    bundle.end()?;
    Ok(())
}

fn a_state_with_the_id_or_the_cgroup_of_something_else_is_refused() -> Result {
    let bundle = Bundle::new(&["sleep", "600"])?;
    bundle.start()?;
    let cgroup = bundle.join("cgroup");
    fs::create_dir(&cgroup)?;
    for file in ["freeze", "events", "kill", "procs"] {
        let path = cgroup.join(format!("cgroup.{file}"));
        nix::unistd::mkfifo(&path, nix::sys::stat::Mode::S_IRWXU)?;
    }
    let climbing = format!("/sys/fs/cgroup/..{}", cgroup.display());
    let own = bundle.cgroup();
    for wrong in [json!(cgroup), json!(climbing), json!("/sys/fs/cgroup")] {
        forge(&bundle, "cgroup", wrong)?;
        // `delete --force` finds the cgroup in another way.
        let (_, actions) = ACTIONS.split_last().ok_or("no command")?;
        fail(&bundle, actions, "is not the path of a cgroup")?;
    }
    forge(&bundle, "cgroup", json!(own))?;
    forge(&bundle, "id", json!("other"))?;
    let output = bundle.runtime(&["kill", bundle.id(), "KILL"]).end()?;
    output.fails_with("it is the state of container other")?;
    bundle.end()?;
    ensure!(!own.exists(), "`delete --force` did not remove the cgroup");
    Ok(())
}
