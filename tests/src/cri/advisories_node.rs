//! Tests of published vulnerabilities of other CRI servers in which a container changed the node's
//! sysctls, filled its disk, connected to its sockets or avoided its cgroups. Other files cover
//! further vulnerabilities. docs/security.md lists all of them. A test whose name begins with the
//! number of a vulnerability runs the published attack, and checks that the attack fails.

use std::collections::BTreeSet;
use std::fs;
use std::path::Path;

use serde_json::json;

use crate::support::machine::Result;
use crate::support::needs::{Need, Test};
use crate::support::node::{A_NODE, BUSYBOX, on_a_node};
use crate::support::user_namespace;
use crate::{ensure, ensure_eq, test};

pub(crate) const TESTS: &[Test] = &[
    test!(
        cve_2022_0811_a_sysctl_changes_nothing_outside_the_pod,
        A_NODE,
        Need::RrunCri
    ),
    test!(
        cve_2020_8557_files_in_etc_do_not_fill_the_disk_of_the_node,
        A_NODE,
        Need::RrunCri
    ),
    test!(
        cve_2020_15257_no_socket_of_the_server_is_abstract,
        A_NODE,
        Need::RrunCri
    ),
    test!(
        cve_2025_47291_only_the_containers_are_in_the_cgroup_of_a_pod,
        A_NODE,
        Need::RrunCri
    ),
];

/// In CVE-2022-0811, the value of a sysctl set other sysctls of the node in CRI-O. In
/// CVE-2022-0532, the sysctls of a pod without separate namespaces changed the node.
fn cve_2022_0811_a_sysctl_changes_nothing_outside_the_pod() -> Result {
    const OF_THE_NODE: [&str; 3] = [
        "/proc/sys/kernel/core_pattern",
        "/proc/sys/kernel/shm_rmid_forced",
        "/proc/sys/net/ipv4/ip_forward",
    ];
    on_a_node(|node| {
        let read = || OF_THE_NODE.map(|path| fs::read_to_string(path).unwrap_or_default());
        // The first pod can change the node's ip_forward, because rrun's network needs forwarding.
        let first = node.runp(&node.pod("first"))?;
        let before = read();
        let value = "1+kernel.core_pattern=|/evil";
        for (name, value) in [
            ("kernel.shm_rmid_forced", value),
            ("kernel.shm_rmid_forced", "1\nkernel.core_pattern=|/evil"),
            ("kernel.shm_rmid_forced+kernel.core_pattern", "|/evil"),
            ("kernel.shm/../core_pattern", "|/evil"),
            ("kernel/shm/../core_pattern", "|/evil"),
            ("net/../kernel/core_pattern", "|/evil"),
            ("net.ipv4/../../kernel/core_pattern", "|/evil"),
            ("kernel.core_pattern", "|/evil"),
        ] {
            let mut pod = node.pod("sysctl");
            pod["linux"]["sysctls"] = json!({ name: value });
            // Only the value with a newline is accepted. The kernel ignores the text after the newline.
            let output = node.try_runp(&pod)?;
            ensure!(
                output.code != 0 || value.contains('\n'),
                "the server accepts the sysctl {name} with the value {value:?}"
            );
            if output.code == 0 {
                node.asks(&["rmp", "--force", output.text()])?;
            }
            ensure_eq!(
                read(),
                before,
                "the node's sysctls after the attack {name}={value:?}"
            );
        }
        for (name, value, namespace) in [
            ("kernel.shm_rmid_forced", "1", "ipc"),
            ("net.ipv4.ip_forward", "0", "network"),
        ] {
            let mut pod = node.pod("of-the-node");
            pod["linux"]["sysctls"] = json!({ name: value });
            pod["linux"]["security_context"]["namespace_options"][namespace] = json!(2);
            let output = node.try_runp(&pod)?;
            output.fails_with("does not belong to one of the pod's own namespaces")?;
            ensure_eq!(
                read(),
                before,
                "the node's sysctls after the attack with {name}"
            );
        }
        node.asks(&["rmp", "--force", &first])?;
        Ok(())
    })
}

/// In CVE-2020-8557, a container could write to its /etc/hosts without a limit, and no statistics
/// of the pod counted the file.
fn cve_2020_8557_files_in_etc_do_not_fill_the_disk_of_the_node() -> Result {
    on_a_node(|node| {
        node.pull(BUSYBOX)?;
        let pod = node.pod("filling");
        let pod_id = node.runp(&pod)?;
        for name in ["hosts", "hostname", "resolv.conf"] {
            let path = format!("/etc/{name}");
            let mut container = node.container(name, &["/inside", "fill", &path, "64"]);
            container["log_path"] = json!("filling.log");
            let id = node.run(&pod_id, &pod, &container)?;
            let status = node.exited(&id)?;
            ensure!(
                status["exitCode"] != 0,
                "the container can write 64 MiB to {path}"
            );
            let log = node.log_of("filling", "filling")?;
            ensure!(
                log.contains("No space left on device"),
                "writing to {path} failed for another reason: {log}"
            );
        }
        let used = bytes_below(&node.join("state"))?;
        ensure!(
            used < 16 << 20,
            "the files in the server's state directory have {used} bytes"
        );
        // The pod can still be used.
        let id = node.run(&pod_id, &pod, &node.container("later", &["true"]))?;
        ensure_eq!(
            node.exited(&id)?["exitCode"],
            0,
            "exit code of a later container of the pod"
        );
        Ok(())
    })
}

