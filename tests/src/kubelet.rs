//! The real kubelet, with static pods and no API server, over the CRI server.

use std::fs;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use serde_json::{Value, json};

use crate::cgroup_use::held_to;
use crate::machine::{Result, command, note, wait_for, wait_within};
use crate::needs::{Need, Test};
use crate::node::{
    CRICTL, IMAGES, Node, REGISTRY, SERVER, WEB, is_pods_interface, is_rrun, on_a_node,
};
use crate::{ensure, ensure_eq, test};

pub const TESTS: &[Test] = &[test!(
    three_static_pods_from_their_manifests_to_their_removal,
    Need::Guest,
    Need::Program("kubelet"),
    Need::Controller("cpu"),
    Need::Controller("memory"),
    CRICTL,
    SERVER,
    REGISTRY,
    IMAGES,
)];

/// For what takes kubelet several rounds of its own clocks.
const PATIENCE: Duration = Duration::from_secs(300);

/// A kubelet; dropped, it is stopped, and what it keeps is removed.
struct Kubelet {
    socket: PathBuf,
    manifests: PathBuf,
}

impl Kubelet {
    fn start(node: &Node) -> Result<Self> {
        let kubelet = Kubelet {
            socket: node.socket(),
            manifests: node.join("manifests"),
        };
        kubelet.begin()?;
        Ok(kubelet)
    }

    fn begin(&self) -> Result {
        let output = command("/src/tests/setup/kubelet.sh", ["start"])
            .arg(&self.socket)
            .arg(&self.manifests)
            .within(PATIENCE)
            .ok()?;
        note(format!(
            "kubelet answered {:.0} s after its start",
            output.took.as_secs_f64()
        ));
        Ok(())
    }

    fn stop(&self) -> Result {
        command("/src/tests/setup/kubelet.sh", ["stop"])
            .ok()
            .map(|_| ())
    }

    fn write_manifest(&self, name: &str) -> Result {
        let pod = json!({
            "apiVersion": "v1",
            "kind": "Pod",
            "metadata": { "name": name, "namespace": "default" },
            "spec": {
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
            },
        });
        // kubelet passes over what begins with a dot: it never sees half a manifest.
        let partial = self.manifests.join(".partial");
        fs::write(&partial, serde_json::to_vec(&pod)?)?;
        Ok(fs::rename(
            partial,
            self.manifests.join(format!("{name}.json")),
        )?)
    }

    /// What kubelet says of its pods.
    fn pods(&self) -> Result<Vec<Value>> {
        let pods = command("curl", ["-fsS", "http://127.0.0.1:10255/pods"])
            .ok()?
            .json()?;
        Ok(pods["items"].as_array().cloned().unwrap_or_default())
    }

    /// Waits until as many pods are Ready.
    fn ready(&self, count: usize) -> Result<Vec<Value>> {
        wait_within(PATIENCE, &format!("{count} pods to be Ready"), || {
            let pods = self.pods()?;
            let ready = pods.iter().filter(|pod| is_ready(pod)).count();
            ensure!(ready == count, "{ready} are Ready among {}", states(&pods));
            Ok(Some(pods))
        })
    }
}

impl Drop for Kubelet {
    fn drop(&mut self) {
        let _ = self.stop();
        for dir in [
            "/var/lib/kubelet",
            "/var/log/pods",
            "/var/log/containers",
            "/etc/kubernetes",
        ] {
            let _ = fs::remove_dir_all(dir);
        }
        // Its own groups, which outlive the pods in them.
        for group in groups_below(Path::new("/sys/fs/cgroup/kubepods")) {
            let _ = fs::remove_dir(group);
        }
        let _ = fs::remove_dir("/sys/fs/cgroup/kubepods");
    }
}

fn is_ready(pod: &Value) -> bool {
    let conditions = pod.pointer("/status/conditions").and_then(Value::as_array);
    conditions
        .into_iter()
        .flatten()
        .any(|condition| condition["type"] == "Ready" && condition["status"] == "True")
}

