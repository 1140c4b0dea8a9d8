//! What the server's configuration gives every container, and requests that are refused.

use std::fs;

use serde_json::{Value, json};

use crate::machine::Result;
use crate::needs::Test;
use crate::node::{BUSYBOX, CRICTL, IMAGES, REGISTRY, SERVER, is_rrun, on_a_node};
use crate::{ensure, ensure_eq, test};

pub const TESTS: &[Test] = &[
    test!(
        limits_and_annotations_are_a_matter_of_configuration,
        CRICTL,
        SERVER,
        REGISTRY,
        IMAGES
    ),
    test!(
        what_makes_no_sense_is_refused_by_its_field,
        CRICTL,
        SERVER,
        REGISTRY,
        IMAGES
    ),
];

fn limits_and_annotations_are_a_matter_of_configuration() -> Result {
    on_a_node(|node| {
        if !is_rrun() {
            return Ok(());
        }
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

fn what_makes_no_sense_is_refused_by_its_field() -> Result {
    on_a_node(|node| {
        if !is_rrun() {
            return Ok(());
        }
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
