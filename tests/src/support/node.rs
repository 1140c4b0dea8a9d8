//! This module starts a separate node for each test. A node consists of a registry and a CRI server
//! with temporary directories. The tests call the server with crictl.
//!
//! With `RRUN_TEST_CRI=containerd`, the tests run against containerd instead of rrun-cri. In this
//! case, the variable `RUNTIME` contains the name of the OCI runtime that containerd calls. The
//! default of `RUNTIME` is runc. If a test fails with containerd, the test may expect more than the
//! CRI requires.

use std::fs;
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::time::Duration;

use nix::sys::signal::Signal;
use nix::unistd::Pid;
use serde_json::{Value, json};

use crate::ensure;
use crate::support::leak_check::{mounts_below, unmount_below};
use crate::support::machine::{
    Directory, Output, Result, Run, Running, command, deadline, tail, wait_for,
};
use crate::support::needs::Need;
use crate::support::supervisor::Supervisor;

pub(crate) const REGISTRY: Need = Need::Program("docker-registry");
pub(crate) const IMAGES: Need = Need::File("/images/registry");
pub(crate) const CRICTL: Need = Need::Program("crictl");
pub(crate) const SERVER: Need = Need::CriServer;

/// The requirements of every test that calls [`on_a_node`].
pub(crate) const A_NODE: Need = Need::All(&[CRICTL, SERVER, REGISTRY, IMAGES]);

/// The address at which rrun-cri serves its metrics.
pub(crate) const METRICS: &str = "127.0.0.1:9464";

/// A wrapper script that removes all limits from the container's configuration and then calls the
/// real runtime.
pub(crate) const WITHOUT_LIMITS: &str = "/src/tests/setup/runc-without-limits";

pub(crate) const PORT: &str = "5000";
pub(crate) const WEB: &str = "127.0.0.1:5000/demo/web:1";
pub(crate) const BUSYBOX: &str = "127.0.0.1:5000/demo/busybox:latest";

/// Returns the name of the CRI server under test.
pub(crate) fn server_program() -> String {
    std::env::var("RRUN_TEST_CRI").unwrap_or_else(|_| "rrun-cri".to_owned())
}

pub(crate) fn is_rrun() -> bool {
    server_program().ends_with("rrun-cri")
}

pub(crate) struct Node {
    directory: Directory,
    server: Option<Running>,
    /// The supervisor to which the server and its child processes report their system calls.
    supervisor: Option<Supervisor>,
    /// The log of earlier runs of the server.
    old_log: String,
}

/// Runs `test` on a separate node. After the test, this function removes all pods and images from
/// the node, and checks that nothing remains. If the test fails, the failure message contains the
/// server's log.
pub(crate) fn on_a_node(test: impl FnOnce(&mut Node) -> Result) -> Result {
    on_node(Node::start(None)?, test)
}

/// Like [`on_a_node`], but the server and its child processes report their system calls to a
/// supervisor. The pod ranges are small, so an address that is never freed is noticed.
pub(crate) fn on_a_supervised_node(test: impl FnOnce(&mut Node) -> Result) -> Result {
    on_node(Node::start(Some(Supervisor::new()?))?, test)
}

fn on_node(mut node: Node, test: impl FnOnce(&mut Node) -> Result) -> Result {
    let result = test(&mut node);
    let containers = match &result {
        Ok(()) => String::new(),
        Err(_) => node.crictl(&["ps", "--all"]).end().map_or_else(
            |_| "`crictl ps --all` fails, too".to_owned(),
            |output| output.told(),
        ),
    };
    let ended = node.end();
    let log = tail(&node.log(), 6000);
    if let Err(failed) = result.and(ended) {
        let message = failed.message().unwrap_or_default();
        return Err(format!(
            "{message}\n{containers}\nthe log of {}:\n{log}",
            server_program()
        )
        .into());
    }
    Ok(())
}