fn states(pods: &[Value]) -> String {
    pods.iter()
        .map(|pod| format!("\n{}: {}", pod["metadata"]["name"], pod["status"]))
        .collect()
}

/// Directories below this one, the deepest first.
fn groups_below(dir: &Path) -> Vec<PathBuf> {
    let mut all = Vec::new();
    for entry in fs::read_dir(dir).into_iter().flatten().flatten() {
        if entry.file_type().is_ok_and(|kind| kind.is_dir()) {
            all.extend(groups_below(&entry.path()));
            all.push(entry.path());
        }
    }
    all
}

/// The container's id without the runtime's name before it.
fn container_of(pod: &Value) -> Result<String> {
    let id = pod
        .pointer("/status/containerStatuses/0/containerID")
        .and_then(Value::as_str);
    let id = id.and_then(|id| id.split("://").nth(1));
    Ok(id
        .ok_or(format!("no container in {}", pod["status"]))?
        .to_owned())
}

fn restarts_of(pod: &Value) -> i64 {
    pod.pointer("/status/containerStatuses/0/restartCount")
        .and_then(Value::as_i64)
        .unwrap_or(-1)
}

/// What must stay as it is while kubelet and the server come and go.
fn lives(node: &Node, pods: &[Value]) -> Result<Vec<(String, i32, i64)>> {
    let mut all = Vec::new();
    for pod in pods {
        let id = container_of(pod)?;
        all.push((id.clone(), node.pid(&id)?, restarts_of(pod)));
    }
    all.sort();
    Ok(all)
}

fn answers(pods: &[Value]) -> Result {
    for pod in pods {
        let address = pod["status"]["podIP"]
            .as_str()
            .ok_or(format!("no podIP: {}", pod["status"]))?;
        command("curl", ["-fsS", &format!("http://{address}:5000/")])
            .ok()?
            .says("hello from rrun")?;
    }
    Ok(())
}

fn three_static_pods_from_their_manifests_to_their_removal() -> Result {
    on_a_node(|node| {
        let kubelet = Kubelet::start(node)?;
        let started = Instant::now();
        for number in 1..=3 {
            kubelet.write_manifest(&format!("web-{number}"))?;
        }
        let pods = kubelet.ready(3)?;
        note(format!(
            "three static pods were Ready {:.1} s after their manifests, the image's pull included",
            started.elapsed().as_secs_f64()
        ));
        answers(&pods)?;
        limits_are_as_kubelet_means_them(node, &pods)?;
        a_busy_loop_is_held_to_its_limit(node, &pods[0])?;
        an_allocation_over_the_limit_is_oomkilled_and_restarted(node, &kubelet, &pods[1])?;
        restarts_go_unnoticed(node, &kubelet)?;
        removal_leaves_nothing(node, &kubelet)
    })
}

fn limits_are_as_kubelet_means_them(node: &Node, pods: &[Value]) -> Result {
    for pod in pods {
        let group = node.cgroup(&container_of(pod)?)?;
        for (name, value) in [
            ("cpu.weight", "17"),
            ("cpu.max", "50000 100000"),
            ("memory.max", "67108864"),
        ] {
            let is = fs::read_to_string(group.join(name))?;
            ensure_eq!(is.trim_end(), value, "{name} of {}", group.display());
        }
        ensure!(
            group.starts_with("/sys/fs/cgroup/kubepods/burstable"),
            "the container is in {}",
            group.display()
        );
    }
    Ok(())
}

fn a_busy_loop_is_held_to_its_limit(node: &Node, pod: &Value) -> Result {
    let id = container_of(pod)?;
    let script = "timeout 60 sh -c 'while :; do :; done'";
    let spinning = node
        .crictl(&["exec", "-s", "--timeout", "60", &id, "sh", "-c", script])
        .start()?;
    // Past crictl's own start.
    std::thread::sleep(Duration::from_secs(3));
    let used = held_to(0.5, &node.cgroup(&id)?)?;
    note(format!(
        "a busy loop under kubelet's limit of 500m used {:.0}m",
        used * 1000.0
    ));
    drop(spinning);
    Ok(())
}

