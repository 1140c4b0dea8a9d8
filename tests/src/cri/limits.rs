//! Tests of the resource limits of containers and pods, and of the resource usage in the
//! statistics. The server must enforce, update and report the limits.

use rrun_proto::v1::{LinuxContainerResources, UpdatePodSandboxResourcesRequest};
use serde_json::{Value, json};

use crate::support::calls::Calls;
use crate::support::cgroup_use::{file, held_to};
use crate::support::images::build::{Archive, ITEM, Item};
use crate::support::images::{pull_built, with_one_layer};
use crate::support::machine::{Failed, Result, note, wait_for};
use crate::support::needs::{Need, Test};
use crate::support::node::{A_NODE, BUSYBOX, is_rrun, on_a_node};
use crate::{ensure, ensure_eq, test};

const CPU: Need = Need::Controller("cpu");
const MEMORY: Need = Need::Controller("memory");

pub(crate) const TESTS: &[Test] = &[
    test!(
        the_server_enforces_and_updates_the_limits_of_a_container,
        A_NODE,
        CPU,
        MEMORY
    ),
    test!(
        a_container_that_exceeds_its_memory_limit_is_reported_as_oomkilled,
        A_NODE,
        MEMORY
    ),
    test!(
        a_memory_limit_below_the_current_usage_is_refused,
        A_NODE,
        MEMORY,
        Need::RrunCri
    ),
    test!(
        each_size_of_huge_pages_has_its_own_limit,
        A_NODE,
        Need::Controller("hugetlb"),
        Need::RrunCri
    ),
    test!(
        the_server_leaves_the_limits_of_a_pod_to_kubelet,
        A_NODE,
        Need::Controller("hugetlb")
    ),
    test!(
        crictl_stats_reports_the_resource_usage_of_a_container,
        A_NODE,
        CPU,
        MEMORY
    ),
    test!(
        the_number_of_terminals_of_a_container_is_limited,
        A_NODE,
        Need::RrunCri
    ),
    test!(
        large_files_of_user_names_do_not_fill_the_memory_of_the_server,
        A_NODE,
        Need::RrunCri
    ),
    test!(
        the_number_of_cgroups_of_a_pod_is_limited,
        A_NODE,
        Need::RrunCri
    ),
    test!(
        the_configurations_of_a_pods_containers_have_a_limit,
        A_NODE,
        Need::RrunCri
    ),
    test!(
        the_number_of_containers_of_a_pod_is_limited,
        A_NODE,
        Need::RrunCri
    ),
    test!(
        a_pod_whose_container_nests_cgroups_deeply_is_removed,
        A_NODE,
        Need::RrunCri
    ),
];

fn the_server_enforces_and_updates_the_limits_of_a_container() -> Result {
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
            ensure_eq!(
                file(&group, name)?,
                value,
                "content of the file {name} in the container's cgroup"
            );
        }
        let used = held_to(0.5, &group)?;
        note(format!(
            "a container with a CPU quota of 500m used {:.0}m of CPU",
            used * 1000.0
        ));

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
            ensure_eq!(
                file(&group, name)?,
                value,
                "content of the file {name} in the container's cgroup after the update"
            );
        }
        let used = held_to(0.25, &group)?;
        note(format!(
            "after an update of the CPU quota to 250m, the container used {:.0}m of CPU",
            used * 1000.0
        ));
        let resources = node.status(&id)?["resources"]["linux"].clone();
        ensure_eq!(
            resources["cpuQuota"],
            "25000",
            "CPU quota in the container's status (resources: {resources})"
        );
        ensure_eq!(
            resources["memoryLimitInBytes"],
            "100663296",
            "memory limit in the container's status"
        );
        Ok(())
    })
}

fn a_container_that_exceeds_its_memory_limit_is_reported_as_oomkilled() -> Result {
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
        ensure_eq!(
            status["reason"],
            "OOMKilled",
            "reason in the status of the killed container"
        );
        ensure_eq!(
            status["exitCode"],
            json!(137),
            "exit code of the killed container"
        );
        // A container that is killed, but does not exceed its memory limit, is not reported as
        // OOMKilled.
        let mut container = node.container("other", &["sleep", "600"]);
        container["linux"]["resources"] = limit;
        let id = node.run(&pod_id, &pod, &container)?;
        node.asks(&["stop", "--timeout", "0", &id])?;
        ensure_eq!(
            node.status(&id)?["reason"],
            "Error",
            "reason in the status of a stopped container"
        );
        Ok(())
    })
}

