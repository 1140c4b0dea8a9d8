//! A node to itself: a registry, a CRI server with throw-away directories, and crictl on it.
//!
//! `RRUN_TEST_CRI=containerd` puts containerd in rrun-cri's place, which keeps the tests honest; with
//! `RUNTIME` besides, another OCI runtime in runc's.

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

pub(crate) const REGISTRY: Need = Need::Program("docker-registry");
pub(crate) const IMAGES: Need = Need::File("/images/registry");
pub(crate) const CRICTL: Need = Need::Program("crictl");
pub(crate) const SERVER: Need = Need::CriServer;

/// What every test needs that calls [`on_a_node`].
pub(crate) const A_NODE: Need = Need::All(&[CRICTL, SERVER, REGISTRY, IMAGES]);

/// Where rrun-cri serves its metrics.
pub(crate) const METRICS: &str = "127.0.0.1:9464";

/// A runtime that drops all limits and calls the real one.
pub(crate) const WITHOUT_LIMITS: &str = "/src/tests/setup/runc-without-limits";

pub(crate) const PORT: &str = "5000";
pub(crate) const WEB: &str = "127.0.0.1:5000/demo/web:1";
pub(crate) const BUSYBOX: &str = "127.0.0.1:5000/demo/busybox:latest";

/// The server under test.
pub(crate) fn server_program() -> String {
    std::env::var("RRUN_TEST_CRI").unwrap_or_else(|_| "rrun-cri".to_owned())
}

pub(crate) fn is_rrun() -> bool {
    server_program().ends_with("rrun-cri")
}

pub(crate) struct Node {
    directory: Directory,
    server: Option<Running>,
    /// What earlier lives of the server have written.
    old_log: String,
}

/// Runs a test on a node of its own; afterwards everything on it is removed, and nothing may be
/// left. What the server wrote is told with a failure.
pub(crate) fn on_a_node(test: impl FnOnce(&mut Node) -> Result) -> Result {
    let mut node = Node::start()?;
    let result = test(&mut node);
    let pods = match &result {
        Ok(()) => String::new(),
        Err(_) => node.crictl(&["ps", "--all"]).end().map_or_else(
            |_| "crictl does not answer".to_owned(),
            |output| output.told(),
        ),
    };
    let ended = node.end();
    let log = tail(&node.log(), 6000);
    if let Err(failed) = result.and(ended) {
        let message = failed.message().unwrap_or_default();
        return Err(format!("{message}\n{pods}\n{} wrote:\n{log}", server_program()).into());
    }
    Ok(())
}

