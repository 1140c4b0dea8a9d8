//! Tests of containers that crictl creates: their settings, logs, exec sessions, exit codes and
//! stops.

use std::fs;
use std::time::{Duration, Instant};

use serde_json::{Value, json};

use crate::support::machine::{Result, note, program_path, wait_for};
use crate::support::needs::{Need, Test};
use crate::support::node::{A_NODE, BUSYBOX, Node, is_rrun, on_a_node};
use crate::{ensure, ensure_eq, test};

pub(crate) const TESTS: &[Test] = &[
    test!(a_container_gets_its_configured_settings, A_NODE),
    test!(the_default_mounts_leave_the_writable_layer_empty, A_NODE),
    test!(a_log_contains_all_lines_of_stdout_and_stderr, A_NODE),
    test!(
        exec_returns_the_output_and_the_exit_code_and_obeys_its_timeout,
        A_NODE
    ),
    test!(
        an_exec_timeout_kills_the_whole_session_but_no_daemon_of_an_earlier_session,
        A_NODE,
        Need::RrunCri
    ),
    test!(
        the_container_status_keeps_the_exit_code_and_the_reason_and_the_times,
        A_NODE
    ),
    test!(
        stop_waits_for_the_grace_period_and_then_kills_the_container,
        A_NODE
    ),
];

/// Returns whether the value is an RFC 3339 time in 2020 or later that includes the seconds.
fn is_time(value: &Value) -> bool {
    value
        .as_str()
        .is_some_and(|time| time.len() >= 20 && time > "2020-01-01T00:00:00")
}

fn a_container_gets_its_configured_settings() -> Result {
    on_a_node(|node| {
        node.pull(BUSYBOX)?;
        let pod = node.pod("config");
        let pod_id = node.runp(&pod)?;
        let shared = node.join("shared");
        fs::create_dir(&shared)?;
        fs::write(shared.join("file"), "from the node")?;

        let mut container = node.container("report", &["/inside", "report"]);
        container["working_dir"] = json!("/tmp");
        container["envs"] = json!([{ "key": "ANSWER", "value": "42" }]);
        container["linux"]["security_context"] = json!({
                "namespace_options": { "pid": 1 },
                "run_as_user": { "value": 1000 },
                "run_as_group": { "value": 2000 },
                "supplemental_groups": [3000],
                "no_new_privs": true,
                "readonly_rootfs": true,
                "capabilities": { "drop_capabilities": ["ALL"], "add_capabilities": ["NET_BIND_SERVICE"] },
        });
        if let Some(mounts) = container["mounts"].as_array_mut() {
            mounts.push(
                json!({ "container_path": "/shared", "host_path": shared, "readonly": true }),
            );
        }
        let id = node.run(&pod_id, &pod, &container)?;
        node.exited(&id)?;
        let report: Value = serde_json::from_str(&node.asks(&["logs", &id])?)?;
        ensure_eq!(
            (&report["uid"], &report["gid"]),
            (&json!(1000), &json!(2000)),
            "user id and group id of the container"
        );
        ensure!(
            report["groups"]
                .as_array()
                .is_some_and(|groups| groups.contains(&json!(3000))),
            "the supplementary group 3000 is missing: {}",
            report["groups"]
        );
        ensure_eq!(report["cwd"], "/tmp", "working directory of the container");
        ensure_eq!(
            report["env"]["ANSWER"],
            "42",
            "environment variable ANSWER in the container"
        );
        ensure!(
            report["env"]["PATH"]
                .as_str()
                .is_some_and(|path| path.contains("/bin")),
            "the container's environment lacks the PATH that the image sets"
        );
        ensure_eq!(
            report["status"]["NoNewPrivs"],
            "1",
            "NoNewPrivs in the container's /proc/self/status"
        );
        ensure_eq!(
            report["status"]["CapBnd"],
            "0000000000000400",
            "capability bounding set of the container"
        );
        ensure_eq!(report["hostname"], "config", "host name of the container");
        let mount = |point: &str| {
            let lines = report["mounts"]
                .as_array()
                .into_iter()
                .flatten()
                .filter_map(Value::as_str);
            lines
                .filter(|line| line.split(' ').nth(4) == Some(point))
                .find_map(|line| line.split(' ').nth(5).map(str::to_owned))
        };
        for point in ["/", "/shared"] {
            let options = mount(point).ok_or(format!("nothing is mounted on {point}"))?;
            ensure!(
                options.split(',').any(|option| option == "ro"),
                "the mount on {point} is not read-only; its mount options: {options}"
            );
        }

        // The image's configuration supplies the settings that this CreateContainer request omits.
        // The server looks up the user name in the image's /etc/passwd.
        let mut container = node.container("name", &["/inside", "report"]);
        container["linux"]["security_context"]["run_as_username"] = json!("www-data");
        let id = node.run(&pod_id, &pod, &container)?;
        node.exited(&id)?;
        let report: Value = serde_json::from_str(&node.asks(&["logs", &id])?)?;
        ensure_eq!(
            (&report["uid"], &report["gid"]),
            (&json!(33), &json!(33)),
            "user id and group id of a container that runs as www-data"
        );

        let id = node.create(&pod_id, &pod, &node.container("labels", &["sleep", "600"]))?;
        let status = node.status(&id)?;
        ensure_eq!(
            status["mounts"].as_array().map(Vec::len),
            Some(1),
            "number of mounts in the container's status"
        );
        Ok(())
    })
}

