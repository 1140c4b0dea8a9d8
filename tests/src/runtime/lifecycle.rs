//! A container's life by the runtime's command line.

use std::fs;
use std::io::Write as _;
use std::os::fd::AsRawFd as _;
use std::os::unix::net::UnixListener;

use serde_json::json;

use crate::support::bundle::Bundle;
use crate::support::machine::{Result, wait_for};
use crate::support::needs::{Need, Test};
use crate::{ensure, ensure_eq, test};

pub(crate) const TESTS: &[Test] = &[
    test!(run_gives_the_programs_output_and_exit_code),
    test!(run_passes_standard_input_on),
    test!(run_gives_128_and_the_number_for_a_signal),
    test!(run_passes_sigterm_on_to_the_program),
    test!(a_created_container_waits_for_start),
    test!(create_after_waits_for_the_bundle_to_be_written, Need::Rrun),
    test!(a_created_container_can_be_deleted),
    test!(
        a_start_that_died_late_does_not_hide_that_the_program_runs,
        Need::Rrun
    ),
    test!(a_stopped_container_keeps_its_state_until_delete),
    test!(a_detached_run_leaves_the_container_running),
    test!(pid_file_has_the_first_processs_id),
    test!(kill_knows_signals_by_name_and_number),
    test!(kill_all_reaches_every_process),
    test!(kill_ends_what_the_first_process_left_behind),
    // crun's deaf first process lives on.
    test!(signals_end_a_container_that_waits_for_start),
    test!(delete_force_ends_a_running_container),
    test!(delete_force_of_nothing_is_no_error),
    test!(delete_leaves_no_orphan_behind),
    test!(exec_gives_the_programs_output_and_exit_code),
    test!(exec_has_the_containers_namespaces_and_environment),
    test!(exec_takes_user_directory_and_environment),
    test!(exec_takes_a_process_from_a_file),
    test!(exec_detached_writes_the_pid_file),
    test!(exec_into_a_created_container_works),
    test!(two_containers_live_side_by_side),
    test!(a_bundle_elsewhere_is_found_by_its_option),
];

fn run_gives_the_programs_output_and_exit_code() -> Result {
    let mut bundle = Bundle::new(&["echo", "hello", "world"])?;
    ensure_eq!(bundle.run()?.stdout, "hello world\n", "standard output");
    let output = bundle.args(&["stderr", "alas"]).run()?;
    ensure!(
        output.stderr.contains("alas"),
        "standard error:\n{}",
        output.told()
    );
    bundle.args(&["exit", "42"]).call(&["run"])?.exits(42)?;
    Ok(())
}

fn run_passes_standard_input_on() -> Result {
    let bundle = Bundle::new(&["cat"])?;
    let output = bundle
        .call(&["run"])?
        .stdin("some text\nof two lines")
        .ok()?;
    ensure_eq!(
        output.stdout,
        "some text\nof two lines",
        "what cat gave back"
    );
    Ok(())
}

fn run_gives_128_and_the_number_for_a_signal() -> Result {
    let bundle = Bundle::new(&["sleep", "600"])?;
    let running = bundle.run_beside()?;
    bundle.call(&["kill"])?.arg("KILL").ok()?;
    ensure_eq!(running.end()?.code, 128 + 9, "exit code of run");
    Ok(())
}

fn run_passes_sigterm_on_to_the_program() -> Result {
    let bundle = Bundle::new(&["wait"])?;
    let mut running = bundle.run_beside()?;
    wait_for("the program's first line", || {
        Ok(running.stdout().contains("ready").then_some(()))
    })?;
    running.signal(nix::sys::signal::Signal::SIGTERM);
    let output = running.end()?;
    ensure_eq!(
        (output.code, output.stdout.as_str()),
        (0, "ready\nSIGTERM\n"),
        "run after SIGTERM"
    );
    Ok(())
}

fn a_created_container_waits_for_start() -> Result {
    let mut bundle = Bundle::new(&["write", "/data/ran", "yes"])?;
    bundle.set("/root/readonly", json!(false));
    bundle.call(&["create"])?.ok()?;
    ensure_eq!(bundle.status()?, "created", "status after create");
    let pid = bundle.pid()?;
    ensure!(
        fs::exists(format!("/proc/{pid}"))?,
        "no process {pid} after create"
    );
    ensure!(
        !bundle.rootfs().join("data/ran").exists(),
        "the program ran before start"
    );
    bundle.call(&["start"])?.ok()?;
    bundle.wait_status("stopped")?;
    ensure_eq!(
        fs::read_to_string(bundle.rootfs().join("data/ran"))?,
        "yes",
        "what it wrote"
    );
    bundle.delete()?;
    bundle.runtime(&["state", bundle.id()]).exits(1)?;
    Ok(())
}

