//! Tests of the runtime handlers rrun, runc and crun on one node. Each handler supports all
//! features of a container.

use std::fs;
use std::os::unix::fs::PermissionsExt;

use serde_json::{Value, json};

use crate::support::machine::{Result, program_path};
use crate::support::needs::{Need, Test};
use crate::support::node::{A_NODE, BUSYBOX, Node, is_rrun, on_a_node};
use crate::{ensure, ensure_eq, test};

pub(crate) const TESTS: &[Test] = &[
    test!(containers_behave_the_same_under_every_handler, A_NODE),
    test!(
        the_server_reports_a_handler_whose_runtime_is_missing,
        A_NODE,
        Need::RrunCri
    ),
    test!(
        a_wrapper_around_rrun_sees_the_complete_bundle,
        A_NODE,
        Need::RrunCri
    ),
];

fn containers_behave_the_same_under_every_handler() -> Result {
    on_a_node(|node| {
        node.pull(BUSYBOX)?;
        for handler in ["", "runc", "crun"] {
            if handler.is_empty() || program_path(handler).is_some() {
                check_handler(node, handler).map_err(|failed| {
                    format!(
                        "test of the runtime handler {handler:?}: {}",
                        failed.message().unwrap_or_default()
                    )
                })?;
            }
        }
        Ok(())
    })
}

fn check_handler(node: &mut Node, handler: &str) -> Result {
    let name = format!("by-{handler}x");
    let mut pod = node.pod(&name);
    pod["linux"]["sysctls"] = json!({ "kernel.shm_rmid_forced": "1" });
    let pod_id = node.runp_by(handler, &pod)?;
    let inspected = node.json(&["inspectp", &pod_id])?;
    let reported = inspected["status"]["runtimeHandler"].as_str();
    ensure_eq!(
        reported.unwrap_or_default(),
        handler,
        "the runtime handler in the pod's status"
    );
    let mut container = node.container("report", &["/inside", "report"]);
    container["linux"]["security_context"] = json!({
        "namespace_options": { "pid": 1 },
        "run_as_user": { "value": 1000 }, "run_as_group": { "value": 2000 },
        "supplemental_groups": [3000], "supplemental_groups_policy": 1,
        "no_new_privs": true, "readonly_rootfs": true,
        "capabilities": { "drop_capabilities": ["ALL"], "add_ambient_capabilities": ["NET_RAW"] },
    });
    let report = node.report(&pod_id, &pod, &container)?;
    ensure_eq!(
        (
            &report["uid"],
            &report["gid"],
            &report["status"]["NoNewPrivs"]
        ),
        (&json!(1000), &json!(2000), &json!("1")),
        "user id, group id and NoNewPrivs of the container"
    );
    ensure_eq!(
        report["groups"],
        json!([2000, 3000]),
        "supplementary groups of the container"
    );
    for set in ["CapBnd", "CapPrm", "CapEff", "CapInh", "CapAmb"] {
        ensure_eq!(
            report["status"][set],
            "0000000000002000",
            "capability set {set} in the container's /proc/self/status"
        );
    }
    ensure_eq!(
        report["hostname"],
        json!(name),
        "host name of the container"
    );

    // The next three containers test other features. The first has a stop signal. The second shares
    // the PID namespace of a target container, like an ephemeral container. The third has a
    // terminal on all standard streams.
    let mut main = node.container(
        "main",
        &[
            "sh",
            "-c",
            "trap 'exit 7' USR1; while :; do sleep 0.1; done",
        ],
    );
    main["stop_signal"] = json!(29);
    let id = node.run(&pod_id, &pod, &main)?;
    let mut debug = node.container("debug", &["sleep", "600"]);
    debug["linux"]["security_context"]["namespace_options"] = json!({ "pid": 3, "target_id": id });
    let debug = node.run(&pod_id, &pod, &debug)?;
    let ps = node.asks(&["exec", "-s", &debug, "ps"])?;
    ensure!(
        ps.contains("trap"),
        "the ephemeral container does not see the target's processes: {ps}"
    );
    ensure_eq!(
        node.asks(&[
            "exec",
            "-s",
            &debug,
            "cat",
            "/proc/sys/kernel/shm_rmid_forced"
        ])?
        .trim(),
        "1",
        "value of the pod's sysctl kernel.shm_rmid_forced"
    );
    let mut tty = node.container("tty", &["/inside", "report"]);
    tty["tty"] = json!(true);
    let report = node.report(&pod_id, &pod, &tty)?;
    ensure_eq!(
        report["tty"],
        json!([true, true, true]),
        "whether stdin, stdout and stderr are terminals"
    );
    let status = node.status(&id)?;
    if is_rrun() {
        ensure_eq!(status["stopSignal"], "SIGUSR1", "stop signal in {status}");
    }
    node.asks(&["stop", "--timeout", "20", &id])?;
    ensure_eq!(
        node.status(&id)?["exitCode"],
        json!(7),
        "exit code of the container after its stop signal"
    );

    // A privileged container has the node's capabilities, a writable /sys and no masked paths in
    // /proc.
    let mut pod = node.pod(&format!("{name}-privileged"));
    pod["linux"]["security_context"]["privileged"] = json!(true);
    let pod_id = node.runp_by(handler, &pod)?;
    let mut main = node.container("main", &["/inside", "report"]);
    main["linux"]["security_context"]["privileged"] = json!(true);
    let report = node.report(&pod_id, &pod, &main)?;
    let own = std::fs::read_to_string("/proc/self/status")?;
    let own = own.lines().find_map(|line| line.strip_prefix("CapBnd:"));
    ensure_eq!(
        report["status"]["CapEff"].as_str(),
        own.map(str::trim),
        "capabilities of the privileged container"
    );
    let options = |place: &str| {
        let lines = report["mounts"]
            .as_array()
            .into_iter()
            .flatten()
            .filter_map(Value::as_str);
        let mut lines = lines.filter(|line| line.split(' ').nth(4) == Some(place));
        lines
            .next_back()
            .and_then(|line| line.split(' ').nth(5).map(str::to_owned))
    };
    let sys = options("/sys").unwrap_or_default();
    ensure!(sys.starts_with("rw"), "/sys is not writable: {sys}");
    ensure!(options("/proc/kcore").is_none(), "/proc/kcore is masked");
    // The server refuses a privileged container in a pod that is not privileged.
    let mut main = node.container("refused", &["true"]);
    main["linux"]["security_context"]["privileged"] = json!(true);
    let pod = node.pod(&format!("{name}-plain"));
    let pod_id = node.runp_by(handler, &pod)?;
    let made = node.create(&pod_id, &pod, &main);
    ensure!(
        made.is_err(),
        "the server created a privileged container in an unprivileged pod"
    );
    Ok(())
}

