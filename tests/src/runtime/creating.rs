//! Tests of a container that the runtime is still creating. A hook blocks the creation, so that a
//! test can run other commands in the meantime.

use std::fs;
use std::path::PathBuf;

use nix::sys::signal::Signal;
use serde_json::{Value, json};

use crate::support::bundle::Bundle;
use crate::support::machine::{Result, Running, wait_for};
use crate::support::needs::{Need, Test};
use crate::{ensure, ensure_eq, test};

pub(crate) const TESTS: &[Test] = &[
    test!(exec_is_refused_until_the_container_is_created, Need::Rrun),
    test!(
        other_commands_do_not_treat_a_container_as_running_during_its_creation,
        Need::Rrun
    ),
    test!(
        exec_works_as_soon_as_the_program_of_run_executes,
        Need::Rrun
    ),
    test!(exec_is_refused_if_create_was_killed, Need::Rrun),
];

/// A command that creates a container, and that waits in a hook.
struct Creation {
    bundle: Bundle,
    command: Running,
    /// The file for which the hook waits.
    go: PathBuf,
    /// The file that the hook creates before it exits.
    ended: PathBuf,
}

impl Creation {
    /// Starts the command `args` for a container with a blocking hook of the kind `hook`. When this
    /// function returns, the hook runs.
    fn start(args: &[&str], hook: &str) -> Result<Self> {
        let mut bundle = Bundle::new(&["sleep", "600"])?;
        let [begun, go, ended] = ["begun", "go", "ended"].map(|name| bundle.join(name));
        let line = format!(
            "touch {}; while [ ! -e {} ]; do sleep 0.01; done; touch {}",
            begun.display(),
            go.display(),
            ended.display()
        );
        bundle.set(
            &format!("/hooks/{hook}"),
            json!([{ "path": "/bin/sh", "args": ["sh", "-c", line] }]),
        );
        let command = bundle.call(args)?.start()?;
        wait_for("the hook to run", || Ok(begun.exists().then_some(())))?;
        Ok(Creation {
            bundle,
            command,
            go,
            ended,
        })
    }

    /// Lets the hook exit, and waits until the container is created.
    fn finish(self) -> Result<Bundle> {
        fs::write(&self.go, "")?;
        let output = self.command.end()?;
        ensure_eq!(
            output.code,
            0,
            "the exit code of the command that creates the container ({})",
            output.told()
        );
        Ok(self.bundle)
    }
}

/// Before the first process has changed its root, a process of `exec` would run in the host's root.
fn exec_is_refused_until_the_container_is_created() -> Result {
    for (args, status) in [
        (&["create"][..], "created"),
        (&["run", "--detach"], "running"),
    ] {
        for hook in ["prestart", "createRuntime", "createContainer"] {
            let creation = Creation::start(args, hook)?;
            let bundle = &creation.bundle;
            fs::write(bundle.join("secret"), "a secret of the host")?;
            let secret = bundle.join("secret").display().to_string();
            let output = bundle
                .runtime(&["exec", bundle.id(), "/bin/cat", &secret])
                .end()?;
            ensure!(
                !output.stdout.contains("secret"),
                "during `{}`, a process of `exec` reads a file in the host's root",
                args[0]
            );
            ensure_eq!(
                output.code,
                255,
                "the exit code of `exec` during the hook {hook} of `{}` ({})",
                args[0],
                output.told()
            );
            let reason = format!(
                "cannot exec in container {}: the container is still being created",
                bundle.id()
            );
            ensure!(
                output.stderr.contains(&reason),
                "the error of `exec` does not contain the sentence {reason:?}:\n{}",
                output.told()
            );
            let bundle = creation.finish()?;
            ensure_eq!(
                bundle.status()?,
                status,
                "the status after `{}` with the hook {hook}",
                args[0]
            );
            bundle.exec(&[], &["exit", "0"]).ok()?;
            ensure!(
                !bundle.root().join(bundle.id()).join("start.shut").exists(),
                "the file start.shut still exists after `{}`",
                args[0]
            );
            bundle.end()?;
        }
    }
    Ok(())
}

fn other_commands_do_not_treat_a_container_as_running_during_its_creation() -> Result {
    for args in [&["create"][..], &["run", "--detach"]] {
        let creation = Creation::start(args, "createRuntime")?;
        let bundle = &creation.bundle;
        let id = bundle.id();
        let state = bundle.state()?;
        ensure_eq!(
            (&state["status"], state["pid"].as_i64().unwrap_or_default()),
            (&Value::from("creating"), 0),
            "the status and the process id during `{}`",
            args[0]
        );
        for refused in [
            &["pause", id][..],
            &["resume", id],
            &["start", id],
            &["update", "--pids-limit", "10", id],
            &["delete", id],
        ] {
            let output = bundle.runtime(refused).exits(1)?;
            ensure!(
                output.stderr.contains("creating"),
                "the error of `{}` does not contain the status `creating`:\n{}",
                refused[0],
                output.told()
            );
        }
        bundle.runtime(&["ps", id]).ok()?;
        bundle.runtime(&["kill", id, "KILL"]).ok()?;
        let output = creation.command.end()?;
        ensure_eq!(
            output.code,
            1,
            "the exit code of `{}` after `kill` killed the first process ({})",
            args[0],
            output.told()
        );
    }
    Ok(())
}

/// The command `run` can notice the execution of the program late. This test stops `run` during the
/// hook, so that `run` does not notice the execution.
fn exec_works_as_soon_as_the_program_of_run_executes() -> Result {
    let creation = Creation::start(&["run"], "createContainer")?;
    let bundle = &creation.bundle;
    creation.command.signal(Signal::SIGSTOP);
    fs::write(&creation.go, "")?;
    bundle.wait_status("running")?;
    bundle.exec(&[], &["exit", "0"]).ok()?;
    creation.command.signal(Signal::SIGCONT);
    bundle.runtime(&["kill", bundle.id(), "KILL"]).ok()?;
    ensure_eq!(
        creation.command.end()?.code,
        137,
        "the exit code of `run` after `kill` killed the program"
    );
    Ok(())
}

fn exec_is_refused_if_create_was_killed() -> Result {
    for args in [&["create"][..], &["run", "--detach"]] {
        let creation = Creation::start(args, "createRuntime")?;
        creation.command.signal(Signal::SIGKILL);
        fs::write(&creation.go, "")?;
        // The hook outlives the killed command, and must see the file before its removal.
        wait_for("the hook to end", || {
            Ok(creation.ended.exists().then_some(()))
        })?;
        let bundle = creation.bundle;
        // The first process exits, because it cannot receive an answer of the killed command.
        bundle.wait_status("stopped")?;
        let output = bundle.exec(&[], &["exit", "0"]).exits(255)?;
        ensure!(
            output.stderr.contains("cannot exec in a stopped container"),
            "the error of `exec` does not report that the container has stopped:\n{}",
            output.told()
        );
        bundle.delete()?;
        ensure!(
            !bundle.cgroup().exists(),
            "the container's cgroup still exists after `delete`"
        );
    }
    Ok(())
}
