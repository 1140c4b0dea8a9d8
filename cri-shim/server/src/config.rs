//! The command line and the configuration file.
//!
//! Each source is a [`Partial`]; they are laid over each other (file, drop-ins in the order of
//! their names, command line) and over the defaults give a [`Config`].

mod load;
mod rlimit;

use std::collections::BTreeMap;
use std::net::SocketAddr;
use std::path::{Path, PathBuf};
use std::time::Duration;

use serde::Deserialize;

use crate::cgroup::{self, slice};
use crate::container::seccomp::Asked;
use rrun_images::{Limits, MinRate, Pins};
use rrun_network::NetworkSettings;
use rrun_network::namespace::Namespaces;

pub(crate) use load::Source;
pub(crate) use rlimit::Rlimit;

/// Read unless `--config` names another; need not be there.
pub(crate) const DEFAULT_FILE: &str = "/etc/rrun/config.toml";

/// What `rrun-cri config default` prints.
pub(crate) const DEFAULT_TEXT: &str = include_str!("config_default.toml");

/// How many seconds nothing may move on a stream, as kubelet has it.
const STREAM_IDLE_TIMEOUT: u64 = 4 * 60 * 60;

/// Who keeps the cgroup tree: rrun by files, or systemd by D-Bus. Kubelet asks and follows.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Deserialize, clap::ValueEnum)]
#[serde(rename_all = "lowercase")]
pub(crate) enum CgroupDriver {
    Cgroupfs,
    Systemd,
}

/// One `[runtime.NAME]`: an OCI runtime that a pod's RuntimeClass can choose.
#[derive(Clone, Debug, PartialEq, Eq, Deserialize)]
#[serde(deny_unknown_fields)]
pub(crate) struct RuntimeHandler {
    /// The binary; a bare name is looked up beside rrun-cri and in PATH.
    pub path: PathBuf,
    /// Global options, before the subcommand.
    #[serde(default)]
    pub options: Vec<String>,
    /// Its containers' processes are processes of the node's kernel: a signal to them needs no
    /// help from the runtime. False for runtimes with a kernel of their own (runsc, kata).
    #[serde(default = "yes")]
    pub native: bool,
    /// Which annotations of a pod, and of a container, its runtime is told; `*` and `?` stand for
    /// any characters.
    #[serde(default)]
    pub pod_annotations: Vec<String>,
    #[serde(default)]
    pub container_annotations: Vec<String>,
}

impl RuntimeHandler {
    /// A sentence if the binary is not there.
    pub(crate) fn missing(&self) -> Option<String> {
        let path = self.path.display();
        (!self.path.is_file()).then(|| format!("there is no runtime at {path}"))
    }
}

fn yes() -> bool {
    true
}

/// `[cni]`: how plugins are run.
#[derive(Clone, Debug, Default, PartialEq, Eq, Deserialize)]
#[serde(deny_unknown_fields)]
pub(crate) struct CniPart {
    pub max_conf_num: Option<usize>,
    pub timeout_seconds: Option<u64>,
    pub teardown_patience_seconds: Option<u64>,
}

/// See [`rrun_network::CniSettings`].
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct CniSettings {
    pub max_conf_num: usize,
    pub timeout: Duration,
    pub teardown_patience: Duration,
}

impl CniPart {
    fn overlaid(self, over: CniPart) -> CniPart {
        CniPart {
            max_conf_num: over.max_conf_num.or(self.max_conf_num),
            timeout_seconds: over.timeout_seconds.or(self.timeout_seconds),
            teardown_patience_seconds: over
                .teardown_patience_seconds
                .or(self.teardown_patience_seconds),
        }
    }

    fn settings(&self) -> Result<CniSettings, ConfigError> {
        let timeout = self.timeout_seconds.unwrap_or(100);
        if !(1..=3600).contains(&timeout) {
            return Err(ConfigError::Value {
                key: "cni.timeout_seconds",
                reason: format!("{timeout} is not between 1 and 3600"),
            });
        }
        Ok(CniSettings {
            max_conf_num: self.max_conf_num.unwrap_or(1),
            // Kubelet waits 120 s for StopPodSandbox, and twice as long for RunPodSandbox.
            timeout: Duration::from_secs(timeout),
            teardown_patience: Duration::from_secs(self.teardown_patience_seconds.unwrap_or(300)),
        })
    }
}

