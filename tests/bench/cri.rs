//! Compares the CRI servers rrun-cri and containerd. Two programs measure them: critest's benchmark
//! and our own client. Each program measures the two servers in turn.

use std::fs;
use std::path::Path;
use std::time::{Duration, Instant};

use rrun_proto::v1::image_service_client::ImageServiceClient;
use rrun_proto::v1::runtime_service_client::RuntimeServiceClient;
use rrun_proto::v1::{
    ContainerConfig, ContainerMetadata, ContainerState, ContainerStatusRequest,
    CreateContainerRequest, ExecRequest, ExecSyncRequest, ImageSpec, LinuxContainerConfig,
    LinuxPodSandboxConfig, LinuxSandboxSecurityContext, ListPodSandboxRequest, NamespaceMode,
    NamespaceOption, PodSandboxConfig, PodSandboxMetadata, PodSandboxState, PortForwardRequest,
    PullImageRequest, RemoveContainerRequest, RemoveImageRequest, RemovePodSandboxRequest,
    RunPodSandboxRequest, StartContainerRequest, StopContainerRequest, StopPodSandboxRequest,
    VersionRequest,
};
use serde_json::{Map, Value, json};
use tonic::Code;
use tonic::transport::{Channel, Endpoint};

use crate::service::Service;
use crate::{
    Result, critest, exec_sync, fleet, logs, memory, network, pods, pull, report, streaming,
};

#[derive(clap::Args)]
pub(crate) struct CriOptions {
    /// Servers to measure: containerd, rrun-cri, or NAME=unix:///PATH of a running server; figures
    /// are compared with those of the first server
    #[arg(long, value_delimiter = ',', default_value = "containerd,rrun-cri")]
    servers: Vec<String>,
    #[arg(
        long,
        value_enum,
        value_delimiter = ',',
        default_value = "critest,pods,network,exec,streams,logs,pull,memory,fleet"
    )]
    parts: Vec<Part>,
    /// Number of pods that are measured on each server for each kind of network
    #[arg(long, default_value_t = 30)]
    pub(crate) rounds: usize,
    /// Number of pods that run while memory is measured
    #[arg(long, default_value_t = 20)]
    pub(crate) pods: usize,
    /// Number of pods on a full node
    #[arg(long, default_value_t = 150)]
    pub(crate) fleet: usize,
    /// Number of lines that a container logs
    #[arg(long, default_value_t = 1_000_000)]
    pub(crate) lines: u64,
    /// Image of the containers, which must contain a shell, true and sleep
    #[arg(long, default_value = "registry.k8s.io/e2e-test-images/busybox:1.29-2")]
    pub(crate) image: String,
    /// Image that is pulled and removed
    #[arg(long, default_value = "127.0.0.1:5000/demo/web:1")]
    pub(crate) pulled: String,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, clap::ValueEnum)]
enum Part {
    /// critest -benchmark, whose pods have their own network
    Critest,
    /// Creating and removing pods with our own client, on the node's network and with their own
    /// network
    Pods,
    /// Traffic between pods, and RunPodSandbox with CNI plugins
    Network,
    /// ExecSync of `true`
    Exec,
    /// Interactive exec, a forwarded port, and idle sessions
    Streams,
    /// A container that logs as fast as it can
    Logs,
    /// Pull and removal of an image from the local registry
    Pull,
    /// Memory of each pod and of the servers
    Memory,
    /// A node full of pods: list calls, and a restart of the server
    Fleet,
}

/// A connection to a server.
pub(crate) struct Server {
    pub(crate) name: String,
    pub(crate) address: String,
    pub(crate) runtime: RuntimeServiceClient<Channel>,
    images: ImageServiceClient<Channel>,
}

