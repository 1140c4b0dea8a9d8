//! This test runs one pod for each kubelet feature that needs support from the CRI server. (kubelet
//! requests recursive read-only mounts only if it has an API server. The module `cri::volumes`
//! tests such mounts.)

use std::fs;
use std::path::Path;

use serde_json::{Value, json};

use crate::support::kubelet::{
    KUBELET, Kubelet, Options, UNCOUNTED, container_id, logs, pod_name, static_pod, without_limits,
};
use crate::support::machine::{Result, wait_for};
use crate::support::needs::{Need, Test};
use crate::support::node::{BUSYBOX, Node, WEB, on_a_node};
use crate::{ensure, ensure_eq, test};

pub(crate) const TESTS: &[Test] = &[test!(
    pods_get_the_users_and_the_volumes_and_the_seccomp_filters_that_they_request,
    Need::Native,
    Need::RrunCri,
    KUBELET,
)];

/// The kubelet configuration. EventedPLEG is disabled, so kubelet polls the states of the pods
/// every second.
const CONFIG: &str = "\
featureGates: {PodAndContainerStatsFromCRI: true, EventedPLEG: false}
seccompDefault: true
";

/// The last line that each container prints.
const DONE: &str = "that is all";

fn pods_get_the_users_and_the_volumes_and_the_seccomp_filters_that_they_request() -> Result {
    on_a_node(|node| {
        without_limits(node)?;
        let config = format!("{CONFIG}{UNCOUNTED}");
        let kubelet = Kubelet::start(
            node,
            Options {
                config: &config,
                ..Options::default()
            },
        )?;
        let manifests = [seccomp_pod(), image_volume_pod(), user_namespace_pod()];
        for pod in &manifests {
            kubelet.write_manifest(pod)?;
        }
        let pods = kubelet.ready(manifests.len())?;
        let [filtered, of_an_image, with_users] = &pods[..] else {
            return Err(format!("{} pods are Ready instead of three", pods.len()).into());
        };
        the_default_seccomp_profile_applies_unless_a_container_is_unconfined(filtered)?;
        an_image_can_be_mounted_as_a_volume(of_an_image)?;
        a_pod_has_its_own_range_of_user_ids(node, with_users)?;
        // This test does not remove its pods. `kubelet::application` tests the removal of pods.
        statistics_reach_kubelet(&kubelet, &pods)
    })
}

/// Returns a container that runs `script`, prints the script's output, and then sleeps.
fn script_container(name: &str, script: &str) -> Value {
    json!({
        "name": name,
        "image": BUSYBOX,
        "imagePullPolicy": "IfNotPresent",
        "command": ["sh", "-c", format!("{{ {script}; }} 2>&1; echo {DONE}; exec sleep 100000")],
    })
}

/// Waits until the script of a `script_container` has ended, and returns the script's output.
fn script_output(pod: &Value, container: &str) -> Result<String> {
    wait_for(
        &format!("the script of the container {container} to end"),
        || {
            let output = logs(pod, container)?;
            Ok(output.strip_suffix(&format!("{DONE}\n")).map(str::to_owned))
        },
    )
}

fn seccomp_pod() -> Value {
    let script = "grep Seccomp: /proc/self/status; unshare -U true";
    let mut refuses = script_container("refuses", script);
    refuses["securityContext"] = json!({ "seccompProfile": { "type": "Unconfined" } });
    static_pod(
        "filtered",
        &json!({
            "terminationGracePeriodSeconds": 0,
            "containers": [script_container("default", script), refuses],
        }),
    )
}

fn the_default_seccomp_profile_applies_unless_a_container_is_unconfined(pod: &Value) -> Result {
    let default = script_output(pod, "default")?;
    ensure!(
        default.contains("Seccomp:\t2") && default.contains("Operation not permitted"),
        "the default seccomp profile is not applied; the output of the script in the container: {default}"
    );
    ensure_eq!(
        script_output(pod, "refuses")?,
        "Seccomp:\t0\n",
        "output of the container that runs without a seccomp profile"
    );
    Ok(())
}

fn image_volume_pod() -> Value {
    let mut container = script_container(
        "c",
        "cat /content/www/healthz /part/healthz; touch /content/new",
    );
    container["volumeMounts"] = json!([
        { "name": "content", "mountPath": "/content" },
        { "name": "content", "mountPath": "/part", "subPath": "www" },
    ]);
    static_pod(
        "of-an-image",
        &json!({
            "terminationGracePeriodSeconds": 0,
            "containers": [container],
            "volumes": [{ "name": "content",
                "image": { "reference": WEB, "pullPolicy": "IfNotPresent" } }],
        }),
    )
}

