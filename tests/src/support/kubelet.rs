//! The real kubelet, which uses the CRI server under test. By default, kubelet runs static pods
//! without an API server. This module starts kubelet and reads kubelet's reports. The module also
//! checks that nothing of a removed pod remains on the node.

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

/// The program `kubelet` in PATH, and the requirements of every test that starts a [`Node`].
pub(crate) const KUBELET: Need = Need::All(&[Need::Program("kubelet"), A_NODE]);

/// A machine on which kubelet can set limits.
pub(crate) const COUNTED: Need = Need::All(&[
    Need::OwnMachine,
    Need::Controller("cpu"),
    Need::Controller("memory"),
]);

/// The timeout for operations that take several rounds of kubelet's periodic loops.
pub(crate) const KUBELET_TIMEOUT: Duration = Duration::from_secs(1200);

/// The URL at which a proxy makes kubelet's HTTPS endpoint available without TLS.
pub(crate) const ENDPOINT: &str = "http://127.0.0.1:10251";

/// The parent cgroups of kubelet's pods, with the cgroupfs driver and with the systemd driver.
const GROUPS: [&str; 2] = ["/sys/fs/cgroup/kubepods", "/sys/fs/cgroup/kubepods.slice"];

/// Additional lines for kubelet's configuration on a machine without cgroup controllers. With these
/// lines, kubelet creates no cgroups and enforces no limits.
pub(crate) const UNCOUNTED: &str = "\
cgroupsPerQOS: false
enforceNodeAllocatable: []
cpuCFSQuota: false
";

/// Configures the server to call the runtimes through a wrapper that removes all limits. kubelet
/// always requests CPU shares. On a machine without cgroup controllers, the runtimes cannot set CPU
/// shares and need this wrapper.
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

/// The options of a kubelet.
#[derive(Clone, Copy, Default)]
pub(crate) struct Options<'a> {
    /// The path of the kubelet program. `None` means the kubelet in PATH.
    pub(crate) program: Option<&'a str>,
    /// Additional lines for kubelet's configuration.
    pub(crate) config: &'a str,
    /// The kubeconfig file with which kubelet registers at the API server. `None` means that
    /// kubelet runs only static pods.
    pub(crate) kubeconfig: Option<&'a str>,
}

/// A kubelet. Dropping the value stops kubelet and removes kubelet's files.
pub(crate) struct Kubelet<'a> {
    socket: PathBuf,
    manifests: PathBuf,
    options: Options<'a>,
    /// The proxy (socat) that forwards connections without TLS to kubelet's HTTPS endpoint.
    tls: Option<Running>,
    /// True if the directory [`MOUNT_TABLE`] existed before kubelet started. kubelet calls
    /// mount(8), and mount(8) creates this directory.
    had_mount_table: bool,
}

const MOUNT_TABLE: &str = "/run/mount";

