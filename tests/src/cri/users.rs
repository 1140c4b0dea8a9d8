//! Tests of pods with their own user namespace: root in such a pod is an ordinary user on the node.

use std::fs;
use std::os::unix::fs::PermissionsExt;

use serde_json::{Value, json};

use crate::support::machine::Result;
use crate::support::needs::Test;
use crate::support::node::{A_NODE, BUSYBOX, Node, is_rrun, on_a_node};
use crate::support::user_namespace::{FIRST, container, ids, pod};
use crate::{ensure, ensure_eq, test};

pub(crate) const TESTS: &[Test] = &[
    test!(root_in_a_pod_is_an_ordinary_user_on_the_node, A_NODE),
    test!(a_volume_with_mapped_ids_shows_the_ids_of_the_pod, A_NODE),
    test!(
        an_invalid_user_namespace_is_refused_with_a_clear_error,
        A_NODE
    ),
];

/// Returns the features of the default runtime handler from the output of `crictl info`.
fn features(node: &Node) -> Result<Value> {
    let info: Value = serde_json::from_str(&node.asks(&["info"])?)?;
    let handlers = info["runtimeHandlers"].as_array().cloned();
    let default = handlers.unwrap_or_default().into_iter();
    let mut default = default.filter(|one| one["name"].as_str().unwrap_or_default().is_empty());
    Ok(default
        .next()
        .ok_or("crictl info lists no default handler")?["features"]
        .clone())
}

fn root_in_a_pod_is_an_ordinary_user_on_the_node() -> Result {
    on_a_node(|node| {
        node.pull(BUSYBOX)?;
        ensure_eq!(
            features(node)?["user_namespaces"],
            true,
            "value of the feature user_namespaces of the default runtime handler"
        );
        let pod_config = pod(node, "users", 1);
        let pod_id = node.runp(&pod_config)?;
        let status = node.json(&["inspectp", &pod_id])?["status"].clone();
        let host_id = status.pointer("/linux/namespaces/options/usernsOptions/uids/0/hostId");
        ensure_eq!(
            host_id,
            Some(&json!(FIRST)),
            "first host id of the pod's id mapping ({status})"
        );

        let mut report = container(node, "report", 1, &["/inside", "report"]);
        report["working_dir"] = json!("/not/in/the/image");
        let report = node.report(&pod_id, &pod_config, &report)?;
        ensure_eq!(report["uid"], 0, "user id inside the container");
        ensure_eq!(
            report["uid_map"],
            json!(["0", FIRST.to_string(), "65536"]),
            "user id map of the container"
        );
        ensure_eq!(report["hostname"], "users", "host name of the container");
        ensure_eq!(
            report["cwd"],
            "/not/in/the/image",
            "working directory of the container"
        );

        // Root in the container owns the image's files, can write to them, and can configure the
        // pod's network.
        let mut main = container(node, "main", 1, &["sleep", "600"]);
        main["working_dir"] = json!("/made/for/it");
        main["linux"]["security_context"]["capabilities"] =
            json!({ "add_capabilities": ["NET_ADMIN"] });
        let id = node.run(&pod_id, &pod_config, &main)?;
        let process = fs::read_to_string(format!("/proc/{}/status", node.pid(&id)?))?;
        ensure!(
            process.contains(&format!("Uid:\t{FIRST}\t")),
            "the container's process does not run as user {FIRST} on the node: {process}"
        );
        let inside = |script: &str| node.asks(&["exec", "-s", &id, "sh", "-c", script]);
        // With containerd, the pod's /dev/shm belongs to root on the node. The test therefore
        // checks the owner of /dev/shm only with rrun.
        let shm = if is_rrun() { "/dev/shm" } else { "" };
        let files = "/bin /bin/busybox /etc /made/for/it /etc/hosts";
        let owners = inside(&format!("stat -c %u:%g {files} {shm}"))?;
        for owner in owners.split_whitespace() {
            ensure_eq!(
                owner,
                "0:0",
                "user id and group id of the owner of a file, as seen in the container (owners of all files: {owners})"
            );
        }
        inside("echo text > /etc/new && mkdir /a && chown 5:6 /a && echo x > /dev/shm/x")?;
        ensure_eq!(
            inside("stat -c %u:%g /a")?.trim(),
            "5:6",
            "owner of a directory after chown in the container"
        );
        inside("rm /etc/new && mv /etc/passwd /etc/p && chown 7 /etc/p")?;
        inside("ip address add 192.0.2.1/32 dev lo")?;
        ensure!(
            inside("ip address show dev eth0")?.contains("inet "),
            "eth0 has no IPv4 address"
        );
        ensure!(
            inside("ls /sys/class/net")?.contains("eth0"),
            "/sys does not show the network interfaces of the pod"
        );
        ensure!(
            inside("mount")?.contains("/dev/mqueue"),
            "/dev/mqueue is not mounted"
        );

        // A restarted server finds the pod's namespaces again.
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
            ensure_eq!(
                of(&id)?,
                of(&second)?,
                "{kind} namespace of the first container, which the second container must share"
            );
        }

        // The containers of this pod share one PID namespace.
        let pod_config = pod(node, "together", 0);
        let pod_id = node.runp(&pod_config)?;
        let mut ids = Vec::new();
        for name in ["first", "second"] {
            let one = container(node, name, 0, &["sleep", "654"]);
            ids.push(node.run(&pod_id, &pod_config, &one)?);
        }
        let ps = node.asks(&["exec", "-s", &ids[0], "ps"])?;
        ensure_eq!(
            ps.matches("sleep 654").count(),
            2,
            "number of sleep processes in the output of ps: {ps}"
        );
        Ok(())
    })
}

fn a_volume_with_mapped_ids_shows_the_ids_of_the_pod() -> Result {
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
            "content of the file that only root can read"
        );
        inside("echo new > /volume/new")?;
        let new = fs::metadata(volume.join("new"))?;
        ensure_eq!(
            std::os::unix::fs::MetadataExt::uid(&new),
            0,
            "owner of the new file on the node"
        );
        ensure!(
            inside("cat /plain/secret").is_err(),
            "through a mount without mapped ids, the container can read a file that only root on the node can read"
        );
        Ok(())
    })
}

fn an_invalid_user_namespace_is_refused_with_a_clear_error() -> Result {
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
            let failed = node
                .runp(config)
                .err()
                .ok_or("the server created a pod with an invalid user namespace")?;
            let message = failed.message().unwrap_or_default();
            ensure!(
                !is_rrun() || message.contains("user"),
                "the error does not mention the user namespace: {message}"
            );
        }
        let pod_config = pod(node, "right", 1);
        let pod_id = node.runp(&pod_config)?;
        let mut other = container(node, "other", 1, &["true"]);
        other["linux"]["security_context"]["namespace_options"]["userns_options"]["uids"][0]["host_id"] =
            json!(2_000_000);
        let failed = node.create(&pod_id, &pod_config, &other).err().ok_or(
            "the server created a container whose id mapping differs from its pod's id mapping",
        )?;
        let message = failed.message().unwrap_or_default();
        ensure!(
            message.contains("user"),
            "the error does not mention the user namespace: {message}"
        );
        Ok(())
    })
}