/// A `start` that is killed once it was let in leaves the name of the socket behind at which the
/// container waited for it.
fn a_start_that_died_late_does_not_hide_that_the_program_runs() -> Result {
    let bundle = Bundle::new(&["sleep", "600"])?;
    bundle.call(&["create"])?.ok()?;
    let gate = bundle.root().join(bundle.id()).join("start");
    ensure!(gate.exists(), "nothing waits at {}", gate.display());
    for _ in 0..3 {
        ensure_eq!(bundle.status()?, "created", "before its start");
    }
    bundle.runtime(&["start", bundle.id()]).ok()?;
    ensure!(!gate.exists(), "{} is left", gate.display());
    drop(UnixListener::bind(&gate)?);
    ensure_eq!(bundle.status()?, "running", "with the socket's name left");
    let list = bundle.runtime(&["list", "--format", "json"]).ok()?;
    ensure_eq!(list.json()?[0]["status"], "running", "in the list");
    bundle.runtime(&["start", bundle.id()]).exits(1)?;
    bundle.runtime(&["kill", bundle.id(), "KILL"]).ok()?;
    bundle.wait_status("stopped")?;
    drop(UnixListener::bind(&gate)?);
    ensure_eq!(bundle.status()?, "stopped", "after its end");
    bundle.runtime(&["delete", bundle.id()]).ok()?;
    Ok(())
}

/// What rrun-cri does: rrun starts while the bundle is written.
fn create_after_waits_for_the_bundle_to_be_written() -> Result {
    let bundle = Bundle::new(&["true"])?;
    let config = bundle.join("config.json");
    if config.exists() {
        fs::remove_file(&config)?;
    }
    for called_off in [true, false] {
        let (read, mut write) = std::io::pipe()?;
        let pipe = format!("/proc/{}/fd/{}", std::process::id(), read.as_raw_fd());
        let mut running = bundle
            .runtime(&["create", "--after", &pipe, bundle.id()])
            .start()?;
        if called_off {
            drop(write);
            let output = running.end()?;
            ensure_eq!(output.code, 1, "exit code of a creation called off");
            ensure!(
                output.stderr.contains("the caller called it off"),
                "what it said:\n{}",
                output.told()
            );
            bundle.runtime(&["state", bundle.id()]).exits(1)?;
            continue;
        }
        ensure!(running.lives(), "create ended before there was a bundle");
        bundle.write_config()?;
        write.write_all(b"1")?;
        let output = running.end()?;
        ensure_eq!(output.code, 0, "exit code of create");
    }
    bundle.call(&["start"])?.ok()?;
    bundle.wait_status("stopped")?;
    bundle.delete()?;
    Ok(())
}

fn a_created_container_can_be_deleted() -> Result {
    let bundle = Bundle::new(&["sleep", "600"])?;
    bundle.call(&["create"])?.ok()?;
    let pid = bundle.pid()?;
    bundle.delete()?;
    wait_for("its process to go", || {
        Ok((!fs::exists(format!("/proc/{pid}"))?).then_some(()))
    })
}

fn a_stopped_container_keeps_its_state_until_delete() -> Result {
    let bundle = Bundle::new(&["exit", "3"])?;
    bundle.start()?;
    bundle.wait_status("stopped")?;
    ensure_eq!(bundle.pid()?, 0, "pid of a stopped container");
    bundle.call(&["start"])?.exits(1)?;
    bundle.delete()?;
    bundle.call(&["delete"])?.exits(1)?;
    Ok(())
}

fn a_detached_run_leaves_the_container_running() -> Result {
    let bundle = Bundle::new(&["sleep", "600"])?;
    bundle.call(&["run", "--detach"])?.ok()?;
    ensure_eq!(bundle.status()?, "running", "status after run --detach");
    bundle.call(&["kill"])?.arg("KILL").ok()?;
    bundle.wait_status("stopped")?;
    bundle.delete()?;
    Ok(())
}

fn pid_file_has_the_first_processs_id() -> Result {
    let bundle = Bundle::new(&["sleep", "600"])?;
    let file = bundle.join("pid");
    let path = file.to_string_lossy();
    bundle.call(&["create", "--pid-file", &path])?.ok()?;
    // Without a newline, as runc writes it and podman reads it.
    ensure_eq!(
        fs::read_to_string(&file)?,
        bundle.pid()?.to_string(),
        "pid file"
    );
    bundle.end()?;
    Ok(())
}

