//! What the server's configuration gives every container, and requests that are refused.

use std::fs;

use serde_json::{Value, json};

use crate::support::machine::{Directory, Result, command, wait_for};
use crate::support::needs::{Need, Test};
use crate::support::node::{A_NODE, BUSYBOX, CRICTL, Node, SERVER, on_a_node};
use crate::{ensure, ensure_eq, test};

pub(crate) const TESTS: &[Test] = &[
    test!(
        limits_and_annotations_are_a_matter_of_configuration,
        A_NODE,
        Need::RrunCri
    ),
    test!(
        a_mistake_is_told_with_file_line_and_key,
        Need::RrunCri,
        SERVER
    ),
    test!(
        the_start_tells_what_the_node_lacks,
        CRICTL,
        SERVER,
        Need::RrunCri
    ),
    test!(
        where_systemd_keeps_the_cgroups_a_pod_is_a_slice_and_a_container_a_scope,
        A_NODE,
        Need::File("/run/systemd/system"),
        Need::Controller("memory"),
        Need::RrunCri
    ),
    test!(
        what_makes_no_sense_is_refused_by_its_field,
        A_NODE,
        Need::RrunCri
    ),
];

fn limits_and_annotations_are_a_matter_of_configuration() -> Result {
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
            "open files"
        );
        ensure_eq!(report["limits"]["RLIMIT_CORE"], json!([0, 0]), "core");
        let info = node.json(&["inspect", &id])?;
        let told = info.pointer("/info/runtimeSpec/annotations");
        ensure_eq!(
            told,
            Some(&json!({ "pod.a": "1", "own/b": "3" })),
            "what the runtime is told"
        );
        Ok(())
    })
}