impl Node {
    fn start(supervisor: Option<Supervisor>) -> Result<Self> {
        let directory = Directory::new("node")?;
        for dir in ["root", "state", "logs", "certs.d", "cni", "cdi", "config.d"] {
            fs::create_dir(directory.join(dir))?;
        }
        let mut node = Node {
            directory,
            server: None,
            supervisor,
            old_log: String::new(),
        };
        registry(&["start", PORT])?;
        registry(&["mirrors", &node.join("certs.d").to_string_lossy(), PORT])?;
        node.write_config()?;
        if let Some(supervisor) = &node.supervisor {
            supervisor.replace(node.directory.path(), "NODE");
            let mut config = fs::read_to_string(node.join("config.toml"))?;
            config += "[network]\nrange = \"10.88.0.0/28\"\nrange6 = \"fd00:88::/124\"\n";
            fs::write(node.join("config.toml"), config)?;
        }
        node.start_server()?;
        Ok(node)
    }

    pub(crate) fn join(&self, name: &str) -> PathBuf {
        self.directory.join(name)
    }

    pub(crate) fn socket(&self) -> PathBuf {
        self.join("cri.sock")
    }

    pub(crate) fn log(&mut self) -> String {
        let now = self
            .server
            .as_mut()
            .map(Running::stderr)
            .unwrap_or_default();
        format!("{}{now}", self.old_log)
    }

    fn write_config(&self) -> Result {
        let [root, state, certs, cni, cdi] = ["root", "state", "certs.d", "cni", "cdi"]
            .map(|name| self.join(name).display().to_string());
        let socket = self.socket().display().to_string();
        let text = if is_rrun() {
            // In the native view (tests/native/run), the server does not have CAP_SYS_RESOURCE,
            // which it needs to lower an oom_score_adj. So the server's configuration must enable
            // restrict_oom_score_adj.
            format!(
                "root = {root:?}\nstate = {state:?}\nlisten = \"unix://{socket}\"\n\
                 netns_dir = \"{state}/netns\"\n\
                 registry_config_path = {certs:?}\ncni_conf_dir = {cni:?}\n\
                 restrict_oom_score_adj = true\ndebug = true\nmetrics_listen = {METRICS:?}\ncdi_spec_dirs = [{cdi:?}]\n\
                 [runtime.runc]\npath = 'runc'\n[runtime.crun]\npath = 'crun'\n\
                 [runtime.absent]\npath = '/no/such/runtime'\n"
            )
        } else {
            self.has_cni_bridge()?;
            // containerd sets a CPU weight for every pod, even if the machine has no cpu
            // controller. On such a machine, a wrapper around runc removes the CPU weight.
            let cpu = Need::Controller("cpu").lacking().is_none();
            let runc = if cpu {
                std::env::var("RUNTIME").unwrap_or_else(|_| "runc".to_owned())
            } else {
                WITHOUT_LIMITS.to_owned()
            };
            format!(
                "version = 3\nroot = {root:?}\nstate = {state:?}\n\
                 disabled_plugins = [\"io.containerd.nri.v1.nri\"]\n\
                 [grpc]\naddress = {socket:?}\n\
                 [plugins.'io.containerd.cri.v1.images'.registry]\nconfig_path = {certs:?}\n\
                 [plugins.'io.containerd.cri.v1.images'.pinned_images]\n\
                 sandbox = 'registry.k8s.io/pause:3.9'\n\
                 [plugins.'io.containerd.cri.v1.runtime']\nrestrict_oom_score_adj = true\n\
                 enable_cdi = true\ncdi_spec_dirs = [{cdi:?}]\n\
                 [plugins.'io.containerd.cri.v1.runtime'.containerd.runtimes.runc]\n\
                 runtime_type = 'io.containerd.runc.v2'\n\
                 [plugins.'io.containerd.cri.v1.runtime'.containerd.runtimes.runc.options]\n\
                 BinaryName = {runc:?}\n\
                 [plugins.'io.containerd.cri.v1.runtime'.containerd.runtimes.crun]\n\
                 runtime_type = 'io.containerd.runc.v2'\n\
                 [plugins.'io.containerd.cri.v1.runtime'.containerd.runtimes.crun.options]\n\
                 BinaryName = 'crun'\n\
                 [plugins.'io.containerd.cri.v1.runtime'.cni]\nconf_dir = {cni:?}\n\
                 bin_dirs = ['/usr/lib/cni']\n"
            )
        };
        Ok(fs::write(self.join("config.toml"), text)?)
    }

