//! Tests of the server's configuration, of the errors in a configuration, of the warnings that the
//! server logs at start, and of invalid requests.

use std::fs;

use serde_json::{Value, json};

use crate::support::machine::{Directory, Result, command, wait_for};
use crate::support::needs::{Need, Test};
use crate::support::node::{A_NODE, BUSYBOX, CRICTL, Node, SERVER, on_a_node};
use crate::{ensure, ensure_eq, test};

pub(crate) const TESTS: &[Test] = &[
    test!(
        the_configuration_sets_rlimits_and_allows_annotations,
        A_NODE,
        Need::RrunCri
    ),
    test!(
        a_configuration_error_names_the_file_and_the_line_and_the_key,
        Need::RrunCri,
        SERVER
    ),
    test!(
        the_server_logs_at_start_what_the_node_lacks,
        CRICTL,
        SERVER,
        Need::RrunCri
    ),
    test!(
        the_systemd_driver_puts_a_pod_in_a_slice_and_a_container_in_a_scope,
        A_NODE,
        Need::File("/run/systemd/system"),
        Need::Controller("memory"),
        Need::RrunCri
    ),
    test!(
        the_refusal_of_an_invalid_request_names_the_field,
        A_NODE,
        Need::RrunCri
    ),
];

fn the_configuration_sets_rlimits_and_allows_annotations() -> Result {
    on_a_node(|node| {
        fs::write(
            node.join("config.d/10.toml"),
            "rlimits = ['nofile=1234:2345', 'core=0']\n[runtime.rrun]\npath = 'rrun'\n\
             pod_annotations = ['pod.*']\ncontainer_annotations = ['own/*']\n",
        )?;
        node.terminate_server()?;
        node.start_server()?;
        node.pull(BUSYBOX)?;
        let mut pod = node.pod("configured");
        pod["annotations"] = json!({ "pod.a": "1", "other": "2" });
        let pod_id = node.runp(&pod)?;
        let mut container = node.container("report", &["/inside", "report"]);
        container["annotations"] = json!({ "own/b": "3", "other": "4" });
        let id = node.run(&pod_id, &pod, &container)?;
        node.exited(&id)?;
        let report: Value = serde_json::from_str(&node.asks(&["logs", &id])?)?;
        ensure_eq!(
            report["limits"]["RLIMIT_NOFILE"],
            json!([1234, 2345]),
            "the container's RLIMIT_NOFILE"
        );
        ensure_eq!(
            report["limits"]["RLIMIT_CORE"],
            json!([0, 0]),
            "the container's RLIMIT_CORE"
        );
        let info = node.json(&["inspect", &id])?;
        let annotations = info.pointer("/info/runtimeSpec/annotations");
        ensure_eq!(
            annotations,
            Some(&json!({ "pod.a": "1", "own/b": "3" })),
            "annotations in the container's runtime spec"
        );
        Ok(())
    })
}

