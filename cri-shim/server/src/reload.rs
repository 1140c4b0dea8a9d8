//! Reload of the configuration on SIGHUP. Changed settings take effect if they do not require a
//! restart. The log lists the changed keys that require a restart.

use std::collections::BTreeMap;
use std::path::PathBuf;
use std::sync::Arc;

use crate::config::{Config, ConfigSource, changed_keys};
use crate::node::Node;
use crate::stderr_log;
use rrun_images::Registries;

/// The configuration that is in effect. A reload compares this configuration with the files on the
/// disk.
pub(crate) struct Reload {
    source: ConfigSource,
    config: Config,
    registries: Registries,
    /// The paths and contents that the hosts.toml files had at the last reload.
    hosts: BTreeMap<PathBuf, Vec<u8>>,
}

impl Reload {
    /// Checks the registries' hosts.toml files and logs their errors. This call blocks on disk I/O.
    pub(crate) fn new(source: ConfigSource, node: &Arc<Node>) -> Self {
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

    /// Reads the whole configuration again. Returns an error text if the configuration contains a
    /// mistake. This call blocks on disk I/O.
    pub(crate) fn run(&mut self) -> Option<String> {
        let mut wrong = None;
        match self.source.load() {
            Ok(config) => self.apply(config),
            Err(error) => {
                let what = format!("{error}; the previous configuration remains in effect");
                log::error!("SIGHUP: {what}");
                wrong = Some(what);
            }
        }
        wrong.or(self.check_registries())
    }

    /// Applies the changed settings that need no restart. Logs the changed keys that need a
    /// restart.
    fn apply(&mut self, config: Config) {
        let mut changed = changed_keys(&self.config, &config);
        if changed.is_empty() {
            log::info!("SIGHUP: the configuration has not changed");
        }
        if config.debug != self.config.debug {
            stderr_log::set_level(config.debug);
            log::info!("SIGHUP: debug is now {}", config.debug);
        }
        stderr_log::set_max_lines(config.log_lines);
        if config.log_lines != self.config.log_lines {
            log::info!("SIGHUP: log_lines is now {}", config.log_lines);
        }
        changed.retain(|key| key != "debug" && key != "log_lines");
        if !changed.is_empty() {
            log::warn!(
                "SIGHUP: these changed keys take effect at the next start: {}",
                changed.join(", ")
            );
        }
        self.config = config;
    }

    /// Checks the hosts.toml files that have changed, and logs their errors. The server does
    /// nothing else to apply the changes, because each pull reads the hosts.toml files again.
    fn check_registries(&mut self) -> Option<String> {
        let mut wrong = None;
        let now = self.registries.files();
        for (path, text) in &now {
            if self.hosts.get(path) == Some(text) {
                continue;
            }
            match self.registries.check(path) {
                Ok(()) => log::info!("SIGHUP: {} has changed and is in effect", path.display()),
                Err(error) => {
                    log::error!("SIGHUP: {error}");
                    wrong = Some(error.to_string());
                }
            }
        }
        for path in self.hosts.keys().filter(|path| !now.contains_key(*path)) {
            log::info!(
                "SIGHUP: {} no longer exists, so its settings no longer apply",
                path.display()
            );
        }
        self.hosts = now;
        wrong
    }
}
