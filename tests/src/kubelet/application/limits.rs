//! Checks of the resource limits of kubelet's pods. The checks cover the values in the cgroup
//! files, the effect of the limits, and the usage in kubelet's reports.

use std::collections::BTreeSet;

use serde_json::Value;

use crate::support::application::{address, tells};
use crate::support::cgroup_use::{file, held_to};
use crate::support::kubelet::{KUBELET_TIMEOUT, Kubelet, container_id, container_status, pod_name};
use crate::support::machine::{MIB, Result, command, note, wait_for, wait_within};
use crate::support::node::{Node, is_rrun};
use crate::{ensure, ensure_eq};

pub(crate) fn limits_in_the_cgroups_match_the_pod_manifests_and_the_kubelet_configuration(
    node: &Node,
    pods: &[Value],
    protection: &str,
) -> Result {
    // kubelet computes memory.high as floor((request + 0.9 * (limit - request)) / 4096) * 4096
    let high = (48 * MIB + 80 * MIB * 9 / 10) / 4096 * 4096;
    for pod in pods {
        let group = node.cgroup(&container_id(pod, "web")?)?;
        for (name, value) in [
            ("cpu.weight", "17".to_owned()),
            ("cpu.max", "50000 100000".to_owned()),
            ("memory.max", (128 * MIB).to_string()),
            ("memory.high", high.to_string()),
            (protection, (48 * MIB).to_string()),
        ] {
            ensure_eq!(
                file(&group, name)?,
                value,
                "content of the file {name} in the cgroup {}",
                group.display()
            );
        }
        let path = group.to_string_lossy().into_owned();
        ensure!(
            path.contains("kubepods") && path.contains("burstable"),
            "the container's cgroup is not below the cgroup of burstable pods: {path}"
        );
        // No other container of the pod requests memory. The pod's cgroup therefore has the same
        // memory protection as the container's cgroup.
        let of_pod = group
            .parent()
            .ok_or("the container's cgroup has no parent")?;
        ensure_eq!(
            file(of_pod, protection)?,
            (48 * MIB).to_string(),
            "content of the file {protection} in the pod's cgroup"
        );
    }
    Ok(())
}

/// With kubelet's setting LimitedSwap, a critical pod gets no swap, and every static pod is
/// critical. Other pods get a share of the node's swap.
pub(crate) fn a_critical_pod_gets_no_swap(node: &Node, pods: &[Value]) -> Result {
    for pod in pods {
        let group = node.cgroup(&container_id(pod, "web")?)?;
        ensure_eq!(
            file(&group, "memory.swap.max")?,
            "0",
            "memory.swap.max of a critical pod's container"
        );
    }
    Ok(())
}

/// Makes the CRI call with which kubelet resizes a container. kubelet makes this call only if it
/// has an API server. The test therefore makes the call itself.
pub(crate) fn a_resize_in_place_takes_effect(node: &Node, pod: &Value) -> Result {
    let id = container_id(pod, "web")?;
    let group = node.cgroup(&id)?;
    let pid = node.pid(&id)?;
    for size in [144 * MIB, 128 * MIB] {
        node.asks(&["update", "--memory", &size.to_string(), &id])?;
        ensure_eq!(
            file(&group, "memory.max")?,
            size.to_string(),
            "memory.max of the container's cgroup after a resize"
        );
    }
    ensure_eq!(
        file(&group, "cpu.max")?,
        "50000 100000",
        "cpu.max of the container's cgroup after a resize of the memory"
    );
    ensure_eq!(
        node.pid(&id)?,
        pid,
        "the container's process id after the resizes"
    );
    Ok(())
}

pub(crate) fn a_busy_loop_uses_no_more_cpu_time_than_its_limit(node: &Node, pod: &Value) -> Result {
    let group = node.cgroup(&container_id(pod, "web")?)?;
    // The busy loop lasts 40 s, so it does not end during the measurement of its CPU usage.
    tells(pod, "/burn/40")?;
    let used = held_to(0.5, &group)?;
    note(format!(
        "a busy loop under kubelet's CPU limit of 500m used {:.0}m of CPU",
        used * 1000.0
    ));
    Ok(())
}