/// A running pod and its container.
pub(crate) struct Pod {
    pub(crate) id: String,
    pub(crate) config: PodSandboxConfig,
    pub(crate) container: String,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Network {
    Node,
    Own,
}

/// The timeout of each CRI call. A call reaches this timeout only if the server hangs.
const ANSWER_TIMEOUT: Duration = Duration::from_secs(120);

pub(crate) fn run(options: &CriOptions, programs: &Path, results: &Path) -> Result {
    let executor = tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build()?;
    executor.block_on(measure(options, programs, results))
}

async fn measure(options: &CriOptions, programs: &Path, results: &Path) -> Result {
    let mut servers = Vec::new();
    let mut skipped = Vec::new();
    let mut services = vec![Service::start("registry")?];
    for server in &options.servers {
        let (name, address) = match server.split_once('=') {
            Some((name, address)) => (name, address.to_owned()),
            None => match Service::start(server) {
                Ok(service) => {
                    let address = service.address.clone();
                    services.push(service);
                    (server.as_str(), address)
                }
                Err(error) => {
                    skipped.push(format!("{server}: {error}"));
                    continue;
                }
            },
        };
        match Server::connect(name, &address, options).await {
            Ok((server, version)) => {
                println!("  {name}: {version}");
                servers.push(server);
            }
            Err(error) => skipped.push(format!("{name}: {error}")),
        }
    }
    if servers.is_empty() {
        return Err(format!(
            "no connection to any CRI server; the reasons: {}",
            skipped.join("; ")
        )
        .into());
    }
    let mut raw = Map::new();
    raw.insert("machine".to_owned(), report::machine());
    for &part in &options.parts {
        let outcome = match part {
            Part::Critest => critest::run(options, &servers, results).await,
            Part::Pods => pods::run(options, &mut servers, results).await,
            Part::Network => network::run(options, &mut servers, results).await,
            Part::Exec => exec_sync::run(options, &mut servers, results).await,
            Part::Streams => streaming::run(options, &mut servers, results).await,
            Part::Logs => logs::run(options, &mut servers, programs, results).await,
            Part::Pull => pull::run(options, &mut servers, results).await,
            Part::Memory => memory::run(options, &mut servers, results).await,
            Part::Fleet => fleet::run(options, &mut servers, &services, results).await,
        };
        match outcome {
            Ok((figures, mut obstacles)) => {
                raw.insert(format!("{part:?}").to_lowercase(), figures);
                skipped.append(&mut obstacles);
            }
            Err(error) => skipped.push(format!("{part:?}: {error}")),
        }
    }
    println!();
    let controllers = fs::read_to_string("/sys/fs/cgroup/cgroup.controllers").unwrap_or_default();
    if !controllers
        .split_whitespace()
        .any(|controller| controller == "cpu")
    {
        println!(
            "  this kernel has no cgroup v2 controllers, so containerd calls runc through a script that \
             removes the limits (about 3 ms for each container)"
        );
    }
    println!(
        "  CPU: the CPU time of all processes in the native view (tests/native/run), except the benchmark's client"
    );
    match skipped.as_slice() {
        [] => println!("  nothing skipped"),
        skipped => println!(
            "  {} SKIPPED:\n    {}",
            skipped.len(),
            skipped.join("\n    ")
        ),
    }
    raw.insert("skipped".to_owned(), json!(skipped));
    report::write_json(&results.join("cri.json"), &Value::Object(raw))
}

/// Connects to a server and pulls an image.
pub(crate) fn pull_once(address: &str, image: &str) -> Result {
    let executor = tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build()?;
    executor.block_on(async { Server::open(address, address).await?.pull(image).await })
}

/// Returns the number of running pods on the server at `address`.
pub(crate) fn running_pods(address: &str) -> Result<usize> {
    let executor = tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build()?;
    executor.block_on(async {
        let mut server = Server::open(address, address).await?;
        let pods = server
            .runtime
            .list_pod_sandbox(ListPodSandboxRequest::default())
            .await;
        let pods = pods
            .map_err(|status| call_error("ListPodSandbox", &status))?
            .into_inner()
            .items;
        Ok(pods
            .iter()
            .filter(|pod| pod.state() == PodSandboxState::SandboxReady)
            .count())
    })
}

/// Returns the wall time of a call in milliseconds, and the call's result.
pub(crate) async fn timed<T>(call: impl Future<Output = Result<T>>) -> Result<(f64, T)> {
    let started = Instant::now();
    let answer = call.await?;
    Ok((started.elapsed().as_secs_f64() * 1e3, answer))
}

/// Returns the CPU time of all other processes in the native view or in the guest machine, in
/// milliseconds. These processes are the servers and all processes that the servers have started.
/// The file cpu.stat counts CPU time even if no controller is enabled.
pub(crate) fn cpu_of_others() -> Result<f64> {
    let path = "/sys/fs/cgroup/cpu.stat";
    let text = fs::read_to_string(path).map_err(|error| format!("{path}: {error}"))?;
    let all = text
        .lines()
        .find_map(|line| line.strip_prefix("usage_usec "));
    let all: f64 = all.ok_or("cpu.stat contains no usage_usec")?.parse()?;
    let own = nix::sys::resource::getrusage(nix::sys::resource::UsageWho::RUSAGE_SELF)?;
    let own = [own.user_time(), own.system_time()]
        .iter()
        .map(|time| time.tv_sec() as f64 * 1e6 + time.tv_usec() as f64)
        .sum::<f64>();
    Ok((all - own) / 1e3)
}

impl Server {
    async fn connect(name: &str, address: &str, options: &CriOptions) -> Result<(Self, String)> {
        let mut server = Self::open(name, address).await?;
        let version = server
            .runtime
            .version(VersionRequest::default())
            .await?
            .into_inner();
        server.pull(&options.image).await?;
        Ok((
            server,
            format!("{} {}", version.runtime_name, version.runtime_version),
        ))
    }

