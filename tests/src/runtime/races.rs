//! Tests with concurrent commands for one container, with containers whose state is damaged, and
//! with hundreds of containers.

use std::fs;
use std::path::PathBuf;
use std::time::{Duration, Instant};

use serde_json::{Value, json};

use crate::support::bundle::Bundle;
use crate::support::machine::{Result, Running, full, note, wait_for};
use crate::support::needs::{Need, Test};
use crate::{ensure, ensure_eq, test};

pub(crate) const TESTS: &[Test] = &[
    test!(exactly_one_of_many_concurrent_create_commands_with_the_same_id_succeeds),
    test!(
        delete_with_force_during_create_leaves_nothing_behind,
        Need::Rrun
    ),
    test!(other_commands_do_not_wait_until_create_ends, Need::Rrun),
    test!(delete_with_force_ends_a_running_create_command),
    test!(
        delete_with_force_removes_a_container_with_a_damaged_state_file,
        Need::Rrun
    ),
    test!(
        a_damaged_state_file_does_not_hide_other_containers,
        Need::Rrun
    ),
    test!(list_does_not_wait_for_a_fifo, Need::Rrun),
    test!(only_one_container_can_use_a_cgroup, Need::Rrun),
    test!(
        a_container_cannot_use_the_cgroup_of_a_stopped_container,
        Need::Rrun
    ),
    test!(many_containers_in_a_row_leave_nothing_behind),
    test!(many_concurrent_containers_leave_nothing_behind),
];

fn exactly_one_of_many_concurrent_create_commands_with_the_same_id_succeeds() -> Result {
    let bundle = Bundle::new(&["sleep", "600"])?;
    bundle.write_config()?;
    for _ in 0..3 {
        let all = (0..8)
            .map(|_| bundle.runtime(&["create", bundle.id()]).start())
            .collect::<Result<Vec<Running>>>()?;
        let mut succeeded = 0;
        for one in all {
            let output = one.end()?;
            succeeded += usize::from(output.code == 0);
            ensure!(
                output.code == 0 || output.code == 1 && output.stderr.contains("exist"),
                "`create` failed, but not because the id is already in use:\n{}",
                output.told()
            );
        }
        ensure_eq!(succeeded, 1, "the number of `create` calls that succeed");
        ensure_eq!(
            bundle.status()?,
            "created",
            "the container's status after the concurrent `create` calls"
        );
        bundle.runtime(&["start", bundle.id()]).ok()?;
        bundle.end()?;
    }
    Ok(())
}

fn delete_with_force_during_create_leaves_nothing_behind() -> Result {
    let bundle = Bundle::new(&["sleep", "600"])?;
    for round in 0..30u64 {
        let create = bundle.call(&["create"])?.start()?;
        std::thread::sleep(Duration::from_micros(round * 400));
        // If `delete --force` interrupts `create`, `delete --force` removes everything that
        // `create` has created, and `create` exits with 1. If `delete --force` runs before or after
        // `create`, `create` exits with 0.
        bundle.end()?;
        let created = create.end()?;
        ensure!(
            [0, 1].contains(&created.code),
            "the exit code of `create` is neither 0 nor 1:\n{}",
            created.told()
        );
        let exists = bundle.root().join(bundle.id()).exists();
        ensure_eq!(
            exists && created.code != 0,
            false,
            "whether a failed `create` left the container's directory behind"
        );
        if !exists {
            ensure!(
                !bundle.cgroup().exists(),
                "in round {round}, the container's directory is gone, but its cgroup still exists"
            );
        }
        bundle.end()?;
        ensure!(
            !bundle.cgroup().exists(),
            "in round {round}, the container's cgroup still exists after `delete --force`"
        );
    }
    Ok(())
}

/// Returns a bundle with a hook that sleeps for 300 seconds. `create` waits for this hook, and does
/// not end during the test.
fn with_slow_hook() -> Result<Bundle> {
    let mut bundle = Bundle::new(&["sleep", "600"])?;
    bundle.set(
        "/hooks/createRuntime",
        json!([{ "path": "/bin/sleep", "args": ["sleep", "300"] }]),
    );
    Ok(bundle)
}

