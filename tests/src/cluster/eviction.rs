//! Pods that kubelet evicts, on a real cluster: static pods are critical and never are. Whom it picks
//! follows from what the CRI server tells of each.

use std::path::PathBuf;

use serde_json::{Value, json};

use crate::support::cluster::{APISERVER, Cluster, eventually, timeout_flag};
use crate::support::disk::{Disk, FREE_MIB, is_told};
use crate::support::kubelet::{COUNTED, KUBELET, Kubelet, UNCOUNTED, busybox_pod, lives};
use crate::support::machine::{MIB, Result};
use crate::support::needs::{Need, Test};
use crate::support::node::{Node, on_a_node};
use crate::{ensure, ensure_eq, test};

pub(crate) const TESTS: &[Test] = &[
    test!(
        who_fills_a_disk_is_evicted_and_nobody_else,
        Need::Native,
        APISERVER,
        KUBELET,
    ),
    test!(
        who_takes_the_memory_is_evicted_and_nobody_else,
        Need::Long,
        COUNTED,
        APISERVER,
        KUBELET,
    ),
];

/// One container that does nothing until it is told to.
fn pod(name: &str, resources: &Value) -> Value {
    // Takes as much memory as it is told to: dd waits with all of its block.
    let script = "while [ ! -e /take ]; do sleep 1; done; \
        dd if=/dev/zero bs=$(cat /take)M count=1 | sleep 100000";
    let mut pod = busybox_pod(name, &["sh", "-c", script]);
    let container = &mut pod["spec"]["containers"][0];
    container["resources"] = resources.clone();
    container["volumeMounts"] = json!([{ "name": "data", "mountPath": "/data" }]);
    pod["spec"]["volumes"] = json!([{ "name": "data", "emptyDir": {} }]);
    pod
}

/// Has this pod write a file of so many MiB.
fn writes(cluster: &Cluster, pod: &str, file: &str, size: u64) -> Result {
    let size = format!("count={size}");
    let file = format!("of={file}");
    let dd = ["dd", "if=/dev/zero", &file, "bs=1M", &size];
    // An eviction may be there before its end.
    cluster.kubectl(&["exec", pod, "--"]).args(dd).end()?;
    Ok(())
}

/// Waits until kubelet has evicted the pod, and says so in these words.
fn evicted(cluster: &Cluster, pod: &str, words: &[&str]) -> Result {
    eventually(&format!("the eviction of {pod}"), || {
        let status = cluster.json(&["get", "pod", pod])?["status"].clone();
        let others = || cluster.asks(&["get", "pods", "-o", "wide"]);
        ensure!(
            status["phase"] == "Failed" && status["reason"] == "Evicted",
            "{status}\n{}",
            others()?
        );
        let told = status["message"].as_str().unwrap_or_default();
        ensure!(words.iter().all(|word| told.contains(word)), "{told}");
        Ok(Some(()))
    })
}

/// Waits until the node is under no pressure of this kind.
fn relieved(cluster: &Cluster, pressure: &str) -> Result {
    let status =
        format!("jsonpath={{.items[0].status.conditions[?(@.type==\"{pressure}\")].status}}");
    eventually("the end of the pressure", || {
        let now = cluster.asks(&["get", "nodes", "-o", &status])?;
        Ok((now == "False").then_some(()))
    })
}

/// A pod's one container, which runs.
fn lives_of(node: &Node, cluster: &Cluster, pod: &str) -> Result<Vec<(String, i32, i64)>> {
    let pod = cluster.json(&["get", "pod", pod])?;
    let all = lives(node, &[pod])?;
    ensure_eq!(all.len(), 1, "running containers of a pod");
    Ok(all)
}

fn start_pods(cluster: &Cluster, pods: &[Value]) -> Result {
    for pod in pods {
        cluster.apply(pod)?;
    }
    let ready = [
        "wait",
        "pod",
        "--all",
        "--for=condition=Ready",
        &timeout_flag(),
    ];
    cluster.asks(&ready)?;
    Ok(())
}

fn who_fills_a_disk_is_evicted_and_nobody_else() -> Result {
    on_a_node(|node| {
        let images = Disk::of_the_images(node)?;
        let own = Disk::at(PathBuf::from("/var/lib/kubelet"))?;
        let result = on_two_small_disks(node, &images, &own);
        own.unmount()?;
        result
    })
}

