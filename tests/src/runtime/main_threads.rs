//! Tests of processes whose main thread has exited, and that run on in another thread. In /proc,
//! such a process is a zombie, and a kill of its cgroup does not end it.

use std::fs;

use serde_json::json;

use crate::support::bundle::Bundle;
use crate::support::machine::{Result, wait_for};
use crate::support::needs::{Need, Test};
use crate::{ensure, ensure_eq, test};

pub(crate) const TESTS: &[Test] = &[
    test!(
        a_container_runs_until_the_last_thread_of_its_first_process_exits,
        Need::Rrun
    ),
    test!(
        kill_and_delete_end_processes_whose_main_thread_has_exited,
        Need::Rrun
    ),
];

/// Returns whether the main thread of a process has exited.
fn has_no_main_thread(pid: &str) -> bool {
    let stat = fs::read_to_string(format!("/proc/{pid}/stat"));
    stat.is_ok_and(|stat| stat.contains(") Z "))
}

fn a_container_runs_until_the_last_thread_of_its_first_process_exits() -> Result {
    let bundle = Bundle::new(&["headless"])?;
    bundle.start()?;
    let pid = bundle.pid()?;
    wait_for("the main thread to exit", || {
        Ok(has_no_main_thread(&pid.to_string()).then_some(()))
    })?;
    let state = bundle.state()?;
    ensure_eq!(
        (&state["status"], &state["pid"]),
        (&json!("running"), &json!(pid)),
        "the state of a container whose first process has no main thread"
    );
    ensure_eq!(
        bundle.exec(&[], &["echo", "inside"]).ok()?.text(),
        "inside",
        "the output of `exec`"
    );
    for command in ["pause", "resume"] {
        bundle.runtime(&[command, bundle.id()]).ok()?;
    }
    let refused = bundle.runtime(&["delete", bundle.id()]).end()?.stderr;
    ensure!(
        refused.contains("is not stopped: running"),
        "`delete` of a running container prints: {refused}"
    );
    bundle.runtime(&["kill", bundle.id(), "KILL"]).ok()?;
    bundle.wait_status("stopped")?;
    bundle.delete()?;
    ensure!(
        !fs::exists(format!("/proc/{pid}"))?,
        "the container's first process still exists after `delete`"
    );
    Ok(())
}

/// Starts a container without a separate PID namespace, and waits until a main thread has exited.
fn start(mode: &str) -> Result<Bundle> {
    let mut bundle = Bundle::new(&["headless", mode])?;
    bundle.without_namespace("pid");
    for mount in bundle.mounts().filter(|mount| mount["type"] == "cgroup") {
        mount["options"] = json!(["nosuid", "noexec", "nodev"]);
    }
    bundle.start()?;
    wait_for("a main thread of the container to exit", || {
        let processes = bundle.cgroup_file("cgroup.procs")?;
        let is_moved = bundle.cgroup().join("moved").exists() || !mode.starts_with("moved");
        Ok((is_moved && processes.lines().any(has_no_main_thread)).then_some(()))
    })?;
    Ok(bundle)
}

fn kill_and_delete_end_processes_whose_main_thread_has_exited() -> Result {
    for mode in ["child", "moved-child", "multiply"] {
        for options in [&["kill"][..], &["kill", "--all"]] {
            let bundle = start(mode)?;
            let words = [options, &[bundle.id(), "KILL"]].concat();
            bundle.runtime(&words).ok()?;
            ensure_eq!(
                bundle.cgroup_count("cgroup.events", "populated")?,
                0,
                "whether processes of `headless {mode}` are left after `{}`",
                words.join(" ")
            );
            ensure_eq!(
                bundle.cgroup_file("cgroup.freeze")?.trim(),
                "0",
                "cgroup.freeze after `kill`"
            );
            ensure_eq!(bundle.status()?, "stopped", "the status after `kill`");
            bundle.delete()?;
        }
        let bundle = start(mode)?;
        bundle.end()?;
        ensure!(
            !bundle.cgroup().exists(),
            "the cgroup of `headless {mode}` still exists after `delete --force`"
        );
    }
    Ok(())
}