impl<'a> Kubelet<'a> {
    /// Creates a [`Kubelet`] value, but does not start kubelet.
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
            "kubelet responded {:.0} s after its start",
            output.took.as_secs_f64()
        ));
        Ok(())
    }

    /// Runs `script`, which starts kubelet. `self.options` is passed to `script` in environment
    /// variables, such as `KUBELET_CONFIG`. The arguments of `script` are the paths of the server's
    /// socket and of the manifests.
    pub(crate) fn launch(&self, script: &[&str]) -> Result<Output> {
        let program = self.options.program.unwrap_or("kubelet");
        let mut environment = vec![
            format!("KUBELET={program}"),
            format!("KUBELET_CONFIG={}", self.options.config),
        ];
        if let Some(kubeconfig) = self.options.kubeconfig {
            environment.push(format!("KUBELET_KUBECONFIG={kubeconfig}"));
            // The API server connects to kubelet at the node's address, so kubelet must not listen
            // only on the loopback address.
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

    /// Writes a pod's manifest. kubelet then runs the pod.
    pub(crate) fn write_manifest(&self, pod: &Value) -> Result {
        // kubelet ignores files whose names begin with a dot. The dot hides the manifest until it
        // is complete.
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

    /// Returns the pods that kubelet reports, in the order of their names.
    pub(crate) fn pods(&self) -> Result<Vec<Value>> {
        let pods = self.asks("/pods")?;
        let mut pods = pods["items"].as_array().cloned().unwrap_or_default();
        pods.sort_by_key(|pod| pod["metadata"]["name"].to_string());
        Ok(pods)
    }

    /// Requests `path` from kubelet's port without authentication, and returns the JSON of the
    /// response.
    pub(crate) fn asks(&self, path: &str) -> Result<Value> {
        Ok(serde_json::from_str(&self.reads(path)?)?)
    }

    /// Like [`Kubelet::asks`], but returns the response as text.
    pub(crate) fn reads(&self, path: &str) -> Result<String> {
        let url = format!("http://127.0.0.1:10255{path}");
        Ok(command("curl", ["-fsS", &url]).ok()?.stdout)
    }

    /// Returns kubelet's current report about `pod`.
    pub(crate) fn pod(&self, pod: &Value) -> Result<Value> {
        let name = &pod["metadata"]["name"];
        let found = self
            .pods()?
            .into_iter()
            .find(|pod| pod["metadata"]["name"] == *name);
        Ok(found.ok_or(format!("kubelet reports no pod {name}"))?)
    }

    /// Waits until exactly `count` pods are Ready, and returns kubelet's reports about all pods.
    pub(crate) fn ready(&self, count: usize) -> Result<Vec<Value>> {
        wait_within(
            KUBELET_TIMEOUT,
            &format!("exactly {count} pods to be Ready"),
            || {
                let pods = self.pods()?;
                let ready = pods.iter().filter(|pod| is_ready(pod)).count();
                ensure!(
                    ready == count,
                    "{ready} pods are Ready instead of {count}: {}",
                    states(&pods)
                );
                Ok(Some(pods))
            },
        )
    }

    /// Removes the manifests in `manifests`, and waits until nothing of any pod remains on the
    /// node.
    pub(crate) fn removes(&self, node: &Node, manifests: &[Value]) -> Result {
        for pod in manifests {
            self.remove_manifest(pod)?;
        }
        wait_within(KUBELET_TIMEOUT, "kubelet to report no pods", || {
            Ok(self.pods()?.is_empty().then_some(()))
        })?;
        Self::has_left_nothing(node)
    }

    /// Waits until nothing of any pod remains on the node, not even a log.
    pub(crate) fn has_left_nothing(node: &Node) -> Result {
        Self::has_stopped_everything(node)?;
        // kubelet removes logs only once a minute, so this wait needs the long timeout.
        wait_within(KUBELET_TIMEOUT, "kubelet to remove the pods' logs", || {
            let left = entries("/var/log/pods");
            ensure!(
                left.is_empty(),
                "these logs of pods still exist: {}",
                left.join(" ")
            );
            Ok(Some(()))
        })
    }

    /// Waits until no process, cgroup, mount or interface of any pod remains on the node. The pods'
    /// logs are allowed to remain, because kubelet removes them later.
    pub(crate) fn has_stopped_everything(node: &Node) -> Result {
        wait_within(
            KUBELET_TIMEOUT,
            "the cgroups and directories of all pods to be removed",
            || {
                let mut left: Vec<String> = pods_groups()
                    .into_iter()
                    .map(|group| group.display().to_string())
                    .collect();
                left.extend(entries("/var/lib/kubelet/pods"));
                ensure!(
                    left.is_empty(),
                    "these cgroups and directories of pods still exist: {}",
                    left.join(" ")
                );
                // kubelet waits at least a minute before it removes exited pods from the CRI
                // server. This check therefore ignores exited pods.
                if is_rrun() {
                    let pods = node.asks(&["pods", "--quiet", "--state", "Ready"])?;
                    ensure!(pods.is_empty(), "these pods are still Ready: {pods}");
                }
                Ok(Some(()))
            },
        )?;
        wait_for("the pods' interfaces to be deleted", || {
            let names = fs::read_dir("/sys/class/net")?.flatten();
            let left: Vec<_> = names
                .filter(|name| is_pods_interface(&name.file_name().to_string_lossy()))
                .collect();
            ensure!(
                left.is_empty(),
                "these network interfaces of pods still exist: {left:?}"
            );
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
        // The pods of a failed test can still have mounts in this directory.
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
        // kubelet does not remove the parent cgroups of its pods, so this function removes them.
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

/// Returns the manifest of a static pod with the specification `spec`.
pub(crate) fn static_pod(name: &str, spec: &Value) -> Value {
    json!({
        "apiVersion": "v1",
        "kind": "Pod",
        "metadata": { "name": name, "namespace": "default", "labels": { "app": "application" } },
        "spec": spec,
    })
}

/// Returns the manifest of a static pod with one busybox container. The container's name is `c`.
/// The pod has no grace period.
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

/// Returns a pod's name. `pod` is the pod's manifest or kubelet's report about the pod.
pub(crate) fn pod_name(pod: &Value) -> &str {
    pod["metadata"]["name"].as_str().unwrap_or_default()
}

/// Returns the URL of kubelet's endpoint `path` for a pod. The URL ends with `rest`.
pub(crate) fn url(path: &str, pod: &Value, rest: &str) -> String {
    format!("{ENDPOINT}/{path}/default/{}{rest}", pod_name(pod))
}

/// Requests all log lines of a container from kubelet. The last lines are not enough, because a
/// probe logs one line each second. On a busy machine, the test's request can be minutes late, and
/// the expected line is then no longer one of the last lines.
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

/// Returns the cgroups of all pods, without kubelet's parent cgroups.
fn pods_groups() -> Vec<PathBuf> {
    let all = GROUPS.iter().flat_map(|root| groups_below(Path::new(root)));
    all.filter(|group| {
        let name = group.file_name().unwrap_or_default().to_string_lossy();
        name.starts_with("pod") || name.contains("-pod")
    })
    .collect()
}

/// Returns the status that kubelet reports for the container `name`. The container can also be a
/// sidecar.
pub(crate) fn container_status(pod: &Value, name: &str) -> Result<Value> {
    let status = ["containerStatuses", "initContainerStatuses"]
        .iter()
        .flat_map(|list| pod["status"][list].as_array().into_iter().flatten())
        .find(|status| status["name"] == name);
    Ok(status
        .ok_or(format!(
            "the pod's status contains no container {name}: {}",
            pod["status"]
        ))?
        .clone())
}

/// Returns the container's id without the prefix that names the container runtime.
pub(crate) fn container_id(pod: &Value, name: &str) -> Result<String> {
    let status = container_status(pod, name)?;
    let id = status["containerID"].as_str();
    let id = id.and_then(|id| id.split("://").nth(1));
    Ok(id
        .ok_or(format!(
            "the container's status contains no containerID: {status}"
        ))?
        .to_owned())
}

/// Returns the id, process id and number of restarts of each running container. A restart of
/// kubelet or of the server must not change these values.
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
