//! The real kubelet over the CRI server, with static pods and no API server: its start, what it says,
//! and what must be gone after its pods.

use std::fs;
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::time::Duration;

use serde_json::{Value, json};

use crate::ensure;
use crate::support::cgroup_use::groups_below;
use crate::support::leak_check::unmount_below;
use crate::support::machine::{Output, Result, Running, command, note, wait_for, wait_within};
use crate::support::needs::Need;
use crate::support::node::{A_NODE, BUSYBOX, Node, WITHOUT_LIMITS, is_pods_interface, is_rrun};

/// The newest kubelet, on a node.
pub(crate) const KUBELET: Need = Need::All(&[Need::Program("kubelet"), A_NODE]);

/// A machine whose limits are kubelet's to set.
pub(crate) const COUNTED: Need = Need::All(&[
    Need::OwnMachine,
    Need::Controller("cpu"),
    Need::Controller("memory"),
]);

/// For what takes kubelet several rounds of its own clocks.
pub(crate) const KUBELET_TIMEOUT: Duration = Duration::from_secs(1200);

/// Where kubelet's own endpoint is to be had without TLS.
pub(crate) const ENDPOINT: &str = "http://127.0.0.1:10251";

/// Where kubelet keeps its pods' cgroups, by either driver.
const GROUPS: [&str; 2] = ["/sys/fs/cgroup/kubepods", "/sys/fs/cgroup/kubepods.slice"];

/// For a kernel's view without controllers: kubelet makes no groups, and no limit is held.
pub(crate) const UNCOUNTED: &str = "\
cgroupsPerQOS: false
enforceNodeAllocatable: []
cpuCFSQuota: false
";

/// Has the server run its containers by runtimes that are told of no limits: kubelet asks for CPU
/// shares whatever it is told itself.
pub(crate) fn without_limits(node: &mut Node) -> Result {
    let mut config = "default_runtime = 'unlimited'\n".to_owned();
    for (handler, runtime) in [("unlimited", "rrun"), ("runc", "runc")] {
        let script = node.join(&format!("{runtime}-without-limits"));
        fs::write(
            &script,
            format!("#!/bin/sh\nexport RUNTIME={runtime}\nexec {WITHOUT_LIMITS} \"$@\"\n"),
        )?;
        fs::set_permissions(&script, fs::Permissions::from_mode(0o755))?;
        config += &format!("[runtime.{handler}]\npath = {script:?}\n");
    }
    fs::write(node.join("config.d/50-unlimited.toml"), config)?;
    node.terminate_server()?;
    node.start_server()
}

/// How kubelet is to run.
#[derive(Clone, Copy, Default)]
pub(crate) struct Options<'a> {
    /// Another kubelet than the one in PATH.
    pub(crate) program: Option<&'a str>,
    /// Lines for its configuration.
    pub(crate) config: &'a str,
    /// The API server that it belongs to, by a kubeconfig file; none, for static pods alone.
    pub(crate) kubeconfig: Option<&'a str>,
}

/// A kubelet; dropped, it is stopped, and what it keeps is removed.
pub(crate) struct Kubelet<'a> {
    socket: PathBuf,
    manifests: PathBuf,
    options: Options<'a>,
    /// Speaks TLS to kubelet's endpoint for clients that do not.
    tls: Option<Running>,
    /// Whether there was mount(8)'s directory before; kubelet calls that.
    had_mount_table: bool,
}

const MOUNT_TABLE: &str = "/run/mount";

impl<'a> Kubelet<'a> {
    /// One that does not run yet.
    pub(crate) fn new(node: &Node, options: Options<'a>) -> Self {
        Kubelet {
            socket: node.socket(),
            manifests: node.join("manifests"),
            options,
            tls: None,
            had_mount_table: Path::new(MOUNT_TABLE).exists(),
        }
    }

    pub(crate) fn start(node: &Node, options: Options<'a>) -> Result<Self> {
        let mut kubelet = Kubelet::new(node, options);
        kubelet.begin()?;
        let tls = [
            "TCP-LISTEN:10251,bind=127.0.0.1,reuseaddr,fork",
            "OPENSSL:127.0.0.1:10250,verify=0",
        ];
        kubelet.tls = Some(command("socat", tls).start()?);
        Ok(kubelet)
    }

    pub(crate) fn begin(&self) -> Result {
        let output = self.launch(&["/src/tests/setup/kubelet.sh", "start"])?;
        note(format!(
            "kubelet answered {:.0} s after its start",
            output.took.as_secs_f64()
        ));
        Ok(())
    }