fn on_two_small_disks(node: &mut Node, images: &Disk, own: &Disk) -> Result {
    // Volumes are looked at as often as everything else.
    let config = format!(
        "evictionHard: {{memory.available: 1Mi, nodefs.available: {FREE_MIB}Mi, imagefs.available: {FREE_MIB}Mi}}\n\
         evictionPressureTransitionPeriod: 1s\nvolumeStatsAggPeriod: 1s\n{UNCOUNTED}"
    );
    let cluster = Cluster::configured(node, &config)?;
    eventually("kubelet to tell both disks as they are", || {
        let summary = cluster.kubelet.asks("/stats/summary")?;
        is_told(&summary["node"]["fs"], own)?;
        is_told(&summary["node"]["runtime"]["imageFs"], images)?;
        Ok(Some(()))
    })?;
    let bounds = json!({ "limits": { "ephemeral-storage": "16Mi" } });
    start_pods(
        &cluster,
        &[
            pod("bystander", &json!({})),
            pod("bounded", &bounds),
            pod("writer", &json!({})),
            pod("keeper", &json!({})),
        ],
    )?;
    let before = lives_of(node, &cluster, "bystander")?;

    // More than its own share, of a disk that has enough.
    writes(&cluster, "bounded", "/file", 24)?;
    let words = ["local storage usage exceeds", "16Mi"];
    evicted(&cluster, "bounded", &words)?;

    // The images' disk, by its writable layer; what has been evicted may give its room back meanwhile.
    writes(&cluster, "writer", "/file", all_but(images, FREE_MIB - 64)?)?;
    let words = ["low on resource", "Container c was using"];
    evicted(&cluster, "writer", &words)?;
    has_room(images)?;
    relieved(&cluster, "DiskPressure")?;

    // kubelet's own disk, by a volume, of whose size kubelet takes a while to hear.
    writes(
        &cluster,
        "keeper",
        "/data/much",
        all_but(own, FREE_MIB + 16)?,
    )?;
    keeps(&cluster, "keeper", 64 * MIB)?;
    writes(&cluster, "keeper", "/data/more", 32)?;
    evicted(&cluster, "keeper", &["low on resource"])?;
    has_room(own)?;
    relieved(&cluster, "DiskPressure")?;

    let after = lives_of(node, &cluster, "bystander")?;
    ensure_eq!(after, before, "containers, processes and restarts");
    cluster.asks(&["delete", "pod", "--all", &timeout_flag()])?;
    Kubelet::has_stopped_everything(node)
}

/// MiB to write until no more than so many are free.
fn all_but(disk: &Disk, free: u64) -> Result<u64> {
    Ok((disk.free()? / MIB).saturating_sub(free))
}

/// Waits until kubelet tells that this pod has so many bytes in its volume.
fn keeps(cluster: &Cluster, pod: &str, bytes: u64) -> Result {
    eventually("kubelet to know of a volume's size", || {
        let summary = cluster.kubelet.asks("/stats/summary")?;
        let mut pods = summary["pods"].as_array().into_iter().flatten();
        let told = pods.find(|told| told["podRef"]["name"] == pod);
        let mut volumes = told
            .into_iter()
            .flat_map(|pod| pod["volume"].as_array().into_iter().flatten());
        let volume = volumes.find(|volume| volume["name"] == "data");
        let used = volume.and_then(|volume| volume["usedBytes"].as_u64());
        ensure!(used > Some(bytes), "{used:?} bytes");
        Ok(Some(()))
    })
}

/// What is to stay available, and what is left when more than that has been taken, in MiB.
const AVAILABLE_MIB: u64 = 400;
const LEFT_MIB: u64 = 250;

fn who_takes_the_memory_is_evicted_and_nobody_else() -> Result {
    on_a_node(|node| {
        let config = format!(
            "evictionHard: {{memory.available: {AVAILABLE_MIB}Mi, nodefs.available: 1%}}\n\
             evictionPressureTransitionPeriod: 1s\n"
        );
        let cluster = Cluster::configured(node, &config)?;
        let pods = ["bystander", "taker"].map(|name| pod(name, &json!({})));
        start_pods(&cluster, &pods)?;
        let before = lives_of(node, &cluster, "bystander")?;
        let available = eventually("kubelet to tell of the node's memory", || {
            let summary = cluster.kubelet.asks("/stats/summary")?;
            let available = &summary["node"]["memory"]["availableBytes"];
            Ok(available.as_u64())
        })?;
        let size = (available / MIB).checked_sub(LEFT_MIB);
        let size = size.ok_or(format!("only {available} bytes are available"))?;
        ensure!(size > 100, "only {available} bytes are available");
        let take = format!("echo {size} >/take");
        cluster.asks(&["exec", "taker", "--", "sh", "-c", &take])?;
        let words = ["low on resource: memory", "Container c was using"];
        evicted(&cluster, "taker", &words)?;
        relieved(&cluster, "MemoryPressure")?;
        let after = lives_of(node, &cluster, "bystander")?;
        ensure_eq!(after, before, "containers, processes and restarts");
        cluster.asks(&["delete", "pod", "--all", &timeout_flag()])?;
        Kubelet::has_stopped_everything(node)
    })
}

fn has_room(disk: &Disk) -> Result {
    eventually("the disk to have room again", || {
        let free = disk.free()?;
        ensure!(free > FREE_MIB * MIB, "{free} bytes are free");
        Ok(Some(()))
    })
}