/// Returns the size of the regular files below `dir`. Does not enter the root file systems of
/// containers.
fn bytes_below(dir: &Path) -> Result<u64> {
    let mut sum = 0;
    for entry in fs::read_dir(dir)? {
        let entry = entry?;
        let metadata = entry.metadata()?;
        if metadata.is_dir() && entry.file_name() != "rootfs" {
            sum += bytes_below(&entry.path())?;
        } else if metadata.is_file() {
            sum += metadata.len();
        }
    }
    Ok(sum)
}

/// The sockets of the process: the inodes in the links of `/proc/PID/fd`.
fn sockets(pid: i32) -> Result<BTreeSet<String>> {
    let mut all = BTreeSet::new();
    for entry in fs::read_dir(format!("/proc/{pid}/fd"))? {
        let Ok(target) = fs::read_link(entry?.path()) else {
            continue;
        };
        let target = target.to_string_lossy().into_owned();
        if let Some(inode) = target.strip_prefix("socket:[") {
            all.insert(inode.trim_end_matches(']').to_owned());
        }
    }
    Ok(all)
}

/// In CVE-2020-15257, the sockets of containerd's shims were abstract. A container in the node's
/// network namespace could connect to them.
fn cve_2020_15257_no_socket_of_the_server_is_abstract() -> Result {
    on_a_node(|node| {
        node.pull(BUSYBOX)?;
        let mut pod = node.pod("sockets");
        pod["linux"]["security_context"]["namespace_options"]["network"] = json!(2);
        let pod_id = node.runp(&pod)?;
        let container = node.container("sockets", &["sleep", "600"]);
        let id = node.run(&pod_id, &pod, &container)?;
        // The container sees the same file as a process of the node.
        let seen = node.asks(&["exec", "-s", &id, "cat", "/proc/net/unix"])?;
        let mut own = sockets(node.server_pid()?)?;
        own.extend(sockets(node.monitor(&pod_id)?.as_raw())?);
        let mut named = 0;
        for line in seen.lines() {
            let words: Vec<&str> = line.split_whitespace().collect();
            let [.., inode, path] = words.as_slice() else {
                continue;
            };
            if own.contains(*inode) {
                named += 1;
                ensure!(
                    !path.starts_with('@'),
                    "a socket of the server or of a monitor is abstract: {line}"
                );
            }
        }
        ensure!(
            named >= 2,
            "the container sees {named} sockets with names, but the server and the monitor have one each:\n{seen}"
        );
        Ok(())
    })
}

/// In CVE-2025-47291, containerd did not put containers with a user namespace into the pod's
/// cgroup. In CVE-2019-14891, CRI-O's monitor was in the pod's cgroup, so that the container could
/// cause the monitor to be killed for lack of memory.
fn cve_2025_47291_only_the_containers_are_in_the_cgroup_of_a_pod() -> Result {
    on_a_node(|node| {
        node.pull(BUSYBOX)?;
        let cgroup_of = |pid: i32| -> Result<String> {
            let text = fs::read_to_string(format!("/proc/{pid}/cgroup"))?;
            let path = text.lines().find_map(|line| line.strip_prefix("0::"));
            Ok(path.unwrap_or_default().to_owned())
        };
        for (name, users) in [("plain", false), ("users", true)] {
            let (mut pod, container) = if users {
                (
                    user_namespace::pod(node, name, 1),
                    user_namespace::container(node, name, 1, &["sleep", "600"]),
                )
            } else {
                (node.pod(name), node.container(name, &["sleep", "600"]))
            };
            let parent = format!("/rrun/e2e-{name}");
            pod["linux"]["cgroup_parent"] = json!(parent);
            let pod_id = node.runp(&pod)?;
            let id = node.run(&pod_id, &pod, &container)?;
            let own = cgroup_of(node.pid(&id)?)?;
            ensure!(
                own.contains(&format!("{parent}/")),
                "the container {name} is in the cgroup {own}, which is not below {parent}"
            );
            let monitor = cgroup_of(node.monitor(&pod_id)?.as_raw())?;
            ensure!(
                !monitor.contains(&parent),
                "the monitor of the pod {name} is in the pod's cgroup {monitor}"
            );
            node.asks(&["rmp", "--force", &pod_id])?;
        }
        Ok(())
    })
}
