//! Features of pods that want an API server: recursive read-only mounts, limits changed in place, swap.

use std::fs;
use std::path::Path;

use nix::mount::{MntFlags, MsFlags, mount, umount2};
use serde_json::{Value, json};

use crate::support::cgroup_use::{file, held_to};
use crate::support::cluster::{APISERVER, Cluster, eventually, timeout_flag};
use crate::support::kubelet::{
    COUNTED, KUBELET, Kubelet, busybox_pod, container_id, container_status, static_pod,
};
use crate::support::machine::{MIB, Result, note};
use crate::support::needs::{Need, Test};
use crate::support::node::{BUSYBOX, Node, on_a_node};
use crate::support::swap::Swap;
use crate::{ensure, ensure_eq, test};

pub(crate) const TESTS: &[Test] = &[
    test!(
        read_only_mounts_are_so_all_the_way_down,
        Need::NativeOrLong,
        APISERVER,
        KUBELET,
    ),
    test!(
        limits_change_in_place_and_swap_is_shared_out,
        Need::Long,
        COUNTED,
        APISERVER,
        KUBELET,
    ),
];

fn read_only_mounts_are_so_all_the_way_down() -> Result {
    on_a_node(|node| {
        let source = node.join("source");
        let below = source.join("below");
        fs::create_dir_all(&below)?;
        mount(
            Some("below"),
            &below,
            Some("tmpfs"),
            MsFlags::empty(),
            None::<&str>,
        )?;
        let result = read_only(node, &source);
        umount2(&below, MntFlags::MNT_DETACH)?;
        result
    })
}

fn read_only(node: &mut Node, source: &Path) -> Result {
    let cluster = Cluster::start(node)?;
    // The scheduler, and whoever admits pods, go by what the node says of its handlers.
    let handlers = "jsonpath={.items[0].status.runtimeHandlers}";
    let told = cluster.asks(&["get", "nodes", "-o", handlers])?;
    let told: Value = serde_json::from_str(&told)?;
    let mut all = told.as_array().into_iter().flatten();
    let default = all.find(|handler| handler["name"].as_str().unwrap_or_default().is_empty());
    let features = &default.ok_or(format!("no default handler: {told}"))?["features"];
    ensure!(
        features["recursiveReadOnlyMounts"] == true && features["userNamespaces"] == true,
        "{told}"
    );

    let script = "for dir in top all maybe; do for place in $dir $dir/below; do \
                  if touch /$place/$dir 2>/dev/null; then echo $place is written; \
                  else echo $place is not; fi; done; done; sleep 100000";
    let modes = [
        ("top", "Disabled"),
        ("all", "Enabled"),
        ("maybe", "IfPossible"),
    ];
    let mounts: Vec<Value> = modes
        .iter()
        .map(|(name, mode)| {
            json!({ "name": "source", "mountPath": format!("/{name}"), "readOnly": true,
                "recursiveReadOnly": mode })
        })
        .collect();
    cluster.apply(&static_pod(
        "reader",
        &json!({
            "terminationGracePeriodSeconds": 0,
            "containers": [{ "name": "c", "image": BUSYBOX, "command": ["sh", "-c", script],
                "volumeMounts": mounts }],
            "volumes": [{ "name": "source",
                "hostPath": { "path": source, "type": "Directory" } }],
        }),
    ))?;
    cluster.asks(&[
        "wait",
        "pod/reader",
        "--for=condition=Ready",
        &timeout_flag(),
    ])?;
    let wanted = "top is not\ntop/below is written\nall is not\nall/below is not\n\
                  maybe is not\nmaybe/below is not";
    eventually("the pod to have tried", || {
        let tried = cluster.asks(&["logs", "reader"])?;
        ensure_eq!(tried, wanted, "what it could write");
        Ok(Some(()))
    })?;
    let status = container_status(&cluster.json(&["get", "pod", "reader"])?, "c")?;
    for (name, mode) in [
        ("top", "Disabled"),
        ("all", "Enabled"),
        ("maybe", "Enabled"),
    ] {
        let path = format!("/{name}");
        let mut mounts = status["volumeMounts"].as_array().into_iter().flatten();
        let told = mounts.find(|mount| mount["mountPath"] == path.as_str());
        let told = told.map(|mount| mount["recursiveReadOnly"].clone());
        ensure_eq!(told, Some(mode.into()), "{path} in {status}");
    }
    cluster.asks(&["delete", "pod", "--all", &timeout_flag()])?;
    Kubelet::has_stopped_everything(node)
}

