//! Tests of pod features that require an API server: recursive read-only mounts, in-place changes
//! of limits, and swap.

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
        recursive_read_only_mounts_protect_the_mounts_below_them,
        Need::NativeOrLong,
        APISERVER,
        KUBELET,
    ),
    test!(
        container_limits_change_in_place_and_swap_is_divided_among_pods,
        Need::Long,
        COUNTED,
        APISERVER,
        KUBELET,
    ),
];

fn recursive_read_only_mounts_protect_the_mounts_below_them() -> Result {
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
    // The scheduler and the admission of pods rely on the features that the node's status lists for
    // its runtime handlers.
    let handlers = "jsonpath={.items[0].status.runtimeHandlers}";
    let reported = cluster.asks(&["get", "nodes", "-o", handlers])?;
    let reported: Value = serde_json::from_str(&reported)?;
    let mut all = reported.as_array().into_iter().flatten();
    let default = all.find(|handler| handler["name"].as_str().unwrap_or_default().is_empty());
    let features = &default.ok_or(format!(
        "the default handler is missing; the handlers in the node's status: {reported}"
    ))?["features"];
    ensure!(
        features["recursiveReadOnlyMounts"] == true && features["userNamespaces"] == true,
        "the default handler lacks a feature; the handlers in the node's status: {reported}"
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
    let expected = "top is not\ntop/below is written\nall is not\nall/below is not\n\
                  maybe is not\nmaybe/below is not";
    eventually("the pod to try every write", || {
        let tried = cluster.asks(&["logs", "reader"])?;
        ensure_eq!(tried, expected, "results of the pod's writes");
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
        let mount = mounts.find(|mount| mount["mountPath"] == path.as_str());
        let mode_in_status = mount.map(|mount| mount["recursiveReadOnly"].clone());
        ensure_eq!(
            mode_in_status,
            Some(mode.into()),
            "value of recursiveReadOnly for the mount on {path}, in the container's status {status}"
        );
    }
    cluster.asks(&["delete", "pod", "--all", &timeout_flag()])?;
    Kubelet::has_stopped_everything(node)
}

/// The requests and limits of a container. `cpu` contains the CPU request and the CPU limit in
/// millicores. `memory` contains the memory request and the memory limit in MiB.
struct Size {
    cpu: [u64; 2],
    memory: [u64; 2],
}

impl Size {
    /// Returns the requests and limits as Kubernetes quantities.
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

// kubelet does not resize a container that has swap. A container has swap if its memory request is
// below its memory limit. In SMALL and LARGE, the memory request therefore equals the memory limit,
// and the container has no swap.
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

fn container_limits_change_in_place_and_swap_is_divided_among_pods() -> Result {
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
        swap_is_divided_among_pods(node, &cluster)?;
        container_limits_change_in_place(node, &cluster)?;
        cluster.asks(&["delete", "pod", "--all", &timeout_flag()])?;
        Kubelet::has_stopped_everything(node)
    })
}

fn pod(name: &str, resources: &Value) -> Value {
    // The container becomes busy as soon as the file /busy exists.
    let script = "while [ ! -e /busy ]; do sleep 1; done; while :; do :; done";
    let mut pod = busybox_pod(name, &["sh", "-c", script]);
    pod["spec"]["containers"][0]["resources"] = resources.clone();
    pod
}

/// Returns the status and the cgroup of the only container in the pod `pod`.
fn container(node: &Node, cluster: &Cluster, pod: &str) -> Result<(Value, std::path::PathBuf)> {
    let status = cluster.json(&["get", "pod", pod])?;
    let group = node.cgroup(&container_id(&status, "c")?)?;
    Ok((container_status(&status, "c")?, group))
}

/// Runs a program that allocates `size` MiB in the pod, and returns the program's exit code.
fn run_allocation(cluster: &Cluster, pod: &str, size: u64) -> Result<i32> {
    let size = format!("bs={size}M");
    let dd = ["dd", "if=/dev/zero", "of=/dev/null", &size, "count=1"];
    Ok(cluster.kubectl(&["exec", pod, "--"]).args(dd).end()?.code)
}

/// Checks the swap limits of the pods. The swap limit of a burstable pod is `(memory request /
/// memory of the node) * swap of the node`. Other pods get no swap.
fn swap_is_divided_among_pods(node: &Node, cluster: &Cluster) -> Result {
    let memory = meminfo("MemTotal:")?;
    let swap = meminfo("SwapTotal:")?;
    let (_, group) = container(node, cluster, "sharing")?;
    swap_is(&group, &SHARING, memory, swap)?;
    // The program needs more than the pod's memory limit, but less than the pod's memory and swap
    // limits together.
    ensure_eq!(
        run_allocation(cluster, "sharing", 72)?,
        0,
        "exit code of a program that needs swap"
    );
    for other in ["sized", "guaranteed", "best-effort"] {
        let (_, group) = container(node, cluster, other)?;
        ensure_eq!(
            file(&group, "memory.swap.max")?,
            "0",
            "memory.swap.max of the pod {other}"
        );
    }
    // The kernel kills the program and the container's other processes, so `kubectl exec` fails.
    let code = run_allocation(cluster, "guaranteed", 72)?;
    ensure!(
        code != 0,
        "a pod without swap could allocate more memory than its memory limit"
    );
    Ok(())
}

fn swap_is(group: &Path, size: &Size, memory: u64, swap: u64) -> Result {
    let share = (size.memory[0] * MIB) as f64 / memory as f64 * swap as f64;
    let limit: u64 = file(group, "memory.swap.max")?.parse()?;
    ensure!(
        limit.abs_diff(share as u64) <= 4096,
        "memory.swap.max is {limit}, but the pod's share of the node's swap is {share}"
    );
    Ok(())
}

/// Returns the value of the line `name` in /proc/meminfo, in bytes.
fn meminfo(name: &str) -> Result<u64> {
    let text = fs::read_to_string("/proc/meminfo")?;
    let line = text.lines().find_map(|line| line.strip_prefix(name));
    let word = line.and_then(|line| line.split_whitespace().next());
    Ok(word
        .ok_or(format!("the entry {name} is missing in /proc/meminfo"))?
        .parse::<u64>()?
        * 1024)
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

fn container_limits_change_in_place(node: &Node, cluster: &Cluster) -> Result {
    let (before, group) = container(node, cluster, "sized")?;
    let pid = node.pid(&container_id_of(&before)?)?;
    limits_are(&group, &SMALL)?;
    cluster.asks(&["exec", "sized", "--", "touch", "/busy"])?;
    let used = held_to(0.2, &group)?;

    resize(cluster, &LARGE.resources())?;
    is_resized(node, cluster, &LARGE)?;
    let more = held_to(0.5, &group)?;
    note(format!(
        "CPU usage of a busy loop: {:.0}m before a resize in place, and {:.0}m after the resize",
        used * 1000.0,
        more * 1000.0
    ));
    // The program needs twice the old memory limit, so it succeeds only with the new limit.
    ensure_eq!(
        run_allocation(cluster, "sized", 128)?,
        0,
        "exit code of a program that needs more memory than the old limit allows"
    );

    resize(cluster, &SMALL.resources())?;
    is_resized(node, cluster, &SMALL)?;
    held_to(0.2, &group)?;

    let (after, same_group) = container(node, cluster, "sized")?;
    ensure_eq!(
        same_group,
        group,
        "the container's cgroup after the resizes"
    );
    ensure_eq!(after["restartCount"], 0, "restart count after the resizes");
    ensure_eq!(
        after["containerID"],
        before["containerID"],
        "the container's id after the resizes"
    );
    ensure_eq!(
        node.pid(&container_id_of(&after)?)?,
        pid,
        "the container's process id after the resizes"
    );
    Ok(())
}

fn container_id_of(status: &Value) -> Result<String> {
    let id = status["containerID"].as_str();
    let id = id.and_then(|id| id.split("://").nth(1));
    Ok(id
        .ok_or(format!(
            "the container's status has no containerID: {status}"
        ))?
        .to_owned())
}

/// Waits until the API server reports the end of the resize. Then checks the new limits.
fn is_resized(node: &Node, cluster: &Cluster, size: &Size) -> Result {
    eventually("the API server to report the end of the resize", || {
        let pod = cluster.json(&["get", "pod", "sized"])?;
        let mut conditions = pod["status"]["conditions"].as_array().into_iter().flatten();
        let pending = conditions
            .find(|one| one["type"] == "PodResizePending" || one["type"] == "PodResizeInProgress");
        ensure!(
            pending.is_none(),
            "the resize is not finished, because the pod still has this condition: {pending:?}"
        );
        // kubelet takes the resources in this status from the container status that the CRI server
        // returns.
        let status = container_status(&pod, "c")?;
        ensure_eq!(
            status["resources"],
            size.resources(),
            "resources in the container's status"
        );
        Ok(Some(()))
    })?;
    let (_, group) = container(node, cluster, "sized")?;
    limits_are(&group, size)
}

fn limits_are(group: &Path, size: &Size) -> Result {
    let of_pod = group
        .parent()
        .ok_or("the container's cgroup has no parent")?;
    for group in [group, of_pod] {
        let limit = format!("{} 100000", size.cpu[1] * 100);
        ensure_eq!(
            file(group, "cpu.max")?,
            limit,
            "cpu.max of the cgroup {}",
            group.display()
        );
        let limit = (size.memory[1] * MIB).to_string();
        ensure_eq!(
            file(group, "memory.max")?,
            limit,
            "memory.max of the cgroup {}",
            group.display()
        );
    }
    // runc's formula converts 102 and 204 CPU shares to these weights.
    let weight = if size.cpu[0] == 100 { "17" } else { "29" };
    ensure_eq!(
        file(group, "cpu.weight")?,
        weight,
        "cpu.weight of the container's cgroup"
    );
    Ok(())
}
