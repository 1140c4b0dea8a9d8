//! Every key of the configuration, with its default.

use std::collections::BTreeMap;
use std::fmt;
use std::marker::PhantomData;
use std::net::{Ipv4Addr, SocketAddr};
use std::path::{Path, PathBuf};
use std::time::Duration;

use serde::de::value::MapAccessDeserializer;
use serde::de::{MapAccess, Visitor};
use serde::{Deserialize, Deserializer, Serialize};

use super::rlimit::Rlimit;
use super::runtime_handler::RuntimeHandler;
use crate::cgroup::{CgroupDriver, slice};
use rrun_images::ImageSettings;
use rrun_network::CniSettings;
use rrun_network::NetworkConfig;
use rrun_network::namespace::Namespaces;

/// What the server runs with. Each field is a key of the files, its type what the files may say;
/// whether a value can be served is checked when all files are merged.
#[derive(Clone, Debug, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub(crate) struct Config {
    /// What outlives a reboot: images, layers, writable layers, the store.
    pub root: PathBuf,
    /// What a reboot may take: sockets, bundles.
    pub state: PathBuf,
    /// `unix://` and the path of [`Config::socket`].
    pub(super) listen: String,
    pub cni_conf_dir: PathBuf,
    /// See [`Config::cni_bin_dirs`].
    pub(super) cni_bin_dir: PathBuf,
    pub registry_config_path: PathBuf,
    pub cgroup_driver: CgroupDriver,
    pub stream_listen: SocketAddr,
    /// `None`: no metrics are served.
    pub metrics_listen: Option<SocketAddr>,
    pub debug: bool,
    /// PEM files; with them, streams are served over TLS.
    pub stream_tls_cert: Option<PathBuf>,
    pub stream_tls_key: Option<PathBuf>,
    /// See [`Config::stream_idle_timeout`].
    pub(super) stream_idle_timeout: u64,
    pub monitor: PathBuf,
    /// See [`Config::namespaces`].
    pub(super) netns_dir: PathBuf,
    pub default_runtime: String,
    pub restrict_oom_score_adj: bool,
    /// What containers get that request no seccomp profile.
    pub unset_seccomp_profile: String,
    /// Whether pods get SELinux labels, and of how many categories their levels are made.
    pub enable_selinux: bool,
    pub selinux_category_range: u16,
    /// See [`Config::default_cgroup_parent`].
    pub(super) default_cgroup_parent: Option<String>,
    /// Where the Container Device Interface's files are, highest priority last.
    pub cdi_spec_dirs: Vec<PathBuf>,
    /// What every container's first process gets.
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

/// Accepts only a TOML table; serde would also take an array of the values in field order.
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
            stream_tls_cert: None,
            stream_tls_key: None,
            // As kubelet has it.
            stream_idle_timeout: 4 * 60 * 60,
            monitor: "rrun-monitor".into(),
            netns_dir: "/run/netns".into(),
            default_runtime: RuntimeHandler::BUILT_IN.to_owned(),
            restrict_oom_score_adj: false,
            unset_seccomp_profile: "unconfined".to_owned(),
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
    /// The path of the CRI's unix socket.
    pub(crate) fn socket(&self) -> &Path {
        Path::new(self.listen.strip_prefix("unix://").unwrap_or(&self.listen))
    }

    /// Where CNI plugins are; the first directory that has one wins.
    pub(crate) fn cni_bin_dirs(&self) -> Vec<PathBuf> {
        std::env::split_paths(&self.cni_bin_dir).collect()
    }

    /// Where pods' network namespaces are pinned.
    pub(crate) fn namespaces(&self) -> Namespaces {
        Namespaces::new(self.netns_dir.clone(), &self.state)
    }

    /// How long nothing may move on a stream before it is closed.
    pub(crate) fn stream_idle_timeout(&self) -> Duration {
        // A larger number would overflow the clock, and this one is as good as no limit.
        Duration::from_secs(self.stream_idle_timeout.min(u32::MAX.into()))
    }

    /// The cgroup under which pods without a cgroup parent get theirs: `/rrun`, or `/rrun.slice`.
    pub(crate) fn default_cgroup_parent(&self) -> &str {
        match (&self.default_cgroup_parent, self.cgroup_driver) {
            (Some(parent), _) => parent,
            (None, CgroupDriver::Cgroupfs) => "/rrun",
            (None, CgroupDriver::Systemd) => "/rrun.slice",
        }
    }

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