fn the_server_reports_a_handler_whose_runtime_is_missing() -> Result {
    on_a_node(|node| {
        let info: Value = serde_json::from_str(&node.asks(&["info"])?)?;
        let conditions = info["status"]["conditions"]
            .as_array()
            .cloned()
            .unwrap_or_default();
        let ready = |kind: &str| conditions.iter().find(|one| one["type"] == kind);
        ensure_eq!(
            ready("RuntimeReady").map(|one| &one["status"]),
            Some(&json!(true)),
            "status of the condition RuntimeReady"
        );
        let reported =
            ready("RuntimeHandlersReady").ok_or("the condition RuntimeHandlersReady is missing")?;
        ensure!(
            reported["message"]
                .as_str()
                .is_some_and(|m| m.contains("/no/such/runtime")),
            "the condition RuntimeHandlersReady does not name the missing runtime: {reported}"
        );
        let features = info["runtimeHandlers"]
            .as_array()
            .cloned()
            .unwrap_or_default();
        let absent = features.iter().find(|one| one["name"] == "absent");
        ensure!(
            absent.is_some_and(|one| one["features"]["user_namespaces"] != true),
            "the handler without a runtime reports the feature user_namespaces: {features:?}"
        );
        let failed = node
            .runp_by("absent", &node.pod("absent"))
            .err()
            .ok_or("the server created a pod for a handler whose runtime is missing")?;
        let message = failed.message().unwrap_or_default();
        ensure!(
            message.contains("/no/such/runtime"),
            "the error of RunPodSandbox does not name the missing runtime: {message}"
        );
        let failed = node
            .runp_by("unknown", &node.pod("unknown"))
            .err()
            .ok_or("the server created a pod for an unknown handler")?;
        ensure!(
            failed.message().unwrap_or_default().contains("unknown"),
            "the error does not name the unknown handler"
        );
        Ok(())
    })
}

/// The wrapper acts like nvidia-container-runtime: it edits the bundle and then runs rrun. The
/// option `--after` makes a runtime start before its bundle is complete. The server must not pass
/// this option to a wrapper.
fn a_wrapper_around_rrun_sees_the_complete_bundle() -> Result {
    on_a_node(|node| {
        let program = node.join("before");
        fs::write(
            &program,
            "#!/bin/sh\n\
             case \"$*\" in *--after*) echo 'the bundle is still being written' >&2; exit 1 ;; esac\n\
             for argument; do\n\
             [ \"$previous\" != --bundle ] || sed -i s/SEEN=no/SEEN=yes/ \"$argument/config.json\"\n\
             previous=$argument\n\
             done\n\
             exec rrun \"$@\"\n",
        )?;
        fs::set_permissions(&program, fs::Permissions::from_mode(0o755))?;
        fs::write(
            node.join("config.d/50-before.toml"),
            format!("[runtime.before]\npath = {program:?}\n"),
        )?;
        node.terminate_server()?;
        node.start_server()?;
        node.pull(BUSYBOX)?;
        let pod = node.pod("before");
        let pod_id = node.runp_by("before", &pod)?;
        let mut container = node.container("asks", &["sh", "-c", "echo $SEEN"]);
        container["envs"] = json!([{ "key": "SEEN", "value": "no" }]);
        let id = node.run(&pod_id, &pod, &container)?;
        node.exited(&id)?;
        let log = node.log_of("before", "asks")?;
        ensure!(
            log.ends_with(" F yes\n"),
            "the container's log lacks the value that the wrapper wrote to the bundle: {log}"
        );
        Ok(())
    })
}