fn kill_knows_signals_by_name_and_number() -> Result {
    let bundle = Bundle::new(&["wait"])?;
    let mut running = bundle.run_beside()?;
    wait_for("the program's first line", || {
        Ok(running.stdout().contains("ready").then_some(()))
    })?;
    for (signal, heard) in [("USR1", 1), ("SIGUSR1", 2), ("usr1", 3), ("10", 4)] {
        bundle.call(&["kill"])?.arg(signal).ok()?;
        wait_for(&format!("kill {signal} to be heard"), || {
            Ok((running.stdout().matches("SIGUSR1").count() == heard).then_some(()))
        })?;
    }
    // SIGTERM is the default.
    bundle.call(&["kill"])?.ok()?;
    ensure_eq!(running.end()?.code, 0, "exit code after SIGTERM");
    Ok(())
}

fn kill_all_reaches_every_process() -> Result {
    let mut bundle = Bundle::new(&["sleep", "600"])?;
    // Without a PID namespace the kernel ends nobody else when the first process ends.
    bundle.without_namespace("pid");
    bundle.start()?;
    bundle.exec(&["--detach"], &["sleep", "600"]).ok()?;
    ensure_eq!(
        bundle.cgroup_file("cgroup.procs")?.lines().count(),
        2,
        "processes"
    );
    bundle.call(&["kill", "--all"])?.arg("KILL").ok()?;
    wait_for("the cgroup to be empty", || {
        Ok(bundle
            .cgroup_file("cgroup.events")?
            .contains("populated 0")
            .then_some(()))
    })?;
    bundle.wait_status("stopped")?;
    bundle.delete()?;
    Ok(())
}

fn delete_force_ends_a_running_container() -> Result {
    let bundle = Bundle::new(&["deaf"])?;
    bundle.start()?;
    let pid = bundle.pid()?;
    bundle.end()?;
    ensure!(!bundle.cgroup().exists(), "its cgroup is still there");
    wait_for("its process to go", || {
        Ok((!fs::exists(format!("/proc/{pid}"))?).then_some(()))
    })
}

fn delete_force_of_nothing_is_no_error() -> Result {
    let bundle = Bundle::new(&["exit", "0"])?;
    bundle.end()?;
    Ok(())
}

/// Without a PID namespace of the container's own.
fn kill_ends_what_the_first_process_left_behind() -> Result {
    let mut bundle = Bundle::new(&["orphan", "600"])?;
    bundle.without_namespace("pid");
    bundle.start()?;
    bundle.wait_status("stopped")?;
    let populated =
        || -> Result<bool> { Ok(!bundle.cgroup_file("cgroup.procs")?.trim().is_empty()) };
    ensure!(populated()?, "the orphan is gone before");
    bundle.runtime(&["kill", bundle.id(), "KILL"]).ok()?;
    wait_for(
        "the orphan to be gone",
        || Ok((!populated()?).then_some(())),
    )?;
    bundle.end()?;
    Ok(())
}

fn signals_end_a_container_that_waits_for_start() -> Result {
    for signal in ["TERM", "INT", "HUP", "QUIT"] {
        let bundle = Bundle::new(&["sleep", "600"])?;
        bundle.call(&["create"])?.ok()?;
        bundle.runtime(&["kill", bundle.id(), signal]).ok()?;
        bundle.wait_status("stopped")?;
        bundle.delete()?;
    }
    Ok(())
}

fn delete_leaves_no_orphan_behind() -> Result {
    let mut bundle = Bundle::new(&["orphan", "600"])?;
    bundle.without_namespace("pid");
    bundle.start()?;
    bundle.wait_status("stopped")?;
    bundle.end()?;
    ensure!(!bundle.cgroup().exists(), "its cgroup is still there");
    Ok(())
}

fn exec_gives_the_programs_output_and_exit_code() -> Result {
    let bundle = Bundle::new(&["sleep", "600"])?;
    bundle.start()?;
    ensure_eq!(
        bundle.exec(&[], &["echo", "from", "inside"]).ok()?.text(),
        "from inside",
        "output"
    );
    bundle.exec(&[], &["exit", "7"]).exits(7)?;
    let output = bundle.exec(&[], &["cat"]).stdin("given").ok()?;
    ensure_eq!(output.stdout, "given", "what cat gave back");
    ensure_eq!(bundle.status()?, "running", "status after exec");
    bundle.end()?;
    Ok(())
}