    /// Restarts the server with further lines at the begin of its configuration.
    pub(crate) fn restart_with(&mut self, lines: &str) -> Result {
        self.terminate_server()?;
        let file = self.join("config.toml");
        let text = fs::read_to_string(&file)?;
        fs::write(&file, format!("{lines}\n{text}"))?;
        self.start_server()
    }

    /// Configures Debian's CNI plugins, which then create the pods' network and host ports.
    pub(crate) fn has_cni_bridge(&self) -> Result {
        Ok(fs::write(self.join("cni/10-bridge.conflist"), CNI)?)
    }

    /// Starts the server, and waits until the server responds.
    pub(crate) fn start_server(&mut self) -> Result {
        let program = server_program();
        let config = self.join("config.toml");
        let server = match &self.supervisor {
            Some(supervisor) => supervisor.command(&program),
            None => command(&program, [""; 0]),
        };
        let mut server = server.arg("--config").arg(config).start()?;
        let answers = wait_for(&format!("the server {program} to listen"), || {
            // A server that has exited will not listen any more, so the wait ends.
            if !server.lives() {
                return Ok(Some(Err(format!(
                    "the server {program} exited; its standard error:\n{}",
                    tail(&server.stderr(), 4000)
                ))));
            }
            Ok(UnixStream::connect(self.socket()).ok().map(Ok))
        });
        self.server = Some(server);
        answers??;
        let what = format!("the server {program} to respond to `crictl version`");
        wait_for(&what, || match self.crictl(&["version"]).ok() {
            Err(_) if !self.server_lives() => Ok(Some(Err(format!(
                "the server {program} exited; its standard error:\n{}",
                tail(&self.log(), 4000)
            )))),
            answer => answer.map(|_| Some(Ok(()))),
        })??;
        Ok(())
    }

    /// Returns the supervisor of a node that [`on_a_supervised_node`] started.
    pub(crate) fn supervisor(&self) -> Result<&Supervisor> {
        Ok(self
            .supervisor
            .as_ref()
            .ok_or("the server is not supervised")?)
    }

    /// Returns whether the server's process is running.
    pub(crate) fn server_lives(&mut self) -> bool {
        self.server.as_mut().is_some_and(Running::lives)
    }

    /// Sends SIGHUP to the server, which then reads its configuration again.
    pub(crate) fn hang_up_server(&self) {
        if let Some(server) = &self.server {
            server.signal(Signal::SIGHUP);
        }
    }

    /// Kills the server's process with SIGKILL, as a crash would. The pods' monitors continue to
    /// run.
    pub(crate) fn kill_server(&mut self) -> Result {
        self.stop_server(Signal::SIGKILL).map(|_| ())
    }

    /// Terminates the server with SIGTERM, as an upgrade does.
    pub(crate) fn terminate_server(&mut self) -> Result {
        let code = self.stop_server(Signal::SIGTERM)?;
        ensure!(
            code == 0 || !is_rrun(),
            "the server exited with the exit code {code} after SIGTERM"
        );
        Ok(())
    }

    /// Sends `signal` to the server. `signal` must not be a signal that terminates the server.
    pub(crate) fn signal_server(&self, signal: Signal) {
        if let Some(server) = &self.server {
            server.signal(signal);
        }
    }

    /// Returns the server's resident memory in kB (proc(5), VmRSS).
    pub(crate) fn server_resident(&self) -> Result<u64> {
        let server = self.server.as_ref().ok_or("the server is not running")?;
        resident(server.pid())
    }