fn other_commands_do_not_wait_until_create_ends() -> Result {
    let bundle = with_slow_hook()?;
    let create = bundle.call(&["create"])?.start()?;
    bundle.wait_status("creating")?;
    bundle.runtime(&["start", bundle.id()]).exits(1)?;
    bundle.runtime(&["delete", bundle.id()]).exits(1)?;
    bundle.runtime(&["create", bundle.id()]).exits(1)?;
    bundle.runtime(&["list"]).ok()?.says("creating")?;
    bundle.exec(&[], &["exit", "0"]).end()?;
    bundle.runtime(&["kill", bundle.id(), "KILL"]).end()?;
    ensure_eq!(
        create.end()?.code,
        1,
        "the exit code of `create` after `kill` killed the container's process"
    );
    ensure!(
        !bundle.root().join(bundle.id()).exists(),
        "the container's directory still exists"
    );
    Ok(())
}

fn delete_with_force_ends_a_running_create_command() -> Result {
    let bundle = with_slow_hook()?;
    let create = bundle.call(&["create"])?.start()?;
    wait_for("`create` to create the cgroup", || {
        Ok(bundle.cgroup().exists().then_some(()))
    })?;
    wait_for("`create` to write the state", || Ok(bundle.state().ok()))?;
    bundle.end()?;
    ensure!(
        create.end()?.code != 0,
        "`create` succeeded despite `delete --force`"
    );
    ensure!(
        !bundle.cgroup().exists(),
        "the container's cgroup still exists"
    );
    ensure!(
        !bundle.root().join(bundle.id()).exists(),
        "the container's directory still exists"
    );
    Ok(())
}

fn state_file(bundle: &Bundle) -> PathBuf {
    bundle.root().join(bundle.id()).join("state.json")
}

fn delete_with_force_removes_a_container_with_a_damaged_state_file() -> Result {
    for damage in ["{ damaged", "", "{}", "missing"] {
        let bundle = Bundle::new(&["sleep", "600"])?;
        bundle.start()?;
        let pid = bundle.pid()?;
        match damage {
            "missing" => fs::remove_file(state_file(&bundle))?,
            text => fs::write(state_file(&bundle), text)?,
        }
        bundle.end()?;
        ensure!(
            !bundle.cgroup().exists(),
            "`delete --force` did not remove the cgroup of a container whose state file was damaged ({damage:?})"
        );
        ensure!(
            !bundle.root().join(bundle.id()).exists(),
            "`delete --force` did not remove the directory of a container whose state file was damaged ({damage:?})"
        );
        wait_for("the container's process to exit", || {
            Ok((!fs::exists(format!("/proc/{pid}"))?).then_some(()))
        })?;
    }
    Ok(())
}

fn a_damaged_state_file_does_not_hide_other_containers() -> Result {
    let bundle = Bundle::new(&["sleep", "600"])?;
    bundle.start()?;
    let other = bundle.root().join("damaged");
    fs::create_dir(&other)?;
    for damage in ["{ damaged", "", "{}", "[]", "\0"] {
        fs::write(other.join("state.json"), damage)?;
        let list = bundle.runtime(&["list"]).ok()?.says(bundle.id())?;
        ensure_eq!(
            list.stderr.lines().count(),
            1,
            "the number of lines in the error of `list` about a state file with the content {damage:?} (the error: {})",
            list.stderr
        );
        ensure!(
            list.stderr.contains("damaged"),
            "the error of `list` does not name the damaged container:\n{}",
            list.told()
        );
        let state = bundle.runtime(&["state", "damaged"]).exits(1)?;
        ensure_eq!(
            state.stderr.lines().count(),
            1,
            "the number of lines in the error of `state` about a state file with the content {damage:?} (the error: {})",
            state.stderr
        );
        ensure!(
            state.stderr.contains("state.json"),
            "the error of `state` does not name the state file:\n{}",
            state.told()
        );
    }
    bundle.runtime(&["delete", "--force", "damaged"]).ok()?;
    ensure!(
        !other.exists(),
        "the damaged container's directory still exists"
    );
    bundle.end()?;
    Ok(())
}