    /// Runs a script that starts it, as [`Options`] say.
    pub(crate) fn launch(&self, script: &[&str]) -> Result<Output> {
        let program = self.options.program.unwrap_or("kubelet");
        let mut environment = vec![
            format!("KUBELET={program}"),
            format!("KUBELET_CONFIG={}", self.options.config),
        ];
        if let Some(kubeconfig) = self.options.kubeconfig {
            environment.push(format!("KUBELET_KUBECONFIG={kubeconfig}"));
            // The API server asks for it by the node's address.
            environment.push("KUBELET_ADDRESS=0.0.0.0".to_owned());
        }
        command("env", environment)
            .args(script)
            .arg(&self.socket)
            .arg(&self.manifests)
            .within(KUBELET_TIMEOUT)
            .ok()
    }

    pub(crate) fn stop(&self) -> Result {
        command("/src/tests/setup/kubelet.sh", ["stop"])
            .ok()
            .map(|_| ())
    }

    /// Has kubelet run this pod.
    pub(crate) fn write_manifest(&self, pod: &Value) -> Result {
        // kubelet passes over what begins with a dot: it never sees half a manifest.
        let partial = self.manifests.join(".partial");
        fs::write(&partial, serde_json::to_vec(pod)?)?;
        Ok(fs::rename(partial, self.manifest(pod))?)
    }

    pub(crate) fn remove_manifest(&self, pod: &Value) -> Result {
        Ok(fs::remove_file(self.manifest(pod))?)
    }

    fn manifest(&self, pod: &Value) -> PathBuf {
        let name = pod["metadata"]["name"].as_str().unwrap_or("pod");
        self.manifests.join(format!("{name}.json"))
    }

    /// What kubelet says of its pods, in the order of their names.
    pub(crate) fn pods(&self) -> Result<Vec<Value>> {
        let pods = self.asks("/pods")?;
        let mut pods = pods["items"].as_array().cloned().unwrap_or_default();
        pods.sort_by_key(|pod| pod["metadata"]["name"].to_string());
        Ok(pods)
    }

    /// What is to be read without credentials.
    pub(crate) fn asks(&self, path: &str) -> Result<Value> {
        Ok(serde_json::from_str(&self.reads(path)?)?)
    }

    /// The same, as the text that it is.
    pub(crate) fn reads(&self, path: &str) -> Result<String> {
        let url = format!("http://127.0.0.1:10255{path}");
        Ok(command("curl", ["-fsS", &url]).ok()?.stdout)
    }

    /// The pod of this name, as it is now.
    pub(crate) fn pod(&self, pod: &Value) -> Result<Value> {
        let name = &pod["metadata"]["name"];
        let found = self
            .pods()?
            .into_iter()
            .find(|pod| pod["metadata"]["name"] == *name);
        Ok(found.ok_or(format!("kubelet knows no pod {name}"))?)
    }

    /// Waits until as many pods are Ready.
    pub(crate) fn ready(&self, count: usize) -> Result<Vec<Value>> {
        wait_within(
            KUBELET_TIMEOUT,
            &format!("{count} pods to be Ready"),
            || {
                let pods = self.pods()?;
                let ready = pods.iter().filter(|pod| is_ready(pod)).count();
                ensure!(ready == count, "{ready} are Ready among {}", states(&pods));
                Ok(Some(pods))
            },
        )
    }

    /// Removes the pods, and waits until nothing is left of them.
    pub(crate) fn removes(&self, node: &Node, manifests: &[Value]) -> Result {
        for pod in manifests {
            self.remove_manifest(pod)?;
        }
        wait_within(KUBELET_TIMEOUT, "kubelet's pods to be gone", || {
            Ok(self.pods()?.is_empty().then_some(()))
        })?;
        Self::has_left_nothing(node)
    }

    /// Waits until nothing of any pod is on the node.
    pub(crate) fn has_left_nothing(node: &Node) -> Result {
        Self::has_stopped_everything(node)?;
        // kubelet does this once a minute.
        wait_within(KUBELET_TIMEOUT, "the pods' logs to be gone", || {
            let left = entries("/var/log/pods");
            ensure!(left.is_empty(), "left: {}", left.join(" "));
            Ok(Some(()))
        })
    }

    /// Waits until nothing of any pod runs or is mounted on the node; kubelet keeps the logs longer.
    pub(crate) fn has_stopped_everything(node: &Node) -> Result {
        wait_within(KUBELET_TIMEOUT, "everything of the pods to be gone", || {
            let mut left: Vec<String> = pods_groups()
                .into_iter()
                .map(|group| group.display().to_string())
                .collect();
            left.extend(entries("/var/lib/kubelet/pods"));
            ensure!(left.is_empty(), "left: {}", left.join(" "));
            // kubelet collects dead pods of the CRI a minute after, or on its own occasions.
            if is_rrun() {
                let pods = node.asks(&["pods", "--quiet", "--state", "Ready"])?;
                ensure!(pods.is_empty(), "pods are left: {pods}");
            }
            Ok(Some(()))
        })?;
        wait_for("the pods' interfaces to be gone", || {
            let names = fs::read_dir("/sys/class/net")?.flatten();
            let left: Vec<_> = names
                .filter(|name| is_pods_interface(&name.file_name().to_string_lossy()))
                .collect();
            ensure!(left.is_empty(), "{left:?}");
            Ok(Some(()))
        })
    }
}