/// Checks the errors in a configuration. `rrun-cri config check` reports these errors, and a
/// starting server reports the same errors. Also checks the errors that rrun-monitor reports for
/// its command line.
fn a_configuration_error_names_the_file_and_the_line_and_the_key() -> Result {
    let directory = Directory::new("mistakes")?;
    let config = directory.join("config.toml");
    let hosts = directory.join("certs.d/example.org");
    fs::create_dir_all(&hosts)?;
    fs::create_dir(directory.join("config.d"))?;
    let hosts = hosts.join("hosts.toml");
    let main = format!("registry_config_path = {:?}\n", directory.join("certs.d"));
    let cri = |args: &[&str]| command("rrun-cri", args).arg("--config").arg(&config);
    let empty = directory.join("empty.pem").display().to_string();
    fs::write(&empty, "")?;
    for (mistake, expected) in [
        ("nonsense = 1\n", "line 3, nonsense"),
        (
            "[network]\nrange = ''\nrange6 = ''\n",
            "line 4, network.range",
        ),
        ("default_runtime = 'none'\n", "line 3, default_runtime"),
        (
            "unset_seccomp_profile = 'none'\n",
            "line 3, unset_seccomp_profile",
        ),
        ("stream_tls_cert = '/x'\n", "line 3, stream_tls_cert"),
        ("stream_tls_key = '/x'\n", "line 3, stream_tls_key"),
        ("stream_idle_timeout = 0\n", "line 3, stream_idle_timeout"),
        ("stream_sessions = 0\n", "line 3, stream_sessions"),
        (
            "container_terminals = 1048577\n",
            "line 3, container_terminals",
        ),
        (
            "[cni]\ntimeout_seconds = 0\n",
            "line 4, cni.timeout_seconds",
        ),
        (
            &format!("stream_tls_cert = {empty:?}\nstream_tls_key = {empty:?}\n"),
            "line 4, stream_tls_key",
        ),
    ] {
        fs::write(&config, &main)?;
        let drop_in = directory.join("config.d/10.toml");
        fs::write(&drop_in, format!("# a comment\n\n{mistake}"))?;
        let expected = format!("{}, {expected}", drop_in.display());
        for args in [&["config", "check"][..], &[]] {
            let output = cri(args).exits(1)?;
            ensure!(
                output.stderr.contains(&expected),
                "the output of rrun-cri does not contain the expected error place {expected:?}:\n{}",
                output.told()
            );
        }
        fs::remove_file(&drop_in)?;
    }
    // This error is on the command line and not in a file. The error message therefore names only
    // the option.
    let output = cri(&["--listen", "nowhere"]).exits(1)?;
    ensure!(
        output.stderr.contains("rrun-cri: listen: "),
        "the error message of rrun-cri does not name the option --listen: {}",
        output.told()
    );
    fs::write(&hosts, "server = 3\n")?;
    let output = cri(&["config", "check"]).exits(1)?;
    let expected = format!("{}, line 1, server", hosts.display());
    ensure!(
        output.stderr.contains(&expected),
        "the output of rrun-cri does not contain the expected error place {expected:?}:\n{}",
        output.told()
    );
    fs::write(&hosts, "server = 'https://x'\nsever = 3\n")?;
    let output = cri(&["config", "check"]).ok()?;
    let expected = format!("{}, line 2, sever", hosts.display());
    ensure!(
        output.stderr.contains(&expected),
        "the output of rrun-cri does not contain the expected error place {expected:?}:\n{}",
        output.told()
    );
    fs::remove_file(&hosts)?;
    let output = cri(&["config", "check"]).ok()?;
    ensure_eq!(
        output.stderr,
        "",
        "standard error of `rrun-cri config check` for a correct configuration"
    );
    for flag in ["--help", "-h"] {
        command("rrun-monitor", [flag])
            .ok()?
            .says("usage: rrun-monitor")?;
    }
    command("rrun-monitor", ["--version"])
        .ok()?
        .says("rrun-monitor ")?;
    command("rrun-monitor", ["--nonsense", "x"]).exits(1)?;
    Ok(())
}