    pub(crate) async fn open(name: &str, address: &str) -> Result<Self> {
        let channel = Endpoint::from_shared(address.to_owned())?
            .connect_timeout(Duration::from_secs(5))
            .timeout(ANSWER_TIMEOUT)
            .connect()
            .await
            .map_err(|error| format!("{address}: {error:?}"))?;
        Ok(Server {
            name: name.to_owned(),
            address: address.to_owned(),
            runtime: RuntimeServiceClient::new(channel.clone()),
            images: ImageServiceClient::new(channel),
        })
    }

    pub(crate) async fn pull(&mut self, image: &str) -> Result {
        let request = PullImageRequest {
            image: Some(image_spec(image)),
            ..Default::default()
        };
        let started = Instant::now();
        loop {
            match self.images.pull_image(request.clone()).await {
                Ok(_) => return Ok(()),
                // containerd answers requests before it can pull images. For this reason, a pull is
                // repeated if it fails soon after the start of containerd.
                Err(status)
                    if status.code() == Code::Unavailable && started.elapsed() < ANSWER_TIMEOUT =>
                {
                    tokio::time::sleep(Duration::from_millis(200)).await;
                }
                Err(status) => return Err(call_error("PullImage", &status).into()),
            }
        }
    }

    pub(crate) async fn remove_image(&mut self, image: &str) -> Result {
        let request = RemoveImageRequest {
            image: Some(image_spec(image)),
        };
        self.images
            .remove_image(request)
            .await
            .map_err(|status| call_error("RemoveImage", &status))?;
        Ok(())
    }

    pub(crate) async fn run_pod(&mut self, config: &PodSandboxConfig) -> Result<String> {
        let request = RunPodSandboxRequest {
            config: Some(config.clone()),
            ..Default::default()
        };
        let answer = self.runtime.run_pod_sandbox(request).await;
        Ok(answer
            .map_err(|status| call_error("RunPodSandbox", &status))?
            .into_inner()
            .pod_sandbox_id)
    }

