//! Containers by crictl: their configuration, logs, execs and ends.

use std::fs;
use std::time::{Duration, Instant};

use serde_json::{Value, json};

use crate::support::machine::{Result, note, program_path, wait_for};
use crate::support::needs::{Need, Test};
use crate::support::node::{A_NODE, BUSYBOX, Node, is_rrun, on_a_node};
use crate::{ensure, ensure_eq, test};

pub(crate) const TESTS: &[Test] = &[
    test!(a_container_gets_what_its_configuration_says, A_NODE),
    test!(
        what_every_container_has_mounted_leaves_its_writable_layer_empty,
        A_NODE
    ),
    test!(logs_have_both_streams_in_order, A_NODE),
    test!(exec_gives_output_exit_code_and_ends_in_time, A_NODE),
    test!(
        what_an_exec_started_dies_with_it_and_a_daemon_stays,
        A_NODE,
        Need::RrunCri
    ),
    test!(exit_codes_reasons_and_times_are_kept, A_NODE),
    test!(stop_gives_the_grace_period_and_then_kills, A_NODE),
];

/// RFC 3339 to the second, and later than the year 2020.
fn is_time(value: &Value) -> bool {
    value
        .as_str()
        .is_some_and(|time| time.len() >= 20 && time > "2020-01-01T00:00:00")
}

fn a_container_gets_what_its_configuration_says() -> Result {
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
            "user and group"
        );
        ensure!(
            report["groups"]
                .as_array()
                .is_some_and(|groups| groups.contains(&json!(3000))),
            "{}",
            report["groups"]
        );
        ensure_eq!(report["cwd"], "/tmp", "working directory");
        ensure_eq!(report["env"]["ANSWER"], "42", "environment");
        ensure!(
            report["env"]["PATH"]
                .as_str()
                .is_some_and(|path| path.contains("/bin")),
            "the image's environment"
        );
        ensure_eq!(report["status"]["NoNewPrivs"], "1", "no_new_privs");
        ensure_eq!(
            report["status"]["CapBnd"],
            "0000000000000400",
            "bounding set"
        );
        ensure_eq!(report["hostname"], "config", "host name");
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
                "{point} is {options}"
            );
        }

        // What the image says is the default; a user by name is looked up in it.
        let mut container = node.container("name", &["/inside", "report"]);
        container["linux"]["security_context"]["run_as_username"] = json!("www-data");
        let id = node.run(&pod_id, &pod, &container)?;
        node.exited(&id)?;
        let report: Value = serde_json::from_str(&node.asks(&["logs", &id])?)?;
        ensure_eq!(
            (&report["uid"], &report["gid"]),
            (&json!(33), &json!(33)),
            "www-data"
        );

        let id = node.create(&pod_id, &pod, &node.container("labels", &["sleep", "600"]))?;
        let status = node.status(&id)?;
        ensure_eq!(
            status["mounts"].as_array().map(Vec::len),
            Some(1),
            "mounts in the status"
        );
        Ok(())
    })
}

fn what_every_container_has_mounted_leaves_its_writable_layer_empty() -> Result {
    on_a_node(|node| {
        node.pull(BUSYBOX)?;
        let pod = node.pod("untouched");
        let pod_id = node.runp(&pod)?;
        let mut container = node.container("untouched", &["sleep", "600"]);
        container["mounts"] = json!([]);
        let id = node.run(&pod_id, &pod, &container)?;
        let inside = |script: &str| node.asks(&["exec", "-s", &id, "sh", "-c", script]);
        // BusyBox's image has /etc and none of these in it.
        let mounts = inside("cat /proc/mounts")?;
        for place in ["/etc/hosts", "/etc/hostname", "/etc/resolv.conf"] {
            let is_mounted = |line: &str| line.split(' ').nth(1) == Some(place);
            ensure!(mounts.lines().any(is_mounted), "{place} is not mounted");
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
            ensure_eq!(written()?, Vec::<std::ffi::OsString>::new(), "before");
            inside("echo a >/etc/new")?;
            ensure_eq!(written()?, ["etc"], "after a write");
        }
        Ok(())
    })
}

