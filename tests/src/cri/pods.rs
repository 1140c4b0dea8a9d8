//! Tests of pods: the namespaces that a pod's containers share, the pods' networks, and connections
//! between pods.

use std::fs;
use std::os::unix::fs::MetadataExt;

use serde_json::{Value, json};

use crate::support::leak_check::mounts_below;
use crate::support::machine::{Result, command, wait_for};
use crate::support::needs::{Need, Test};
use crate::support::node::{A_NODE, BUSYBOX, Node, WEB, is_rrun, on_a_node};
use crate::{ensure, ensure_eq, test};

pub(crate) const TESTS: &[Test] = &[
    test!(a_pod_can_use_the_network_of_the_node, A_NODE),
    test!(
        the_containers_of_a_pod_share_the_namespaces_of_the_pod,
        A_NODE
    ),
    test!(pods_and_the_node_can_connect_to_each_other, A_NODE),
    test!(inspectp_shows_the_namespaces_of_a_pod, A_NODE),
    test!(a_stopped_pod_has_no_mounts, A_NODE, Need::RrunCri),
    test!(
        a_restarted_server_unmounts_the_file_systems_of_a_stopped_pod,
        A_NODE,
        Need::RrunCri
    ),
];

fn a_pod_can_use_the_network_of_the_node() -> Result {
    on_a_node(|node| {
        node.pull(BUSYBOX)?;
        let mut pod = node.pod("host");
        pod["linux"]["security_context"]["namespace_options"]["network"] = json!(2);
        if !is_rrun() {
            // containerd refuses a host name for a pod on the node's network, and CRI-O ignores the
            // host name. The test therefore sets no host name if the server is containerd or CRI-O.
            pod.as_object_mut().and_then(|pod| pod.remove("hostname"));
        }
        let pod_id = node.runp(&pod)?;
        let id = node.run(&pod_id, &pod, &node.container("main", &["sleep", "600"]))?;
        let own = fs::read_to_string("/proc/sys/kernel/hostname")?;
        ensure_eq!(
            node.asks(&["exec", "-s", &id, "hostname"])?.trim(),
            own.trim(),
            "the pod's host name"
        );
        let inside = node.asks(&["exec", "-s", &id, "readlink", "/proc/self/ns/net"])?;
        let own = fs::read_link("/proc/self/ns/net")?;
        ensure_eq!(
            inside.trim(),
            own.to_string_lossy(),
            "the pod's network namespace"
        );
        let status = node.json(&["inspectp", &pod_id])?["status"].clone();
        ensure_eq!(
            status.pointer("/linux/namespaces/options/network"),
            Some(&json!("NODE")),
            "the network mode in the pod's status"
        );
        Ok(())
    })
}

fn inspectp_shows_the_namespaces_of_a_pod() -> Result {
    on_a_node(|node| {
        node.pull(BUSYBOX)?;
        let pod = node.pod("found");
        let pod_id = node.runp(&pod)?;
        let id = node.run(&pod_id, &pod, &node.container("main", &["sleep", "600"]))?;
        let inside = node.pid(&id)?;
        let namespace = |path: &str| -> Result<_> { Ok(fs::metadata(path)?.ino()) };
        let info = node.json(&["inspectp", &pod_id])?["info"].clone();
        // Users run `nsenter --target PID` with this process id, so the process must be in the
        // pod's namespaces.
        let pid = &info["pid"];
        let spec = info.pointer("/runtimeSpec/linux/namespaces");
        let spec = spec
            .and_then(Value::as_array)
            .ok_or("inspectp shows no namespaces")?;
        for (kind, name) in [("net", "network"), ("ipc", "ipc"), ("uts", "uts")] {
            let own = namespace(&format!("/proc/{inside}/ns/{kind}"))?;
            let of_pid = namespace(&format!("/proc/{pid}/ns/{kind}"))?;
            ensure_eq!(
                of_pid,
                own,
                "inode of the {name} namespace of the pod's process"
            );
            let of_spec = spec.iter().find(|one| one["type"] == name);
            let of_spec = of_spec.ok_or(format!(
                "the pod's runtime specification lacks the {name} namespace: {spec:?}"
            ))?;
            // containerd creates the IPC and UTS namespaces together with the pod's first process.
            // For containerd, inspectp therefore shows only the path of the network namespace.
            if let Some(path) = of_spec["path"].as_str() {
                ensure_eq!(
                    namespace(path)?,
                    own,
                    "inode of the pod's {name} namespace at the path {path}"
                );
            }
        }
        ensure_eq!(
            info["netNamespaceClosed"],
            false,
            "netNamespaceClosed of a running pod"
        );
        node.asks(&["stopp", &pod_id])?;
        let info = node.json(&["inspectp", &pod_id])?["info"].clone();
        ensure_eq!(
            info["netNamespaceClosed"],
            true,
            "netNamespaceClosed of a stopped pod"
        );
        ensure_eq!(
            info["pid"],
            0,
            "process id that inspectp shows for a stopped pod"
        );
        Ok(())
    })
}

