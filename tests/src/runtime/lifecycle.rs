//! Tests of a container's life cycle, which the runtime's commands control.

use std::fs;
use std::io::Write as _;
use std::os::fd::AsRawFd as _;
use std::os::unix::net::UnixListener;

use serde_json::json;

use crate::support::bundle::{Bundle, runtime_program};
use crate::support::errnos;
use crate::support::inject::{Call, trace};
use crate::support::machine::{Result, command, wait_for};
use crate::support::needs::{Need, Test};
use crate::{ensure, ensure_eq, test};

pub(crate) const TESTS: &[Test] = &[
    test!(run_returns_the_programs_output_and_exit_code),
    test!(run_passes_standard_input_to_the_program),
    test!(run_exits_with_128_plus_the_number_of_the_fatal_signal),
    test!(run_forwards_sigterm_to_the_program),
    test!(a_created_container_waits_for_start),
    test!(
        create_waits_for_the_bundle_if_the_caller_sets_the_option_after,
        Need::Rrun
    ),
    test!(a_created_container_can_be_deleted),
    test!(
        the_status_is_running_even_if_the_start_socket_is_left_behind,
        Need::Rrun
    ),
    test!(a_stopped_container_keeps_its_state_until_delete),
    test!(the_container_keeps_running_after_run_with_detach),
    test!(the_pid_file_contains_the_id_of_the_containers_first_process),
    test!(kill_accepts_signals_by_name_and_by_number),
    test!(kill_with_the_option_all_sends_the_signal_to_every_process),
    test!(
        kill_with_the_option_all_sends_no_signal_to_a_process_outside_the_container,
        Need::Rrun
    ),
    test!(kill_kills_processes_that_the_first_process_left_behind),
    // crun fails this test. Before `start`, the first process of a crun container ignores the
    // test's signals.
    test!(signals_end_a_container_that_waits_for_start),
    test!(delete_with_force_kills_a_running_container),
    test!(delete_with_force_kills_a_container_that_a_tracer_stops_before_its_exit),
    test!(delete_with_force_succeeds_for_a_missing_container),
    test!(delete_leaves_no_orphaned_process_behind),
    test!(exec_returns_the_programs_output_and_exit_code),
    test!(exec_uses_the_containers_namespaces_and_environment),
    test!(exec_applies_the_options_user_and_cwd_and_env),
    test!(exec_reads_the_process_configuration_from_a_file),
    test!(exec_with_detach_writes_the_pid_file),
    test!(exec_works_in_a_created_container),
    test!(two_containers_run_independently),
    test!(run_uses_the_bundle_that_the_option_bundle_specifies),
];

fn run_returns_the_programs_output_and_exit_code() -> Result {
    let mut bundle = Bundle::new(&["echo", "hello", "world"])?;
    ensure_eq!(
        bundle.run()?.stdout,
        "hello world\n",
        "the standard output of `run`"
    );
    let output = bundle.args(&["stderr", "alas"]).run()?;
    ensure!(
        output.stderr.contains("alas"),
        "the standard error of `run` does not contain `alas`:\n{}",
        output.told()
    );
    bundle.args(&["exit", "42"]).call(&["run"])?.exits(42)?;
    Ok(())
}

fn run_passes_standard_input_to_the_program() -> Result {
    let bundle = Bundle::new(&["cat"])?;
    let output = bundle
        .call(&["run"])?
        .stdin("some text\nof two lines")
        .ok()?;
    ensure_eq!(
        output.stdout,
        "some text\nof two lines",
        "the output of cat, which copies its input"
    );
    Ok(())
}

fn run_exits_with_128_plus_the_number_of_the_fatal_signal() -> Result {
    let bundle = Bundle::new(&["sleep", "600"])?;
    let running = bundle.run_in_background()?;
    bundle.call(&["kill"])?.arg("KILL").ok()?;
    ensure_eq!(
        running.end()?.code,
        128 + 9,
        "the exit code of `run` after SIGKILL"
    );
    Ok(())
}

