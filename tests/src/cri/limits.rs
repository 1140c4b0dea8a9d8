//! Limits by the CRI: enforced, updated, reported, and what statistics say.

use rrun_proto::v1::{LinuxContainerResources, UpdatePodSandboxResourcesRequest};
use serde_json::{Value, json};

use crate::support::calls::Calls;
use crate::support::cgroup_use::{file, held_to};
use crate::support::machine::{Result, note, wait_for};
use crate::support::needs::{Need, Test};
use crate::support::node::{A_NODE, BUSYBOX, is_rrun, on_a_node};
use crate::{ensure, ensure_eq, test};

const CPU: Need = Need::Controller("cpu");
const MEMORY: Need = Need::Controller("memory");

pub(crate) const TESTS: &[Test] = &[
    test!(limits_are_enforced_and_updated, A_NODE, CPU, MEMORY),
    test!(an_allocation_over_the_limit_is_oomkilled, A_NODE, MEMORY),
    test!(
        a_memory_limit_below_what_is_in_use_is_refused,
        A_NODE,
        MEMORY,
        Need::RrunCri
    ),
    test!(
        huge_pages_are_limited_by_their_size,
        A_NODE,
        Need::Controller("hugetlb"),
        Need::RrunCri
    ),
    test!(
        a_pods_own_resources_are_kubelets_to_write,
        A_NODE,
        Need::Controller("hugetlb")
    ),
    test!(stats_tell_what_a_container_uses, A_NODE, CPU, MEMORY),
];

fn limits_are_enforced_and_updated() -> Result {
    on_a_node(|node| {
        node.pull(BUSYBOX)?;
        let pod = node.pod("limits");
        let pod_id = node.runp(&pod)?;
        let mut container = node.container("spins", &["/inside", "spin", "600"]);
        container["linux"]["resources"] = json!({
            "cpu_period": 100_000, "cpu_quota": 50_000, "cpu_shares": 102,
            "memory_limit_in_bytes": 64 << 20,
        });
        let id = node.run(&pod_id, &pod, &container)?;
        let group = node.cgroup(&id)?;
        for (name, value) in [
            ("cpu.max", "50000 100000"),
            ("cpu.weight", "17"),
            ("memory.max", "67108864"),
        ] {
            ensure_eq!(file(&group, name)?, value, "{name}");
        }
        let used = held_to(0.5, &group)?;
        note(format!("a quota of 500m used {:.0}m", used * 1000.0));

        node.asks(&[
            "update",
            "--cpu-period",
            "100000",
            "--cpu-quota",
            "25000",
            "--cpu-share",
            "1024",
            "--memory",
            "100663296",
            &id,
        ])?;
        for (name, value) in [
            ("cpu.max", "25000 100000"),
            ("cpu.weight", "100"),
            ("memory.max", "100663296"),
        ] {
            ensure_eq!(file(&group, name)?, value, "{name} after the update");
        }
        let used = held_to(0.25, &group)?;
        note(format!(
            "after an update to 250m it used {:.0}m",
            used * 1000.0
        ));
        let resources = node.status(&id)?["resources"]["linux"].clone();
        ensure_eq!(
            resources["cpuQuota"],
            "25000",
            "quota in the status ({resources})"
        );
        ensure_eq!(
            resources["memoryLimitInBytes"],
            "100663296",
            "memory limit in the status"
        );
        Ok(())
    })
}

fn an_allocation_over_the_limit_is_oomkilled() -> Result {
    on_a_node(|node| {
        node.pull(BUSYBOX)?;
        let pod = node.pod("memory");
        let pod_id = node.runp(&pod)?;
        let limit =
            json!({ "memory_limit_in_bytes": 48 << 20, "memory_swap_limit_in_bytes": 48 << 20 });
        let mut container = node.container("greedy", &["/inside", "allocate", "256"]);
        container["linux"]["resources"] = limit.clone();
        let id = node.run(&pod_id, &pod, &container)?;
        let status = node.exited(&id)?;
        ensure_eq!(status["reason"], "OOMKilled", "reason");
        ensure_eq!(status["exitCode"], json!(137), "exit code");
        // Killed otherwise is not that.
        let mut container = node.container("other", &["sleep", "600"]);
        container["linux"]["resources"] = limit;
        let id = node.run(&pod_id, &pod, &container)?;
        node.asks(&["stop", "--timeout", "0", &id])?;
        ensure_eq!(
            node.status(&id)?["reason"],
            "Error",
            "reason of what was killed"
        );
        Ok(())
    })
}

/// The kernel would reclaim what it can, and then kill; kubelet tries again later.
fn a_memory_limit_below_what_is_in_use_is_refused() -> Result {
    on_a_node(|node| {
        node.pull(BUSYBOX)?;
        let pod = node.pod("shrinks");
        let pod_id = node.runp(&pod)?;
        let script = "head -c 33554432 /dev/zero > /dev/shm/held; exec sleep 1000";
        let mut container = node.container("holds", &["sh", "-c", script]);
        container["linux"]["resources"] = json!({ "memory_limit_in_bytes": 128 << 20 });
        let id = node.run(&pod_id, &pod, &container)?;
        let group = node.cgroup(&id)?;
        wait_for("32 MB to be in use", || {
            let used: u64 = file(&group, "memory.current")?.parse()?;
            Ok((used > 32 << 20).then_some(()))
        })?;
        let output = node
            .crictl(&["update", "--memory", "16777216", &id])
            .end()?;
        ensure!(
            output.code != 0
                && output
                    .stderr
                    .contains("the new memory limit of 16777216 bytes is below the"),
            "{}",
            output.told()
        );
        ensure_eq!(file(&group, "memory.max")?, "134217728", "memory.max");
        let status = node.status(&id)?;
        ensure_eq!(status["state"], "CONTAINER_RUNNING", "state ({status})");
        ensure_eq!(
            status["resources"]["linux"]["memoryLimitInBytes"],
            "134217728",
            "memory limit in the status"
        );
        node.asks(&["update", "--memory", "67108864", &id])?;
        ensure_eq!(file(&group, "memory.max")?, "67108864", "memory.max");
        Ok(())
    })
}

