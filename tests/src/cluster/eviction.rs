//! Tests of pods that kubelet evicts. The tests need a real cluster, because kubelet never evicts
//! static pods. To select the pod to evict, kubelet uses the resource usage that the CRI server
//! reports for each pod.

use std::path::PathBuf;

use serde_json::{Value, json};

use crate::support::cluster::{APISERVER, Cluster, eventually, timeout_flag};
use crate::support::disk::{Disk, FREE_MIB, kubelet_reports_the_disk};
use crate::support::kubelet::{COUNTED, KUBELET, Kubelet, UNCOUNTED, busybox_pod, lives};
use crate::support::machine::{MIB, Result};
use crate::support::needs::{Need, Test};
use crate::support::node::{Node, on_a_node};
use crate::{ensure, ensure_eq, test};

pub(crate) const TESTS: &[Test] = &[
    test!(
        only_the_pod_that_fills_a_disk_is_evicted,
        Need::Native,
        APISERVER,
        KUBELET,
    ),
    test!(
        only_the_pod_that_uses_up_the_memory_is_evicted,
        Need::Long,
        COUNTED,
        APISERVER,
        KUBELET,
    ),
];

/// Returns a pod with one container. The container does nothing until the file /take exists.
fn pod(name: &str, resources: &Value) -> Value {
    // The file /take contains the number of MiB that the container allocates. dd reads one block of
    // this size and writes the block to a pipe. sleep never reads the pipe, so dd keeps the block
    // in memory.
    let script = "while [ ! -e /take ]; do sleep 1; done; \
        dd if=/dev/zero bs=$(cat /take)M count=1 | sleep 100000";
    let mut pod = busybox_pod(name, &["sh", "-c", script]);
    let container = &mut pod["spec"]["containers"][0];
    container["resources"] = resources.clone();
    container["volumeMounts"] = json!([{ "name": "data", "mountPath": "/data" }]);
    pod["spec"]["volumes"] = json!([{ "name": "data", "emptyDir": {} }]);
    pod
}

/// Makes the pod write `size` MiB to the file `file`.
fn writes(cluster: &Cluster, pod: &str, file: &str, size: u64) -> Result {
    let size = format!("count={size}");
    let file = format!("of={file}");
    let dd = ["dd", "if=/dev/zero", &file, "bs=1M", &size];
    // kubelet can evict the pod before dd ends. The test therefore ignores a failure of this
    // command.
    cluster.kubectl(&["exec", pod, "--"]).args(dd).end()?;
    Ok(())
}

/// Waits until kubelet has evicted the pod. Then checks that the message in the pod's status
/// contains all of `words`.
fn evicted(cluster: &Cluster, pod: &str, words: &[&str]) -> Result {
    eventually(&format!("kubelet to evict the pod {pod}"), || {
        let status = cluster.json(&["get", "pod", pod])?["status"].clone();
        let others = || cluster.asks(&["get", "pods", "-o", "wide"]);
        ensure!(
            status["phase"] == "Failed" && status["reason"] == "Evicted",
            "the pod is not evicted; the pod's status: {status}\nAll pods:\n{}",
            others()?
        );
        let message = status["message"].as_str().unwrap_or_default();
        ensure!(
            words.iter().all(|word| message.contains(word)),
            "the eviction's message must contain all of the texts {words:?}; the message: {message}"
        );
        Ok(Some(()))
    })
}

/// Waits until the node no longer reports the condition `pressure`.
fn relieved(cluster: &Cluster, pressure: &str) -> Result {
    let status =
        format!("jsonpath={{.items[0].status.conditions[?(@.type==\"{pressure}\")].status}}");
    eventually(
        &format!("the condition {pressure} of the node to become False"),
        || {
            let now = cluster.asks(&["get", "nodes", "-o", &status])?;
            Ok((now == "False").then_some(()))
        },
    )
}