    /// Returns the configuration of a container that runs a command.
    pub(crate) fn container(image: &str, command: &[&str]) -> ContainerConfig {
        ContainerConfig {
            metadata: Some(ContainerMetadata {
                name: "bench".to_owned(),
                attempt: 0,
            }),
            image: Some(image_spec(image)),
            command: command.iter().map(|&word| word.to_owned()).collect(),
            log_path: "bench/0.log".to_owned(),
            linux: Some(LinuxContainerConfig::default()),
            ..Default::default()
        }
    }

    pub(crate) async fn create(
        &mut self,
        pod: &str,
        config: &PodSandboxConfig,
        image: &str,
        command: &[&str],
    ) -> Result<String> {
        let container = Self::container(image, command);
        self.create_from(pod, config, container).await
    }

    pub(crate) async fn create_from(
        &mut self,
        pod: &str,
        config: &PodSandboxConfig,
        container: ContainerConfig,
    ) -> Result<String> {
        let request = CreateContainerRequest {
            pod_sandbox_id: pod.to_owned(),
            config: Some(container),
            sandbox_config: Some(config.clone()),
        };
        let answer = self.runtime.create_container(request).await;
        Ok(answer
            .map_err(|status| call_error("CreateContainer", &status))?
            .into_inner()
            .container_id)
    }

    pub(crate) async fn has_exited(&mut self, container: &str) -> Result<bool> {
        let request = ContainerStatusRequest {
            container_id: container.to_owned(),
            verbose: false,
        };
        let answer = self.runtime.container_status(request).await;
        let status = answer
            .map_err(|status| call_error("ContainerStatus", &status))?
            .into_inner()
            .status;
        Ok(status.is_some_and(|status| status.state() == ContainerState::ContainerExited))
    }

    pub(crate) async fn start(&mut self, container: &str) -> Result {
        let request = StartContainerRequest {
            container_id: container.to_owned(),
        };
        let answer = self.runtime.start_container(request).await;
        answer.map_err(|status| call_error("StartContainer", &status))?;
        Ok(())
    }

    /// Runs a program in a container. Returns an error unless the program exits with 0.
    pub(crate) async fn exec(&mut self, container: &str, command: &[&str]) -> Result {
        let request = ExecSyncRequest {
            container_id: container.to_owned(),
            cmd: command.iter().map(|&word| word.to_owned()).collect(),
            timeout: 60,
        };
        let answer = self.runtime.exec_sync(request).await;
        match answer
            .map_err(|status| call_error("ExecSync", &status))?
            .into_inner()
            .exit_code
        {
            0 => Ok(()),
            code => Err(format!(
                "exit code of the command `{}` in ExecSync: {code}, expected: 0",
                command.join(" ")
            )
            .into()),
        }
    }

    /// Returns the URL of an exec session, with a terminal if `tty` is true.
    pub(crate) async fn exec_url(
        &mut self,
        container: &str,
        command: &[&str],
        tty: bool,
    ) -> Result<String> {
        let request = ExecRequest {
            container_id: container.to_owned(),
            cmd: command.iter().map(|&word| word.to_owned()).collect(),
            tty,
            stdin: tty,
            stdout: true,
            stderr: false,
        };
        let answer = self.runtime.exec(request).await;
        Ok(answer
            .map_err(|status| call_error("Exec", &status))?
            .into_inner()
            .url)
    }

    /// Returns the URL for forwarding a pod's ports.
    pub(crate) async fn port_forward_url(&mut self, pod: &str) -> Result<String> {
        let request = PortForwardRequest {
            pod_sandbox_id: pod.to_owned(),
            port: Vec::new(),
        };
        let answer = self.runtime.port_forward(request).await;
        Ok(answer
            .map_err(|status| call_error("PortForward", &status))?
            .into_inner()
            .url)
    }

    pub(crate) async fn stop(&mut self, container: &str) -> Result {
        let request = StopContainerRequest {
            container_id: container.to_owned(),
            timeout: 30,
        };
        let answer = self.runtime.stop_container(request).await;
        answer.map_err(|status| call_error("StopContainer", &status))?;
        Ok(())
    }