fn huge_pages_are_limited_by_their_size() -> Result {
    on_a_node(|node| {
        node.pull(BUSYBOX)?;
        let pod = node.pod("huge");
        let pod_id = node.runp(&pod)?;
        let mut container = node.container("pages", &["sleep", "1000"]);
        // Kubelet names every size that the node has.
        container["linux"]["resources"] = json!({ "hugepage_limits": [
            { "page_size": "2MB", "limit": 4 << 20 }, { "page_size": "1GB", "limit": 0 },
        ] });
        let id = node.run(&pod_id, &pod, &container)?;
        let group = node.cgroup(&id)?;
        for (name, value) in [("hugetlb.2MB.max", "4194304"), ("hugetlb.1GB.max", "0")] {
            if group.join(name).exists() {
                ensure_eq!(file(&group, name)?, value, "{name}");
            }
        }
        let limits = node.status(&id)?["resources"]["linux"]["hugepageLimits"].clone();
        ensure_eq!(
            limits[0]["pageSize"],
            "2MB",
            "limits in the status ({limits})"
        );
        ensure_eq!(
            limits[0]["limit"],
            "4194304",
            "limits in the status ({limits})"
        );

        let mut wrong = node.container("wrong", &["true"]);
        wrong["linux"]["resources"] =
            json!({ "hugepage_limits": [{ "page_size": "3MB", "limit": 6 << 20 }] });
        let output = node.try_create(&pod_id, &pod, &wrong)?;
        output.fails_with("page size 3")?;
        Ok(())
    })
}

/// Containerd and CRI-O remember them, too, and leave the cgroup alone: kubelet has made it, and
/// has written what it asks for into it by then.
fn a_pods_own_resources_are_kubelets_to_write() -> Result {
    on_a_node(|node| {
        node.pull(BUSYBOX)?;
        let mut pod = node.pod("resized");
        pod["linux"]["resources"] =
            json!({ "hugepage_limits": [{ "page_size": "2MB", "limit": 2 << 20 }] });
        let pod_id = node.runp(&pod)?;
        let id = node.run(&pod_id, &pod, &node.container("main", &["sleep", "1000"]))?;
        let group = node.cgroup(&id)?;
        let group = group.parent().ok_or("no pod's cgroup")?;
        let limit = || file(group, "hugetlb.2MB.max");
        let before = limit()?;
        ensure!(before != "2097152", "the pod's limit was written");
        let calls = Calls::new(node)?;
        let mut client = calls.runtime();
        let resources = LinuxContainerResources {
            memory_limit_in_bytes: 64 << 20,
            hugepage_limits: vec![rrun_proto::v1::HugepageLimit {
                page_size: "2MB".to_owned(),
                limit: 4 << 20,
            }],
            ..Default::default()
        };
        let request = UpdatePodSandboxResourcesRequest {
            pod_sandbox_id: pod_id,
            overhead: Some(LinuxContainerResources::default()),
            resources: Some(resources),
        };
        calls.wait(async move { client.update_pod_sandbox_resources(request).await })??;
        ensure_eq!(limit()?, before, "the pod's limit after its update");
        Ok(())
    })
}

fn stats_tell_what_a_container_uses() -> Result {
    on_a_node(|node| {
        node.pull(BUSYBOX)?;
        let pod = node.pod("stats");
        let pod_id = node.runp(&pod)?;
        let script =
            "head -c 20000000 /dev/zero > /file; cat /file > /dev/null; while :; do :; done";
        let id = node.run(
            &pod_id,
            &pod,
            &node.container("busy", &["sh", "-c", script]),
        )?;
        let number = |value: Option<&Value>| {
            value
                .and_then(Value::as_str)
                .and_then(|text| text.parse::<u64>().ok())
                .unwrap_or_default()
        };
        wait_for("the container's figures", || {
            let stats = node.json(&["stats", "--all", "--id", &id])?["stats"][0].clone();
            let cpu = number(stats.pointer("/cpu/usageCoreNanoSeconds/value"));
            let memory = number(stats.pointer("/memory/workingSetBytes/value"));
            let written = number(stats.pointer("/writableLayer/usedBytes/value"));
            ensure!(
                cpu > 500_000_000 && memory > 0 && written >= 20_000_000,
                "CPU {cpu} ns, memory {memory}, written {written}: {stats}"
            );
            ensure_eq!(stats["attributes"]["id"], json!(id), "id");
            ensure_eq!(stats["attributes"]["metadata"]["name"], "busy", "name");
            Ok(Some(()))
        })?;
        // containerd wants a cgroup parent for that.
        if is_rrun() {
            let pods = node.json(&["statsp", "--id", &pod_id])?["stats"][0].clone();
            let used = number(pods.pointer("/linux/cpu/usageCoreNanoSeconds/value"));
            ensure!(used > 0, "of the pod: {pods}");
        }
        Ok(())
    })
}
