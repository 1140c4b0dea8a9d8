//! A pod for each of kubelet's features that a runtime must have its part in. (Recursive read-only
//! mounts are not among them: without an API server kubelet asks for none; `cri::volumes` has them.)

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
    pods_have_the_users_volumes_and_filters_that_they_ask_for,
    Need::Native,
    Need::RrunCri,
    KUBELET,
)];

/// Without events: the pods' states are asked for each second.
const CONFIG: &str = "\
featureGates: {PodAndContainerStatsFromCRI: true, EventedPLEG: false}
seccompDefault: true
";

/// What each container says when it has looked at everything.
const DONE: &str = "that is all";

fn pods_have_the_users_volumes_and_filters_that_they_ask_for() -> Result {
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
        let manifests = [filtered(), of_an_image(), with_users()];
        for pod in &manifests {
            kubelet.write_manifest(pod)?;
        }
        let pods = kubelet.ready(manifests.len())?;
        let [filtered, of_an_image, with_users] = &pods[..] else {
            return Err(format!("other pods than written: {}", pods.len()).into());
        };
        seccomp_is_the_default_unless_refused(filtered)?;
        an_image_is_a_volume(of_an_image)?;
        a_pod_has_users_of_its_own(node, with_users)?;
        // Their removal by kubelet is `kubelet::application`'s.
        statistics_are_the_servers(&kubelet, &pods)
    })
}

/// A container that tells what this script finds, and stays.
fn looks(name: &str, script: &str) -> Value {
    json!({
        "name": name,
        "image": BUSYBOX,
        "imagePullPolicy": "IfNotPresent",
        "command": ["sh", "-c", format!("{{ {script}; }} 2>&1; echo {DONE}; exec sleep 100000")],
    })
}

/// What such a container has told.
fn told(pod: &Value, container: &str) -> Result<String> {
    wait_for(&format!("{container} to have looked"), || {
        let told = logs(pod, container)?;
        Ok(told.strip_suffix(&format!("{DONE}\n")).map(str::to_owned))
    })
}

fn filtered() -> Value {
    let script = "grep Seccomp: /proc/self/status; unshare -U true";
    let mut refuses = looks("refuses", script);
    refuses["securityContext"] = json!({ "seccompProfile": { "type": "Unconfined" } });
    static_pod(
        "filtered",
        &json!({
            "terminationGracePeriodSeconds": 0,
            "containers": [looks("default", script), refuses],
        }),
    )
}

fn seccomp_is_the_default_unless_refused(pod: &Value) -> Result {
    let default = told(pod, "default")?;
    ensure!(
        default.contains("Seccomp:\t2") && default.contains("Operation not permitted"),
        "with seccompDefault: {default}"
    );
    ensure_eq!(told(pod, "refuses")?, "Seccomp:\t0\n", "Unconfined");
    Ok(())
}

fn of_an_image() -> Value {
    let mut container = looks(
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

fn an_image_is_a_volume(pod: &Value) -> Result {
    let told = told(pod, "c")?;
    ensure_eq!(
        told,
        "ok\nok\ntouch: /content/new: Read-only file system\n",
        "of an image as a volume"
    );
    Ok(())
}

fn with_users() -> Value {
    let mut container = looks(
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

fn a_pod_has_users_of_its_own(node: &Node, pod: &Value) -> Result {
    let told = told(pod, "c")?;
    let (map, rest) = told.split_once('\n').ok_or("it said nothing")?;
    let map: Vec<u32> = map
        .split_whitespace()
        .map(str::parse)
        .collect::<std::result::Result<_, _>>()?;
    let [0, host, 65536] = map[..] else {
        return Err(format!("a pod's 65536 users are {map:?}").into());
    };
    ensure!(host >= 65536, "a pod's users are the node's own: {map:?}");
    ensure_eq!(rest, "0\n0:0\n", "user and owner as the pod has them");
    let pid = node.pid(&container_id(pod, "c")?)?;
    let status = fs::read_to_string(format!("/proc/{pid}/status"))?;
    let user = format!("\nUid:\t{host}\t");
    ensure!(status.contains(&user), "not user {host}: {status}");
    // The volume is mapped: on the node the file is root's, whichever users the pod gets next.
    let uid = pod["metadata"]["annotations"]["kubernetes.io/config.hash"].as_str();
    let volume = "volumes/kubernetes.io~empty-dir/data/file";
    let file = Path::new("/var/lib/kubelet/pods")
        .join(uid.ok_or("no hash")?)
        .join(volume);
    let owner = std::os::unix::fs::MetadataExt::uid(&fs::metadata(&file)?);
    ensure_eq!(owner, 0, "the owner of {}", file.display());
    Ok(())
}

/// All that can be counted without controllers.
fn statistics_are_the_servers(kubelet: &Kubelet, pods: &[Value]) -> Result {
    wait_for("the pods' statistics", || {
        let summary = kubelet.asks("/stats/summary")?;
        for pod in pods {
            let told = summary["pods"].as_array().into_iter().flatten();
            let told = told
                .clone()
                .find(|told| told["podRef"]["name"] == pod_name(pod))
                .ok_or(format!("no {} in {summary}", pod_name(pod)))?;
            let number = |what: &str| {
                let number = told.pointer(what).and_then(Value::as_u64);
                number.ok_or(format!("no {what} in {told}"))
            };
            ensure!(number("/network/rxBytes")? > 0, "{told}");
            ensure!(number("/containers/0/logs/usedBytes")? > 0, "{told}");
            number("/containers/0/rootfs/usedBytes")?;
            ensure!(number("/process_stats/process_count")? > 0, "{told}");
        }
        Ok(Some(()))
    })?;
    let metrics = kubelet.reads("/metrics/cadvisor")?;
    for pod in pods {
        let of_it = format!("pod=\"{}\"", pod_name(pod));
        let mut lines = metrics
            .lines()
            .filter(|line| line.starts_with("container_network_receive_bytes_total"));
        ensure!(
            lines.any(|line| line.contains(&of_it)),
            "no received bytes of {of_it}"
        );
    }
    Ok(())
}