fn an_allocation_over_the_limit_is_oomkilled_and_restarted(
    node: &Node,
    kubelet: &Kubelet,
    pod: &Value,
) -> Result {
    let id = container_of(pod)?;
    let name = &pod["metadata"]["name"];
    // The kernel kills the whole group, and the container with it (memory.oom.group).
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
    wait_within(PATIENCE, "the killed container to be restarted", || {
        let pods = kubelet.pods()?;
        let pod = pods
            .iter()
            .find(|pod| pod["metadata"]["name"] == *name)
            .ok_or("it is gone")?;
        let status = &pod["status"]["containerStatuses"][0];
        let last = &status["lastState"]["terminated"];
        ensure!(
            last["reason"] == "OOMKilled" && last["exitCode"] == 137,
            "{status}"
        );
        ensure!(status["restartCount"] == 1, "{status}");
        Ok(Some(()))
    })?;
    let pods = kubelet.ready(3)?;
    answers(&pods)
}

fn restarts_go_unnoticed(node: &mut Node, kubelet: &Kubelet) -> Result {
    let pods = kubelet.ready(3)?;
    let before = lives(node, &pods)?;

    node.kill_server()?;
    // The web servers answer while there is nobody to ask about them.
    answers(&pods)?;
    node.start_server()?;
    kubelet.stop()?;
    answers(&pods)?;
    kubelet.begin()?;

    let pods = kubelet.ready(3)?;
    ensure_eq!(
        lives(node, &pods)?,
        before,
        "containers, processes and restarts"
    );
    // Probes and all, for some rounds more.
    std::thread::sleep(Duration::from_secs(5));
    let pods = kubelet.ready(3)?;
    ensure_eq!(
        lives(node, &pods)?,
        before,
        "containers, processes and restarts a little later"
    );
    answers(&pods)
}

fn removal_leaves_nothing(node: &Node, kubelet: &Kubelet) -> Result {
    let started = Instant::now();
    for number in 1..=3 {
        fs::remove_file(kubelet.manifests.join(format!("web-{number}.json")))?;
    }
    wait_within(PATIENCE, "kubelet's pods to be gone", || {
        Ok(kubelet.pods()?.is_empty().then_some(()))
    })?;
    wait_within(PATIENCE, "everything of the pods to be gone", || {
        let mut left: Vec<String> = groups_below(Path::new("/sys/fs/cgroup/kubepods"))
            .into_iter()
            .filter(|group| {
                group
                    .file_name()
                    .is_some_and(|name| name.to_string_lossy().starts_with("pod"))
            })
            .map(|group| group.display().to_string())
            .collect();
        for dir in ["/var/lib/kubelet/pods", "/var/log/pods"] {
            let names = fs::read_dir(dir).into_iter().flatten().flatten();
            left.extend(names.map(|name| name.path().display().to_string()));
        }
        ensure!(left.is_empty(), "left: {}", left.join(" "));
        // kubelet collects dead pods of the CRI a minute after, or on its own occasions.
        if is_rrun() {
            let pods = node.asks(&["pods", "--quiet", "--state", "Ready"])?;
            ensure!(pods.is_empty(), "pods are left: {pods}");
        }
        Ok(Some(()))
    })?;
    note(format!(
        "everything of the pods was gone {:.1} s after their manifests",
        started.elapsed().as_secs_f64()
    ));
    wait_for("the pods' interfaces to be gone", || {
        let names = fs::read_dir("/sys/class/net")?.flatten();
        let left: Vec<_> = names
            .filter(|name| is_pods_interface(&name.file_name().to_string_lossy()))
            .collect();
        ensure!(left.is_empty(), "{left:?}");
        Ok(Some(()))
    })
}