/// By `config check`, by a start, and by whoever asks for help.
fn a_mistake_is_told_with_file_line_and_key() -> Result {
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
    for (mistake, told) in [
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
        let told = format!("{}, {told}", drop_in.display());
        for args in [&["config", "check"][..], &[]] {
            let output = cri(args).exits(1)?;
            ensure!(output.stderr.contains(&told), "{told}:\n{}", output.told());
        }
        fs::remove_file(&drop_in)?;
    }
    // What the command line gets wrong stands in no file.
    let output = cri(&["--listen", "nowhere"]).exits(1)?;
    ensure!(
        output.stderr.contains("rrun-cri: listen: "),
        "{}",
        output.told()
    );
    fs::write(&hosts, "server = 3\n")?;
    let output = cri(&["config", "check"]).exits(1)?;
    let told = format!("{}, line 1, server", hosts.display());
    ensure!(output.stderr.contains(&told), "{told}:\n{}", output.told());
    fs::write(&hosts, "server = 'https://x'\nsever = 3\n")?;
    let output = cri(&["config", "check"]).ok()?;
    let told = format!("{}, line 2, sever", hosts.display());
    ensure!(output.stderr.contains(&told), "{told}:\n{}", output.told());
    fs::remove_file(&hosts)?;
    let output = cri(&["config", "check"]).ok()?;
    ensure_eq!(output.stderr, "", "what is said of no mistake");
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

fn the_start_tells_what_the_node_lacks() -> Result {
    on_a_node(|node| {
        let said = |node: &mut Node, what: &str| {
            let what = what.to_owned();
            wait_for(&format!("{what:?} in the log"), || {
                Ok(node.log().contains(&what).then_some(()))
            })
        };
        said(
            node,
            "the runtime handler \"absent\": there is no runtime at /no/such/runtime",
        )?;
        let controllers = fs::read_to_string("/sys/fs/cgroup/cgroup.controllers")?;
        let lacks = ["cpu", "cpuset", "io", "memory", "pids"]
            .into_iter()
            .filter(|one| !controllers.split_whitespace().any(|had| had == *one))
            .collect::<Vec<_>>()
            .join(", ");
        if lacks.is_empty() {
            ensure!(!node.log().contains("has no controller"), "{}", node.log());
        } else {
            said(node, &format!("/sys/fs/cgroup has no controller {lacks}:"))?;
        }
        for what in ["there is no monitor", "systemd is not PID 1", "CNI plugin"] {
            ensure!(!node.log().contains(what), "{what}:\n{}", node.log());
        }
        node.terminate_server()?;
        fs::write(
            node.join("config.d/10.toml"),
            "monitor = '/no/such/monitor'\ncni_bin_dir = '/no/such/plugins'\n\
             cgroup_driver = 'systemd'\ndefault_runtime = 'absent'\n",
        )?;
        node.has_cni_bridge()?;
        node.start_server()?;
        said(node, "there is no monitor at /no/such/monitor")?;
        said(node, "(the default one: no pod can be made)")?;
        said(node, "10-bridge.conflist: the CNI plugin bridge")?;
        if Need::Systemd.lacking().is_some() {
            said(
                node,
                "cgroup_driver is \"systemd\", and systemd is not PID 1",
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
        ensure_eq!(condition["status"], json!(false), "{condition}");
        ensure!(condition.to_string().contains("no monitor"), "{condition}");
        Ok(())
    })
}

fn where_systemd_keeps_the_cgroups_a_pod_is_a_slice_and_a_container_a_scope() -> Result {
    const SLICE: &str = "e2e-burstable-pod1.slice";
    let result = on_a_node(|node| {
        node.pull(BUSYBOX)?;
        let told = node.asks(&["runtime-config"])?;
        ensure!(told.to_lowercase().contains("systemd"), "{told}");
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
            ensure_eq!(limit()?.trim(), "67108864", "memory.max");
            node.kill_server()?;
            node.start_server()?;
            node.asks(&["update", "--memory", "100663296", &id])?;
            ensure_eq!(limit()?.trim(), "100663296", "memory.max after an update");
            let stats = node.json(&["stats", "--id", &id])?;
            let used = stats.pointer("/stats/0/memory/workingSetBytes/value");
            ensure!(used.is_some(), "no memory in {stats}");
            node.asks(&["stop", "--timeout", "0", &id])?;
            ensure_eq!(node.status(&id)?["exitCode"], json!(137), "exit code");
            wait_for("the scope to go", || Ok((!group.exists()).then_some(())))?;
        }
        // Without a parent it gets a slice of its own, which goes with it.
        let pod = node.pod("own");
        let pod_id = node.runp(&pod)?;
        let id = node.run(&pod_id, &pod, &node.container("main", &["sleep", "600"]))?;
        let group = node.cgroup(&id)?;
        ensure!(
            group.starts_with("/sys/fs/cgroup/rrun.slice"),
            "{}",
            group.display()
        );
        node.asks(&["rmp", "--force", &pod_id])?;
        let slice = group.parent().ok_or("no parent")?.to_owned();
        ensure!(!slice.exists(), "{} is left", slice.display());
        // The other driver's form.
        let mut wrong = node.pod("wrong");
        wrong["linux"]["cgroup_parent"] = json!("/kubepods/pod1");
        let failed = node.runp(&wrong).err().ok_or("it runs")?;
        ensure!(
            failed.message().unwrap_or_default().contains("slice"),
            "the wrong form"
        );
        Ok(())
    });
    let _ = command("systemctl", ["stop", "e2e.slice"]).end();
    result
}

fn what_makes_no_sense_is_refused_by_its_field() -> Result {
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
            let failed = failed.ok_or(format!("a pod with a wrong {field} runs"))?;
            let message = failed.message().unwrap_or_default();
            ensure!(message.contains(field), "{field}: {message}");
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
            let failed = failed.ok_or(format!("a container with a wrong {field} is made"))?;
            let message = failed.message().unwrap_or_default();
            ensure!(message.contains(field), "{field}: {message}");
        }
        let left = fs::read_dir(node.join("root/containers"))?.count();
        ensure_eq!(left, 0, "writable layers that are left");
        Ok(())
    })
}