fn the_default_mounts_leave_the_writable_layer_empty() -> Result {
    on_a_node(|node| {
        node.pull(BUSYBOX)?;
        let pod = node.pod("untouched");
        let pod_id = node.runp(&pod)?;
        let mut container = node.container("untouched", &["sleep", "600"]);
        container["mounts"] = json!([]);
        let id = node.run(&pod_id, &pod, &container)?;
        let inside = |script: &str| node.asks(&["exec", "-s", &id, "sh", "-c", script]);
        // The BusyBox image contains /etc, but not these three files. The server or the runtime
        // must therefore create their mount points.
        let mounts = inside("cat /proc/mounts")?;
        for place in ["/etc/hosts", "/etc/hostname", "/etc/resolv.conf"] {
            let is_mounted = |line: &str| line.split(' ').nth(1) == Some(place);
            ensure!(
                mounts.lines().any(is_mounted),
                "nothing is mounted on {place} in the container:\n{mounts}"
            );
        }
        inside("cat /etc/hosts | grep -q localhost && echo a >>/etc/hosts")?;
        if is_rrun() {
            let upper = node.join("root/containers").join(&id).join("upper");
            let written = || -> Result<Vec<_>> {
                let entries = fs::read_dir(&upper)?;
                Ok(entries
                    .map(|entry| entry.map(|entry| entry.file_name()))
                    .collect::<std::result::Result<_, _>>()?)
            };
            ensure_eq!(
                written()?,
                Vec::<std::ffi::OsString>::new(),
                "entries of the writable layer before the container writes a file"
            );
            inside("echo a >/etc/new")?;
            ensure_eq!(
                written()?,
                ["etc"],
                "entries of the writable layer after the container wrote a file"
            );
        }
        Ok(())
    })
}