/// A limit below the current usage would make the kernel reclaim memory and then kill the
/// container's processes. kubelet retries a refused update later.
fn a_memory_limit_below_the_current_usage_is_refused() -> Result {
    on_a_node(|node| {
        node.pull(BUSYBOX)?;
        let pod = node.pod("shrinks");
        let pod_id = node.runp(&pod)?;
        let script = "head -c 33554432 /dev/zero > /dev/shm/held; exec sleep 1000";
        let mut container = node.container("holds", &["sh", "-c", script]);
        container["linux"]["resources"] = json!({ "memory_limit_in_bytes": 128 << 20 });
        let id = node.run(&pod_id, &pod, &container)?;
        let group = node.cgroup(&id)?;
        wait_for("the container to use 32 MB of memory", || {
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
            "the server did not refuse the update with an error about the current memory usage: {}",
            output.told()
        );
        ensure_eq!(
            file(&group, "memory.max")?,
            "134217728",
            "memory.max of the container's cgroup after the refused update"
        );
        let status = node.status(&id)?;
        ensure_eq!(
            status["state"],
            "CONTAINER_RUNNING",
            "the container's state after the refused update (status: {status})"
        );
        ensure_eq!(
            status["resources"]["linux"]["memoryLimitInBytes"],
            "134217728",
            "memory limit in the container's status"
        );
        node.asks(&["update", "--memory", "67108864", &id])?;
        ensure_eq!(
            file(&group, "memory.max")?,
            "67108864",
            "memory.max of the container's cgroup after the accepted update"
        );
        Ok(())
    })
}

fn each_size_of_huge_pages_has_its_own_limit() -> Result {
    on_a_node(|node| {
        node.pull(BUSYBOX)?;
        let pod = node.pod("huge");
        let pod_id = node.runp(&pod)?;
        let mut container = node.container("pages", &["sleep", "1000"]);
        // kubelet sends a limit for every huge page size of the node.
        container["linux"]["resources"] = json!({ "hugepage_limits": [
            { "page_size": "2MB", "limit": 4 << 20 }, { "page_size": "1GB", "limit": 0 },
        ] });
        let id = node.run(&pod_id, &pod, &container)?;
        let group = node.cgroup(&id)?;
        for (name, value) in [("hugetlb.2MB.max", "4194304"), ("hugetlb.1GB.max", "0")] {
            if group.join(name).exists() {
                ensure_eq!(
                    file(&group, name)?,
                    value,
                    "content of the file {name} in the container's cgroup"
                );
            }
        }
        let limits = node.status(&id)?["resources"]["linux"]["hugepageLimits"].clone();
        ensure_eq!(
            limits[0]["pageSize"],
            "2MB",
            "page size of the first huge page limit in the container's status (all limits: {limits})"
        );
        ensure_eq!(
            limits[0]["limit"],
            "4194304",
            "first huge page limit in the container's status (all limits: {limits})"
        );

        let mut wrong = node.container("wrong", &["true"]);
        wrong["linux"]["resources"] =
            json!({ "hugepage_limits": [{ "page_size": "3MB", "limit": 6 << 20 }] });
        let output = node.try_create(&pod_id, &pod, &wrong)?;
        output.fails_with("page size 3")?;
        Ok(())
    })
}

/// kubelet creates the pod's cgroup and writes the pod's limits to this cgroup. The server only
/// records the pod's resources, like containerd and CRI-O.
fn the_server_leaves_the_limits_of_a_pod_to_kubelet() -> Result {
    on_a_node(|node| {
        node.pull(BUSYBOX)?;
        let mut pod = node.pod("resized");
        pod["linux"]["resources"] =
            json!({ "hugepage_limits": [{ "page_size": "2MB", "limit": 2 << 20 }] });
        let pod_id = node.runp(&pod)?;
        let id = node.run(&pod_id, &pod, &node.container("main", &["sleep", "1000"]))?;
        let group = node.cgroup(&id)?;
        let group = group
            .parent()
            .ok_or("the container's cgroup has no parent")?;
        let limit = || file(group, "hugetlb.2MB.max");
        let before = limit()?;
        ensure!(
            before != "2097152",
            "RunPodSandbox set the limit of the pod's cgroup, although kubelet sets this limit itself"
        );
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
        ensure_eq!(
            limit()?,
            before,
            "hugetlb.2MB.max of the pod's cgroup after UpdatePodSandboxResources"
        );
        Ok(())
    })
}

fn crictl_stats_reports_the_resource_usage_of_a_container() -> Result {
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
        wait_for(
            "the server to report plausible statistics of the container",
            || {
                let stats = node.json(&["stats", "--all", "--id", &id])?["stats"][0].clone();
                let cpu = number(stats.pointer("/cpu/usageCoreNanoSeconds/value"));
                let memory = number(stats.pointer("/memory/workingSetBytes/value"));
                let written = number(stats.pointer("/writableLayer/usedBytes/value"));
                ensure!(
                    cpu > 500_000_000 && memory > 0 && written >= 20_000_000,
                    "one of these statistics of the container is too small: CPU time {cpu} ns, memory {memory} bytes, written data {written} bytes; all statistics: {stats}"
                );
                ensure_eq!(
                    stats["attributes"]["id"],
                    json!(id),
                    "container id in the statistics"
                );
                ensure_eq!(
                    stats["attributes"]["metadata"]["name"],
                    "busy",
                    "container name in the statistics"
                );
                Ok(Some(()))
            },
        )?;
        // containerd returns statistics only for a pod that has a cgroup parent. The pod of this
        // test has no cgroup parent, so this check is only for rrun-cri.
        if is_rrun() {
            let pods = node.json(&["statsp", "--id", &pod_id])?["stats"][0].clone();
            let used = number(pods.pointer("/linux/cpu/usageCoreNanoSeconds/value"));
            ensure!(used > 0, "the pod's statistics have no CPU usage: {pods}");
        }
        Ok(())
    })
}