/// Another user can own the --root directory, and create a FIFO in it.
fn list_does_not_wait_for_a_fifo() -> Result {
    let bundle = Bundle::new(&["sleep", "600"])?;
    bundle.start()?;
    let other = bundle.root().join("other");
    fs::create_dir(&other)?;
    let state = other.join("state.json");
    nix::unistd::mkfifo(&state, nix::sys::stat::Mode::S_IRWXU)?;
    let list = bundle.runtime(&["list"]).ok()?.says(bundle.id())?;
    ensure!(
        list.stderr
            .contains("other/state.json: it is not a regular file"),
        "the error of `list` does not report that state.json is not a regular file:\n{}",
        list.told()
    );
    bundle.runtime(&["state", "other"]).exits(1)?;
    fs::remove_file(&state)?;
    // In the following state, the path of the cgroup leads to a FIFO.
    let cgroup = bundle.join("cgroup");
    fs::create_dir(&cgroup)?;
    nix::unistd::mkfifo(&cgroup.join("cgroup.freeze"), nix::sys::stat::Mode::S_IRWXU)?;
    let mut copy: Value = serde_json::from_slice(&fs::read(state_file(&bundle))?)?;
    copy["id"] = json!("other");
    copy["cgroup"] = json!(cgroup);
    fs::write(&state, copy.to_string())?;
    bundle.runtime(&["list"]).ok()?.says("other")?;
    fs::remove_dir_all(&other)?;
    bundle.end()?;
    Ok(())
}

/// Two bundles have different --root directories, so no lock of the runtime prevents that two
/// `create` commands use the same cgroup. The deletion of one container would kill the other one.
fn only_one_container_can_use_a_cgroup() -> Result {
    for round in 0..30 {
        let mut pair = [
            Bundle::new(&["sleep", "600"])?,
            Bundle::new(&["sleep", "600"])?,
        ];
        let id = pair[0].id().to_owned();
        let parent = PathBuf::from("/sys/fs/cgroup").join(&id);
        for bundle in &mut pair {
            bundle.set("/linux/cgroupsPath", json!(format!("/{id}/container")));
        }
        // In some rounds, the test creates the container's cgroup, or only the parent.
        match round % 3 {
            0 => fs::create_dir_all(parent.join("container"))?,
            1 => fs::create_dir(&parent)?,
            _ => {}
        }
        let both = pair
            .iter()
            .map(|bundle| bundle.call(&["create"])?.start())
            .collect::<Result<Vec<Running>>>()?;
        let mut succeeded = 0;
        for (one, bundle) in both.into_iter().zip(&pair) {
            let output = one.end()?;
            if output.code == 0 {
                succeeded += 1;
                ensure_eq!(bundle.status()?, "created", "the container's status");
            } else {
                ensure!(
                    output.stderr.contains("create cgroup /sys/fs/cgroup/"),
                    "in round {round}, `create` failed, but not because another container uses the cgroup:\n{}",
                    output.told()
                );
            }
        }
        ensure_eq!(
            succeeded,
            1,
            "the number of `create` commands that succeed in round {round}"
        );
        for bundle in &pair {
            bundle.end()?;
        }
        fs::remove_dir(&parent)?;
    }
    Ok(())
}

fn a_container_cannot_use_the_cgroup_of_a_stopped_container() -> Result {
    for existed in [false, true] {
        let first = Bundle::new(&["sleep", "600"])?;
        if existed {
            fs::create_dir(first.cgroup())?;
        }
        first.start()?;
        first.runtime(&["kill", first.id(), "KILL"]).ok()?;
        first.wait_status("stopped")?;
        let mut second = Bundle::new(&["sleep", "600"])?;
        second.set("/linux/cgroupsPath", json!(format!("/{}", first.id())));
        let output = second.call(&["create"])?.exits(1)?;
        ensure!(
            output
                .stderr
                .contains("it already exists for another container"),
            "the error of `create` does not report that another container has the cgroup (which existed before the first container: {existed}):\n{}",
            output.told()
        );
        first.delete()?;
        second.start()?;
        second.end()?;
    }
    Ok(())
}

