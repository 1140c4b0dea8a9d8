//! Commands for one container at the same time, what is left of a container whose state is
//! damaged, and containers by the hundred.

use std::fs;
use std::path::PathBuf;
use std::time::{Duration, Instant};

use serde_json::json;

use crate::support::bundle::Bundle;
use crate::support::machine::{Result, Running, full, note, wait_for};
use crate::support::needs::{Need, Test};
use crate::{ensure, ensure_eq, test};

pub(crate) const TESTS: &[Test] = &[
    test!(of_many_creates_of_one_id_one_wins),
    test!(a_delete_that_meets_a_create_leaves_nothing, Need::Rrun),
    test!(commands_do_not_wait_for_a_create_in_flight, Need::Rrun),
    test!(a_create_in_flight_is_ended_by_delete_force),
    test!(
        a_container_with_a_damaged_state_is_removed_by_force,
        Need::Rrun
    ),
    test!(a_damaged_state_hides_no_other_container, Need::Rrun),
    test!(containers_in_a_row_leave_nothing_to_grow),
    test!(containers_at_once_leave_nothing),
];

fn of_many_creates_of_one_id_one_wins() -> Result {
    let bundle = Bundle::new(&["sleep", "600"])?;
    bundle.write_config()?;
    for _ in 0..3 {
        let all = (0..8)
            .map(|_| bundle.runtime(&["create", bundle.id()]).start())
            .collect::<Result<Vec<Running>>>()?;
        let mut won = 0;
        for one in all {
            let output = one.end()?;
            won += usize::from(output.code == 0);
            ensure!(
                output.code == 0 || output.code == 1 && output.stderr.contains("exist"),
                "{}",
                output.told()
            );
        }
        ensure_eq!(won, 1, "number of winners");
        ensure_eq!(bundle.status()?, "created", "the winner's status");
        bundle.runtime(&["start", bundle.id()]).ok()?;
        bundle.end()?;
    }
    Ok(())
}

fn a_delete_that_meets_a_create_leaves_nothing() -> Result {
    let bundle = Bundle::new(&["sleep", "600"])?;
    for round in 0..30u64 {
        let create = bundle.call(&["create"])?.start()?;
        std::thread::sleep(Duration::from_micros(round * 400));
        // Its end is the end of all that was made by then; what comes later did not see it.
        bundle.end()?;
        let created = create.end()?;
        ensure!([0, 1].contains(&created.code), "{}", created.told());
        let there = bundle.root().join(bundle.id()).exists();
        ensure_eq!(
            there && created.code != 0,
            false,
            "a directory of a failed create"
        );
        if !there {
            ensure!(
                !bundle.cgroup().exists(),
                "round {round}: its cgroup is left"
            );
        }
        bundle.end()?;
        ensure!(
            !bundle.cgroup().exists(),
            "round {round}: its cgroup is left"
        );
    }
    Ok(())
}

/// A bundle with a hook that takes long.
fn held_by_hook() -> Result<Bundle> {
    let mut bundle = Bundle::new(&["sleep", "600"])?;
    bundle.set(
        "/hooks/createRuntime",
        json!([{ "path": "/bin/sleep", "args": ["sleep", "300"] }]),
    );
    Ok(bundle)
}

fn commands_do_not_wait_for_a_create_in_flight() -> Result {
    let bundle = held_by_hook()?;
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
        "exit code of the create whose process was killed"
    );
    ensure!(
        !bundle.root().join(bundle.id()).exists(),
        "its directory is left"
    );
    Ok(())
}

fn a_create_in_flight_is_ended_by_delete_force() -> Result {
    let bundle = held_by_hook()?;
    let create = bundle.call(&["create"])?.start()?;
    wait_for("its cgroup", || Ok(bundle.cgroup().exists().then_some(())))?;
    wait_for("its state", || Ok(bundle.state().ok()))?;
    bundle.end()?;
    ensure!(create.end()?.code != 0, "the create succeeded");
    ensure!(!bundle.cgroup().exists(), "its cgroup is left");
    ensure!(
        !bundle.root().join(bundle.id()).exists(),
        "its directory is left"
    );
    Ok(())
}

fn state_file(bundle: &Bundle) -> PathBuf {
    bundle.root().join(bundle.id()).join("state.json")
}

fn a_container_with_a_damaged_state_is_removed_by_force() -> Result {
    for damage in ["{ damaged", "", "{}", "missing"] {
        let bundle = Bundle::new(&["sleep", "600"])?;
        bundle.start()?;
        let pid = bundle.pid()?;
        match damage {
            "missing" => fs::remove_file(state_file(&bundle))?,
            text => fs::write(state_file(&bundle), text)?,
        }
        bundle.end()?;
        ensure!(!bundle.cgroup().exists(), "{damage:?}: its cgroup is left");
        ensure!(
            !bundle.root().join(bundle.id()).exists(),
            "{damage:?}: its directory is left"
        );
        wait_for("its process to go", || {
            Ok((!fs::exists(format!("/proc/{pid}"))?).then_some(()))
        })?;
    }
    Ok(())
}

fn a_damaged_state_hides_no_other_container() -> Result {
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
            "lines about {damage:?}: {}",
            list.stderr
        );
        ensure!(list.stderr.contains("damaged"), "{}", list.told());
        let state = bundle.runtime(&["state", "damaged"]).exits(1)?;
        ensure_eq!(
            state.stderr.lines().count(),
            1,
            "lines about {damage:?}: {}",
            state.stderr
        );
        ensure!(state.stderr.contains("state.json"), "{}", state.told());
    }
    bundle.runtime(&["delete", "--force", "damaged"]).ok()?;
    ensure!(!other.exists(), "it is left");
    bundle.end()?;
    Ok(())
}

/// What must not grow: lines of mountinfo, cgroups, entries of --root.
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

/// Descriptors open on the whole machine; others' too, so that it is only told.
fn open_files() -> u64 {
    let text = fs::read_to_string("/proc/sys/fs/file-nr").unwrap_or_default();
    text.split_whitespace()
        .next()
        .and_then(|number| number.parse().ok())
        .unwrap_or_default()
}

fn containers_in_a_row_leave_nothing_to_grow() -> Result {
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
    ensure_eq!(counts(&bundle)?, before, "mounts, cgroups, states");
    let tenth = number / 10;
    let mean = |part: &[Duration]| part.iter().sum::<Duration>() / tenth as u32;
    note(format!(
        "{number} containers in a row: {:?} each of the first {tenth}, {:?} of the last; open files {files}, then {}",
        mean(took.get(..tenth).unwrap_or_default()),
        mean(took.get(number - tenth..).unwrap_or_default()),
        open_files(),
    ));
    Ok(())
}

fn containers_at_once_leave_nothing() -> Result {
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
            ensure_eq!(output.code, 0, "{}", output.told());
        }
        if step == "start" {
            let [_, groups, states] = counts(&bundle)?;
            ensure_eq!(states, number, "containers there are");
            ensure!(groups >= number, "{groups} cgroups");
        }
    }
    ensure_eq!(counts(&bundle)?, before, "mounts, cgroups, states");
    note(format!(
        "{number} containers at once: {:?} for all",
        started.elapsed()
    ));
    Ok(())
}