fn a_log_contains_all_lines_of_stdout_and_stderr() -> Result {
    on_a_node(|node| {
        node.pull(BUSYBOX)?;
        let pod = node.pod("logs");
        let pod_id = node.runp(&pod)?;
        let script = "echo to stdout; echo to stderr >&2; printf 'no line end'";
        let id = node.run(
            &pod_id,
            &pod,
            &node.container("both", &["sh", "-c", script]),
        )?;
        node.exited(&id)?;
        let output = node.crictl(&["logs", &id]).ok()?;
        ensure_eq!(
            output.stdout,
            "to stdout\nno line end",
            "standard output of crictl logs"
        );
        ensure_eq!(
            output.stderr,
            "to stderr\n",
            "standard error of crictl logs"
        );
        let file = node.log_of("logs", "both")?;
        let lines: Vec<Vec<&str>> = file
            .lines()
            .map(|line| line.splitn(4, ' ').collect())
            .collect();
        ensure_eq!(lines.len(), 3, "number of lines in the log file: {file:?}");
        for line in &lines {
            ensure_eq!(line.len(), 4, "number of fields in the log line {line:?}");
            ensure!(
                is_time(&json!(line[0])),
                "the log line {line:?} does not begin with a time"
            );
        }
        ensure!(
            lines
                .iter()
                .any(|line| line[1..] == ["stdout", "F", "to stdout"]),
            "the container's log lacks the line that the container wrote to stdout: {file}"
        );
        ensure!(
            lines
                .iter()
                .any(|line| line[1..] == ["stderr", "F", "to stderr"]),
            "the container's log lacks the line that the container wrote to stderr: {file}"
        );
        ensure!(
            lines
                .iter()
                .any(|line| line[1] == "stdout" && line[3] == "no line end"),
            "the container's log lacks the line that the container wrote without a line end: {file}"
        );

        // The log contains every line of a container that writes as fast as it can.
        let id = node.run(
            &pod_id,
            &pod,
            &node.container("burst", &["/inside", "burst", "20000"]),
        )?;
        node.exited(&id)?;
        let text = node.asks(&["logs", &id])?;
        ensure!(
            text.lines()
                .enumerate()
                .all(|(at, line)| line == format!("line {}", at + 1)),
            "the lines of the log are not in order"
        );
        ensure_eq!(
            text.lines().count(),
            20_000,
            "number of lines in the container's log"
        );
        let tail = node.asks(&["logs", "--tail", "2", &id])?;
        ensure_eq!(
            tail,
            "line 19999\nline 20000",
            "output of crictl logs --tail 2"
        );

        // A line that is longer than a log record is split into partial records. crictl joins the
        // partial records again.
        let long = "head -c 40000 /dev/zero | tr '\\0' x; echo";
        let id = node.run(&pod_id, &pod, &node.container("long", &["sh", "-c", long]))?;
        node.exited(&id)?;
        ensure_eq!(
            node.asks(&["logs", &id])?,
            "x".repeat(40_000),
            "the long line in the output of crictl logs"
        );
        let file = node.log_of("logs", "long")?;
        ensure!(
            file.lines().any(|line| line.contains(" stdout P ")),
            "the container's log contains no partial record"
        );
        Ok(())
    })
}

fn exec_returns_the_output_and_the_exit_code_and_obeys_its_timeout() -> Result {
    on_a_node(|node| {
        node.pull(BUSYBOX)?;
        let pod = node.pod("exec");
        let pod_id = node.runp(&pod)?;
        let id = node.run(&pod_id, &pod, &node.container("main", &["sleep", "600"]))?;
        let script = "echo out; echo err >&2; exit 7";
        let output = node
            .crictl(&["exec", "-s", &id, "sh", "-c", script])
            .end()?;
        ensure!(
            output.code != 0,
            "crictl exec succeeded although its command exited with exit code 7: {}",
            output.told()
        );
        let text = format!("{}{}", output.stdout, output.stderr);
        for part in ["out", "err", "7"] {
            ensure!(
                text.contains(part),
                "the output does not contain {part:?}:\n{}",
                output.told()
            );
        }
        let output = node
            .crictl(&["exec", "-s", "--timeout", "2", &id, "sleep", "456"])
            .exits(1)?;
        ensure!(
            output.stderr.contains("DeadlineExceeded")
                || output.stderr.contains("timeout")
                || output.stderr.contains("deadline"),
            "the error does not name the timeout: {}",
            output.told()
        );
        wait_for("the process of the timed-out exec session to end", || {
            Ok((!node.asks(&["exec", "-s", &id, "ps"])?.contains("sleep 456")).then_some(()))
        })?;
        node.crictl(&["exec", "-s", &id, "/no/such/program"])
            .exits(1)?;
        node.asks(&["stop", "--timeout", "0", &id])?;
        let output = node.crictl(&["exec", "-s", &id, "true"]).exits(1)?;
        ensure!(
            output.stderr.contains("not running")
                || output.stderr.contains("exited")
                || output.stderr.contains("EXITED"),
            "the error does not state that the container is not running: {}",
            output.told()
        );
        Ok(())
    })
}

