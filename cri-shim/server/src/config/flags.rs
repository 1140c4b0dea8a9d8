//! The keys that the command line can set.

use std::net::SocketAddr;
use std::path::PathBuf;

use serde::Serialize;

use crate::cgroup::CgroupDriver;

/// Each field sets the configuration key with the same name. If a flag is missing, the value from
/// the configuration files is used.
#[derive(Clone, Debug, Default, Serialize, clap::Args)]
pub(crate) struct Flags {
    /// The directory for persistent data: images, layers, writable layers and the store
    #[arg(long, value_name = "DIR")]
    pub root: Option<PathBuf>,
    /// The directory for data that a reboot can delete: sockets and bundles
    #[arg(long, value_name = "DIR")]
    pub state: Option<PathBuf>,
    /// The CRI socket
    #[arg(long, value_name = "unix://PATH")]
    pub listen: Option<String>,
    /// The directory of CNI configurations; if it contains no configuration, the embedded network
    /// is used
    #[arg(long, value_name = "DIR")]
    pub cni_conf_dir: Option<PathBuf>,
    /// The directory of CNI plugins, or several directories separated by colons; a plugin is
    /// executed from the first directory that contains it
    #[arg(long, value_name = "DIR[:DIR]")]
    pub cni_bin_dir: Option<PathBuf>,
    /// The certs.d directory with the hosts.toml files of registries
    #[arg(long, value_name = "DIR")]
    pub registry_config_path: Option<PathBuf>,
    /// The cgroup driver; the default is systemd if systemd is PID 1, and cgroupfs otherwise
    #[arg(long, value_enum)]
    pub cgroup_driver: Option<CgroupDriver>,
    /// The address on which exec, attach and port-forward streams are served
    #[arg(long, value_name = "ADDR")]
    pub stream_listen: Option<SocketAddr>,
    /// The address on which Prometheus metrics are served; by default no metrics are served
    #[arg(long, value_name = "ADDR")]
    pub metrics_listen: Option<SocketAddr>,
    /// Log every operation, not only failures
    #[arg(long, num_args = 0..=1, default_missing_value = "true")]
    pub debug: Option<bool>,
}