/// `[image]`: what may be pulled, and what is kept.
#[derive(Clone, Debug, Default, PartialEq, Eq, Deserialize)]
#[serde(deny_unknown_fields)]
pub(crate) struct ImagePart {
    pub parallel_layers: Option<usize>,
    pub parallel_layers_per_host: Option<usize>,
    pub parallel_unpacks: Option<usize>,
    pub layer_bytes: Option<u64>,
    pub layer_files: Option<u64>,
    pub silence_seconds: Option<u64>,
    pub least_rate: Option<u64>,
    pub least_rate_seconds: Option<u64>,
    pub abandoned_seconds: Option<u64>,
    pub pinned: Option<Vec<String>>,
}

impl ImagePart {
    fn overlaid(self, over: ImagePart) -> ImagePart {
        ImagePart {
            parallel_layers: over.parallel_layers.or(self.parallel_layers),
            parallel_layers_per_host: over
                .parallel_layers_per_host
                .or(self.parallel_layers_per_host),
            parallel_unpacks: over.parallel_unpacks.or(self.parallel_unpacks),
            layer_bytes: over.layer_bytes.or(self.layer_bytes),
            layer_files: over.layer_files.or(self.layer_files),
            silence_seconds: over.silence_seconds.or(self.silence_seconds),
            least_rate: over.least_rate.or(self.least_rate),
            least_rate_seconds: over.least_rate_seconds.or(self.least_rate_seconds),
            abandoned_seconds: over.abandoned_seconds.or(self.abandoned_seconds),
            pinned: over.pinned.or(self.pinned),
        }
    }

    fn limits(&self) -> Result<Limits, ConfigError> {
        let zeros = [
            ("image.parallel_layers", self.parallel_layers == Some(0)),
            (
                "image.parallel_layers_per_host",
                self.parallel_layers_per_host == Some(0),
            ),
            ("image.parallel_unpacks", self.parallel_unpacks == Some(0)),
            ("image.layer_bytes", self.layer_bytes == Some(0)),
            ("image.layer_files", self.layer_files == Some(0)),
            ("image.silence_seconds", self.silence_seconds == Some(0)),
            (
                "image.least_rate_seconds",
                self.least_rate_seconds == Some(0),
            ),
            ("image.abandoned_seconds", self.abandoned_seconds == Some(0)),
        ];
        if let Some((key, _)) = zeros.into_iter().find(|(_, zero)| *zero) {
            let reason = "0 would let nothing be pulled".to_owned();
            return Err(ConfigError::Value { key, reason });
        }
        let default = Limits::default();
        let parallel_layers = self.parallel_layers.unwrap_or(default.parallel_layers);
        // If there is more than one slot, one host must leave a slot for the others.
        let most_per_host = parallel_layers.saturating_sub(1).max(1);
        let layers_per_host = self.parallel_layers_per_host.unwrap_or(most_per_host);
        if layers_per_host > most_per_host {
            return Err(ConfigError::Value {
                key: "image.parallel_layers_per_host",
                reason: format!(
                    "{layers_per_host} would let one host take all {parallel_layers} of image.parallel_layers"
                ),
            });
        }
        let seconds = |given: Option<u64>, default| given.map_or(default, Duration::from_secs);
        Ok(Limits {
            parallel_layers,
            layers_per_host,
            parallel_unpacks: self.parallel_unpacks.unwrap_or(default.parallel_unpacks),
            layer_bytes: self.layer_bytes.unwrap_or(default.layer_bytes),
            layer_entries: self.layer_files.unwrap_or(default.layer_entries),
            silence: seconds(self.silence_seconds, default.silence),
            min_rate: MinRate {
                rate: self.least_rate.unwrap_or(default.min_rate.rate),
                over: seconds(self.least_rate_seconds, default.min_rate.over),
            },
            // A larger number would overflow the clock, and this one is as good as no limit.
            abandoned: seconds(
                self.abandoned_seconds.map(|s| s.min(u32::MAX.into())),
                default.abandoned,
            ),
        })
    }
}