/// Returns the number of exec sessions that have a cgroup in the container's cgroup.
fn exec_cgroups(node: &Node, container: &str) -> Result<usize> {
    let names = fs::read_dir(node.cgroup(container)?)?
        .map(|entry| Ok(entry?.file_name().to_string_lossy().into_owned()))
        .collect::<Result<Vec<_>>>()?;
    Ok(names
        .iter()
        .filter(|name| name.starts_with("rrun-exec-"))
        .count())
}

/// This test is for rrun only. When an exec session times out, containerd kills only the first
/// process of the session.
fn an_exec_timeout_kills_the_whole_session_but_no_daemon_of_an_earlier_session() -> Result {
    on_a_node(|node| {
        node.pull(BUSYBOX)?;
        for handler in ["", "runc", "crun"] {
            if !handler.is_empty() && program_path(handler).is_none() {
                note(format!(
                    "the runtime {handler} is not installed, so the test runs no exec session with this runtime"
                ));
                continue;
            }
            let pod = node.pod(&format!("daemons{handler}"));
            let pod_id = node.runp_by(handler, &pod)?;
            let id = node.run(&pod_id, &pod, &node.container("main", &["sleep", "600"]))?;
            // The first sleep is an orphan with its own session id. Neither its parent nor its
            // session id shows that the exec session started this sleep.
            let script = "(setsid sleep 1111 &) ; sleep 1112";
            node.crictl(&["exec", "-s", "--timeout", "2", &id, "sh", "-c", script])
                .exits(1)?;
            let processes = || node.asks(&["exec", "-s", &id, "ps"]);
            wait_for("all processes of the exec session to be killed", || {
                let processes = processes()?;
                Ok((!processes.contains("sleep 111")).then_some(()))
            })?;

            let script = "(setsid sleep 1113 >/dev/null 2>&1 &)";
            node.asks(&["exec", "-s", &id, "sh", "-c", script])?;
            let left = processes()?;
            ensure!(
                left.contains("sleep 1113"),
                "the daemon that a finished exec session started no longer runs (runtime handler {handler:?}); processes in the container: {left}"
            );
            wait_for(
                "the cgroups of all exec sessions except the daemon's cgroup to be removed",
                || Ok((exec_cgroups(node, &id)? == 1).then_some(())),
            )?;
            node.asks(&["exec", "-s", &id, "pkill", "-f", "sleep 1113"])?;
            wait_for("the daemon's cgroup to be removed", || {
                Ok((exec_cgroups(node, &id)? == 0).then_some(()))
            })?;
            ensure_eq!(
                node.status(&id)?["state"],
                "CONTAINER_RUNNING",
                "the container's state after the exec sessions"
            );
        }
        Ok(())
    })
}