/// Checks the usage that kubelet reports for its pods. kubelet requests the usage from the CRI
/// server.
pub(crate) fn statistics_are_plausible(kubelet: &Kubelet) -> Result {
    wait_for(
        "kubelet to report plausible statistics of the three replicas",
        || {
            let summary = kubelet.asks("/stats/summary")?;
            let pods = summary["pods"].as_array().cloned().unwrap_or_default();
            ensure_eq!(
                pods.len(),
                3,
                "number of pods in kubelet's statistics {summary}"
            );
            for pod in &pods {
                let containers = pod["containers"].as_array();
                let web = containers
                    .into_iter()
                    .flatten()
                    .find(|one| one["name"] == "web");
                let web = web.ok_or(format!(
                    "the container web is missing in the pod's statistics {pod}"
                ))?;
                let number = |value: &Value, pointer: &str| {
                    let number = value.pointer(pointer).and_then(Value::as_u64);
                    number.ok_or(format!(
                        "the field {pointer} is missing in the statistics {value}"
                    ))
                };
                let memory = number(web, "/memory/workingSetBytes")?;
                ensure!(
                    (8 * MIB..128 * MIB).contains(&memory),
                    "the working set of {memory} bytes is not plausible; the container's statistics: {web}"
                );
                // Python needs more than 100 ms of CPU time to start on any machine, and much more
                // under emulation.
                let cpu = number(web, "/cpu/usageCoreNanoSeconds")?;
                ensure!(
                    cpu > 100_000_000,
                    "the container used only {cpu} ns of CPU time; the container's statistics: {web}"
                );
                number(web, "/cpu/usageNanoCores")?;
                ensure!(
                    number(web, "/rootfs/usedBytes")? < 64 * MIB,
                    "the container's writable layer is too large; the container's statistics: {web}"
                );
                ensure!(
                    number(web, "/logs/usedBytes")? > 0,
                    "the container's log has the size 0 in the container's statistics: {web}"
                );
                ensure!(
                    number(pod, "/network/rxBytes")? > 1000,
                    "the pod received too few bytes; the pod's statistics: {pod}"
                );
                ensure!(
                    number(pod, "/memory/workingSetBytes")? >= memory / 2,
                    "the pod's working set is less than half of the working set of its container web; the pod's statistics: {pod}"
                );
                ensure!(
                    number(pod, "/process_stats/process_count")? >= 3,
                    "the pod has fewer than three processes; the pod's statistics: {pod}"
                );
            }
            let images = summary.pointer("/node/runtime/imageFs/usedBytes");
            ensure!(
                images.and_then(Value::as_u64) > Some(10 * MIB),
                "kubelet reports too few bytes for the images' file system: {}",
                summary["node"]["runtime"]
            );
            Ok(Some(()))
        },
    )?;
    if is_rrun() {
        let metrics = kubelet.reads("/metrics/cadvisor")?;
        for name in [
            "container_cpu_usage_seconds_total",
            "container_memory_working_set_bytes",
        ] {
            let pods: BTreeSet<&str> = metrics
                .lines()
                .filter(|line| line.starts_with(name) && line.contains("container=\"web\""))
                .filter_map(|line| line.split("pod=\"").nth(1)?.split('"').next())
                .collect();
            ensure_eq!(pods.len(), 3, "number of pods with the metric {name}");
        }
    }
    Ok(())
}

/// Waits until the container `web` of this pod has been restarted `count` times, and returns the
/// container's status.
pub(crate) fn restarted(kubelet: &Kubelet, pod: &Value, count: i64) -> Result<Value> {
    wait_within(
        KUBELET_TIMEOUT,
        &format!(
            "kubelet to report restart number {count} of the pod {}",
            pod_name(pod)
        ),
        || {
            let web = container_status(&kubelet.pod(pod)?, "web")?;
            ensure!(
                web["restartCount"] == count,
                "the restart count is not {count}; the container's status: {web}"
            );
            Ok(Some(web))
        },
    )
}

/// Makes a replica exceed its memory limit repeatedly, until kubelet delays the replica's restart.
pub(crate) fn large_allocations_cause_oom_kills_and_a_back_off(
    kubelet: &Kubelet,
    pod: &Value,
) -> Result {
    // kubelet makes the first restart immediately. Before each later restart, kubelet waits for a
    // back-off. The back-off begins at the container's exit. The first back-off lasts ten seconds,
    // and each later back-off is twice as long as the previous back-off. If kubelet notices an exit
    // late, the first back-off can already be over. So the test makes kubelet restart the replica
    // up to four times, until the test observes a back-off.
    for count in 1..=4 {
        // The kernel kills the application before it answers the request. curl therefore fails.
        let url = format!("http://{}:5000/grow/200", address(pod)?);
        command("curl", ["-sS", "-m", "60", "-X", "POST", &url]).end()?;
        let what = format!(
            "kubelet to report OOM kill number {count} of the pod {}",
            pod_name(pod)
        );
        let killed = wait_within(KUBELET_TIMEOUT, &what, || {
            let web = container_status(&kubelet.pod(pod)?, "web")?;
            let waits = web["state"]["waiting"]["reason"] == "CrashLoopBackOff";
            ensure!(
                waits || web["restartCount"] == count,
                "the container was not killed; the container's status: {web}"
            );
            Ok(Some(web))
        })?;
        let last = &killed["lastState"]["terminated"];
        ensure!(
            last["reason"] == "OOMKilled" && last["exitCode"] == 137,
            "the container was not OOMKilled; the container's status: {killed}"
        );
        let backed_off = killed["state"]["waiting"].is_object();
        restarted(kubelet, pod, count)?;
        kubelet.ready(3)?;
        if backed_off {
            return Ok(());
        }
    }
    Err("kubelet restarted the container four times without a back-off".into())
}
