//! Tests of three static pods under kubelet, each with a small web server: limits, restarts and
//! removal. The module `kubelet::application` tests more features with a real application, but
//! takes longer.

use std::fs;
use std::time::{Duration, Instant};

use serde_json::{Value, json};

use crate::support::cgroup_use::held_to;
use crate::support::kubelet::{
    COUNTED, KUBELET, KUBELET_TIMEOUT, Kubelet, Options, container_id, container_status, lives,
    static_pod,
};
use crate::support::machine::{Result, command, note, wait_within};
use crate::support::needs::Test;
use crate::support::node::{Node, WEB, on_a_node};
use crate::{ensure, ensure_eq, test};

pub(crate) const TESTS: &[Test] = &[test!(
    three_static_pods_run_until_their_manifests_are_removed,
    KUBELET,
    COUNTED,
)];

fn web(number: usize) -> Value {
    static_pod(
        &format!("web-{number}"),
        &json!({
            "terminationGracePeriodSeconds": 2,
            "containers": [{
                "name": "web",
                "image": WEB,
                "imagePullPolicy": "IfNotPresent",
                "resources": {
                    "requests": { "cpu": "100m", "memory": "16Mi" },
                    "limits": { "cpu": "500m", "memory": "64Mi" },
                },
                "readinessProbe": {
                    "httpGet": { "path": "/healthz", "port": 5000 }, "periodSeconds": 1,
                    "timeoutSeconds": 10,
                },
                "livenessProbe": {
                    "exec": { "command": ["cat", "/www/healthz"] }, "periodSeconds": 5,
                    "timeoutSeconds": 20, "failureThreshold": 5,
                },
            }],
        }),
    )
}

fn answers(pods: &[Value]) -> Result {
    for pod in pods {
        let address = pod["status"]["podIP"].as_str().ok_or(format!(
            "the pod's status contains no podIP: {}",
            pod["status"]
        ))?;
        command("curl", ["-fsS", &format!("http://{address}:5000/")])
            .ok()?
            .says("hello from rrun")?;
    }
    Ok(())
}

fn three_static_pods_run_until_their_manifests_are_removed() -> Result {
    on_a_node(|node| {
        let kubelet = Kubelet::start(node, Options::default())?;
        let started = Instant::now();
        let manifests: Vec<Value> = (1..=3).map(web).collect();
        for pod in &manifests {
            kubelet.write_manifest(pod)?;
        }
        let pods = kubelet.ready(3)?;
        note(format!(
            "three static pods were Ready {:.1} s after their manifests were written (this includes the pull of the image)",
            started.elapsed().as_secs_f64()
        ));
        answers(&pods)?;
        limits_in_the_cgroups_match_the_limits_in_the_pod_manifests(node, &pods)?;
        a_busy_loop_uses_no_more_cpu_time_than_its_limit(node, &pods[0])?;
        a_container_that_exceeds_its_memory_limit_is_oomkilled_and_restarted(
            node, &kubelet, &pods[1],
        )?;
        restarts_of_the_server_and_of_kubelet_affect_no_pod(node, &kubelet)?;
        kubelet.removes(node, &manifests)
    })
}

fn limits_in_the_cgroups_match_the_limits_in_the_pod_manifests(
    node: &Node,
    pods: &[Value],
) -> Result {
    for pod in pods {
        let group = node.cgroup(&container_id(pod, "web")?)?;
        for (name, value) in [
            ("cpu.weight", "17"),
            ("cpu.max", "50000 100000"),
            ("memory.max", "67108864"),
        ] {
            let is = fs::read_to_string(group.join(name))?;
            ensure_eq!(
                is.trim_end(),
                value,
                "content of the file {name} in the cgroup {}",
                group.display()
            );
        }
        ensure!(
            group.to_string_lossy().contains("burstable"),
            "the container's cgroup is not below the cgroup of burstable pods: {}",
            group.display()
        );
    }
    Ok(())
}

fn a_busy_loop_uses_no_more_cpu_time_than_its_limit(node: &Node, pod: &Value) -> Result {
    let id = container_id(pod, "web")?;
    let script = "timeout 60 sh -c 'while :; do :; done'";
    let spinning = node
        .crictl(&["exec", "-s", "--timeout", "60", &id, "sh", "-c", script])
        .start()?;
    // The test waits 3 s, because the measurement must not include the start of crictl.
    std::thread::sleep(Duration::from_secs(3));
    let used = held_to(0.5, &node.cgroup(&id)?)?;
    note(format!(
        "a busy loop under kubelet's CPU limit of 500m used {:.0}m of CPU",
        used * 1000.0
    ));
    drop(spinning);
    Ok(())
}

fn a_container_that_exceeds_its_memory_limit_is_oomkilled_and_restarted(
    node: &Node,
    kubelet: &Kubelet,
    pod: &Value,
) -> Result {
    let id = container_id(pod, "web")?;
    let name = &pod["metadata"]["name"];
    // The kernel kills all processes of the cgroup (memory.oom.group), so the container ends
    // together with dd.
    node.crictl(&[
        "exec",
        "-s",
        &id,
        "dd",
        "if=/dev/zero",
        "of=/dev/null",
        "bs=200M",
    ])
    .end()?;
    wait_within(
        KUBELET_TIMEOUT,
        "kubelet to restart the killed container",
        || {
            let pods = kubelet.pods()?;
            let pod = pods
                .iter()
                .find(|pod| pod["metadata"]["name"] == *name)
                .ok_or("the pod is missing in kubelet's list of pods")?;
            let status = container_status(pod, "web")?;
            let last = &status["lastState"]["terminated"];
            ensure!(
                last["reason"] == "OOMKilled" && last["exitCode"] == 137,
                "the container was not OOMKilled; the container's status: {status}"
            );
            ensure!(
                status["restartCount"] == 1,
                "kubelet did not restart the container exactly once; the container's status: {status}"
            );
            Ok(Some(()))
        },
    )?;
    let pods = kubelet.ready(3)?;
    answers(&pods)
}

fn restarts_of_the_server_and_of_kubelet_affect_no_pod(
    node: &mut Node,
    kubelet: &Kubelet,
) -> Result {
    let pods = kubelet.ready(3)?;
    let before = lives(node, &pods)?;

    node.kill_server()?;
    // The web servers still answer while no CRI server runs.
    answers(&pods)?;
    node.start_server()?;
    kubelet.stop()?;
    answers(&pods)?;
    kubelet.begin()?;

    let pods = kubelet.ready(3)?;
    ensure_eq!(
        lives(node, &pods)?,
        before,
        "container ids, process ids and restart counts of the pods after the restarts"
    );
    // The test waits until the probes have run for some more rounds.
    std::thread::sleep(Duration::from_secs(5));
    let pods = kubelet.ready(3)?;
    ensure_eq!(
        lives(node, &pods)?,
        before,
        "container ids, process ids and restart counts of the pods after more rounds of probes"
    );
    answers(&pods)
}
