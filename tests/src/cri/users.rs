//! Pods with a user namespace of their own: root in them is nobody on the node.

use std::fs;
use std::os::unix::fs::PermissionsExt;

use serde_json::{Value, json};

use crate::support::machine::Result;
use crate::support::needs::Test;
use crate::support::node::{A_NODE, BUSYBOX, Node, is_rrun, on_a_node};
use crate::support::user_namespace::{FIRST, container, ids, pod};
use crate::{ensure, ensure_eq, test};

pub(crate) const TESTS: &[Test] = &[
    test!(a_pods_root_is_nobody_on_the_node, A_NODE),
    test!(a_volume_has_the_ids_of_the_pod, A_NODE),
    test!(user_namespaces_that_can_not_be_are_refused_by_name, A_NODE),
];

/// The features of the default handler in `crictl info`.
fn features(node: &Node) -> Result<Value> {
    let info: Value = serde_json::from_str(&node.asks(&["info"])?)?;
    let handlers = info["runtimeHandlers"].as_array().cloned();
    let default = handlers.unwrap_or_default().into_iter();
    let mut default = default.filter(|one| one["name"].as_str().unwrap_or_default().is_empty());
    Ok(default.next().ok_or("no default handler in crictl info")?["features"].clone())
}

fn a_pods_root_is_nobody_on_the_node() -> Result {
    on_a_node(|node| {
        node.pull(BUSYBOX)?;
        ensure_eq!(
            features(node)?["user_namespaces"],
            true,
            "the handler's features"
        );
        let pod_config = pod(node, "users", 1);
        let pod_id = node.runp(&pod_config)?;
        let status = node.json(&["inspectp", &pod_id])?["status"].clone();
        let told = status.pointer("/linux/namespaces/options/usernsOptions/uids/0/hostId");
        ensure_eq!(told, Some(&json!(FIRST)), "the status's mapping ({status})");

        let mut report = container(node, "report", 1, &["/inside", "report"]);
        report["working_dir"] = json!("/not/in/the/image");
        let report = node.report(&pod_id, &pod_config, &report)?;
        ensure_eq!(report["uid"], 0, "user inside");
        ensure_eq!(
            report["uid_map"],
            json!(["0", FIRST.to_string(), "65536"]),
            "map"
        );
        ensure_eq!(report["hostname"], "users", "host name");
        ensure_eq!(report["cwd"], "/not/in/the/image", "working directory");

        // Root inside owns the image's files, can write, rules over its network.
        let mut main = container(node, "main", 1, &["sleep", "600"]);
        main["working_dir"] = json!("/made/for/it");
        main["linux"]["security_context"]["capabilities"] =
            json!({ "add_capabilities": ["NET_ADMIN"] });
        let id = node.run(&pod_id, &pod_config, &main)?;
        let process = fs::read_to_string(format!("/proc/{}/status", node.pid(&id)?))?;
        ensure!(process.contains(&format!("Uid:\t{FIRST}\t")), "{process}");
        let inside = |script: &str| node.asks(&["exec", "-s", &id, "sh", "-c", script]);
        // containerd leaves the pod's /dev/shm to the node's root.
        let shm = if is_rrun() { "/dev/shm" } else { "" };
        let files = "/bin /bin/busybox /etc /made/for/it /etc/hosts";
        let owners = inside(&format!("stat -c %u:%g {files} {shm}"))?;
        for owner in owners.split_whitespace() {
            ensure_eq!(owner, "0:0", "owners ({owners})");
        }
        inside("echo text > /etc/new && mkdir /a && chown 5:6 /a && echo x > /dev/shm/x")?;
        ensure_eq!(
            inside("stat -c %u:%g /a")?.trim(),
            "5:6",
            "owner of a new directory"
        );
        inside("rm /etc/new && mv /etc/passwd /etc/p && chown 7 /etc/p")?;
        inside("ip address add 192.0.2.1/32 dev lo")?;
        ensure!(
            inside("ip address show dev eth0")?.contains("inet "),
            "no address"
        );
        ensure!(
            inside("ls /sys/class/net")?.contains("eth0"),
            "no /sys of its own"
        );
        ensure!(inside("mount")?.contains("/dev/mqueue"), "no /dev/mqueue");

        // A later server finds the namespaces.
        node.kill_server()?;
        node.start_server()?;
        let second = node.run(
            &pod_id,
            &pod_config,
            &container(node, "second", 1, &["sleep", "600"]),
        )?;
        for kind in ["user", "net", "ipc", "uts"] {
            let of = |id: &str| {
                node.asks(&[
                    "exec",
                    "-s",
                    id,
                    "readlink",
                    &format!("/proc/self/ns/{kind}"),
                ])
            };
            ensure_eq!(of(&id)?, of(&second)?, "{kind} namespaces");
        }

        // With one PID namespace for all.
        let pod_config = pod(node, "together", 0);
        let pod_id = node.runp(&pod_config)?;
        let mut ids = Vec::new();
        for name in ["first", "second"] {
            let one = container(node, name, 0, &["sleep", "654"]);
            ids.push(node.run(&pod_id, &pod_config, &one)?);
        }
        let ps = node.asks(&["exec", "-s", &ids[0], "ps"])?;
        ensure_eq!(ps.matches("sleep 654").count(), 2, "sleeps among {ps}");
        Ok(())
    })
}