/// What a container of the second test may have.
struct Size {
    cpu: [u64; 2],
    memory: [u64; 2],
}

impl Size {
    /// Requests and limits, in millicores and MiB.
    fn resources(&self) -> Value {
        let [cpu, memory] = [
            self.cpu.map(|cpu| format!("{cpu}m")),
            self.memory.map(|memory| format!("{memory}Mi")),
        ];
        json!({
            "requests": { "cpu": cpu[0], "memory": memory[0] },
            "limits": { "cpu": cpu[1], "memory": memory[1] },
        })
    }
}

// kubelet resizes nobody who has swap, which all that ask for less memory than they may have do.
const SMALL: Size = Size {
    cpu: [100, 200],
    memory: [64, 64],
};
const LARGE: Size = Size {
    cpu: [200, 500],
    memory: [160, 160],
};
const SHARING: Size = Size {
    cpu: [100, 200],
    memory: [48, 64],
};

fn limits_change_in_place_and_swap_is_shared_out() -> Result {
    on_a_node(|node| {
        let _swap = Swap::of(1024)?;
        let config = "memorySwap: {swapBehavior: LimitedSwap}\n";
        let cluster = Cluster::configured(node, config)?;
        let pods = [
            ("sized", SMALL.resources()),
            ("sharing", SHARING.resources()),
            (
                "guaranteed",
                json!({ "limits": { "cpu": "100m", "memory": "64Mi" } }),
            ),
            ("best-effort", json!({})),
        ];
        for (name, resources) in &pods {
            cluster.apply(&pod(name, resources))?;
        }
        cluster.asks(&[
            "wait",
            "pod",
            "--all",
            "--for=condition=Ready",
            &timeout_flag(),
        ])?;
        swap_is_shared_out(node, &cluster)?;
        limits_change_in_place(node, &cluster)?;
        cluster.asks(&["delete", "pod", "--all", &timeout_flag()])?;
        Kubelet::has_stopped_everything(node)
    })
}

fn pod(name: &str, resources: &Value) -> Value {
    // Busy as soon as it is told to.
    let script = "while [ ! -e /busy ]; do sleep 1; done; while :; do :; done";
    let mut pod = busybox_pod(name, &["sh", "-c", script]);
    pod["spec"]["containers"][0]["resources"] = resources.clone();
    pod
}

/// What this pod's container is, and its group.
fn container(node: &Node, cluster: &Cluster, pod: &str) -> Result<(Value, std::path::PathBuf)> {
    let status = cluster.json(&["get", "pod", pod])?;
    let group = node.cgroup(&container_id(&status, "c")?)?;
    Ok((container_status(&status, "c")?, group))
}

/// The exit code of a program in the pod that needs so many MiB at once.
fn takes(cluster: &Cluster, pod: &str, size: u64) -> Result<i32> {
    let size = format!("bs={size}M");
    let dd = ["dd", "if=/dev/zero", "of=/dev/null", &size, "count=1"];
    Ok(cluster.kubectl(&["exec", pod, "--"]).args(dd).end()?.code)
}

/// `(request / the node's memory) * the node's swap` for who is burstable; nothing for others.
fn swap_is_shared_out(node: &Node, cluster: &Cluster) -> Result {
    let memory = meminfo("MemTotal:")?;
    let swap = meminfo("SwapTotal:")?;
    let (_, group) = container(node, cluster, "sharing")?;
    swap_is(&group, &SHARING, memory, swap)?;
    // Less than the pod may have of both, and more than it may have of memory.
    ensure_eq!(takes(cluster, "sharing", 72)?, 0, "what took swap");
    for other in ["sized", "guaranteed", "best-effort"] {
        let (_, group) = container(node, cluster, other)?;
        ensure_eq!(file(&group, "memory.swap.max")?, "0", "swap of {other}");
    }
    // The kernel kills it, and whoever is in the container with it.
    let code = takes(cluster, "guaranteed", 72)?;
    ensure!(code != 0, "who has no swap got more than it may have");
    Ok(())
}

