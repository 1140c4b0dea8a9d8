//! Every key of the configuration, with its default.

use std::collections::BTreeMap;
use std::fmt;
use std::marker::PhantomData;
use std::net::{Ipv4Addr, SocketAddr};
use std::num::{NonZeroU32, NonZeroUsize};
use std::path::{Path, PathBuf};
use std::time::Duration;

use serde::de::value::MapAccessDeserializer;
use serde::de::{MapAccess, Visitor};
use serde::{Deserialize, Deserializer, Serialize};

use super::rlimit::Rlimit;
use super::runtime_handler::RuntimeHandler;
use crate::cgroup::{CgroupDriver, slice};
use crate::container::seccomp::Socketcall;
use rrun_images::ImageSettings;
use rrun_kernel::descriptor_limit;
use rrun_network::CniSettings;
use rrun_network::NetworkConfig;
use rrun_network::namespace::Namespaces;

/// The server's settings. Each field is a key of the configuration files. The field's type
/// restricts the key's values. [`super::check`] checks the values further after all files are
/// merged.
#[derive(Clone, Debug, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub(crate) struct Config {
    /// The directory for persistent data: images, layers, writable layers and the store.
    pub root: PathBuf,
    /// The directory for data that a reboot can delete: sockets and bundles.
    pub state: PathBuf,
    /// The address of the CRI socket: `unix://` followed by the path that [`Config::socket`]
    /// returns.
    pub(super) listen: String,
    pub cni_conf_dir: PathBuf,
    /// See [`Config::cni_bin_dirs`].
    pub(super) cni_bin_dir: PathBuf,
    pub registry_config_path: PathBuf,
    pub cgroup_driver: CgroupDriver,
    pub stream_listen: SocketAddr,
    /// The address on which metrics are served. If the value is `None`, no metrics are served.
    pub metrics_listen: Option<SocketAddr>,
    pub debug: bool,
    /// The maximum number of similar lines in the log within ten seconds, or 0 for no limit.
    pub log_lines: u32,
    /// The PEM file with the streaming server's certificate. With a certificate and a key, streams
    /// are served over TLS.
    pub stream_tls_cert: Option<PathBuf>,
    pub stream_tls_key: Option<PathBuf>,
    /// See [`Config::stream_idle_timeout`].
    pub(super) stream_idle_timeout: u64,
    /// See [`Config::stream_sessions`].
    pub(super) stream_sessions: NonZeroUsize,
    /// The maximum number of bytes of the kernel's buffers for the streams of all clients.
    pub stream_buffer_bytes: NonZeroUsize,
    /// The maximum number of bytes of output that the server keeps for all commands of ExecSync.
    pub exec_output_bytes: NonZeroUsize,
    /// The maximum number of open descriptors of a pod whose targets are read for one report of
    /// metrics.
    pub stats_descriptors: u64,
    /// The maximum number of cgroups whose processes are counted for a pod or a container.
    pub stats_cgroups: NonZeroUsize,
    /// The maximum number of interfaces of a pod whose counters are reported.
    pub stats_interfaces: NonZeroUsize,
    /// The maximum number of cgroups in a pod's cgroup.
    pub pod_cgroups: NonZeroUsize,
    /// The maximum number of containers of a pod, which includes exited containers.
    pub pod_containers: NonZeroUsize,
    /// The maximum size of the configurations of a pod's containers in bytes.
    pub pod_configuration_bytes: NonZeroUsize,
    /// The maximum number of terminals in a container's /dev/pts.
    pub container_terminals: NonZeroU32,
    /// The maximum number of mounts that a container requests.
    pub container_mounts: NonZeroUsize,
    /// The maximum number of different images of the image volumes of a container.
    pub container_image_volumes: NonZeroUsize,
    /// The maximum number of different images of the image volumes of each container, added up for all
    /// containers of a pod.
    pub pod_image_volumes: NonZeroUsize,
    pub monitor: PathBuf,
    /// See [`Config::namespaces`].
    pub(super) netns_dir: PathBuf,
    pub default_runtime: String,
    pub restrict_oom_score_adj: bool,
    /// The seccomp profile of containers that request no profile.
    pub unset_seccomp_profile: String,
    /// Whether the default seccomp profile allows the system call socketcall.
    pub seccomp_socketcall: Socketcall,
    /// True if pods get SELinux labels.
    pub enable_selinux: bool,
    /// The number of SELinux categories. Each pod's SELinux level contains two of these categories.
    pub selinux_category_range: u16,
    /// See [`Config::default_cgroup_parent`].
    pub(super) default_cgroup_parent: Option<String>,
    /// The directories of Container Device Interface files, in ascending order of priority.
    pub cdi_spec_dirs: Vec<PathBuf>,
    /// The process limits of every container's first process.
    pub rlimits: Vec<Rlimit>,
    #[serde(rename = "runtime")]
    pub runtimes: BTreeMap<String, RuntimeHandler>,
    #[serde(deserialize_with = "section")]
    pub network: NetworkConfig,
    #[serde(deserialize_with = "section")]
    pub cni: CniSettings,
    #[serde(deserialize_with = "section")]
    pub image: ImageSettings,
}