fn exec_has_the_containers_namespaces_and_environment() -> Result {
    let mut bundle = Bundle::new(&["sleep", "600"])?;
    bundle.add("/process/env", json!("ANSWER=42"));
    bundle.start()?;
    let report = bundle.exec(&[], &["report"]).ok()?.json()?;
    let pid = bundle.pid()?;
    for kind in ["pid", "net", "ipc", "uts", "mnt", "cgroup", "user"] {
        let there = fs::read_link(format!("/proc/{pid}/ns/{kind}"))?;
        ensure_eq!(
            report["namespaces"][kind],
            json!(there),
            "{kind} namespace of exec"
        );
    }
    ensure_eq!(report["env"]["ANSWER"], "42", "the container's environment");
    ensure_eq!(report["cgroup"], "0::/", "cgroup of exec");
    ensure_eq!(report["hostname"], "rrun-e2e", "host name");
    ensure_eq!(report["status"]["NoNewPrivs"], "1", "no_new_privs of exec");
    ensure_eq!(
        report["fds"].as_object().map(|fds| fds.len()),
        Some(3),
        "descriptors of exec"
    );
    bundle.end()?;
    Ok(())
}

fn exec_takes_user_directory_and_environment() -> Result {
    let bundle = Bundle::new(&["sleep", "600"])?;
    bundle.start()?;
    let options = [
        "--user",
        "1234:5678",
        "--cwd",
        "/tmp",
        "--env",
        "A=b",
        "--env",
        "C=d",
    ];
    let report = bundle.exec(&options, &["report"]).ok()?.json()?;
    ensure_eq!(report["uid"], 1234, "uid");
    ensure_eq!(report["gid"], 5678, "gid");
    ensure_eq!(report["cwd"], "/tmp", "directory");
    ensure_eq!(
        (&report["env"]["A"], &report["env"]["C"]),
        (&json!("b"), &json!("d")),
        "A and C"
    );
    bundle.end()?;
    Ok(())
}

fn exec_takes_a_process_from_a_file() -> Result {
    let bundle = Bundle::new(&["sleep", "600"])?;
    bundle.start()?;
    let mut process = bundle.config["process"].clone();
    process["args"] = json!(["/bin/inside", "report"]);
    process["cwd"] = json!("/data");
    process["user"] = json!({ "uid": 7, "gid": 8, "additionalGids": [9, 10] });
    process["env"] = json!(["ONLY=this"]);
    let file = bundle.join("process.json");
    fs::write(&file, process.to_string())?;
    let report = bundle
        .runtime(&["exec", "--process"])
        .arg(&file)
        .arg(bundle.id())
        .ok()?
        .json()?;
    ensure_eq!(
        (&report["uid"], &report["gid"]),
        (&json!(7), &json!(8)),
        "user and group"
    );
    ensure_eq!(report["groups"], json!([9, 10]), "groups");
    ensure_eq!(report["cwd"], "/data", "directory");
    ensure_eq!(report["env"]["ONLY"], "this", "environment");
    bundle.end()?;
    Ok(())
}

fn exec_detached_writes_the_pid_file() -> Result {
    let bundle = Bundle::new(&["sleep", "600"])?;
    bundle.start()?;
    let file = bundle.join("exec.pid");
    bundle
        .exec(
            &["--detach", "--pid-file", &file.to_string_lossy()],
            &["sleep", "600"],
        )
        .ok()?;
    let pid = fs::read_to_string(&file)?;
    let procs = bundle.cgroup_file("cgroup.procs")?;
    ensure!(
        procs.lines().any(|line| line == pid),
        "{pid} is not among {procs}"
    );
    bundle.end()?;
    Ok(())
}

fn exec_into_a_created_container_works() -> Result {
    let bundle = Bundle::new(&["sleep", "600"])?;
    bundle.call(&["create"])?.ok()?;
    bundle.exec(&[], &["exit", "0"]).ok()?;
    bundle.end()?;
    Ok(())
}

fn two_containers_live_side_by_side() -> Result {
    let one = Bundle::new(&["sleep", "600"])?;
    let other = Bundle::new(&["sleep", "600"])?;
    one.start()?;
    other.start()?;
    for (kind, differ) in [("mnt", true), ("pid", true), ("net", true), ("user", false)] {
        let ns = |pid| fs::read_link(format!("/proc/{pid}/ns/{kind}"));
        ensure_eq!(
            ns(one.pid()?)? != ns(other.pid()?)?,
            differ,
            "{kind} namespaces differ"
        );
    }
    one.end()?;
    ensure_eq!(
        other.status()?,
        "running",
        "status of the one after the other's end"
    );
    other.end()?;
    Ok(())
}

fn a_bundle_elsewhere_is_found_by_its_option() -> Result {
    let bundle = Bundle::new(&["echo", "found"])?;
    bundle.write_config()?;
    let path = bundle.path().to_string_lossy();
    let output = bundle
        .runtime(&["run", "--bundle", &path, bundle.id()])
        .dir("/".as_ref())
        .ok()?;
    ensure_eq!(output.text(), "found", "output");
    Ok(())
}
