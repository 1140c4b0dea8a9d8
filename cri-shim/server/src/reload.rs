//! SIGHUP: the configuration is read again. What can change while the server runs does, the log
//! says what, and what can't is named.

use std::collections::BTreeMap;
use std::path::PathBuf;
use std::sync::Arc;

use crate::config::{Config, Source};
use crate::node::Node;
use crate::stderr_log;
use rrun_images::Registries;

/// What was in force when it was last looked.
pub(crate) struct Reload {
    source: Source,
    config: Config,
    registries: Registries,
    /// The hosts.toml files.
    hosts: BTreeMap<PathBuf, Vec<u8>>,
}

impl Reload {
    /// The log tells what in the registries' configuration can't be understood. Blocks on the disk.
    pub(crate) fn new(source: Source, node: &Arc<Node>) -> Self {
        let registries = node.images.registries().clone();
        let hosts = registries.files();
        for path in hosts.keys() {
            if let Err(error) = registries.check(path) {
                log::error!("{error}");
            }
        }
        Reload {
            source,
            config: node.config.clone(),
            registries,
            hosts,
        }
    }

    /// Reads everything again; a sentence if something is wrong with it. Blocks on the disk.
    pub(crate) fn run(&mut self) -> Option<String> {
        let mut wrong = None;
        match self.source.load() {
            Ok(config) => self.take(config),
            Err(error) => {
                let what = format!("{error}; the configuration stays as it was");
                log::error!("SIGHUP: {what}");
                wrong = Some(what);
            }
        }
        wrong.or(self.look_at_registries())
    }

    fn take(&mut self, config: Config) {
        let old = &self.config;
        if config.debug != old.debug {
            stderr_log::set_level(config.debug);
            log::info!("SIGHUP: debug is {} now", config.debug);
        }
        let changed: [(&str, bool); 24] = [
            ("root", config.root != old.root),
            ("state", config.state != old.state),
            ("netns_dir", config.namespaces != old.namespaces),
            ("listen", config.socket != old.socket),
            ("cni_conf_dir", config.cni_conf_dir != old.cni_conf_dir),
            ("cni_bin_dir", config.cni_bin_dirs != old.cni_bin_dirs),
            (
                "registry_config_path",
                config.registry_config_path != old.registry_config_path,
            ),
            ("cgroup_driver", config.cgroup_driver != old.cgroup_driver),
            ("stream_listen", config.stream_listen != old.stream_listen),
            (
                "stream_tls_cert",
                config.stream_tls_cert != old.stream_tls_cert,
            ),
            (
                "stream_tls_key",
                config.stream_tls_key != old.stream_tls_key,
            ),
            (
                "stream_idle_timeout",
                config.stream_idle_timeout != old.stream_idle_timeout,
            ),
            (
                "metrics_listen",
                config.metrics_listen != old.metrics_listen,
            ),
            ("monitor", config.monitor != old.monitor),
            (
                "default_runtime",
                config.default_runtime != old.default_runtime,
            ),
            (
                "restrict_oom_score_adj",
                config.restrict_oom_score_adj != old.restrict_oom_score_adj,
            ),
            (
                "default_cgroup_parent",
                config.default_cgroup_parent != old.default_cgroup_parent,
            ),
            (
                "enable_selinux",
                config.enable_selinux != old.enable_selinux,
            ),
            (
                "selinux_category_range",
                config.selinux_category_range != old.selinux_category_range,
            ),
            ("[runtime]", config.runtimes != old.runtimes),
            ("[network]", config.network != old.network),
            ("[cni]", config.cni != old.cni),
            ("[image]", config.images != old.images),
            ("image.pinned", config.pins != old.pins),
        ];
        let waiting: Vec<&str> = changed
            .iter()
            .filter_map(|(key, changed)| changed.then_some(*key))
            .collect();
        if !waiting.is_empty() {
            log::warn!(
                "SIGHUP: changed, and in force with the next start: {}",
                waiting.join(", ")
            );
        } else if config == *old {
            log::info!("SIGHUP: the configuration is as it was");
        } else if config.debug == old.debug {
            log::warn!("SIGHUP: the configuration has changed, in force with the next start");
        }
        self.config = config;
    }

    /// hosts.toml files are read at each pull; here is told what the next one will find.
    fn look_at_registries(&mut self) -> Option<String> {
        let mut wrong = None;
        let now = self.registries.files();
        for (path, text) in &now {
            if self.hosts.get(path) == Some(text) {
                continue;
            }
            match self.registries.check(path) {
                Ok(()) => log::info!("SIGHUP: {} has changed and is in force", path.display()),
                Err(error) => {
                    log::error!("SIGHUP: {error}");
                    wrong = Some(error.to_string());
                }
            }
        }
        for path in self.hosts.keys().filter(|path| !now.contains_key(*path)) {
            log::info!("SIGHUP: {} is gone", path.display());
        }
        self.hosts = now;
        wrong
    }
}