/// Deserialises a section, which must be a TOML table. Without this check, serde would also accept
/// an array that contains the section's values in the order of the fields.
fn section<'de, D: Deserializer<'de>, T: Deserialize<'de>>(from: D) -> Result<T, D::Error> {
    struct Table<T>(PhantomData<T>);

    impl<'de, T: Deserialize<'de>> Visitor<'de> for Table<T> {
        type Value = T;

        fn expecting(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
            formatter.write_str("a table")
        }

        fn visit_map<A: MapAccess<'de>>(self, table: A) -> Result<T, A::Error> {
            T::deserialize(MapAccessDeserializer::new(table))
        }
    }

    from.deserialize_map(Table(PhantomData))
}

impl Default for Config {
    fn default() -> Self {
        Config {
            root: "/var/lib/rrun".into(),
            state: "/run/rrun".into(),
            listen: "unix:///run/rrun/rrun-cri.sock".to_owned(),
            cni_conf_dir: "/etc/cni/net.d".into(),
            cni_bin_dir: "/opt/cni/bin".into(),
            registry_config_path: "/etc/rrun/certs.d".into(),
            cgroup_driver: if slice::is_systemd_booted() {
                CgroupDriver::Systemd
            } else {
                CgroupDriver::Cgroupfs
            },
            stream_listen: (Ipv4Addr::LOCALHOST, 0).into(),
            metrics_listen: None,
            debug: false,
            log_lines: 500,
            stream_tls_cert: None,
            stream_tls_key: None,
            // The default of kubelet's streamingConnectionIdleTimeout is also four hours.
            stream_idle_timeout: 4 * 60 * 60,
            stream_sessions: NonZeroUsize::new(1024).unwrap_or(NonZeroUsize::MIN),
            stream_buffer_bytes: NonZeroUsize::new(512 << 20).unwrap_or(NonZeroUsize::MIN),
            exec_output_bytes: NonZeroUsize::new(128 << 20).unwrap_or(NonZeroUsize::MIN),
            stats_descriptors: 65_536,
            stats_cgroups: NonZeroUsize::new(4096).unwrap_or(NonZeroUsize::MIN),
            stats_interfaces: NonZeroUsize::new(64).unwrap_or(NonZeroUsize::MIN),
            pod_cgroups: NonZeroUsize::new(1000).unwrap_or(NonZeroUsize::MIN),
            pod_containers: NonZeroUsize::new(128).unwrap_or(NonZeroUsize::MIN),
            pod_configuration_bytes: NonZeroUsize::new(16 << 20).unwrap_or(NonZeroUsize::MIN),
            container_terminals: NonZeroU32::new(256).unwrap_or(NonZeroU32::MIN),
            container_mounts: NonZeroUsize::new(10_000).unwrap_or(NonZeroUsize::MIN),
            container_image_volumes: NonZeroUsize::new(16).unwrap_or(NonZeroUsize::MIN),
            pod_image_volumes: NonZeroUsize::new(128).unwrap_or(NonZeroUsize::MIN),
            monitor: "rrun-monitor".into(),
            netns_dir: "/run/netns".into(),
            default_runtime: RuntimeHandler::BUILT_IN.to_owned(),
            restrict_oom_score_adj: false,
            unset_seccomp_profile: "unconfined".to_owned(),
            seccomp_socketcall: Socketcall::Auto,
            enable_selinux: false,
            selinux_category_range: 1024,
            default_cgroup_parent: None,
            cdi_spec_dirs: vec!["/etc/cdi".into(), "/var/run/cdi".into()],
            rlimits: Vec::new(),
            runtimes: BTreeMap::new(),
            network: NetworkConfig::default(),
            cni: CniSettings::default(),
            image: ImageSettings::default(),
        }
    }
}