fn run_forwards_sigterm_to_the_program() -> Result {
    let bundle = Bundle::new(&["wait"])?;
    let mut running = bundle.run_in_background()?;
    wait_for("the program to print its first line", || {
        Ok(running.stdout().contains("ready").then_some(()))
    })?;
    running.signal(nix::sys::signal::Signal::SIGTERM);
    let output = running.end()?;
    ensure_eq!(
        (output.code, output.stdout.as_str()),
        (0, "ready\nSIGTERM\n"),
        "the exit code and output of `run` after SIGTERM"
    );
    Ok(())
}

fn a_created_container_waits_for_start() -> Result {
    let mut bundle = Bundle::new(&["write", "/data/ran", "yes"])?;
    bundle.set("/root/readonly", json!(false));
    bundle.call(&["create"])?.ok()?;
    ensure_eq!(
        bundle.status()?,
        "created",
        "the container's status after `create`"
    );
    let pid = bundle.pid()?;
    ensure!(
        fs::exists(format!("/proc/{pid}"))?,
        "the container's process {pid} does not exist after `create`"
    );
    ensure!(
        !bundle.rootfs().join("data/ran").exists(),
        "the program ran before `start`"
    );
    bundle.call(&["start"])?.ok()?;
    bundle.wait_status("stopped")?;
    ensure_eq!(
        fs::read_to_string(bundle.rootfs().join("data/ran"))?,
        "yes",
        "the content of the file that the program writes"
    );
    bundle.delete()?;
    bundle.runtime(&["state", bundle.id()]).exits(1)?;
    Ok(())
}

/// The process of a created container listens on its start socket. `start` connects to this socket.
/// If `start` is killed after the connection, the socket file remains.
fn the_status_is_running_even_if_the_start_socket_is_left_behind() -> Result {
    let bundle = Bundle::new(&["sleep", "600"])?;
    bundle.call(&["create"])?.ok()?;
    let start_socket = bundle.root().join(bundle.id()).join("start");
    ensure!(
        start_socket.exists(),
        "the start socket {} does not exist",
        start_socket.display()
    );
    for _ in 0..3 {
        ensure_eq!(
            bundle.status()?,
            "created",
            "the container's status before `start`"
        );
    }
    bundle.runtime(&["start", bundle.id()]).ok()?;
    ensure!(
        !start_socket.exists(),
        "the start socket {} still exists after `start`",
        start_socket.display()
    );
    drop(UnixListener::bind(&start_socket)?);
    ensure_eq!(
        bundle.status()?,
        "running",
        "the container's status with a leftover start socket"
    );
    let list = bundle.runtime(&["list", "--format", "json"]).ok()?;
    ensure_eq!(
        list.json()?[0]["status"],
        "running",
        "the container's status in the output of `list`"
    );
    bundle.runtime(&["start", bundle.id()]).exits(1)?;
    bundle.runtime(&["kill", bundle.id(), "KILL"]).ok()?;
    bundle.wait_status("stopped")?;
    drop(UnixListener::bind(&start_socket)?);
    ensure_eq!(
        bundle.status()?,
        "stopped",
        "the container's status after the program exited"
    );
    bundle.runtime(&["delete", bundle.id()]).ok()?;
    Ok(())
}

