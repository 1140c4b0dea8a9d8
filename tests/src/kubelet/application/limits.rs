//! What kubelet's pods may use and do use: its own limits in the kernel's files, their effect, and
//! what it tells of it.

use std::collections::BTreeSet;

use serde_json::Value;

use crate::support::application::{address, tells};
use crate::support::cgroup_use::{file, held_to};
use crate::support::kubelet::{KUBELET_TIMEOUT, Kubelet, container_id, container_status, pod_name};
use crate::support::machine::{MIB, Result, command, note, wait_for, wait_within};
use crate::support::node::{Node, is_rrun};
use crate::{ensure, ensure_eq};

pub(crate) fn limits_are_as_kubelet_means_them(
    node: &Node,
    pods: &[Value],
    protection: &str,
) -> Result {
    // floor((request + 0.9 * (limit - request)) / 4096) * 4096
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
            ensure_eq!(file(&group, name)?, value, "{name} of {}", group.display());
        }
        let told = group.to_string_lossy().into_owned();
        ensure!(
            told.contains("kubepods") && told.contains("burstable"),
            "the container is in {told}"
        );
        // The pod's own group: 100m and two shares for each container that asks for nothing.
        let of_pod = group.parent().ok_or("no parent")?;
        ensure_eq!(
            file(of_pod, protection)?,
            (48 * MIB).to_string(),
            "{protection} of the pod"
        );
    }
    Ok(())
}

/// Under LimitedSwap a critical pod has none, which every static pod is; others get a part.
pub(crate) fn there_is_no_swap_for_a_critical_pod(node: &Node, pods: &[Value]) -> Result {
    for pod in pods {
        let group = node.cgroup(&container_id(pod, "web")?)?;
        ensure_eq!(file(&group, "memory.swap.max")?, "0", "memory.swap.max");
    }
    Ok(())
}

/// By the call that kubelet resizes with; without an API server it resizes nothing itself.
pub(crate) fn a_resize_in_place_takes_effect(node: &Node, pod: &Value) -> Result {
    let id = container_id(pod, "web")?;
    let group = node.cgroup(&id)?;
    let pid = node.pid(&id)?;
    for size in [144 * MIB, 128 * MIB] {
        node.asks(&["update", "--memory", &size.to_string(), &id])?;
        ensure_eq!(file(&group, "memory.max")?, size.to_string(), "memory.max");
    }
    ensure_eq!(file(&group, "cpu.max")?, "50000 100000", "cpu.max");
    ensure_eq!(node.pid(&id)?, pid, "the process");
    Ok(())
}

pub(crate) fn a_busy_loop_is_held_to_its_limit(node: &Node, pod: &Value) -> Result {
    let group = node.cgroup(&container_id(pod, "web")?)?;
    // Longer than the watch over it.
    tells(pod, "/burn/40")?;
    let used = held_to(0.5, &group)?;
    note(format!(
        "a busy loop under kubelet's limit of 500m used {:.0}m",
        used * 1000.0
    ));
    Ok(())
}

/// What kubelet says of its pods' use, which it asks the CRI server for.
pub(crate) fn statistics_are_plausible(kubelet: &Kubelet) -> Result {
    wait_for("three replicas' statistics", || {
        let summary = kubelet.asks("/stats/summary")?;
        let pods = summary["pods"].as_array().cloned().unwrap_or_default();
        ensure_eq!(pods.len(), 3, "pods in {summary}");
        for pod in &pods {
            let containers = pod["containers"].as_array();
            let web = containers
                .into_iter()
                .flatten()
                .find(|one| one["name"] == "web");
            let web = web.ok_or(format!("no web in {pod}"))?;
            let number = |value: &Value, what: &str| {
                let number = value.pointer(what).and_then(Value::as_u64);
                number.ok_or(format!("no {what} in {value}"))
            };
            let memory = number(web, "/memory/workingSetBytes")?;
            ensure!(
                (8 * MIB..128 * MIB).contains(&memory),
                "working set of {memory} bytes: {web}"
            );
            // Python's start takes a good while under emulation, and some time anywhere.
            let cpu = number(web, "/cpu/usageCoreNanoSeconds")?;
            ensure!(cpu > 100_000_000, "{cpu} ns of CPU time: {web}");
            number(web, "/cpu/usageNanoCores")?;
            ensure!(number(web, "/rootfs/usedBytes")? < 64 * MIB, "{web}");
            ensure!(number(web, "/logs/usedBytes")? > 0, "{web}");
            ensure!(number(pod, "/network/rxBytes")? > 1000, "{pod}");
            ensure!(
                number(pod, "/memory/workingSetBytes")? >= memory / 2,
                "{pod}"
            );
            ensure!(number(pod, "/process_stats/process_count")? >= 3, "{pod}");
        }
        let images = summary.pointer("/node/runtime/imageFs/usedBytes");
        ensure!(
            images.and_then(Value::as_u64) > Some(10 * MIB),
            "the images' file system: {}",
            summary["node"]["runtime"]
        );
        Ok(Some(()))
    })?;
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
            ensure_eq!(pods.len(), 3, "pods with {name}");
        }
    }
    Ok(())
}

/// Waits until the application of this pod has been restarted so often.
pub(crate) fn restarted(kubelet: &Kubelet, pod: &Value, count: i64) -> Result<Value> {
    wait_within(
        KUBELET_TIMEOUT,
        &format!("restart {count} of {}", pod_name(pod)),
        || {
            let web = container_status(&kubelet.pod(pod)?, "web")?;
            ensure!(web["restartCount"] == count, "{web}");
            Ok(Some(web))
        },
    )
}

/// A replica allocates more than it may, again and again, until it has to wait for its restart.
pub(crate) fn allocations_are_oomkilled_and_backed_off(kubelet: &Kubelet, pod: &Value) -> Result {
    // The first restart comes at once. The others' back-off begins with the container's end and
    // doubles from ten seconds on: a kubelet that is slow to see the end may be past the first.
    for count in 1..=4 {
        // The application's end takes the answer along.
        let url = format!("http://{}:5000/grow/200", address(pod)?);
        command("curl", ["-sS", "-m", "60", "-X", "POST", &url]).end()?;
        let what = format!("kill {count} of {}", pod_name(pod));
        let killed = wait_within(KUBELET_TIMEOUT, &what, || {
            let web = container_status(&kubelet.pod(pod)?, "web")?;
            let waits = web["state"]["waiting"]["reason"] == "CrashLoopBackOff";
            ensure!(waits || web["restartCount"] == count, "{web}");
            Ok(Some(web))
        })?;
        let last = &killed["lastState"]["terminated"];
        ensure!(
            last["reason"] == "OOMKilled" && last["exitCode"] == 137,
            "{killed}"
        );
        let backed_off = killed["state"]["waiting"].is_object();
        restarted(kubelet, pod, count)?;
        kubelet.ready(3)?;
        if backed_off {
            return Ok(());
        }
    }
    Err("the container was restarted four times, and never waited for it".into())
}