impl Config {
    /// Returns the path of the CRI socket.
    pub(crate) fn socket(&self) -> &Path {
        Path::new(self.listen.strip_prefix("unix://").unwrap_or(&self.listen))
    }

    /// Returns the directories of CNI plugins. A plugin is executed from the first directory that
    /// contains it.
    pub(crate) fn cni_bin_dirs(&self) -> Vec<PathBuf> {
        std::env::split_paths(&self.cni_bin_dir).collect()
    }

    /// Returns the paths at which pods' network namespaces are pinned.
    pub(crate) fn namespaces(&self) -> Namespaces {
        Namespaces::new(self.netns_dir.clone(), &self.state)
    }

    /// Returns how long a stream can be idle before it is closed.
    pub(crate) fn stream_idle_timeout(&self) -> Duration {
        // The configured timeout is reduced to at most u32::MAX seconds, because a longer timeout
        // could overflow an `Instant`. u32::MAX seconds are about 136 years, so such a timeout
        // never expires in practice.
        Duration::from_secs(self.stream_idle_timeout.min(u32::MAX.into()))
    }

    /// Returns the limit on simultaneous exec, attach and port-forward streams. The limit is lower
    /// than the configured value if the server's limit on open descriptors is too low.
    pub(crate) fn stream_sessions(&self) -> usize {
        self.stream_sessions.get().min(descriptor_limit::share())
    }

    /// Returns the parent cgroup of pods that specify no parent cgroup: by default `/rrun`, or
    /// `/rrun.slice` with the systemd driver.
    pub(crate) fn default_cgroup_parent(&self) -> &str {
        match (&self.default_cgroup_parent, self.cgroup_driver) {
            (Some(parent), _) => parent,
            (None, CgroupDriver::Cgroupfs) => "/rrun",
            (None, CgroupDriver::Systemd) => "/rrun.slice",
        }
    }

    /// Returns the first part of the command line of the handler's runtime: binary, `--root` and
    /// global options. `pod_cgroup` is the cgroup of the pod whose containers the runtime manages.
    /// Returns `None` if the handler does not exist.
    pub(crate) fn runtime_command(&self, handler: &str, pod_cgroup: &str) -> Option<Vec<String>> {
        let name = self.handler_name(handler);
        let runtime = self.runtimes.get(name)?;
        let root = self.state.join("runtime").join(name);
        let mut command = vec![
            runtime.path.to_string_lossy().into_owned(),
            "--root".to_owned(),
            root.to_string_lossy().into_owned(),
        ];
        // If the pod's cgroup is a slice, the pod was created with the cgroup driver systemd. The
        // pod keeps this driver, even if another driver is configured now.
        if slice::is_slice(pod_cgroup) {
            command.push("--systemd-cgroup".to_owned());
        }
        command.extend(runtime.options.iter().cloned());
        Some(command)
    }

    /// Returns an error text if the monitor's binary does not exist or cannot be found.
    pub(crate) fn monitor_missing(&self) -> Option<String> {
        let missing = super::missing("the monitor", &self.monitor)?;
        Some(format!("{missing}: pods cannot be created"))
    }

    /// Returns the runtime handler with the name `handler`. An empty name selects the default
    /// handler.
    pub(crate) fn runtime(&self, handler: &str) -> Option<&RuntimeHandler> {
        self.runtimes.get(self.handler_name(handler))
    }

    /// Returns whether the handler's containers run on the node's kernel.
    pub(crate) fn is_native(&self, handler: &str) -> bool {
        let handler = self.runtimes.get(self.handler_name(handler));
        handler.is_none_or(|handler| handler.native)
    }

    /// Returns the name of the handler that a pod requests. An empty name selects the default
    /// handler.
    pub(crate) fn handler_name<'a>(&'a self, handler: &'a str) -> &'a str {
        if handler.is_empty() {
            &self.default_runtime
        } else {
            handler
        }
    }
}