fn the_number_of_terminals_of_a_container_is_limited() -> Result {
    on_a_node(|node| {
        node.restart_with("container_terminals = 2")?;
        node.pull(BUSYBOX)?;
        let pod = node.pod("terminals");
        let pod_id = node.runp(&pod)?;
        let container = node.container("opens", &["/inside", "sleep", "600"]);
        let id = node.run(&pod_id, &pod, &container)?;
        let script = "exec 3<>/dev/ptmx 4<>/dev/ptmx; (exec 5<>/dev/ptmx) 2>&1 || echo refused";
        let output = node.asks(&["exec", &id, "/bin/sh", "-c", script])?;
        ensure!(
            output.ends_with("refused") && output.contains("No space left on device"),
            "the third terminal is not refused: {output}"
        );
        Ok(())
    })
}

fn the_configurations_of_a_pods_containers_have_a_limit() -> Result {
    on_a_node(|node| {
        node.restart_with("pod_configuration_bytes = 100000")?;
        node.pull(BUSYBOX)?;
        let pod = node.pod("large");
        let pod_id = node.runp(&pod)?;
        let large = |name: &str, variables: usize| {
            let mut container = node.container(name, &["sleep", "600"]);
            let variable = |number| json!({ "key": format!("V{number}"), "value": "x" });
            container["envs"] = (0..variables).map(variable).collect();
            container
        };
        let first = node.run(&pod_id, &pod, &large("first", 1000))?;
        let refused = node.try_create(&pod_id, &pod, &large("second", 1000))?;
        ensure!(
            refused
                .stderr
                .contains("the limit is 100000 bytes (pod_configuration_bytes)"),
            "the error about a second container with 1,000 variables is: {}",
            refused.stderr
        );
        node.asks(&["rm", "--force", &first])?;
        node.run(&pod_id, &pod, &large("second", 1000))?;

        // JSON writes each control character of an image's variables and volumes as six bytes.
        let variable = format!("V={}", "\u{1}".repeat(30_000));
        let volume = |number| (format!("/{number}{}", "\u{1}".repeat(200)), json!({}));
        let volumes: serde_json::Map<_, _> = (100..200).map(volume).collect();
        for (name, config) in [
            ("environment", json!({ "Env": [variable] })),
            ("volumes", json!({ "Volumes": volumes })),
        ] {
            let image = pull_built(node, name, &with_one_layer(Archive::new(), config))?;
            let mut container = node.container(name, &["/inside", "sleep", "600"]);
            container["image"]["image"] = json!(image);
            let refused = node.try_create(&pod_id, &pod, &container)?;
            ensure!(
                refused.stderr.contains("(pod_configuration_bytes)"),
                "the error about a container with the image {name} is: {}",
                refused.stderr
            );
        }
        Ok(())
    })
}

fn the_number_of_containers_of_a_pod_is_limited() -> Result {
    on_a_node(|node| {
        node.restart_with("pod_containers = 2")?;
        node.pull(BUSYBOX)?;
        let pod = node.pod("many");
        let pod_id = node.runp(&pod)?;
        let exits = |name: &str| node.container(name, &["true"]);
        let first = node.run(&pod_id, &pod, &exits("first"))?;
        let second = node.run(&pod_id, &pod, &exits("second"))?;
        for id in [&first, &second] {
            wait_for("the container to exit", || {
                let status = node.status(id)?;
                Ok((status["state"] == "CONTAINER_EXITED").then_some(()))
            })?;
        }
        let monitor = node.monitor(&pod_id)?;
        wait_for("the threads that write the logs to end", || {
            let threads = std::fs::read_dir(format!("/proc/{monitor}/task"))?.count();
            Ok((threads == 1).then_some(()))
        })?;
        let refused = node.try_create(&pod_id, &pod, &exits("third"))?;
        ensure!(
            refused
                .stderr
                .contains("has 2 containers already, which is the limit (pod_containers)"),
            "the error about a third container is: {}",
            refused.stderr
        );
        node.asks(&["rm", &first])?;
        node.run(&pod_id, &pod, &exits("third"))?;
        Ok(())
    })
}