/// Returns the container id, the process id and the restart count of the pod's only container,
/// which must be running.
fn lives_of(node: &Node, cluster: &Cluster, pod: &str) -> Result<Vec<(String, i32, i64)>> {
    let pod = cluster.json(&["get", "pod", pod])?;
    let all = lives(node, &[pod])?;
    ensure_eq!(all.len(), 1, "number of running containers of the pod");
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

fn only_the_pod_that_fills_a_disk_is_evicted() -> Result {
    on_a_node(|node| {
        let images = Disk::of_the_images(node)?;
        let own = Disk::at(PathBuf::from("/var/lib/kubelet"))?;
        let result = evict_from_disks(node, &images, &own);
        own.unmount()?;
        result
    })
}

fn evict_from_disks(node: &mut Node, images: &Disk, own: &Disk) -> Result {
    // By default, kubelet measures volumes only once a minute, so the test sets
    // volumeStatsAggPeriod.
    let config = format!(
        "evictionHard: {{memory.available: 1Mi, nodefs.available: {FREE_MIB}Mi, imagefs.available: {FREE_MIB}Mi}}\n\
         evictionPressureTransitionPeriod: 1s\nvolumeStatsAggPeriod: 1s\n{UNCOUNTED}"
    );
    let cluster = Cluster::configured(node, &config)?;
    eventually(
        "kubelet to report the correct figures for the node's disk and the images' disk",
        || {
            let summary = cluster.kubelet.asks("/stats/summary")?;
            kubelet_reports_the_disk(&summary["node"]["fs"], own)?;
            kubelet_reports_the_disk(&summary["node"]["runtime"]["imageFs"], images)?;
            Ok(Some(()))
        },
    )?;
    let limits = json!({ "limits": { "ephemeral-storage": "16Mi" } });
    start_pods(
        &cluster,
        &[
            pod("bystander", &json!({})),
            pod("bounded", &limits),
            pod("writer", &json!({})),
            pod("keeper", &json!({})),
        ],
    )?;
    let before = lives_of(node, &cluster, "bystander")?;

    // The pod `bounded` writes more than its own limit to a disk with enough free space.
    writes(&cluster, "bounded", "/file", 24)?;
    let words = ["local storage usage exceeds", "16Mi"];
    evicted(&cluster, "bounded", &words)?;

    // The pod `writer` fills the images' disk through its writable layer. At the same time, kubelet
    // can delete the data of the evicted pod `bounded` from this disk. The pod `writer` therefore
    // writes 64 MiB more than necessary.
    writes(&cluster, "writer", "/file", all_but(images, FREE_MIB - 64)?)?;
    let words = ["low on resource", "Container c was using"];
    evicted(&cluster, "writer", &words)?;
    has_room(images)?;
    relieved(&cluster, "DiskPressure")?;

    // The pod `keeper` fills kubelet's own disk through a volume. kubelet measures the volume's
    // size only from time to time. The pod therefore first writes most of the data. The pod writes
    // the rest only after kubelet has reported the volume's size.
    writes(
        &cluster,
        "keeper",
        "/data/much",
        all_but(own, FREE_MIB + 16)?,
    )?;
    volume_uses(&cluster, "keeper", 64 * MIB)?;
    writes(&cluster, "keeper", "/data/more", 32)?;
    evicted(&cluster, "keeper", &["low on resource"])?;
    has_room(own)?;
    relieved(&cluster, "DiskPressure")?;

    let after = lives_of(node, &cluster, "bystander")?;
    ensure_eq!(
        after,
        before,
        "container id, process id and restart count of the pod `bystander`"
    );
    cluster.asks(&["delete", "pod", "--all", &timeout_flag()])?;
    Kubelet::has_stopped_everything(node)
}

/// Returns the number of MiB to write if only `free` MiB of the disk must remain free.
fn all_but(disk: &Disk, free: u64) -> Result<u64> {
    Ok((disk.free()? / MIB).saturating_sub(free))
}

/// Waits until kubelet reports that the pod's volume uses more than `bytes` bytes.
fn volume_uses(cluster: &Cluster, pod: &str, bytes: u64) -> Result {
    eventually("kubelet to report the volume's size", || {
        let summary = cluster.kubelet.asks("/stats/summary")?;
        let mut pods = summary["pods"].as_array().into_iter().flatten();
        let stats = pods.find(|stats| stats["podRef"]["name"] == pod);
        let mut volumes = stats
            .into_iter()
            .flat_map(|pod| pod["volume"].as_array().into_iter().flatten());
        let volume = volumes.find(|volume| volume["name"] == "data");
        let used = volume.and_then(|volume| volume["usedBytes"].as_u64());
        ensure!(
            used > Some(bytes),
            "kubelet reports that the volume uses {used:?} bytes, but it must use more than {bytes} bytes"
        );
        Ok(Some(()))
    })
}

/// kubelet evicts a pod when less than `AVAILABLE_MIB` MiB of memory are available. The pod `taker`
/// allocates all memory except `LEFT_MIB` MiB.
const AVAILABLE_MIB: u64 = 400;
const LEFT_MIB: u64 = 250;

fn only_the_pod_that_uses_up_the_memory_is_evicted() -> Result {
    on_a_node(|node| {
        let config = format!(
            "evictionHard: {{memory.available: {AVAILABLE_MIB}Mi, nodefs.available: 100Mi}}\n\
             evictionPressureTransitionPeriod: 1s\n"
        );
        let cluster = Cluster::configured(node, &config)?;
        let pods = ["bystander", "taker"].map(|name| pod(name, &json!({})));
        start_pods(&cluster, &pods)?;
        let before = lives_of(node, &cluster, "bystander")?;
        let available = eventually("kubelet to report the node's memory", || {
            let summary = cluster.kubelet.asks("/stats/summary")?;
            let available = &summary["node"]["memory"]["availableBytes"];
            Ok(available.as_u64())
        })?;
        let size = (available / MIB).checked_sub(LEFT_MIB);
        let size = size.ok_or(format!("only {available} bytes of memory are available"))?;
        ensure!(size > 100, "only {available} bytes of memory are available");
        let take = format!("echo {size} >/take");
        cluster.asks(&["exec", "taker", "--", "sh", "-c", &take])?;
        let words = ["low on resource: memory", "Container c was using"];
        evicted(&cluster, "taker", &words)?;
        relieved(&cluster, "MemoryPressure")?;
        let after = lives_of(node, &cluster, "bystander")?;
        ensure_eq!(
            after,
            before,
            "container id, process id and restart count of the pod `bystander`"
        );
        cluster.asks(&["delete", "pod", "--all", &timeout_flag()])?;
        Kubelet::has_stopped_everything(node)
    })
}

fn has_room(disk: &Disk) -> Result {
    eventually("kubelet to free space on the disk", || {
        let free = disk.free()?;
        ensure!(
            free > FREE_MIB * MIB,
            "only {free} bytes of the disk are free"
        );
        Ok(Some(()))
    })
}
