//! Limits by the CRI: enforced, updated, reported, and what statistics say.

use serde_json::{Value, json};

use crate::cgroup_use::{file, held_to};
use crate::machine::{Result, note, wait_for};
use crate::needs::{Need, Test};
use crate::node::{BUSYBOX, CRICTL, IMAGES, REGISTRY, SERVER, is_rrun, on_a_node};
use crate::{ensure, ensure_eq, test};

const CPU: Need = Need::Controller("cpu");
const MEMORY: Need = Need::Controller("memory");

pub const TESTS: &[Test] = &[
    test!(
        limits_are_enforced_and_updated,
        CRICTL,
        SERVER,
        REGISTRY,
        IMAGES,
        CPU,
        MEMORY
    ),
    test!(
        an_allocation_over_the_limit_is_oomkilled,
        CRICTL,
        SERVER,
        REGISTRY,
        IMAGES,
        MEMORY
    ),
    test!(
        stats_tell_what_a_container_uses,
        CRICTL,
        SERVER,
        REGISTRY,
        IMAGES,
        CPU,
        MEMORY
    ),
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