fn the_container_status_keeps_the_exit_code_and_the_reason_and_the_times() -> Result {
    on_a_node(|node| {
        node.pull(BUSYBOX)?;
        let pod = node.pod("exits");
        let pod_id = node.runp(&pod)?;
        for (name, command, code, reason) in [
            ("well", &["true"][..], 0, "Completed"),
            ("badly", &["sh", "-c", "exit 3"], 3, "Error"),
        ] {
            let id = node.run(&pod_id, &pod, &node.container(name, command))?;
            let status = node.exited(&id)?;
            ensure_eq!(
                status["exitCode"],
                json!(code),
                "exit code of the container {name}"
            );
            ensure_eq!(
                status["reason"],
                reason,
                "reason in the status of the container {name}"
            );
            for time in ["createdAt", "startedAt", "finishedAt"] {
                ensure!(
                    is_time(&status[time]),
                    "the field {time} in the status of the container {name} is not a valid time: {}",
                    status[time]
                );
            }
            ensure!(
                status["createdAt"].as_str() <= status["startedAt"].as_str()
                    && status["startedAt"].as_str() <= status["finishedAt"].as_str(),
                "the times in the status of the container {name} are out of order: {status}"
            );
        }
        // containerd runs the OCI runtime during StartContainer. CRI-O and rrun-cri run the runtime
        // during CreateContainer, which then reports the missing program.
        let nowhere = node.container("nowhere", &["/no/such/program"]);
        let failed = match node.create(&pod_id, &pod, &nowhere) {
            Err(failed) => {
                // kubelet counts each log file as one attempt to start the container. A failed
                // CreateContainer must therefore leave no log file. If the log file existed before
                // the call, a failed CreateContainer must not remove the log file.
                let log = node.join("logs/exits/nowhere.log");
                ensure!(!log.exists(), "the failed CreateContainer left a log file");
                fs::write(&log, "")?;
                ensure!(
                    node.create(&pod_id, &pod, &nowhere).is_err(),
                    "the second CreateContainer succeeded for a container whose program does not exist"
                );
                ensure!(
                    log.exists(),
                    "the failed CreateContainer removed an older log file"
                );
                failed
            }
            Ok(id) => {
                let failed = node
                    .asks(&["start", &id])
                    .err()
                    .ok_or("the server started a container although its program does not exist")?;
                let status = node.exited(&id)?;
                ensure_eq!(
                    status["exitCode"],
                    json!(128),
                    "exit code of a container that never started"
                );
                ensure_eq!(
                    status["reason"],
                    "StartError",
                    "reason in the status of a container that never started"
                );
                failed
            }
        };
        let message = failed.message().unwrap_or_default();
        for part in ["/no/such/program", "no such file or directory"] {
            ensure!(
                message.contains(part),
                "the error message about the missing program does not contain {part:?}: {message}"
            );
        }
        Ok(())
    })
}

fn stop_waits_for_the_grace_period_and_then_kills_the_container() -> Result {
    on_a_node(|node| {
        node.pull(BUSYBOX)?;
        let pod = node.pod("stops");
        let pod_id = node.runp(&pod)?;
        let obeys = node.run(
            &pod_id,
            &pod,
            &node.container("obeys", &["/inside", "wait"]),
        )?;
        let deaf = node.run(&pod_id, &pod, &node.container("deaf", &["/inside", "deaf"]))?;
        for (pod, id) in [("obeys", &obeys), ("deaf", &deaf)] {
            wait_for("the container to log that it is ready", || {
                Ok(node.log_of("stops", pod)?.contains("ready").then_some(id))
            })?;
        }
        // The exit code 0 shows that the container was not killed with SIGKILL.
        node.asks(&["stop", "--timeout", "60", &obeys])?;
        ensure_eq!(
            node.status(&obeys)?["exitCode"],
            json!(0),
            "exit code of the container that obeys SIGTERM"
        );

        let started = Instant::now();
        node.asks(&["stop", "--timeout", "2", &deaf])?;
        ensure!(
            started.elapsed() >= Duration::from_secs(2),
            "the server killed the container before the grace period ended"
        );
        ensure_eq!(
            node.status(&deaf)?["exitCode"],
            json!(137),
            "exit code of the container that ignores SIGTERM"
        );
        // Stopping a stopped container again is not an error.
        node.asks(&["stop", &deaf])?;
        node.asks(&["rm", &deaf])?;
        // A running container can be removed only with --force.
        let running = node.run(&pod_id, &pod, &node.container("running", &["sleep", "600"]))?;
        node.crictl(&["rm", &running]).exits(1)?;
        node.asks(&["rm", "--force", &running])?;
        Ok(())
    })
}