fn logs_have_both_streams_in_order() -> Result {
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
        ensure_eq!(output.stdout, "to stdout\nno line end", "standard output");
        ensure_eq!(output.stderr, "to stderr\n", "standard error");
        let file = node.log_of("logs", "both")?;
        let lines: Vec<Vec<&str>> = file
            .lines()
            .map(|line| line.splitn(4, ' ').collect())
            .collect();
        ensure_eq!(lines.len(), 3, "lines in {file:?}");
        for line in &lines {
            ensure_eq!(line.len(), 4, "parts of {line:?}");
            ensure!(is_time(&json!(line[0])), "the time of {line:?}");
        }
        ensure!(
            lines
                .iter()
                .any(|line| line[1..] == ["stdout", "F", "to stdout"]),
            "{file}"
        );
        ensure!(
            lines
                .iter()
                .any(|line| line[1..] == ["stderr", "F", "to stderr"]),
            "{file}"
        );
        ensure!(
            lines
                .iter()
                .any(|line| line[1] == "stdout" && line[3] == "no line end"),
            "{file}"
        );

        // As fast as it can, nothing is lost.
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
            "the lines are not in order"
        );
        ensure_eq!(text.lines().count(), 20_000, "lines");
        let tail = node.asks(&["logs", "--tail", "2", &id])?;
        ensure_eq!(tail, "line 19999\nline 20000", "the last two lines");

        // A line longer than a record is cut into parts, and given back whole.
        let long = "head -c 40000 /dev/zero | tr '\\0' x; echo";
        let id = node.run(&pod_id, &pod, &node.container("long", &["sh", "-c", long]))?;
        node.exited(&id)?;
        ensure_eq!(
            node.asks(&["logs", &id])?,
            "x".repeat(40_000),
            "the long line"
        );
        let file = node.log_of("logs", "long")?;
        ensure!(
            file.lines().any(|line| line.contains(" stdout P ")),
            "no partial record in the log"
        );
        Ok(())
    })
}