fn a_volume_has_the_ids_of_the_pod() -> Result {
    on_a_node(|node| {
        node.pull(BUSYBOX)?;
        let volume = node.join("volume");
        fs::create_dir(&volume)?;
        fs::write(volume.join("secret"), "root's own")?;
        fs::set_permissions(volume.join("secret"), PermissionsExt::from_mode(0o600))?;
        let pod_config = pod(node, "volume", 1);
        let pod_id = node.runp(&pod_config)?;
        let mut main = container(node, "main", 1, &["sleep", "600"]);
        if let Some(mounts) = main["mounts"].as_array_mut() {
            mounts.push(json!({
                "container_path": "/volume", "host_path": volume,
                "uidMappings": ids(), "gidMappings": ids(),
            }));
            mounts.push(json!({ "container_path": "/plain", "host_path": volume }));
        }
        let id = node.run(&pod_id, &pod_config, &main)?;
        let inside = |script: &str| node.asks(&["exec", "-s", &id, "sh", "-c", script]);
        ensure_eq!(
            inside("cat /volume/secret")?.trim(),
            "root's own",
            "the secret"
        );
        inside("echo new > /volume/new")?;
        let new = fs::metadata(volume.join("new"))?;
        ensure_eq!(
            std::os::unix::fs::MetadataExt::uid(&new),
            0,
            "owner on the node"
        );
        ensure!(
            inside("cat /plain/secret").is_err(),
            "read what is not its own"
        );
        Ok(())
    })
}

fn user_namespaces_that_can_not_be_are_refused_by_name() -> Result {
    on_a_node(|node| {
        node.pull(BUSYBOX)?;
        let mut wrong = pod(node, "node", 1);
        wrong["linux"]["security_context"]["namespace_options"]["userns_options"]["mode"] =
            json!(2);
        let mut none = pod(node, "none", 1);
        none["linux"]["security_context"]["namespace_options"]["userns_options"]["gids"] =
            json!([]);
        let mut host = pod(node, "host", 1);
        host["linux"]["security_context"]["namespace_options"]["network"] = json!(2);
        for config in [wrong, none, host]
            .iter()
            .take(if is_rrun() { 3 } else { 1 })
        {
            let failed = node.runp(config).err().ok_or("it runs")?;
            let message = failed.message().unwrap_or_default();
            ensure!(!is_rrun() || message.contains("user"), "{message}");
        }
        let pod_config = pod(node, "right", 1);
        let pod_id = node.runp(&pod_config)?;
        let mut other = container(node, "other", 1, &["true"]);
        other["linux"]["security_context"]["namespace_options"]["userns_options"]["uids"][0]["host_id"] =
            json!(2_000_000);
        let failed = node
            .create(&pod_id, &pod_config, &other)
            .err()
            .ok_or("it is made")?;
        let message = failed.message().unwrap_or_default();
        ensure!(message.contains("user"), "{message}");
        Ok(())
    })
}