    /// Returns the resident memory of a pod's monitor in kB (proc(5), VmRSS).
    pub(crate) fn monitor_resident(&self, pod_id: &str) -> Result<u64> {
        resident(self.monitor(pod_id)?.as_raw())
    }

    /// Returns the server's process id.
    pub(crate) fn server_pid(&self) -> Result<i32> {
        let server = self.server.as_ref().ok_or("the server is not running")?;
        Ok(server.pid())
    }

    /// Returns the number of the server's open descriptors and the number of its threads.
    pub(crate) fn server_holds(&self) -> Result<(usize, usize)> {
        let server = self.server.as_ref().ok_or("the server is not running")?;
        let count = |what| Ok(fs::read_dir(format!("/proc/{}/{what}", server.pid()))?.count());
        count("fd").and_then(|fds| Ok((fds, count("task")?)))
    }

    /// Returns the process id of a pod's monitor.
    pub(crate) fn monitor(&self, pod_id: &str) -> Result<Pid> {
        let info = self.json(&["inspectp", pod_id])?;
        let pid = info.pointer("/info/monitor").and_then(Value::as_i64);
        Ok(Pid::from_raw(i32::try_from(pid.ok_or(
            "the output of `crictl inspectp` contains no process id of the monitor",
        )?)?))
    }

    fn stop_server(&mut self, signal: Signal) -> Result<i32> {
        let Some(mut server) = self.server.take() else {
            return Ok(0);
        };
        server.signal(signal);
        let log = server.stderr();
        let output = server.end();
        self.old_log += &log;
        Ok(output?.code)
    }

    /// Returns a crictl command with the arguments `args`.
    pub(crate) fn crictl(&self, args: &[&str]) -> Run {
        let endpoint = format!("unix://{}", self.socket().display());
        let timeout = format!("{}s", deadline().as_secs());
        command(
            "crictl",
            ["--timeout", &timeout, "--runtime-endpoint", &endpoint],
        )
        .args(["--image-endpoint", &endpoint])
        .args(args)
        .within(deadline() + Duration::from_secs(5))
    }

    /// Runs crictl with the arguments `args`. crictl must succeed. Returns the standard output.
    pub(crate) fn asks(&self, args: &[&str]) -> Result<String> {
        Ok(self.crictl(args).ok()?.text().to_owned())
    }

    /// Runs the crictl command `args` with `--output json`, and returns the JSON.
    pub(crate) fn json(&self, args: &[&str]) -> Result<Value> {
        let (command, rest) = args
            .split_first()
            .ok_or("the test calls crictl without a command")?;
        self.crictl(&[command, "--output", "json"])
            .args(rest)
            .ok()?
            .json()
    }

    pub(crate) fn pull(&self, image: &str) -> Result {
        self.asks(&["pull", image]).map(|_| ())
    }

    /// Writes the configuration `value` to a file for crictl, and returns the file's path.
    fn file(&self, name: &str, value: &Value) -> Result<String> {
        let path = self.join(&format!("{name}.json"));
        fs::write(&path, serde_json::to_vec_pretty(value)?)?;
        Ok(path.display().to_string())
    }

    /// Returns a pod's configuration. Each pod has a separate log directory.
    pub(crate) fn pod(&self, name: &str) -> Value {
        json!({
            "metadata": { "name": name, "namespace": "default", "uid": format!("uid-{name}"), "attempt": 0 },
            "hostname": name,
            "log_directory": self.join("logs").join(name),
            "labels": { "app": name },
            // Like kubelet, the tests request a separate PID namespace for each container (mode 1).
            // The CRI's default is one PID namespace for all containers of a pod.
            "linux": { "security_context": { "namespace_options": { "pid": 1 } } },
        })
    }

    pub(crate) fn runp(&self, pod: &Value) -> Result<String> {
        self.runp_by("", pod)
    }