impl Drop for Kubelet<'_> {
    fn drop(&mut self) {
        let _ = self.stop();
        if let Some(tls) = self.tls.take() {
            tls.signal(nix::sys::signal::Signal::SIGTERM);
            let _ = tls.end();
        }
        // What a test that failed has left to kubelet.
        unmount_below(Path::new("/var/lib/kubelet/pods"));
        for dir in [
            "/var/lib/kubelet",
            "/var/log/pods",
            "/var/log/containers",
            "/etc/kubernetes",
        ] {
            let _ = fs::remove_dir_all(dir);
        }
        if !self.had_mount_table {
            let _ = fs::remove_dir_all(MOUNT_TABLE);
        }
        // Its own groups, which outlive the pods in them.
        if Path::new(GROUPS[1]).exists() {
            let _ = command("systemctl", ["stop", "kubepods.slice"]).end();
        }
        for root in GROUPS {
            for group in groups_below(Path::new(root)) {
                let _ = fs::remove_dir(group);
            }
            let _ = fs::remove_dir(root);
        }
    }
}

/// A pod that runs one container, and what else its specification says.
pub(crate) fn static_pod(name: &str, spec: &Value) -> Value {
    json!({
        "apiVersion": "v1",
        "kind": "Pod",
        "metadata": { "name": name, "namespace": "default", "labels": { "app": "application" } },
        "spec": spec,
    })
}

/// A static pod of one container, `c`, of busybox, which is killed when it is to end.
pub(crate) fn busybox_pod(name: &str, command: &[&str]) -> Value {
    static_pod(
        name,
        &json!({
            "terminationGracePeriodSeconds": 0,
            "containers": [{
                "name": "c",
                "image": BUSYBOX,
                "imagePullPolicy": "IfNotPresent",
                "command": command,
            }],
        }),
    )
}

/// The pod's name, by its manifest or its status.
pub(crate) fn pod_name(pod: &Value) -> &str {
    pod["metadata"]["name"].as_str().unwrap_or_default()
}

/// The URL of a pod at kubelet's own endpoint.
pub(crate) fn url(path: &str, pod: &Value, rest: &str) -> String {
    format!("{ENDPOINT}/{path}/default/{}{rest}", pod_name(pod))
}

/// What the container has logged, by kubelet. All of it: minutes can have gone by on a busy machine,
/// with a probe's line each second.
pub(crate) fn logs(pod: &Value, container: &str) -> Result<String> {
    let url = url("containerLogs", pod, &format!("/{container}"));
    Ok(command("curl", ["-fsS", &url]).ok()?.stdout)
}

pub(crate) fn is_ready(pod: &Value) -> bool {
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

fn entries(dir: &str) -> Vec<String> {
    let names = fs::read_dir(dir).into_iter().flatten().flatten();
    names
        .map(|name| name.path().display().to_string())
        .collect()
}

/// The groups of single pods.
fn pods_groups() -> Vec<PathBuf> {
    let all = GROUPS.iter().flat_map(|root| groups_below(Path::new(root)));
    all.filter(|group| {
        let name = group.file_name().unwrap_or_default().to_string_lossy();
        name.starts_with("pod") || name.contains("-pod")
    })
    .collect()
}

/// What kubelet says of this container, a sidecar too.
pub(crate) fn container_status(pod: &Value, name: &str) -> Result<Value> {
    let status = ["containerStatuses", "initContainerStatuses"]
        .iter()
        .flat_map(|list| pod["status"][list].as_array().into_iter().flatten())
        .find(|status| status["name"] == name);
    Ok(status
        .ok_or(format!("no container {name} in {}", pod["status"]))?
        .clone())
}

/// The container's id without the runtime's name before it.
pub(crate) fn container_id(pod: &Value, name: &str) -> Result<String> {
    let status = container_status(pod, name)?;
    let id = status["containerID"].as_str();
    let id = id.and_then(|id| id.split("://").nth(1));
    Ok(id.ok_or(format!("no containerID in {status}"))?.to_owned())
}

/// What must stay as it is while kubelet and the server come and go: every container's id, process
/// and restarts.
pub(crate) fn lives(node: &Node, pods: &[Value]) -> Result<Vec<(String, i32, i64)>> {
    let mut all = Vec::new();
    for pod in pods {
        for list in ["containerStatuses", "initContainerStatuses"] {
            for status in pod["status"][list].as_array().into_iter().flatten() {
                if !status["state"]["running"].is_object() {
                    continue;
                }
                let name = status["name"].as_str().unwrap_or_default();
                let id = container_id(pod, name)?;
                let restarts = status["restartCount"].as_i64().unwrap_or(-1);
                all.push((id.clone(), node.pid(&id)?, restarts));
            }
        }
    }
    all.sort();
    Ok(all)
}