/// What one source says; unset keys leave the rest as it is.
#[derive(Clone, Debug, Default, PartialEq, Eq, Deserialize, clap::Args)]
#[serde(deny_unknown_fields)]
pub(crate) struct Partial {
    /// What outlives a reboot: images, layers, writable layers, the store
    #[arg(long, value_name = "DIR")]
    pub root: Option<PathBuf>,
    /// What a reboot may take: sockets, bundles
    #[arg(long, value_name = "DIR")]
    pub state: Option<PathBuf>,
    /// The CRI socket
    #[arg(long, value_name = "unix://PATH")]
    pub listen: Option<String>,
    /// Where CNI configurations are; with none there the embedded network is used
    #[arg(long, value_name = "DIR")]
    pub cni_conf_dir: Option<PathBuf>,
    /// Where CNI plugins are; several directories with colons between, the first that has one wins
    #[arg(long, value_name = "DIR[:DIR]")]
    pub cni_bin_dir: Option<PathBuf>,
    /// The certs.d tree of hosts.toml files
    #[arg(long, value_name = "DIR")]
    pub registry_config_path: Option<PathBuf>,
    /// Who keeps the cgroup tree
    #[arg(long, value_enum)]
    pub cgroup_driver: Option<CgroupDriver>,
    /// Where exec, attach and port-forward streams are served
    #[arg(long, value_name = "ADDR")]
    pub stream_listen: Option<SocketAddr>,
    /// Where Prometheus metrics are served; by default nowhere
    #[arg(long, value_name = "ADDR")]
    pub metrics_listen: Option<SocketAddr>,
    /// Log what is done, not only what goes wrong
    #[arg(long, num_args = 0..=1, default_missing_value = "true")]
    pub debug: Option<bool>,
    #[arg(skip)]
    pub stream_tls_cert: Option<PathBuf>,
    #[arg(skip)]
    pub stream_tls_key: Option<PathBuf>,
    /// Seconds.
    #[arg(skip)]
    pub stream_idle_timeout: Option<u64>,
    #[arg(skip)]
    pub monitor: Option<PathBuf>,
    #[arg(skip)]
    pub netns_dir: Option<PathBuf>,
    #[arg(skip)]
    pub default_runtime: Option<String>,
    #[arg(skip)]
    pub restrict_oom_score_adj: Option<bool>,
    #[arg(skip)]
    pub unset_seccomp_profile: Option<String>,
    #[arg(skip)]
    pub enable_selinux: Option<bool>,
    #[arg(skip)]
    pub selinux_category_range: Option<u16>,
    #[arg(skip)]
    pub default_cgroup_parent: Option<String>,
    #[arg(skip)]
    pub cdi_spec_dirs: Option<Vec<PathBuf>>,
    #[arg(skip)]
    pub rlimits: Option<Vec<Rlimit>>,
    #[arg(skip)]
    #[serde(default)]
    pub runtime: BTreeMap<String, RuntimeHandler>,
    #[arg(skip)]
    #[serde(default)]
    pub network: NetworkSettings,
    #[arg(skip)]
    #[serde(default)]
    pub cni: CniPart,
    #[arg(skip)]
    #[serde(default)]
    pub image: ImagePart,
}

