//! The keys that the command line can set.

use std::net::SocketAddr;
use std::path::PathBuf;

use serde::Serialize;

use crate::cgroup::CgroupDriver;

/// Each field is the key of that name; one that is not given leaves the files' value.
#[derive(Clone, Debug, Default, Serialize, clap::Args)]
pub(crate) struct Flags {
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
}