fn exec_gives_output_exit_code_and_ends_in_time() -> Result {
    on_a_node(|node| {
        node.pull(BUSYBOX)?;
        let pod = node.pod("exec");
        let pod_id = node.runp(&pod)?;
        let id = node.run(&pod_id, &pod, &node.container("main", &["sleep", "600"]))?;
        let script = "echo out; echo err >&2; exit 7";
        let output = node
            .crictl(&["exec", "-s", &id, "sh", "-c", script])
            .end()?;
        ensure!(output.code != 0, "{}", output.told());
        let told = format!("{}{}", output.stdout, output.stderr);
        for part in ["out", "err", "7"] {
            ensure!(told.contains(part), "no {part:?} in:\n{}", output.told());
        }
        let output = node
            .crictl(&["exec", "-s", "--timeout", "2", &id, "sleep", "456"])
            .exits(1)?;
        ensure!(
            output.stderr.contains("DeadlineExceeded")
                || output.stderr.contains("timeout")
                || output.stderr.contains("deadline"),
            "{}",
            output.told()
        );
        wait_for("the process to be gone", || {
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
            "{}",
            output.told()
        );
        Ok(())
    })
}

/// The cgroups below the container's that execs are in.
fn exec_cgroups(node: &Node, container: &str) -> Result<usize> {
    let names = fs::read_dir(node.cgroup(container)?)?
        .map(|entry| Ok(entry?.file_name().to_string_lossy().into_owned()))
        .collect::<Result<Vec<_>>>()?;
    Ok(names
        .iter()
        .filter(|name| name.starts_with("rrun-exec-"))
        .count())
}

/// containerd kills the first process only.
fn what_an_exec_started_dies_with_it_and_a_daemon_stays() -> Result {
    on_a_node(|node| {
        node.pull(BUSYBOX)?;
        for handler in ["", "runc", "crun"] {
            if !handler.is_empty() && program_path(handler).is_none() {
                note(format!("no {handler} here: its execs are not tried"));
                continue;
            }
            let pod = node.pod(&format!("daemons{handler}"));
            let pod_id = node.runp_by(handler, &pod)?;
            let id = node.run(&pod_id, &pod, &node.container("main", &["sleep", "600"]))?;
            // A session of its own, and an orphan: neither leads back to the exec.
            let script = "(setsid sleep 1111 &) ; sleep 1112";
            node.crictl(&["exec", "-s", "--timeout", "2", &id, "sh", "-c", script])
                .exits(1)?;
            let processes = || node.asks(&["exec", "-s", &id, "ps"]);
            wait_for("all that the exec started to be gone", || {
                let processes = processes()?;
                Ok((!processes.contains("sleep 111")).then_some(()))
            })?;

            let script = "(setsid sleep 1113 >/dev/null 2>&1 &)";
            node.asks(&["exec", "-s", &id, "sh", "-c", script])?;
            let left = processes()?;
            ensure!(left.contains("sleep 1113"), "{handler}: no daemon: {left}");
            wait_for("all execs' cgroups but the daemon's to go", || {
                Ok((exec_cgroups(node, &id)? == 1).then_some(()))
            })?;
            node.asks(&["exec", "-s", &id, "pkill", "-f", "sleep 1113"])?;
            wait_for("the daemon's cgroup to go", || {
                Ok((exec_cgroups(node, &id)? == 0).then_some(()))
            })?;
            ensure_eq!(node.status(&id)?["state"], "CONTAINER_RUNNING", "state");
        }
        Ok(())
    })
}

fn exit_codes_reasons_and_times_are_kept() -> Result {
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
            ensure_eq!(status["exitCode"], json!(code), "exit code of {name}");
            ensure_eq!(status["reason"], reason, "reason of {name}");
            for time in ["createdAt", "startedAt", "finishedAt"] {
                ensure!(
                    is_time(&status[time]),
                    "{time} of {name} is {}",
                    status[time]
                );
            }
            ensure!(
                status["createdAt"].as_str() <= status["startedAt"].as_str()
                    && status["startedAt"].as_str() <= status["finishedAt"].as_str(),
                "the times of {name} are out of order: {status}"
            );
        }
        // containerd runs the runtime at start; CRI-O and rrun-cri do at create, and tell then.
        let nowhere = node.container("nowhere", &["/no/such/program"]);
        let failed = match node.create(&pod_id, &pod, &nowhere) {
            Err(failed) => {
                // kubelet takes a log for an attempt. One that was there is not ours.
                let log = node.join("logs/exits/nowhere.log");
                ensure!(!log.exists(), "a log of what never was");
                fs::write(&log, "")?;
                ensure!(node.create(&pod_id, &pod, &nowhere).is_err(), "it is made");
                ensure!(log.exists(), "somebody else's log is gone");
                failed
            }
            Ok(id) => {
                let failed = node.asks(&["start", &id]).err().ok_or("it started")?;
                let status = node.exited(&id)?;
                ensure_eq!(
                    status["exitCode"],
                    json!(128),
                    "exit code of what never started"
                );
                ensure_eq!(
                    status["reason"],
                    "StartError",
                    "reason of what never started"
                );
                failed
            }
        };
        let message = failed.message().unwrap_or_default();
        for part in ["/no/such/program", "no such file or directory"] {
            ensure!(message.contains(part), "no {part:?} in {message}");
        }
        Ok(())
    })
}

fn stop_gives_the_grace_period_and_then_kills() -> Result {
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
            wait_for("it to be ready", || {
                Ok(node.log_of("stops", pod)?.contains("ready").then_some(id))
            })?;
        }
        // Killed, it would have another.
        node.asks(&["stop", "--timeout", "60", &obeys])?;
        ensure_eq!(
            node.status(&obeys)?["exitCode"],
            json!(0),
            "exit code of the obedient one"
        );

        let started = Instant::now();
        node.asks(&["stop", "--timeout", "2", &deaf])?;
        ensure!(
            started.elapsed() >= Duration::from_secs(2),
            "it got no grace period"
        );
        ensure_eq!(
            node.status(&deaf)?["exitCode"],
            json!(137),
            "exit code of the deaf one"
        );
        // Once more is no error.
        node.asks(&["stop", &deaf])?;
        node.asks(&["rm", &deaf])?;
        // A running one is removed by force only.
        let running = node.run(&pod_id, &pod, &node.container("running", &["sleep", "600"]))?;
        node.crictl(&["rm", &running]).exits(1)?;
        node.asks(&["rm", "--force", &running])?;
        Ok(())
    })
}