fn an_image_can_be_mounted_as_a_volume(pod: &Value) -> Result {
    let output = script_output(pod, "c")?;
    ensure_eq!(
        output,
        "ok\nok\ntouch: /content/new: Read-only file system\n",
        "output of the container with an image volume"
    );
    Ok(())
}

fn user_namespace_pod() -> Value {
    let mut container = script_container(
        "c",
        "cat /proc/self/uid_map; id -u; echo mine >/data/file; stat -c %u:%g /data/file",
    );
    container["volumeMounts"] = json!([{ "name": "data", "mountPath": "/data" }]);
    static_pod(
        "with-users",
        &json!({
            "terminationGracePeriodSeconds": 0,
            "hostUsers": false,
            "containers": [container],
            "volumes": [{ "name": "data", "emptyDir": {} }],
        }),
    )
}

fn a_pod_has_its_own_range_of_user_ids(node: &Node, pod: &Value) -> Result {
    let output = script_output(pod, "c")?;
    let (map, rest) = output
        .split_once('\n')
        .ok_or("the container did not print its uid map")?;
    let map: Vec<u32> = map
        .split_whitespace()
        .map(str::parse)
        .collect::<std::result::Result<_, _>>()?;
    let [0, first_host_uid, 65536] = map[..] else {
        return Err(format!("the pod's uid map is not one range of 65536 ids: {map:?}").into());
    };
    ensure!(
        first_host_uid >= 65536,
        "the pod's range of user ids overlaps with the node's user ids; the pod's uid map: {map:?}"
    );
    ensure_eq!(rest, "0\n0:0\n", "user id and file owner inside the pod");
    let pid = node.pid(&container_id(pod, "c")?)?;
    let status = fs::read_to_string(format!("/proc/{pid}/status"))?;
    let user = format!("\nUid:\t{first_host_uid}\t");
    ensure!(
        status.contains(&user),
        "the container's process does not run with the user id {first_host_uid} on the node; the process's /proc/{pid}/status: {status}"
    );
    // The volume is mounted with mapped ids. On the node, the file therefore belongs to root, and
    // not to a user id from the pod's range.
    let uid = pod["metadata"]["annotations"]["kubernetes.io/config.hash"].as_str();
    let volume = "volumes/kubernetes.io~empty-dir/data/file";
    let file = Path::new("/var/lib/kubelet/pods")
        .join(uid.ok_or("the pod has no annotation with its config hash")?)
        .join(volume);
    let owner = std::os::unix::fs::MetadataExt::uid(&fs::metadata(&file)?);
    ensure_eq!(owner, 0, "owner of the file {} on the node", file.display());
    Ok(())
}

/// Checks the statistics that kubelet reports even on a node without cgroup controllers.
fn statistics_reach_kubelet(kubelet: &Kubelet, pods: &[Value]) -> Result {
    wait_for("kubelet to report the statistics of all pods", || {
        let summary = kubelet.asks("/stats/summary")?;
        for pod in pods {
            let stats = summary["pods"].as_array().into_iter().flatten();
            let stats = stats
                .clone()
                .find(|stats| stats["podRef"]["name"] == pod_name(pod))
                .ok_or(format!(
                    "the pod {} is missing in kubelet's statistics {summary}",
                    pod_name(pod)
                ))?;
            let number = |pointer: &str| {
                let number = stats.pointer(pointer).and_then(Value::as_u64);
                number.ok_or(format!(
                    "the field {pointer} is missing in the pod's statistics {stats}"
                ))
            };
            ensure!(
                number("/network/rxBytes")? > 0,
                "the pod received no bytes; the pod's statistics: {stats}"
            );
            ensure!(
                number("/containers/0/logs/usedBytes")? > 0,
                "the log of the pod's first container has the size 0 in the pod's statistics: {stats}"
            );
            number("/containers/0/rootfs/usedBytes")?;
            ensure!(
                number("/process_stats/process_count")? > 0,
                "the pod's statistics count no process: {stats}"
            );
        }
        Ok(Some(()))
    })?;
    let metrics = kubelet.reads("/metrics/cadvisor")?;
    for pod in pods {
        let label = format!("pod=\"{}\"", pod_name(pod));
        let mut lines = metrics
            .lines()
            .filter(|line| line.starts_with("container_network_receive_bytes_total"));
        ensure!(
            lines.any(|line| line.contains(&label)),
            "no metric with the label {label} counts received bytes"
        );
    }
    Ok(())
}