/// With `create --after`, rrun-cri can start rrun early. rrun waits until rrun-cri has written the
/// bundle.
fn create_waits_for_the_bundle_if_the_caller_sets_the_option_after() -> Result {
    let bundle = Bundle::new(&["true"])?;
    let config = bundle.join("config.json");
    if config.exists() {
        fs::remove_file(&config)?;
    }
    for cancelled in [true, false] {
        let (read, mut write) = std::io::pipe()?;
        let pipe = format!("/proc/{}/fd/{}", std::process::id(), read.as_raw_fd());
        let mut running = bundle
            .runtime(&["create", "--after", &pipe, bundle.id()])
            .start()?;
        if cancelled {
            drop(write);
            let output = running.end()?;
            ensure_eq!(output.code, 1, "the exit code of a cancelled `create`");
            ensure!(
                output.stderr.contains("the caller cancelled the creation"),
                "the error of `create` does not report that the caller cancelled `create`:\n{}",
                output.told()
            );
            bundle.runtime(&["state", bundle.id()]).exits(1)?;
            continue;
        }
        ensure!(running.lives(), "`create` exited before the bundle existed");
        bundle.write_config()?;
        write.write_all(b"1")?;
        let output = running.end()?;
        ensure_eq!(output.code, 0, "the exit code of `create`");
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
    wait_for("the container's process to exit", || {
        Ok((!fs::exists(format!("/proc/{pid}"))?).then_some(()))
    })
}

fn a_stopped_container_keeps_its_state_until_delete() -> Result {
    let bundle = Bundle::new(&["exit", "3"])?;
    bundle.start()?;
    bundle.wait_status("stopped")?;
    ensure_eq!(bundle.pid()?, 0, "the process id of a stopped container");
    bundle.call(&["start"])?.exits(1)?;
    bundle.delete()?;
    bundle.call(&["delete"])?.exits(1)?;
    Ok(())
}

fn the_container_keeps_running_after_run_with_detach() -> Result {
    let bundle = Bundle::new(&["sleep", "600"])?;
    bundle.call(&["run", "--detach"])?.ok()?;
    ensure_eq!(
        bundle.status()?,
        "running",
        "the container's status after `run --detach`"
    );
    bundle.call(&["kill"])?.arg("KILL").ok()?;
    bundle.wait_status("stopped")?;
    bundle.delete()?;
    Ok(())
}

fn the_pid_file_contains_the_id_of_the_containers_first_process() -> Result {
    let bundle = Bundle::new(&["sleep", "600"])?;
    let file = bundle.join("pid");
    let path = file.to_string_lossy();
    bundle.call(&["create", "--pid-file", &path])?.ok()?;
    // The pid file contains no newline, because runc writes none and podman expects none.
    ensure_eq!(
        fs::read_to_string(&file)?,
        bundle.pid()?.to_string(),
        "the content of the pid file"
    );
    bundle.end()?;
    Ok(())
}

fn kill_accepts_signals_by_name_and_by_number() -> Result {
    let bundle = Bundle::new(&["wait"])?;
    let mut running = bundle.run_in_background()?;
    wait_for("the program to print its first line", || {
        Ok(running.stdout().contains("ready").then_some(()))
    })?;
    for (signal, count) in [("USR1", 1), ("SIGUSR1", 2), ("usr1", 3), ("10", 4)] {
        bundle.call(&["kill"])?.arg(signal).ok()?;
        wait_for(
            &format!("the program to receive the signal of `kill {signal}`"),
            || Ok((running.stdout().matches("SIGUSR1").count() == count).then_some(())),
        )?;
    }
    // SIGTERM is the default signal of `kill`.
    bundle.call(&["kill"])?.ok()?;
    ensure_eq!(
        running.end()?.code,
        0,
        "the exit code of `run` after SIGTERM"
    );
    Ok(())
}

fn kill_with_the_option_all_sends_the_signal_to_every_process() -> Result {
    let mut bundle = Bundle::new(&["sleep", "600"])?;
    // Without a separate PID namespace, the kernel does not kill the container's other processes
    // when the first process exits.
    bundle.without_namespace("pid");
    bundle.start()?;
    bundle.exec(&["--detach"], &["sleep", "600"]).ok()?;
    ensure_eq!(
        bundle.cgroup_file("cgroup.procs")?.lines().count(),
        2,
        "the number of processes in the container's cgroup"
    );
    bundle.call(&["kill", "--all"])?.arg("KILL").ok()?;
    wait_for("the container's cgroup to become empty", || {
        Ok(bundle
            .cgroup_file("cgroup.events")?
            .contains("populated 0")
            .then_some(()))
    })?;
    bundle.wait_status("stopped")?;
    bundle.delete()?;
    Ok(())
}

fn kill_with_the_option_all_sends_no_signal_to_a_process_outside_the_container() -> Result {
    let bundle = Bundle::new(&["wait"])?;
    let mut running = bundle.run_in_background()?;
    wait_for("the program to print its first line", || {
        Ok(running.stdout().contains("ready").then_some(()))
    })?;
    // Between the reading of a process id and the sending of the signal, the kernel can give the id
    // to another process. So the runtime must open the process, and then read the ids again.
    let mut traced = std::process::Command::new(runtime_program());
    traced
        .args(bundle.flags())
        .args(["kill", "--all", bundle.id(), "USR1"]);
    let calls = trace(vec![traced], None)?.calls;
    let is = |call: &Call, name: &str| errnos::name(call.place.number) == name;
    let last = |found: &dyn Fn(&Call) -> bool| calls.iter().rposition(found);
    let opened = last(&|call| is(call, "pidfd_open"));
    let listed = last(&|call| is(call, "read") && call.object.ends_with("/cgroup.procs"));
    let sent = last(&|call| is(call, "pidfd_send_signal"));
    ensure!(
        opened.is_some()
            && opened < listed
            && listed < sent
            && last(&|call| is(call, "kill")).is_none(),
        "the runtime does not check the process to which it sends the signal: it opens the process \
         in system call {opened:?}, reads cgroup.procs in system call {listed:?} and sends the \
         signal in system call {sent:?}"
    );
    wait_for("the program to receive the signal", || {
        Ok(running.stdout().contains("SIGUSR1").then_some(()))
    })?;

    // The kernel shows the process id 0 for a process outside the reader's PID namespace. kill(2)
    // would send the signal to the runtime's own process group.
    let output = command("setsid", ["--wait", "unshare", "--pid", "--fork"])
        .arg(runtime_program())
        .args(bundle.flags())
        .args(["kill", "--all", bundle.id(), "USR1"])
        .exits(1)?;
    output.fails_with("a process of the container is not in the PID namespace")?;
    bundle.end()?;
    Ok(())
}

fn delete_with_force_kills_a_running_container() -> Result {
    let bundle = Bundle::new(&["deaf"])?;
    bundle.start()?;
    let pid = bundle.pid()?;
    bundle.end()?;
    ensure!(
        !bundle.cgroup().exists(),
        "the container's cgroup still exists after `delete --force`"
    );
    wait_for("the container's process to exit", || {
        Ok((!fs::exists(format!("/proc/{pid}"))?).then_some(()))
    })
}

fn delete_with_force_kills_a_container_that_a_tracer_stops_before_its_exit() -> Result {
    let bundle = Bundle::new(&["traced", "exit-stop"])?;
    let mut running = bundle.run_in_background()?;
    wait_for("the child to trace the first process", || {
        Ok(running.stdout().contains("traces").then_some(()))
    })?;
    bundle.end()?;
    ensure!(
        !bundle.cgroup().exists(),
        "the container's cgroup still exists after `delete --force`"
    );
    Ok(())
}

fn delete_with_force_succeeds_for_a_missing_container() -> Result {
    let bundle = Bundle::new(&["exit", "0"])?;
    bundle.end()?;
    Ok(())
}

/// The container has no separate PID namespace, so the orphaned process survives the exit of the
/// first process.
fn kill_kills_processes_that_the_first_process_left_behind() -> Result {
    let mut bundle = Bundle::new(&["orphan", "600"])?;
    bundle.without_namespace("pid");
    bundle.start()?;
    bundle.wait_status("stopped")?;
    let populated =
        || -> Result<bool> { Ok(!bundle.cgroup_file("cgroup.procs")?.trim().is_empty()) };
    ensure!(populated()?, "the orphaned process exited before `kill`");
    bundle.runtime(&["kill", bundle.id(), "KILL"]).ok()?;
    wait_for("the orphaned process to exit after `kill`", || {
        Ok((!populated()?).then_some(()))
    })?;
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

fn delete_leaves_no_orphaned_process_behind() -> Result {
    let mut bundle = Bundle::new(&["orphan", "600"])?;
    bundle.without_namespace("pid");
    bundle.start()?;
    bundle.wait_status("stopped")?;
    bundle.end()?;
    ensure!(
        !bundle.cgroup().exists(),
        "the container's cgroup still exists after `delete --force`"
    );
    Ok(())
}

fn exec_returns_the_programs_output_and_exit_code() -> Result {
    let bundle = Bundle::new(&["sleep", "600"])?;
    bundle.start()?;
    ensure_eq!(
        bundle.exec(&[], &["echo", "from", "inside"]).ok()?.text(),
        "from inside",
        "the output of `exec`"
    );
    bundle.exec(&[], &["exit", "7"]).exits(7)?;
    let output = bundle.exec(&[], &["cat"]).stdin("given").ok()?;
    ensure_eq!(
        output.stdout,
        "given",
        "the output of cat, which copies its input"
    );
    ensure_eq!(
        bundle.status()?,
        "running",
        "the container's status after `exec`"
    );
    bundle.end()?;
    Ok(())
}

fn exec_uses_the_containers_namespaces_and_environment() -> Result {
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
            "the {kind} namespace of the process that `exec` starts"
        );
    }
    ensure_eq!(
        report["env"]["ANSWER"],
        "42",
        "the variable ANSWER in the environment of the process that `exec` starts"
    );
    ensure_eq!(
        report["cgroup"],
        "0::/",
        "the cgroup of the process that `exec` starts"
    );
    ensure_eq!(
        report["hostname"],
        "rrun-e2e",
        "the host name that the process started by `exec` sees"
    );
    ensure_eq!(
        report["status"]["NoNewPrivs"],
        "1",
        "the no_new_privs attribute of the process that `exec` starts"
    );
    ensure_eq!(
        report["fds"].as_object().map(|fds| fds.len()),
        Some(3),
        "the number of open descriptors of the process that `exec` starts"
    );
    bundle.end()?;
    Ok(())
}