    pub(crate) async fn remove(&mut self, container: &str) -> Result {
        let request = RemoveContainerRequest {
            container_id: container.to_owned(),
        };
        let answer = self.runtime.remove_container(request).await;
        answer.map_err(|status| call_error("RemoveContainer", &status))?;
        Ok(())
    }

    pub(crate) async fn stop_pod(&mut self, pod: &str) -> Result {
        let request = StopPodSandboxRequest {
            pod_sandbox_id: pod.to_owned(),
        };
        let answer = self.runtime.stop_pod_sandbox(request).await;
        answer.map_err(|status| call_error("StopPodSandbox", &status))?;
        Ok(())
    }

    pub(crate) async fn remove_pod(&mut self, pod: &str) -> Result {
        let request = RemovePodSandboxRequest {
            pod_sandbox_id: pod.to_owned(),
        };
        let answer = self.runtime.remove_pod_sandbox(request).await;
        answer.map_err(|status| call_error("RemovePodSandbox", &status))?;
        Ok(())
    }

    /// Starts a pod with one running container.
    pub(crate) async fn start_pod(
        &mut self,
        network: Network,
        image: &str,
        command: &[&str],
    ) -> Result<Pod> {
        let config = pod_config(network)?;
        let id = self.run_pod(&config).await?;
        let container = self.create(&id, &config, image, command).await?;
        self.start(&container).await?;
        Ok(Pod {
            id,
            config,
            container,
        })
    }

    pub(crate) async fn end_pod(&mut self, pod: &Pod) -> Result {
        self.stop_pod(&pod.id).await?;
        self.remove_pod(&pod.id).await?;
        match &pod.config.log_directory {
            directory if directory.is_empty() => Ok(()),
            directory => Ok(fs::remove_dir_all(directory)?),
        }
    }
}

/// Returns the error message of a failed call.
pub(crate) fn call_error(call: &str, status: &tonic::Status) -> String {
    format!("{call}: {:?}: {}", status.code(), status.message())
}

fn image_spec(image: &str) -> ImageSpec {
    ImageSpec {
        image: image.to_owned(),
        ..Default::default()
    }
}

/// Returns a pod's configuration with a new, unique name.
pub(crate) fn pod_config(network: Network) -> Result<PodSandboxConfig> {
    static NEXT: std::sync::atomic::AtomicU32 = std::sync::atomic::AtomicU32::new(1);
    let number = NEXT.fetch_add(1, std::sync::atomic::Ordering::Relaxed);
    let name = format!("bench-{}-{number}", std::process::id());
    let log_directory = format!("/tmp/rrun-bench-logs/{name}");
    fs::create_dir_all(Path::new(&log_directory).join("bench"))?;
    let mode = match network {
        Network::Node => NamespaceMode::Node,
        Network::Own => NamespaceMode::Pod,
    };
    let namespaces = NamespaceOption {
        network: mode.into(),
        pid: NamespaceMode::Container.into(),
        ipc: NamespaceMode::Pod.into(),
        ..Default::default()
    };
    Ok(PodSandboxConfig {
        metadata: Some(PodSandboxMetadata {
            name: name.clone(),
            uid: name.clone(),
            namespace: "bench".to_owned(),
            attempt: 0,
        }),
        hostname: match network {
            Network::Node => String::new(),
            Network::Own => name,
        },
        log_directory,
        linux: Some(LinuxPodSandboxConfig {
            security_context: Some(LinuxSandboxSecurityContext {
                namespace_options: Some(namespaces),
                ..Default::default()
            }),
            ..Default::default()
        }),
        ..Default::default()
    })
}

/// A command that waits to be killed.
pub(crate) const SLEEP: &[&str] = &["sleep", "86399"];

/// A command that exits immediately on SIGTERM.
pub(crate) const EXITS_ON_SIGTERM: &[&str] = &[
    "sh",
    "-c",
    "trap 'exit 0' TERM; while :; do sleep 86399 & wait $!; done",
];