fn the_containers_of_a_pod_share_the_namespaces_of_the_pod() -> Result {
    on_a_node(|node| {
        node.pull(BUSYBOX)?;
        let mut pod = node.pod("shares");
        pod["dns_config"] = json!({
            "servers": ["192.0.2.53"], "searches": ["example.org"], "options": ["ndots:5"],
        });
        let pod_id = node.runp(&pod)?;
        let one = node.run(&pod_id, &pod, &node.container("one", &["sleep", "600"]))?;
        let two = node.run(&pod_id, &pod, &node.container("two", &["sleep", "600"]))?;
        for (kind, shared) in [
            ("net", true),
            ("ipc", true),
            ("uts", true),
            ("pid", false),
            ("mnt", false),
        ] {
            let path = format!("/proc/self/ns/{kind}");
            let [first, second] =
                [&one, &two].map(|id| node.asks(&["exec", "-s", id, "readlink", &path]));
            let first = first?;
            ensure_eq!(
                first == second?,
                shared,
                "whether the containers share the {kind} namespace"
            );
            let own = fs::read_link(&path)?;
            ensure!(
                first.trim() != own.to_string_lossy(),
                "the container's {kind} namespace is the node's namespace"
            );
        }
        ensure_eq!(
            node.asks(&["exec", "-s", &one, "hostname"])?.trim(),
            "shares",
            "host name of a container"
        );
        node.asks(&[
            "exec",
            "-s",
            &one,
            "sh",
            "-c",
            "echo shared > /dev/shm/file",
        ])?;
        let read = node.asks(&["exec", "-s", &two, "cat", "/dev/shm/file"])?;
        ensure_eq!(
            read.trim(),
            "shared",
            "content of /dev/shm/file in the other container"
        );
        let resolv = node.asks(&["exec", "-s", &two, "cat", "/etc/resolv.conf"])?;
        for line in [
            "nameserver 192.0.2.53",
            "search example.org",
            "options ndots:5",
        ] {
            ensure!(
                resolv.contains(line),
                "/etc/resolv.conf lacks the line {line:?}: {resolv:?}"
            );
        }
        let hosts = node.asks(&["exec", "-s", &two, "cat", "/etc/hostname"])?;
        ensure_eq!(hosts.trim(), "shares", "content of /etc/hostname");

        // The containers share one PID namespace if the pod's configuration requests a shared
        // namespace.
        let mut pod = node.pod("processes");
        pod["linux"]["security_context"]["namespace_options"]["pid"] = json!(0);
        let pod_id = node.runp(&pod)?;
        let mut ids = Vec::new();
        for name in ["first", "second"] {
            let mut container = node.container(name, &["sleep", "654"]);
            container["linux"]["security_context"]["namespace_options"]["pid"] = json!(0);
            ids.push(node.run(&pod_id, &pod, &container)?);
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

fn address(node: &Node, pod_id: &str) -> Result<String> {
    let status = node.json(&["inspectp", pod_id])?;
    let address = status.pointer("/status/network/ip").and_then(Value::as_str);
    Ok(address
        .ok_or(format!("the pod's status has no address: {status}"))?
        .to_owned())
}

fn pods_and_the_node_can_connect_to_each_other() -> Result {
    on_a_node(|node| {
        node.pull(WEB)?;
        let mut pods = Vec::new();
        for name in ["here", "there"] {
            let pod = node.pod(name);
            let pod_id = node.runp(&pod)?;
            let mut web = node.container(&format!("web-{name}"), &[]);
            web["image"]["image"] = json!(WEB);
            let id = node.run(&pod_id, &pod, &web)?;
            pods.push((address(node, &pod_id)?, id));
        }
        ensure!(
            pods[0].0 != pods[1].0,
            "the two pods have the same address {}",
            pods[0].0
        );
        for (address, id) in [(&pods[1].0, &pods[0].1), (&pods[0].0, &pods[1].1)] {
            let url = format!("http://{address}:5000/");
            wait_for(
                &format!("the web server of the other pod to answer at {url}"),
                || {
                    let page = node.asks(&["exec", "-s", id, "wget", "-q", "-O", "-", &url])?;
                    ensure_eq!(
                        page.trim(),
                        "hello from rrun",
                        "the page that the other pod serves"
                    );
                    Ok(Some(()))
                },
            )?;
            command("curl", ["-fsS", &url])
                .ok()?
                .says("hello from rrun")?;
        }
        // A pod reaches itself at 127.0.0.1 and has a default route.
        let id = &pods[0].1;
        let page = node.asks(&[
            "exec",
            "-s",
            id,
            "wget",
            "-q",
            "-O",
            "-",
            "http://127.0.0.1:5000/",
        ])?;
        ensure_eq!(
            page.trim(),
            "hello from rrun",
            "the pod's own page at 127.0.0.1"
        );
        let routes = node.asks(&["exec", "-s", id, "ip", "route"])?;
        ensure!(
            routes.contains("default via"),
            "the pod has no default route: {routes}"
        );
        Ok(())
    })
}

/// Runs a pod with a container that has exited and a container that runs, and stops the pod. The
/// exited container has written to /dev/shm, to /etc/hosts, to its writable layer and to its log.
/// Returns the id of the pod and of the exited container.
fn stopped_pod(node: &Node) -> Result<(String, String)> {
    node.pull(BUSYBOX)?;
    let pod = node.pod("stopped");
    let pod_id = node.runp(&pod)?;
    let script = "head -c 20000000 /dev/zero >/dev/shm/file && echo >>/etc/hosts && \
                  head -c 20000000 /dev/zero >/file && echo written && exit 7";
    let ended = node.container("ended", &["sh", "-c", script]);
    let ended = node.run(&pod_id, &pod, &ended)?;
    node.exited(&ended)?;
    node.run(&pod_id, &pod, &node.container("runs", &["sleep", "600"]))?;
    node.asks(&["stopp", &pod_id])?;
    Ok((pod_id, ended))
}

fn has_no_mounts(node: &Node, when: &str) -> Result {
    let mounts = mounts_below(&node.join("state/pods"));
    ensure!(mounts.is_empty(), "the pod has mounts {when}: {mounts:?}");
    Ok(())
}

/// Kubelet keeps a stopped pod until the pod's object is deleted, for example the pods of completed
/// jobs. The files in /dev/shm used the node's memory meanwhile.
fn a_stopped_pod_has_no_mounts() -> Result {
    on_a_node(|node| {
        let (pod_id, ended) = stopped_pod(node)?;
        has_no_mounts(node, "after its stop")?;
        node.asks(&["stopp", &pod_id])?;
        node.kill_server()?;
        node.start_server()?;
        node.asks(&["stopp", &pod_id])?;

        let status = node.status(&ended)?;
        ensure_eq!(
            (&status["state"], &status["exitCode"]),
            (&json!("CONTAINER_EXITED"), &json!(7)),
            "state and exit code of the container after the pod's stop"
        );
        let log = node.asks(&["logs", &ended])?;
        ensure_eq!(log.trim(), "written", "the container's log");
        let written = node.join("root/containers").join(&ended).join("upper/file");
        ensure_eq!(
            fs::metadata(written)?.len(),
            20_000_000,
            "size of the file in the container's writable layer"
        );
        node.asks(&["rm", &ended])?;
        node.asks(&["rmp", &pod_id])?;
        let left = fs::read_dir(node.join("state/pods"))?.count();
        ensure_eq!(left, 0, "number of directories of pods after the removal");
        Ok(())
    })
}

/// An earlier version of the server kept the mounts of stopped pods.
fn a_restarted_server_unmounts_the_file_systems_of_a_stopped_pod() -> Result {
    on_a_node(|node| {
        let (pod_id, ended) = stopped_pod(node)?;
        let ready = node.pod("ready");
        let ready_id = node.runp(&ready)?;
        let runs = node.container("runs", &["sleep", "600"]);
        let runs = node.run(&ready_id, &ready, &runs)?;
        node.asks(&["exec", "-s", &runs, "touch", "/dev/shm/file"])?;
        node.kill_server()?;
        let dir = node.join("state/pods").join(&pod_id);
        let rootfs = dir.join("containers").join(&ended).join("rootfs");
        for point in [dir.join("shm"), dir.join("etc"), rootfs] {
            let flags = nix::mount::MsFlags::empty();
            nix::mount::mount(Some("old"), &point, Some("tmpfs"), flags, None::<&str>)?;
        }
        node.start_server()?;
        let mounts = mounts_below(&dir);
        ensure!(mounts.is_empty(), "the stopped pod has mounts: {mounts:?}");
        node.asks(&["exec", "-s", &runs, "ls", "/dev/shm/file"])?;
        let later = node.container("later", &["ls", "/dev/shm/file"]);
        let later = node.run(&ready_id, &ready, &later)?;
        ensure_eq!(
            node.exited(&later)?["exitCode"],
            0,
            "exit code of a container that reads the ready pod's /dev/shm"
        );
        Ok(())
    })
}