fn exec_applies_the_options_user_and_cwd_and_env() -> Result {
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
    ensure_eq!(
        report["uid"],
        1234,
        "the user id of the process that `exec` starts"
    );
    ensure_eq!(
        report["gid"],
        5678,
        "the group id of the process that `exec` starts"
    );
    ensure_eq!(
        report["cwd"],
        "/tmp",
        "the working directory of the process that `exec` starts"
    );
    ensure_eq!(
        (&report["env"]["A"], &report["env"]["C"]),
        (&json!("b"), &json!("d")),
        "the environment variables A and C of the process that `exec` starts"
    );
    bundle.end()?;
    Ok(())
}

fn exec_reads_the_process_configuration_from_a_file() -> Result {
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
        "the user id and group id that the process file specifies"
    );
    ensure_eq!(
        report["groups"],
        json!([9, 10]),
        "the additional groups that the process file specifies"
    );
    ensure_eq!(
        report["cwd"],
        "/data",
        "the working directory that the process file specifies"
    );
    ensure_eq!(
        report["env"]["ONLY"],
        "this",
        "the environment variable that the process file specifies"
    );
    bundle.end()?;
    Ok(())
}

fn exec_with_detach_writes_the_pid_file() -> Result {
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
        "the process {pid} that `exec` started is not in the container's cgroup; the processes in the cgroup: {procs}"
    );
    bundle.end()?;
    Ok(())
}