/// What the server runs with.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Config {
    pub root: PathBuf,
    pub state: PathBuf,
    /// Where pods' network namespaces are pinned.
    pub namespaces: Namespaces,
    /// The path of the CRI's unix socket.
    pub socket: PathBuf,
    pub cni_conf_dir: PathBuf,
    pub cni_bin_dirs: Vec<PathBuf>,
    pub registry_config_path: PathBuf,
    pub cgroup_driver: CgroupDriver,
    pub stream_listen: SocketAddr,
    /// `None`: no metrics are served.
    pub metrics_listen: Option<SocketAddr>,
    /// PEM files; with them, streams are served over TLS.
    pub stream_tls_cert: Option<PathBuf>,
    pub stream_tls_key: Option<PathBuf>,
    /// How long nothing may move on a stream before it is closed.
    pub stream_idle_timeout: Duration,
    pub debug: bool,
    pub monitor: PathBuf,
    pub default_runtime: String,
    pub restrict_oom_score_adj: bool,
    /// What containers get that ask for no seccomp profile.
    pub unset_seccomp_profile: Asked,
    /// Whether pods get SELinux labels, and of how many categories their levels are made.
    pub enable_selinux: bool,
    pub selinux_category_range: u16,
    /// The cgroup under which pods without a cgroup parent get theirs: `/rrun`, or `/rrun.slice`.
    pub default_cgroup_parent: String,
    /// Where the Container Device Interface's files are, the weightiest directory last.
    pub cdi_spec_dirs: Vec<PathBuf>,
    /// What every container's first process gets.
    pub rlimits: Vec<Rlimit>,
    pub runtimes: BTreeMap<String, RuntimeHandler>,
    pub network: NetworkSettings,
    pub cni: CniSettings,
    /// Bounds on pulls.
    pub images: Limits,
    pub pins: Pins,
}

#[derive(Debug, thiserror::Error, PartialEq, Eq)]
pub(crate) enum ConfigError {
    #[error("read the configuration {file}: {reason}")]
    Read { file: PathBuf, reason: String },
    #[error("{file}, line {line}, {key}: {reason}")]
    Parse {
        file: PathBuf,
        line: usize,
        key: String,
        reason: String,
    },
    #[error("{key}: {reason}")]
    Value { key: &'static str, reason: String },
}

impl Partial {
    /// Parses one file's text; `file` is for the error.
    pub(crate) fn parse(file: &Path, text: &str) -> Result<Self, ConfigError> {
        toml::from_str(text).map_err(|error| {
            let (line, key) =
                rrun_images::position::of(text, error.span().map_or(0, |span| span.start));
            ConfigError::Parse {
                file: file.to_owned(),
                line,
                key,
                reason: error.message().replace('\n', ", "),
            }
        })
    }

    /// Lays `over` over this one.
    fn overlaid(self, over: Partial) -> Partial {
        let mut runtime = self.runtime;
        runtime.extend(over.runtime);
        Partial {
            root: over.root.or(self.root),
            state: over.state.or(self.state),
            netns_dir: over.netns_dir.or(self.netns_dir),
            listen: over.listen.or(self.listen),
            cni_conf_dir: over.cni_conf_dir.or(self.cni_conf_dir),
            cni_bin_dir: over.cni_bin_dir.or(self.cni_bin_dir),
            registry_config_path: over.registry_config_path.or(self.registry_config_path),
            cgroup_driver: over.cgroup_driver.or(self.cgroup_driver),
            stream_listen: over.stream_listen.or(self.stream_listen),
            stream_tls_cert: over.stream_tls_cert.or(self.stream_tls_cert),
            stream_tls_key: over.stream_tls_key.or(self.stream_tls_key),
            stream_idle_timeout: over.stream_idle_timeout.or(self.stream_idle_timeout),
            metrics_listen: over.metrics_listen.or(self.metrics_listen),
            debug: over.debug.or(self.debug),
            monitor: over.monitor.or(self.monitor),
            default_runtime: over.default_runtime.or(self.default_runtime),
            restrict_oom_score_adj: over.restrict_oom_score_adj.or(self.restrict_oom_score_adj),
            unset_seccomp_profile: over.unset_seccomp_profile.or(self.unset_seccomp_profile),
            enable_selinux: over.enable_selinux.or(self.enable_selinux),
            selinux_category_range: over.selinux_category_range.or(self.selinux_category_range),
            default_cgroup_parent: over.default_cgroup_parent.or(self.default_cgroup_parent),
            cdi_spec_dirs: over.cdi_spec_dirs.or(self.cdi_spec_dirs),
            rlimits: over.rlimits.or(self.rlimits),
            runtime,
            image: self.image.overlaid(over.image),
            network: NetworkSettings {
                bridge: over.network.bridge.or(self.network.bridge),
                range: over.network.range.or(self.network.range),
                range6: over.network.range6.or(self.network.range6),
                primary: over.network.primary.or(self.network.primary),
                masquerade: over.network.masquerade.or(self.network.masquerade),
                mtu: over.network.mtu.or(self.network.mtu),
                mode: over.network.mode.or(self.network.mode),
            },
            cni: self.cni.overlaid(over.cni),
        }
    }