fn large_files_of_user_names_do_not_fill_the_memory_of_the_server() -> Result {
    on_a_node(|node| {
        let content = vec![0xff; 4 << 20];
        let file = |path| Item {
            path,
            content: &content,
            ..ITEM
        };
        let archive = Archive::new().dir("etc", 0o755);
        let archive = archive.item(&file(b"etc/passwd")).item(&file(b"etc/group"));
        let image = pull_built(node, "names", &with_one_layer(archive, json!({})))?;
        let pod = node.pod("names");
        let pod_id = node.runp(&pod)?;
        let before = node.server_resident()?;
        let pod_file = node.join("names.json").display().to_string();
        std::fs::write(&pod_file, pod.to_string())?;
        let mut calls = Vec::new();
        for number in 0..48 {
            let mut container = node.container(&format!("c{number}"), &["/program"]);
            container["image"]["image"] = json!(image);
            let file = node.join(&format!("c{number}.json"));
            std::fs::write(&file, container.to_string())?;
            let file = file.display().to_string();
            calls.push(
                node.crictl(&["create", &pod_id, &file, &pod_file])
                    .start()?,
            );
        }
        for call in calls {
            // The image contains only the two files.
            let output = call.end()?;
            ensure!(
                output.stderr.contains("stat /program: no such file"),
                "the error of crictl create: {}",
                output.stderr
            );
        }
        let grown = node.server_resident()?.saturating_sub(before);
        ensure!(
            grown < 96 << 10,
            "48 containers whose images have /etc/passwd and /etc/group of 4 MiB made the server {grown} kB larger"
        );
        Ok(())
    })
}

/// A privileged container can change the limits of the container's cgroup, but not of the pod's cgroup.
fn the_number_of_cgroups_of_a_pod_is_limited() -> Result {
    on_a_node(|node| {
        node.restart_with("pod_cgroups = 20")?;
        node.pull(BUSYBOX)?;
        let mut pod = node.pod("many");
        pod["linux"]["security_context"]["privileged"] = json!(true);
        let pod_id = node.runp(&pod)?;
        let script =
            "cd /sys/fs/cgroup; n=0; while mkdir $n; do n=$((n+1)); done; echo $n; exec sleep 600";
        let mut container = node.container("many", &["sh", "-c", script]);
        container["linux"]["security_context"]["privileged"] = json!(true);
        let id = node.run(&pod_id, &pod, &container)?;
        let made = wait_for("the container to create cgroups", || {
            let log = node.log_of("many", "many")?;
            Ok(log.contains("mkdir").then_some(log))
        })?;
        ensure!(
            made.contains("Resource temporarily unavailable"),
            "the container created more cgroups than pod_cgroups allows: {made}"
        );
        let refused = node.try_create(&pod_id, &pod, &node.container("more", &["true"]))?;
        ensure!(
            refused.stderr.contains("cgroup.max.descendants"),
            "the error about a container beyond the limit on cgroups is: {}",
            refused.stderr
        );
        node.asks(&["exec", "--sync", &id, "true"])?;
        node.asks(&["rmp", "--force", &pod_id]).map(drop)
    })
}

/// The paths of the container's nested cgroups are longer than PATH_MAX. Only a privileged container
/// can create cgroups.
fn a_pod_whose_container_nests_cgroups_deeply_is_removed() -> Result {
    on_a_node(|node| {
        node.restart_with("pod_cgroups = 10000")?;
        node.pull(BUSYBOX)?;
        for (levels, length) in [("30", "200"), ("1900", "1")] {
            let mut pod = node.pod("deep");
            pod["linux"]["security_context"]["privileged"] = json!(true);
            let pod_id = node.runp(&pod)?;
            let run = |name: &str| {
                let command = ["/inside", "nest-cgroups", levels, length];
                let mut container = node.container(name, &command);
                container["linux"]["security_context"]["privileged"] = json!(true);
                let id = node.run(&pod_id, &pod, &container)?;
                wait_for("the container to create its cgroups", || {
                    let log = node.log_of("deep", name)?;
                    Ok(log.contains("ready").then_some(()))
                })?;
                Ok::<_, Failed>(id)
            };
            let id = run("removed-alone")?;
            node.asks(&["stop", "--timeout", "0", &id])?;
            node.asks(&["rm", &id])?;
            run("removed-with-its-pod")?;
            node.asks(&["rmp", "--force", &pod_id])?;
            ensure_eq!(
                node.asks(&["ps", "--all", "--quiet"])?,
                "",
                "ids of the containers after the removal of the pod"
            );
        }
        Ok(())
    })
}