fn exec_works_in_a_created_container() -> Result {
    let bundle = Bundle::new(&["sleep", "600"])?;
    bundle.call(&["create"])?.ok()?;
    bundle.exec(&[], &["exit", "0"]).ok()?;
    bundle.end()?;
    Ok(())
}

fn two_containers_run_independently() -> Result {
    let one = Bundle::new(&["sleep", "600"])?;
    let other = Bundle::new(&["sleep", "600"])?;
    one.start()?;
    other.start()?;
    for (kind, differ) in [("mnt", true), ("pid", true), ("net", true), ("user", false)] {
        let ns = |pid| fs::read_link(format!("/proc/{pid}/ns/{kind}"));
        ensure_eq!(
            ns(one.pid()?)? != ns(other.pid()?)?,
            differ,
            "whether the {kind} namespaces of the two containers differ"
        );
    }
    one.end()?;
    ensure_eq!(
        other.status()?,
        "running",
        "the status of the second container after the first container was deleted"
    );
    other.end()?;
    Ok(())
}

fn run_uses_the_bundle_that_the_option_bundle_specifies() -> Result {
    let bundle = Bundle::new(&["echo", "found"])?;
    bundle.write_config()?;
    let path = bundle.path().to_string_lossy();
    let output = bundle
        .runtime(&["run", "--bundle", &path, bundle.id()])
        .dir("/".as_ref())
        .ok()?;
    ensure_eq!(output.text(), "found", "the output of `run --bundle`");
    Ok(())
}