impl Node {
    fn start() -> Result<Self> {
        let directory = Directory::new("node")?;
        for dir in ["root", "state", "logs", "certs.d", "cni", "cdi", "config.d"] {
            fs::create_dir(directory.join(dir))?;
        }
        let mut node = Node {
            directory,
            server: None,
            old_log: String::new(),
        };
        registry(&["start", PORT])?;
        registry(&["mirrors", &node.join("certs.d").to_string_lossy(), PORT])?;
        node.write_config()?;
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
            // The native view's host has no CAP_SYS_RESOURCE.
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
            // containerd gives every pod a CPU weight, where none can be given too.
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

    /// Gives pods their network by Debian's CNI plugins, with host ports.
    pub(crate) fn has_cni_bridge(&self) -> Result {
        Ok(fs::write(self.join("cni/10-bridge.conflist"), CNI)?)
    }

    /// Starts the server, and waits until it answers.
    pub(crate) fn start_server(&mut self) -> Result {
        let program = server_program();
        let config = self.join("config.toml");
        let mut server = command(&program, ["--config"]).arg(config).start()?;
        let answers = wait_for(&format!("{program} to listen"), || {
            ensure!(
                server.lives(),
                "{program} ended:\n{}",
                tail(&server.stderr(), 4000)
            );
            Ok(UnixStream::connect(self.socket()).ok().map(|_| ()))
        });
        self.server = Some(server);
        answers?;
        wait_for(&format!("{program} to answer"), || {
            self.crictl(&["version"]).ok().map(Some)
        })?;
        Ok(())
    }

    /// Has the server read its configuration again.
    pub(crate) fn hang_up_server(&self) {
        if let Some(server) = &self.server {
            server.signal(Signal::SIGHUP);
        }
    }

    /// Ends the server as a crash would; nothing else.
    pub(crate) fn kill_server(&mut self) -> Result {
        self.stop_server(Signal::SIGKILL).map(|_| ())
    }

    /// Ends the server as an upgrade would.
    pub(crate) fn terminate_server(&mut self) -> Result {
        let code = self.stop_server(Signal::SIGTERM)?;
        ensure!(
            code == 0 || !is_rrun(),
            "the server ended with {code} after SIGTERM"
        );
        Ok(())
    }

    /// Sends the server a signal that it lives through.
    pub(crate) fn signal_server(&self, signal: Signal) {
        if let Some(server) = &self.server {
            server.signal(signal);
        }
    }

    /// What the server takes of memory, in kB (proc(5), VmRSS).
    pub(crate) fn server_resident(&self) -> Result<u64> {
        let server = self.server.as_ref().ok_or("the server does not run")?;
        let status = fs::read_to_string(format!("/proc/{}/status", server.pid()))?;
        let line = status.lines().find_map(|line| line.strip_prefix("VmRSS:"));
        let word = line.and_then(|line| line.split_whitespace().next());
        Ok(word.ok_or("no VmRSS")?.parse()?)
    }

    /// The server's process.
    pub(crate) fn server_pid(&self) -> Result<i32> {
        let server = self.server.as_ref().ok_or("the server does not run")?;
        Ok(server.pid())
    }

    /// How many descriptors the server has open, and how many threads it has.
    pub(crate) fn server_holds(&self) -> Result<(usize, usize)> {
        let server = self.server.as_ref().ok_or("the server does not run")?;
        let count = |what| Ok(fs::read_dir(format!("/proc/{}/{what}", server.pid()))?.count());
        count("fd").and_then(|fds| Ok((fds, count("task")?)))
    }

    /// The process that looks after a pod.
    pub(crate) fn monitor(&self, pod_id: &str) -> Result<Pid> {
        let info = self.json(&["inspectp", pod_id])?;
        let pid = info.pointer("/info/monitor").and_then(Value::as_i64);
        Ok(Pid::from_raw(i32::try_from(
            pid.ok_or("no pid of the monitor")?,
        )?))
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

    /// crictl with these arguments.
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

    /// crictl with these arguments, which must succeed: its standard output.
    pub(crate) fn asks(&self, args: &[&str]) -> Result<String> {
        Ok(self.crictl(args).ok()?.text().to_owned())
    }

    /// crictl with this command's `--output json`.
    pub(crate) fn json(&self, args: &[&str]) -> Result<Value> {
        let (command, rest) = args.split_first().ok_or("no command")?;
        self.crictl(&[command, "--output", "json"])
            .args(rest)
            .ok()?
            .json()
    }

    pub(crate) fn pull(&self, image: &str) -> Result {
        self.asks(&["pull", image]).map(|_| ())
    }

    /// Writes a configuration to a file for crictl.
    fn file(&self, name: &str, value: &Value) -> Result<String> {
        let path = self.join(&format!("{name}.json"));
        fs::write(&path, serde_json::to_vec_pretty(value)?)?;
        Ok(path.display().to_string())
    }

    /// A pod's configuration; logs go to a directory of its own.
    pub(crate) fn pod(&self, name: &str) -> Value {
        json!({
            "metadata": { "name": name, "namespace": "default", "uid": format!("uid-{name}"), "attempt": 0 },
            "hostname": name,
            "log_directory": self.join("logs").join(name),
            "labels": { "app": name },
            // As kubelet has it; the default of the CRI is one PID namespace for all.
            "linux": { "security_context": { "namespace_options": { "pid": 1 } } },
        })
    }

    pub(crate) fn runp(&self, pod: &Value) -> Result<String> {
        self.runp_by("", pod)
    }

    /// `runp` with a runtime handler; empty is the default one.
    pub(crate) fn runp_by(&self, handler: &str, pod: &Value) -> Result<String> {
        let file = self.pod_file(pod)?;
        self.asks(&["runp", "--runtime", handler, &file])
    }

    /// Runs the container to its end: what `/inside report`, its command, tells.
    pub(crate) fn report(&self, pod_id: &str, pod: &Value, container: &Value) -> Result<Value> {
        let id = self.run(pod_id, pod, container)?;
        self.exited(&id)?;
        let text = self.asks(&["logs", &id])?;
        serde_json::from_str(&text).map_err(|error| format!("{error}: {text}").into())
    }

    /// `runp`, whatever comes of it.
    pub(crate) fn try_runp(&self, pod: &Value) -> Result<Output> {
        let file = self.pod_file(pod)?;
        self.crictl(&["runp", &file]).end()
    }

    fn pod_file(&self, pod: &Value) -> Result<String> {
        let name = pod["metadata"]["name"].as_str().unwrap_or("pod");
        self.file(&format!("pod-{name}"), pod)
    }

    /// A container's configuration, of the image [`BUSYBOX`] with the tests' own program in it.
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

    /// `create`, whatever comes of it.
    pub(crate) fn try_create(
        &self,
        pod_id: &str,
        pod: &Value,
        container: &Value,
    ) -> Result<Output> {
        self.create_command(pod_id, pod, container)?.end()
    }

    /// `create`, under way.
    pub(crate) fn start_create(
        &self,
        pod_id: &str,
        pod: &Value,
        container: &Value,
    ) -> Result<Running> {
        self.create_command(pod_id, pod, container)?.start()
    }

    /// `logs --reopen`, under way.
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

    /// Unmounts all that the server has mounted, as a reboot does.
    pub(crate) fn unmount_all(&self) -> Result {
        for point in mounts_below(self.directory.path()) {
            nix::mount::umount2(&point, nix::mount::MntFlags::MNT_DETACH)?;
        }
        Ok(())
    }

    /// `create` and `start`: the container's id.
    pub(crate) fn run(&self, pod_id: &str, pod: &Value, container: &Value) -> Result<String> {
        let id = self.create(pod_id, pod, container)?;
        self.asks(&["start", &id])?;
        Ok(id)
    }

    /// The `status` of `inspect`.
    pub(crate) fn status(&self, container: &str) -> Result<Value> {
        Ok(self.json(&["inspect", container])?["status"].clone())
    }

    /// Waits until the container has exited, and gives its status.
    pub(crate) fn exited(&self, container: &str) -> Result<Value> {
        wait_for(&format!("container {container} to exit"), || {
            let status = self.status(container)?;
            Ok((status["state"] == "CONTAINER_EXITED").then_some(status))
        })
    }

    /// The process ids of a container's first process and the path of its cgroup.
    pub(crate) fn pid(&self, container: &str) -> Result<i32> {
        let info = self.json(&["inspect", container])?;
        let pid = info.pointer("/info/pid").and_then(Value::as_i64);
        Ok(pid.ok_or(format!("no info.pid in {info}"))?.try_into()?)
    }

    /// The directory of the cgroup that this process is in.
    pub(crate) fn cgroup(&self, container: &str) -> Result<PathBuf> {
        let groups = fs::read_to_string(format!("/proc/{}/cgroup", self.pid(container)?))?;
        let path = groups.lines().find_map(|line| line.strip_prefix("0::/"));
        Ok(Path::new("/sys/fs/cgroup").join(path.ok_or(format!("no 0:: in {groups}"))?))
    }

    /// The log file's lines: time, stream, tag and text.
    pub(crate) fn log_of(&self, pod: &str, container: &str) -> Result<String> {
        let path = self.join("logs").join(pod).join(format!("{container}.log"));
        fs::read_to_string(&path).map_err(|error| format!("{}: {error}", path.display()).into())
    }

    /// Removes everything, and looks for what is still there.
    fn end(&mut self) -> Result {
        if self.server.as_mut().is_none_or(|server| !server.lives()) {
            self.start_server()?;
        }
        self.asks(&["rmp", "--all", "--force"])?;
        self.asks(&["rmi", "--all"])?;
        let pods = self.asks(&["pods", "--quiet"])?;
        let containers = self.asks(&["ps", "--all", "--quiet"])?;
        let images = self.asks(&["images", "--quiet"])?;
        // containerd keeps the pause image.
        let images = if is_rrun() { images } else { String::new() };
        ensure!(
            pods.is_empty() && containers.is_empty() && images.is_empty(),
            "still listed after their removal: pods {pods}, containers {containers}, images {images}"
        );
        if is_rrun() {
            let left: Vec<String> = [
                "state/pods",
                "state/netns",
                "root/containers",
                "root/ingest",
            ]
            .into_iter()
            .flat_map(|dir| below(&self.join(dir)))
            .collect();
            ensure!(
                left.is_empty(),
                "left behind in the server's directories:\n{}",
                left.join("\n")
            );
            // Nobody waits for the removal of layers.
            wait_for("no layer to be left", || {
                let mut left = below(&self.join("root/layers"));
                // The empty lower directory that an image without layers has.
                left.retain(|path| !path.ends_with("/layers/0"));
                Ok(left.is_empty().then_some(()))
            })?;
            let interfaces: Vec<String> = below(Path::new("/sys/class/net"))
                .into_iter()
                .filter(|path| is_pods_interface(path.trim_start_matches("/sys/class/net/")))
                .collect();
            ensure!(interfaces.is_empty(), "interfaces are left: {interfaces:?}");
        }
        let code = self.stop_server(Signal::SIGTERM)?;
        ensure!(
            code == 0 || !is_rrun(),
            "the server ended with {code} after SIGTERM"
        );
        Ok(())
    }
}

/// The node's end of a pod's link: CNI calls it veth…, rrun-cri rr and twelve digits.
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
        // The node's own, which outlives its pods and its server as it should.
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

/// For containerd; rrun-cri needs none.
const CNI: &str = r#"{"cniVersion":"1.0.0","name":"e2e","plugins":[{"type":"bridge","bridge":"cni0",
"isGateway":true,"ipMasq":true,"ipam":{"type":"host-local","dataDir":"/run/e2e-cni",
"ranges":[[{"subnet":"10.99.0.0/16"}]],"routes":[{"dst":"0.0.0.0/0"}]}},
{"type":"portmap","capabilities":{"portMappings":true},"snat":true}]}"#;