    /// Runs `crictl runp` with the runtime handler `handler`. If `handler` is empty, the server
    /// uses the default handler.
    pub(crate) fn runp_by(&self, handler: &str, pod: &Value) -> Result<String> {
        let file = self.pod_file(pod)?;
        self.asks(&["runp", "--runtime", handler, &file])
    }

    /// Runs `container`, whose command must be `/inside report`, and returns the report.
    pub(crate) fn report(&self, pod_id: &str, pod: &Value, container: &Value) -> Result<Value> {
        let id = self.run(pod_id, pod, container)?;
        self.exited(&id)?;
        let text = self.asks(&["logs", &id])?;
        serde_json::from_str(&text).map_err(|error| {
            format!("cannot parse the report of `inside`: {error}; the report: {text}").into()
        })
    }

    /// Runs `crictl runp`, which is allowed to fail.
    pub(crate) fn try_runp(&self, pod: &Value) -> Result<Output> {
        let file = self.pod_file(pod)?;
        self.crictl(&["runp", &file]).end()
    }

    /// Starts `crictl runp` in the background.
    pub(crate) fn start_runp(&self, pod: &Value) -> Result<Running> {
        let file = self.pod_file(pod)?;
        self.crictl(&["runp", &file]).start()
    }

    fn pod_file(&self, pod: &Value) -> Result<String> {
        let name = pod["metadata"]["name"].as_str().unwrap_or("pod");
        self.file(&format!("pod-{name}"), pod)
    }

    /// Returns the configuration of a container that runs `command` in the image [`BUSYBOX`]. The
    /// program `inside` is mounted at /inside in the container.
    pub(crate) fn container(&self, name: &str, command: &[&str]) -> Value {
        let inside = std::env::temp_dir().join("rrun-e2e-inside");
        json!({
            "metadata": { "name": name, "attempt": 0 },
            "image": { "image": BUSYBOX },
            "command": command,
            "log_path": format!("{name}.log"),
            "mounts": [{ "container_path": "/inside", "host_path": inside, "readonly": true }],
            "linux": { "security_context": { "namespace_options": { "pid": 1 } } },
        })
    }

    pub(crate) fn create(&self, pod_id: &str, pod: &Value, container: &Value) -> Result<String> {
        let create = self.create_command(pod_id, pod, container)?;
        Ok(create.ok()?.text().to_owned())
    }

    /// Runs `crictl create`, which is allowed to fail.
    pub(crate) fn try_create(
        &self,
        pod_id: &str,
        pod: &Value,
        container: &Value,
    ) -> Result<Output> {
        self.create_command(pod_id, pod, container)?.end()
    }

    /// Starts `crictl create` in the background.
    pub(crate) fn start_create(
        &self,
        pod_id: &str,
        pod: &Value,
        container: &Value,
    ) -> Result<Running> {
        self.create_command(pod_id, pod, container)?.start()
    }

    /// Starts `crictl logs --reopen` in the background.
    pub(crate) fn start_reopen(&self, container: &str) -> Result<Running> {
        self.crictl(&["logs", "--reopen", container]).start()
    }

    fn create_command(&self, pod_id: &str, pod: &Value, container: &Value) -> Result<Run> {
        let name = container["metadata"]["name"]
            .as_str()
            .unwrap_or("container");
        let container = self.file(&format!("container-{name}"), container)?;
        let pod = self.pod_file(pod)?;
        Ok(self.crictl(&["create", pod_id, &container, &pod]))
    }

    /// Unmounts all mounts of the server, as a reboot does.
    pub(crate) fn unmount_all(&self) -> Result {
        for point in mounts_below(self.directory.path()) {
            nix::mount::umount2(&point, nix::mount::MntFlags::MNT_DETACH)?;
        }
        Ok(())
    }

    /// Runs `crictl create` and `crictl start`, and returns the container's id.
    pub(crate) fn run(&self, pod_id: &str, pod: &Value, container: &Value) -> Result<String> {
        let id = self.create(pod_id, pod, container)?;
        self.asks(&["start", &id])?;
        Ok(id)
    }