    fn finished(self) -> Result<Config, ConfigError> {
        let value = |key, reason: String| ConfigError::Value { key, reason };
        let listen = self
            .listen
            .unwrap_or_else(|| "unix:///run/rrun/rrun-cri.sock".to_owned());
        let socket = match listen.strip_prefix("unix://") {
            Some(path) if path.starts_with('/') => PathBuf::from(path),
            _ => {
                let reason = format!("{listen:?} is not unix:// and an absolute path");
                return Err(value("listen", reason));
            }
        };
        let absolute = |key, path: PathBuf| {
            if path.is_absolute() {
                Ok(path)
            } else {
                let reason = format!("{} is not an absolute path", path.display());
                Err(value(key, reason))
            }
        };
        let cgroup_driver = self.cgroup_driver.unwrap_or_else(|| {
            if slice::is_systemd_booted() {
                CgroupDriver::Systemd
            } else {
                CgroupDriver::Cgroupfs
            }
        });
        let (key, missing) = match (&self.stream_tls_cert, &self.stream_tls_key) {
            (Some(_), None) => ("stream_tls_cert", "stream_tls_key"),
            (None, Some(_)) => ("stream_tls_key", "stream_tls_cert"),
            _ => ("", ""),
        };
        if !missing.is_empty() {
            let reason = format!("a certificate and its key go together: {missing} is missing");
            return Err(value(key, reason));
        }
        let stream_idle_timeout = self.stream_idle_timeout.unwrap_or(STREAM_IDLE_TIMEOUT);
        if stream_idle_timeout == 0 {
            let reason = "0 s would close every stream at once".to_owned();
            return Err(value("stream_idle_timeout", reason));
        }
        let file = |key, given: Option<PathBuf>| given.map(|path| absolute(key, path)).transpose();
        let mut runtimes = self.runtime;
        runtimes
            .entry("rrun".to_owned())
            .or_insert_with(|| RuntimeHandler {
                path: "rrun".into(),
                options: Vec::new(),
                native: true,
                pod_annotations: Vec::new(),
                container_annotations: Vec::new(),
            });
        for handler in runtimes.values_mut() {
            handler.path = found(&handler.path);
        }
        let default_runtime = self.default_runtime.unwrap_or_else(|| "rrun".to_owned());
        if !runtimes.contains_key(&default_runtime) {
            let reason = format!("there is no [runtime.{default_runtime}]");
            return Err(value("default_runtime", reason));
        }
        let default_cgroup_parent = match (self.default_cgroup_parent, cgroup_driver) {
            (Some(parent), _) => parent,
            (None, CgroupDriver::Cgroupfs) => "/rrun".to_owned(),
            (None, CgroupDriver::Systemd) => "rrun.slice".to_owned(),
        };
        let default_cgroup_parent = cgroup::of_pod(cgroup_driver, &default_cgroup_parent)
            .map_err(|error| value("default_cgroup_parent", error.to_string()))?;
        let cdi_spec_dirs = match self.cdi_spec_dirs {
            Some(dirs) => dirs,
            None => vec!["/etc/cdi".into(), "/var/run/cdi".into()],
        };
        for dir in &cdi_spec_dirs {
            absolute("cdi_spec_dirs", dir.clone())?;
        }
        let unset_seccomp_profile = self.unset_seccomp_profile.unwrap_or_default();
        let unset_seccomp_profile = Asked::parse(&unset_seccomp_profile)
            .map_err(|reason| value("unset_seccomp_profile", reason))?;
        let selinux_category_range = self.selinux_category_range.unwrap_or(1024);
        if !(2..=1024).contains(&selinux_category_range) {
            let reason = format!("{selinux_category_range} is not between 2 and 1024");
            return Err(value("selinux_category_range", reason));
        }
        let cni_bin_dirs = self.cni_bin_dir.unwrap_or_else(|| "/opt/cni/bin".into());
        let cni_bin_dirs: Vec<PathBuf> = std::env::split_paths(&cni_bin_dirs)
            .map(|dir| absolute("cni_bin_dir", dir))
            .collect::<Result<_, _>>()?;
        let dir = |key, given: Option<PathBuf>, default: &str| {
            absolute(key, given.unwrap_or_else(|| default.into()))
        };
        let state = dir("state", self.state, "/run/rrun")?;
        Ok(Config {
            root: dir("root", self.root, "/var/lib/rrun")?,
            namespaces: Namespaces::new(dir("netns_dir", self.netns_dir, "/run/netns")?, &state),
            state,
            socket,
            cni_conf_dir: dir("cni_conf_dir", self.cni_conf_dir, "/etc/cni/net.d")?,
            cni_bin_dirs,
            registry_config_path: dir(
                "registry_config_path",
                self.registry_config_path,
                "/etc/rrun/certs.d",
            )?,
            cgroup_driver,
            stream_listen: self
                .stream_listen
                .unwrap_or_else(|| SocketAddr::from(([127, 0, 0, 1], 0))),
            metrics_listen: self.metrics_listen,
            stream_tls_cert: file("stream_tls_cert", self.stream_tls_cert)?,
            stream_tls_key: file("stream_tls_key", self.stream_tls_key)?,
            // More than the clock's range is for ever, too.
            stream_idle_timeout: Duration::from_secs(stream_idle_timeout.min(u32::MAX.into())),
            debug: self.debug.unwrap_or(false),
            monitor: found(&self.monitor.unwrap_or_else(|| "rrun-monitor".into())),
            default_runtime,
            restrict_oom_score_adj: self.restrict_oom_score_adj.unwrap_or(false),
            unset_seccomp_profile,
            enable_selinux: self.enable_selinux.unwrap_or(false),
            selinux_category_range,
            default_cgroup_parent,
            cdi_spec_dirs,
            rlimits: self.rlimits.unwrap_or_default(),
            runtimes,
            network: self.network,
            cni: self.cni.settings()?,
            images: self.image.limits()?,
            pins: Pins::new(self.image.pinned.as_deref().unwrap_or_default()),
        })
    }
}

impl Config {
    /// The handler's command for the containers of a pod with this cgroup: binary, `--root` and
    /// options. `None`: no such handler.
    pub(crate) fn runtime_command(&self, handler: &str, pod_cgroup: &str) -> Option<Vec<String>> {
        let name = self.handler_name(handler);
        let runtime = self.runtimes.get(name)?;
        let root = self.state.join("runtime").join(name);
        let mut command = vec![
            runtime.path.to_string_lossy().into_owned(),
            "--root".to_owned(),
            root.to_string_lossy().into_owned(),
        ];
        // The driver that the pod was made with, whatever it is now.
        if slice::is_slice(pod_cgroup) {
            command.push("--systemd-cgroup".to_owned());
        }
        command.extend(runtime.options.iter().cloned());
        Some(command)
    }