fn swap_is(group: &Path, size: &Size, memory: u64, swap: u64) -> Result {
    let share = (size.memory[0] * MIB) as f64 / memory as f64 * swap as f64;
    let told: u64 = file(group, "memory.swap.max")?.parse()?;
    ensure!(
        told.abs_diff(share as u64) <= 4096,
        "memory.swap.max is {told}, a share of {share}"
    );
    Ok(())
}

/// A line of /proc/meminfo, in bytes.
fn meminfo(name: &str) -> Result<u64> {
    let text = fs::read_to_string("/proc/meminfo")?;
    let line = text.lines().find_map(|line| line.strip_prefix(name));
    let word = line.and_then(|line| line.split_whitespace().next());
    Ok(word.ok_or(format!("no {name}"))?.parse::<u64>()? * 1024)
}

fn resize(cluster: &Cluster, resources: &Value) -> Result {
    let patch = json!({ "spec": { "containers": [{ "name": "c", "resources": resources }] } });
    let patch = patch.to_string();
    cluster.asks(&[
        "patch",
        "pod",
        "sized",
        "--subresource=resize",
        "--patch",
        &patch,
    ])?;
    Ok(())
}

fn limits_change_in_place(node: &Node, cluster: &Cluster) -> Result {
    let (before, group) = container(node, cluster, "sized")?;
    let pid = node.pid(&container_id_of(&before)?)?;
    limits_are(&group, &SMALL)?;
    cluster.asks(&["exec", "sized", "--", "touch", "/busy"])?;
    let used = held_to(0.2, &group)?;

    resize(cluster, &LARGE.resources())?;
    is_resized(node, cluster, &LARGE)?;
    let more = held_to(0.5, &group)?;
    note(format!(
        "a busy loop used {:.0}m, and {:.0}m after a resize in place",
        used * 1000.0,
        more * 1000.0
    ));
    // Twice what it might have before.
    ensure_eq!(takes(cluster, "sized", 128)?, 0, "in the memory that came");

    resize(cluster, &SMALL.resources())?;
    is_resized(node, cluster, &SMALL)?;
    held_to(0.2, &group)?;

    let (after, same_group) = container(node, cluster, "sized")?;
    ensure_eq!(same_group, group, "the container's group");
    ensure_eq!(after["restartCount"], 0, "restarts");
    ensure_eq!(after["containerID"], before["containerID"], "the container");
    ensure_eq!(node.pid(&container_id_of(&after)?)?, pid, "its process");
    Ok(())
}

fn container_id_of(status: &Value) -> Result<String> {
    let id = status["containerID"].as_str();
    let id = id.and_then(|id| id.split("://").nth(1));
    Ok(id.ok_or(format!("no containerID in {status}"))?.to_owned())
}

/// Waits until the API server has it that the resize is done, and looks at what it has done.
fn is_resized(node: &Node, cluster: &Cluster, size: &Size) -> Result {
    eventually("the end of a resize", || {
        let pod = cluster.json(&["get", "pod", "sized"])?;
        let mut conditions = pod["status"]["conditions"].as_array().into_iter().flatten();
        let pending = conditions
            .find(|one| one["type"] == "PodResizePending" || one["type"] == "PodResizeInProgress");
        ensure!(pending.is_none(), "{pending:?}");
        // As the CRI server tells of the container.
        let status = container_status(&pod, "c")?;
        ensure_eq!(status["resources"], size.resources(), "actual resources");
        Ok(Some(()))
    })?;
    let (_, group) = container(node, cluster, "sized")?;
    limits_are(&group, size)
}

fn limits_are(group: &Path, size: &Size) -> Result {
    let of_pod = group.parent().ok_or("no parent")?;
    for group in [group, of_pod] {
        let limit = format!("{} 100000", size.cpu[1] * 100);
        ensure_eq!(file(group, "cpu.max")?, limit, "{}", group.display());
        let limit = (size.memory[1] * MIB).to_string();
        ensure_eq!(file(group, "memory.max")?, limit, "{}", group.display());
    }
    // 102 shares and 204, as runc has it.
    let weight = if size.cpu[0] == 100 { "17" } else { "29" };
    ensure_eq!(file(group, "cpu.weight")?, weight, "cpu.weight");
    Ok(())
}