    /// Returns the field `status` in the output of `crictl inspect`.
    pub(crate) fn status(&self, container: &str) -> Result<Value> {
        Ok(self.json(&["inspect", container])?["status"].clone())
    }

    /// Waits until the container has exited, and returns its status.
    pub(crate) fn exited(&self, container: &str) -> Result<Value> {
        wait_for(&format!("the container {container} to exit"), || {
            let status = self.status(container)?;
            Ok((status["state"] == "CONTAINER_EXITED").then_some(status))
        })
    }

    /// Returns the process id of a container's first process.
    pub(crate) fn pid(&self, container: &str) -> Result<i32> {
        let info = self.json(&["inspect", container])?;
        let pid = info.pointer("/info/pid").and_then(Value::as_i64);
        Ok(pid
            .ok_or(format!(
                "the output of `crictl inspect` contains no info.pid: {info}"
            ))?
            .try_into()?)
    }

    /// Returns the node's id of the pause process of a pod whose containers share one PID namespace.
    pub(crate) fn pause_process(&self, pod_id: &str) -> Result<i64> {
        let info = self.json(&["inspectp", pod_id])?;
        let id = info.pointer("/info/pid1").and_then(Value::as_i64);
        Ok(id.ok_or(format!(
            "the output of `crictl inspectp` contains no info.pid1: {info}"
        ))?)
    }

    /// Returns the directory of the container's cgroup.
    pub(crate) fn cgroup(&self, container: &str) -> Result<PathBuf> {
        let groups = fs::read_to_string(format!("/proc/{}/cgroup", self.pid(container)?))?;
        let path = groups.lines().find_map(|line| line.strip_prefix("0::/"));
        Ok(Path::new("/sys/fs/cgroup").join(path.ok_or(format!(
            "/proc/PID/cgroup of the container contains no line that begins with 0::/ ({groups})"
        ))?))
    }

    /// Returns the content of a container's log file. Each line of the log contains the time, the
    /// stream's name, a tag and the text.
    pub(crate) fn log_of(&self, pod: &str, container: &str) -> Result<String> {
        let path = self.join("logs").join(pod).join(format!("{container}.log"));
        fs::read_to_string(&path)
            .map_err(|error| format!("cannot read {}: {error}", path.display()).into())
    }

    /// Waits until the server has removed the writable layers of all containers.
    pub(crate) fn has_no_writable_layer(&self) -> Result {
        let directory = self.join("root/containers");
        wait_for("the server to remove all writable layers", || {
            Ok(below(&directory).is_empty().then_some(()))
        })
    }

    /// Removes all pods and images, and checks that nothing remains.
    fn end(&mut self) -> Result {
        if self.server.as_mut().is_none_or(|server| !server.lives()) {
            self.start_server()?;
        }
        self.asks(&["rmp", "--all", "--force"])?;
        self.asks(&["rmi", "--all"])?;
        let pods = self.asks(&["pods", "--quiet"])?;
        let containers = self.asks(&["ps", "--all", "--quiet"])?;
        let images = self.asks(&["images", "--quiet"])?;
        // containerd keeps the pause image, so this function checks the images only for rrun-cri.
        let images = if is_rrun() { images } else { String::new() };
        ensure!(
            pods.is_empty() && containers.is_empty() && images.is_empty(),
            "crictl still lists objects after their removal: pods {pods}, containers {containers}, images {images}"
        );
        if is_rrun() {
            let left: Vec<String> = ["state/pods", "state/netns", "root/ingest"]
                .into_iter()
                .flat_map(|dir| below(&self.join(dir)))
                .collect();
            ensure!(
                left.is_empty(),
                "the server left these entries behind in its directories:\n{}",
                left.join("\n")
            );
            // The server removes layers in the background, and no CRI request waits for this
            // removal.
            self.has_no_writable_layer()?;
            wait_for("the server to remove all layers", || {
                let mut left = below(&self.join("root/layers"));
                // /layers/0 is the empty lower directory for images without layers, so the server
                // keeps it.
                left.retain(|path| !path.ends_with("/layers/0"));
                Ok(left.is_empty().then_some(()))
            })?;
            let interfaces: Vec<String> = below(Path::new("/sys/class/net"))
                .into_iter()
                .filter(|path| is_pods_interface(path.trim_start_matches("/sys/class/net/")))
                .collect();
            ensure!(
                interfaces.is_empty(),
                "these network interfaces of pods still exist: {interfaces:?}"
            );
        }
        let code = self.stop_server(Signal::SIGTERM)?;
        ensure!(
            code == 0 || !is_rrun(),
            "the server exited with the exit code {code} after SIGTERM"
        );
        Ok(())
    }
}