/// Returns the numbers of mounts, of cgroups, and of entries in the state directory. These numbers
/// must not grow during a test.
fn counts(bundle: &Bundle) -> Result<[usize; 3]> {
    let groups = fs::read_dir("/sys/fs/cgroup")?
        .flatten()
        .filter(|entry| entry.path().is_dir())
        .count();
    Ok([
        fs::read_to_string("/proc/self/mountinfo")?.lines().count(),
        groups,
        fs::read_dir(bundle.root()).into_iter().flatten().count(),
    ])
}

/// Returns the number of open descriptors on the whole machine. Other programs also change this
/// number, so the test only prints it.
fn open_files() -> u64 {
    let text = fs::read_to_string("/proc/sys/fs/file-nr").unwrap_or_default();
    text.split_whitespace()
        .next()
        .and_then(|number| number.parse().ok())
        .unwrap_or_default()
}

fn many_containers_in_a_row_leave_nothing_behind() -> Result {
    let bundle = Bundle::new(&["sleep", "600"])?;
    bundle.write_config()?;
    let one = || -> Result {
        bundle.runtime(&["create", bundle.id()]).ok()?;
        bundle.runtime(&["start", bundle.id()]).ok()?;
        bundle
            .runtime(&["delete", "--force", bundle.id()])
            .ok()
            .map(drop)
    };
    one()?;
    let guest = std::env::var("RRUN_TEST_VIEW").is_ok_and(|view| view.starts_with("vm"));
    let number = match (full(), guest) {
        (true, _) => 1000,
        (false, false) => 300,
        (false, true) => 50,
    };
    let (before, files) = (counts(&bundle)?, open_files());
    let mut took = Vec::new();
    for _ in 0..number {
        let started = Instant::now();
        one()?;
        took.push(started.elapsed());
    }
    ensure_eq!(
        counts(&bundle)?,
        before,
        "the numbers of mounts, cgroups and containers' state directories after all containers were deleted"
    );
    let tenth = number / 10;
    let mean = |part: &[Duration]| part.iter().sum::<Duration>() / tenth as u32;
    note(format!(
        "of {number} containers in a row, the first {tenth} took {:?} each, \
         and the last {tenth} took {:?} each; the machine had {files} open files before, and {} after",
        mean(took.get(..tenth).unwrap_or_default()),
        mean(took.get(number - tenth..).unwrap_or_default()),
        open_files(),
    ));
    Ok(())
}

fn many_concurrent_containers_leave_nothing_behind() -> Result {
    let mut bundle = Bundle::new(&["sleep", "600"])?;
    let rootfs = bundle.rootfs();
    bundle.set("/root/path", json!(rootfs));
    let number = if full() { 200 } else { 60 };
    let before = counts(&bundle)?;
    let mut ids = Vec::new();
    for at in 0..number {
        let id = format!("{}-{at}", bundle.id());
        let dir = bundle.join(&id);
        fs::create_dir(&dir)?;
        bundle.set("/linux/cgroupsPath", json!(format!("/{id}")));
        fs::write(dir.join("config.json"), bundle.config.to_string())?;
        ids.push((id, dir));
    }
    let started = Instant::now();
    for step in ["create", "start", "delete"] {
        let all = ids
            .iter()
            .map(|(id, dir)| {
                let args: &[&str] = match step {
                    "create" => &["create", id],
                    "start" => &["start", id],
                    _ => &["delete", "--force", id],
                };
                bundle.runtime(args).dir(dir).start()
            })
            .collect::<Result<Vec<Running>>>()?;
        for one in all {
            let output = one.end()?;
            ensure_eq!(
                output.code,
                0,
                "the exit code of `{step}` ({})",
                output.told()
            );
        }
        if step == "start" {
            let [_, groups, states] = counts(&bundle)?;
            ensure_eq!(
                states,
                number,
                "the number of containers in the state directory"
            );
            ensure!(
                groups >= number,
                "the machine has only {groups} cgroups, although {number} containers exist"
            );
        }
    }
    ensure_eq!(
        counts(&bundle)?,
        before,
        "the numbers of mounts, cgroups and containers' state directories after all containers were deleted"
    );
    note(format!(
        "creating, starting and deleting {number} containers concurrently took {:?}",
        started.elapsed()
    ));
    Ok(())
}