fn the_server_logs_at_start_what_the_node_lacks() -> Result {
    on_a_node(|node| {
        let logged = |node: &mut Node, what: &str| {
            let what = what.to_owned();
            wait_for(&format!("the server to log {what:?}"), || {
                Ok(node.log().contains(&what).then_some(()))
            })
        };
        logged(
            node,
            "the runtime handler \"absent\": the runtime /no/such/runtime does not exist",
        )?;
        let controllers = fs::read_to_string("/sys/fs/cgroup/cgroup.controllers")?;
        let lacks = ["cpu", "cpuset", "io", "memory", "pids"]
            .into_iter()
            .filter(|one| !controllers.split_whitespace().any(|had| had == *one))
            .collect::<Vec<_>>()
            .join(", ");
        if lacks.is_empty() {
            ensure!(
                !node.log().contains("lacks the cgroup controllers"),
                "the server's log reports missing cgroup controllers, but no controller is missing:\n{}",
                node.log()
            );
        } else {
            logged(
                node,
                &format!("/sys/fs/cgroup lacks the cgroup controllers {lacks}:"),
            )?;
        }
        for what in [
            "pods cannot be created",
            "systemd is not PID 1",
            "CNI plugin",
        ] {
            ensure!(
                !node.log().contains(what),
                "the server's log contains the warning {what:?}, which does not apply to this node:\n{}",
                node.log()
            );
        }
        node.terminate_server()?;
        fs::write(
            node.join("config.d/10.toml"),
            "monitor = '/no/such/monitor'\ncni_bin_dir = '/no/such/plugins'\n\
             cgroup_driver = 'systemd'\ndefault_runtime = 'absent'\n",
        )?;
        node.has_cni_bridge()?;
        node.start_server()?;
        logged(node, "the monitor /no/such/monitor does not exist")?;
        logged(
            node,
            "(pods cannot be created, because this handler is the default handler)",
        )?;
        logged(node, "10-bridge.conflist: the CNI plugin bridge")?;
        if Need::Systemd.lacking().is_some() {
            logged(
                node,
                "cgroup_driver is \"systemd\", but systemd is not PID 1",
            )?;
        }
        fs::write(
            node.join("config.d/10.toml"),
            "monitor = '/no/such/monitor'\n",
        )?;
        node.terminate_server()?;
        node.start_server()?;
        let ready = node.json(&["info"])?;
        let condition = &ready["status"]["conditions"][0];
        ensure_eq!(
            condition["status"],
            json!(false),
            "status field of the first condition in the output of crictl info (condition: {condition})"
        );
        ensure!(
            condition
                .to_string()
                .contains("the monitor /no/such/monitor does not exist"),
            "the node's first condition does not report that the monitor is missing: {condition}"
        );
        Ok(())
    })
}

fn the_systemd_driver_puts_a_pod_in_a_slice_and_a_container_in_a_scope() -> Result {
    const SLICE: &str = "e2e-burstable-pod1.slice";
    let result = on_a_node(|node| {
        node.pull(BUSYBOX)?;
        let config = node.asks(&["runtime-config"])?;
        ensure!(
            config.to_lowercase().contains("systemd"),
            "the cgroup driver is not systemd: {config}"
        );
        for handler in ["", "runc"] {
            let mut pod = node.pod(&format!("slice{handler}"));
            pod["linux"]["cgroup_parent"] = json!(SLICE);
            let pod_id = node.runp_by(handler, &pod)?;
            let mut main = node.container("main", &["sleep", "600"]);
            main["linux"]["resources"] =
                json!({ "memory_limit_in_bytes": 64 << 20, "cpu_shares": 102 });
            let id = node.run(&pod_id, &pod, &main)?;
            let group = node.cgroup(&id)?;
            let expected =
                format!("/sys/fs/cgroup/e2e.slice/e2e-burstable.slice/{SLICE}/cri-rrun-{id}.scope");
            ensure_eq!(
                group.display().to_string(),
                expected,
                "the container's cgroup"
            );
            let limit = || fs::read_to_string(group.join("memory.max"));
            ensure_eq!(
                limit()?.trim(),
                "67108864",
                "memory.max of the container's cgroup"
            );
            node.kill_server()?;
            node.start_server()?;
            node.asks(&["update", "--memory", "100663296", &id])?;
            ensure_eq!(
                limit()?.trim(),
                "100663296",
                "memory.max of the container's cgroup after an update"
            );
            let stats = node.json(&["stats", "--id", &id])?;
            let used = stats.pointer("/stats/0/memory/workingSetBytes/value");
            ensure!(
                used.is_some(),
                "the statistics have no memory usage: {stats}"
            );
            node.asks(&["stop", "--timeout", "0", &id])?;
            ensure_eq!(
                node.status(&id)?["exitCode"],
                json!(137),
                "exit code of the stopped container"
            );
            wait_for("systemd to remove the container's scope", || {
                Ok((!group.exists()).then_some(()))
            })?;
        }
        // A pod without a cgroup parent gets its own slice. The server removes this slice together
        // with the pod.
        let pod = node.pod("own");
        let pod_id = node.runp(&pod)?;
        let id = node.run(&pod_id, &pod, &node.container("main", &["sleep", "600"]))?;
        let group = node.cgroup(&id)?;
        ensure!(
            group.starts_with("/sys/fs/cgroup/rrun.slice"),
            "the pod's cgroup is not in rrun.slice: {}",
            group.display()
        );
        node.asks(&["rmp", "--force", &pod_id])?;
        let slice = group
            .parent()
            .ok_or("the container's cgroup has no parent")?
            .to_owned();
        ensure!(
            !slice.exists(),
            "the removed pod's slice {} still exists",
            slice.display()
        );
        // The cgroupfs driver requires a path as the cgroup parent, but the systemd driver requires
        // the name of a slice. The server uses the systemd driver, so it must refuse this path.
        let mut wrong = node.pod("wrong");
        wrong["linux"]["cgroup_parent"] = json!("/kubepods/pod1");
        let failed = node
            .runp(&wrong)
            .err()
            .ok_or("the server created a pod whose cgroup parent is not a slice")?;
        ensure!(
            failed.message().unwrap_or_default().contains("slice"),
            "the error does not report that the cgroup parent must be a slice"
        );
        Ok(())
    });
    let _ = command("systemctl", ["stop", "e2e.slice"]).end();
    result
}