/// Returns whether the network interface `name` is the node's end of a pod's veth pair. The names
/// that CNI plugins choose contain `veth`. The names that rrun-cri chooses are `rr` followed by
/// twelve digits.
/// Returns the resident memory of a process in kB.
fn resident(pid: i32) -> Result<u64> {
    let status = fs::read_to_string(format!("/proc/{pid}/status"))?;
    let line = status.lines().find_map(|line| line.strip_prefix("VmRSS:"));
    let word = line.and_then(|line| line.split_whitespace().next());
    Ok(word
        .ok_or("the status file of the process contains no VmRSS")?
        .parse()?)
}

pub(crate) fn is_pods_interface(name: &str) -> bool {
    name.contains("veth") || name.starts_with("rr") && name != "rrun0"
}

fn below(dir: &Path) -> Vec<String> {
    let Ok(entries) = fs::read_dir(dir) else {
        return Vec::new();
    };
    entries
        .flatten()
        .map(|entry| entry.path().display().to_string())
        .collect()
}

impl Drop for Node {
    fn drop(&mut self) {
        if self.server.is_some() {
            let _ = self.crictl(&["rmp", "--all", "--force"]).end();
            let _ = self.stop_server(Signal::SIGKILL);
        }
        let _ = registry(&["stop", PORT]);
        let _ = fs::remove_dir_all("/var/lib/registry/5000");
        let _ = fs::remove_dir("/var/lib/registry");
        // By design, the node's bridge and firewall tables outlive the pods and the server, so this
        // function deletes them.
        for interface in ["rrun0", "cni0"] {
            if Path::new("/sys/class/net").join(interface).exists() {
                let _ = command("ip", ["link", "delete", interface]).end();
            }
        }
        for table in ["rrun0", "rrun"] {
            let _ = command("nft", ["delete", "table", "ip", table]).end();
            let _ = command("nft", ["delete", "table", "inet", table]).end();
        }
        if Path::new("/sys/fs/cgroup/rrun.slice").exists() {
            let _ = command("systemctl", ["stop", "rrun.slice"]).end();
        }
        for group in ["rrun", "k8s.io"] {
            let _ = fs::remove_dir(Path::new("/sys/fs/cgroup").join(group));
        }
        unmount_below(self.directory.path());
    }
}

fn registry(args: &[&str]) -> Result {
    command("/src/tests/images/registry.sh", args)
        .ok()
        .map(|_| ())
}

/// A CNI configuration with Debian's plugins. containerd needs this configuration. rrun-cri can
/// also create the pods' network without CNI plugins.
const CNI: &str = r#"{"cniVersion":"1.0.0","name":"e2e","plugins":[{"type":"bridge","bridge":"cni0",
"isGateway":true,"ipMasq":true,"ipam":{"type":"host-local","dataDir":"/run/e2e-cni",
"ranges":[[{"subnet":"10.99.0.0/16"}]],"routes":[{"dst":"0.0.0.0/0"}]}},
{"type":"portmap","capabilities":{"portMappings":true},"snat":true}]}"#;