    /// A sentence if the monitor's binary is not there.
    pub(crate) fn monitor_missing(&self) -> Option<String> {
        let path = self.monitor.display();
        let missing = !self.monitor.is_file();
        missing.then(|| format!("there is no monitor at {path}: no pod can be made"))
    }

    /// The handler of this name; empty is the default one.
    pub(crate) fn runtime(&self, handler: &str) -> Option<&RuntimeHandler> {
        self.runtimes.get(self.handler_name(handler))
    }

    /// Whether the handler's containers are processes of the node's kernel.
    pub(crate) fn is_native(&self, handler: &str) -> bool {
        let handler = self.runtimes.get(self.handler_name(handler));
        handler.is_none_or(|handler| handler.native)
    }

    /// The name of the handler that a pod asks for; empty is the default one.
    pub(crate) fn handler_name<'a>(&'a self, handler: &'a str) -> &'a str {
        if handler.is_empty() {
            &self.default_runtime
        } else {
            handler
        }
    }
}

/// A bare program name is looked for beside this program, then in PATH; if it is in neither it
/// stays bare, and running it says so.
fn found(program: &Path) -> PathBuf {
    if program.components().count() != 1 || program.is_absolute() {
        return program.to_owned();
    }
    let beside = std::env::current_exe()
        .ok()
        .and_then(|exe| exe.parent().map(Path::to_owned));
    let path = std::env::var_os("PATH").unwrap_or_default();
    beside
        .into_iter()
        .chain(std::env::split_paths(&path))
        .map(|dir| dir.join(program))
        .find(|candidate| candidate.is_file())
        .unwrap_or_else(|| program.to_owned())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn parse(text: &str) -> Result<Partial, ConfigError> {
        Partial::parse(Path::new("/etc/rrun/config.toml"), text)
    }

    #[test]
    fn the_printed_default_is_the_default() -> Result<(), ConfigError> {
        // Commented lines `# key = value` are the defaults: parsed, they must change nothing.
        let uncommented: String = DEFAULT_TEXT
            .lines()
            .map(|line| match line.strip_prefix("# ") {
                Some(rest) if rest.starts_with('[') || rest.contains(" = ") => rest,
                _ if line.starts_with('#') => "",
                _ => line,
            })
            .collect::<Vec<_>>()
            .join("\n");
        let from_text = parse(&uncommented)?.finished()?;
        let mut default = Partial::default().finished()?;
        default.network = from_text.network.clone();
        // These depend on the machine.
        default.cgroup_driver = from_text.cgroup_driver;
        default.default_cgroup_parent = from_text.default_cgroup_parent.clone();
        assert_eq!(from_text, default);
        assert_eq!(parse(DEFAULT_TEXT)?, Partial::default());
        Ok(())
    }

    #[test]
    fn one_host_never_gets_all_of_the_layers_at_once() -> Result<(), ConfigError> {
        let limits = |text: &str| {
            let config = parse(&format!("[image]\n{text}"))?.finished()?;
            Ok::<_, ConfigError>((config.images.parallel_layers, config.images.layers_per_host))
        };
        assert_eq!(limits("")?, (4, 3));
        assert_eq!(limits("parallel_layers = 10")?, (10, 9));
        assert_eq!(limits("parallel_layers = 1")?, (1, 1));
        assert_eq!(limits("parallel_layers_per_host = 2")?, (4, 2));
        let refused = limits("parallel_layers = 3\nparallel_layers_per_host = 3");
        assert!(refused.is_err_and(|e| e.to_string().contains("all 3 of image.parallel_layers")));
        Ok(())
    }

    #[test]
    fn an_unknown_key_is_named_with_file_and_line() {
        let error = parse("root = \"/r\"\n\nrooot = 1\n").map_err(|error| error.to_string());
        let Err(error) = error else {
            panic!("an unknown key was taken");
        };
        assert!(
            error.starts_with("/etc/rrun/config.toml, line 3, rooot: unknown field"),
            "{error}"
        );
    }

    #[test]
    fn a_bad_value_is_named_with_file_line_and_key() {
        let error = parse("debug = true\ncgroup_driver = \"none\"\n");
        assert!(
            matches!(error, Err(ConfigError::Parse { line: 2, ref key, .. }) if key == "cgroup_driver"),
            "{error:?}"
        );
    }

    #[test]
    fn a_later_source_wins_and_handlers_add_up() -> Result<(), ConfigError> {
        let file = parse("root = \"/a\"\nstate = \"/s\"\n[runtime.runc]\npath = \"/bin/runc\"\n")?;
        let drop_in = parse("root = \"/b\"\n[runtime.crun]\npath = \"/bin/crun\"\n")?;
        let config = file.overlaid(drop_in).finished()?;
        assert_eq!(config.root, Path::new("/b"));
        assert_eq!(config.state, Path::new("/s"));
        assert_eq!(
            config.runtimes.keys().collect::<Vec<_>>(),
            ["crun", "rrun", "runc"]
        );
        assert_eq!(
            config
                .runtime_command("runc", "/rrun/p")
                .map(|command| command.join(" ")),
            Some("/bin/runc --root /s/runtime/runc".to_owned())
        );
        assert_eq!(config.runtime_command("none", ""), None);
        let in_slice = config
            .runtime_command("runc", "/a.slice")
            .unwrap_or_default();
        assert_eq!(
            in_slice.last().map(String::as_str),
            Some("--systemd-cgroup")
        );
        Ok(())
    }
}