fn the_refusal_of_an_invalid_request_names_the_field() -> Result {
    on_a_node(|node| {
        node.pull(BUSYBOX)?;
        let change = |mut config: Value, pointer: &str, value: Value| {
            let mut at = &mut config;
            for part in pointer.split('/') {
                at = &mut at[part];
            }
            *at = value;
            config
        };
        for (field, pointer, value) in [
            ("log_directory", "log_directory", json!("relative")),
            (
                "dns_config.servers",
                "dns_config/servers",
                json!(["1.1.1.1\nnameserver 2"]),
            ),
            (
                "run_as_group",
                "linux/security_context/run_as_group",
                json!({ "value": 5 }),
            ),
            (
                "vm.swappiness",
                "linux/sysctls",
                json!({ "vm.swappiness": "1" }),
            ),
            ("cgroup parent", "linux/cgroup_parent", json!("../../x")),
        ] {
            let failed = node.runp(&change(node.pod("wrong"), pointer, value)).err();
            let failed = failed.ok_or(format!(
                "the server created a pod although {pointer} in its configuration is invalid"
            ))?;
            let message = failed.message().unwrap_or_default();
            ensure!(
                message.contains(field),
                "the error message about the invalid {pointer} does not contain {field:?}: {message}"
            );
        }
        let pod = node.pod("right");
        let pod_id = node.runp(&pod)?;
        for (field, pointer, value) in [
            (
                "oom_score_adj",
                "linux/resources/oom_score_adj",
                json!(1001),
            ),
            (
                "memory_swap_limit_in_bytes",
                "linux/resources/memory_swap_limit_in_bytes",
                json!(1 << 20),
            ),
            ("cpu_shares", "linux/resources/cpu_shares", json!(-1)),
            (
                "NET_FUN",
                "linux/security_context/capabilities",
                json!({ "add_capabilities": ["NET_FUN"] }),
            ),
            (
                "run_as_group",
                "linux/security_context/run_as_group",
                json!({ "value": 5 }),
            ),
            (
                "environment",
                "envs",
                json!([{ "key": "A=B", "value": "c" }]),
            ),
            ("working directory", "working_dir", json!("relative")),
            (
                "/etc/hosts",
                "devices",
                json!([{ "host_path": "/etc/hosts", "container_path": "/x" }]),
            ),
        ] {
            let wrong = change(node.container("wrong", &["true"]), pointer, value);
            let failed = node.create(&pod_id, &pod, &wrong).err();
            let failed = failed.ok_or(format!(
                "the server created a container although {pointer} in its configuration is invalid"
            ))?;
            let message = failed.message().unwrap_or_default();
            ensure!(
                message.contains(field),
                "the error message about the invalid {pointer} does not contain {field:?}: {message}"
            );
        }
        node.has_no_writable_layer()
    })
}
