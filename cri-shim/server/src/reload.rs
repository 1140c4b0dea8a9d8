//! SIGHUP: the configuration is read again. What can change while the server runs does, the log
//! says what, and what can't is named.

use std::collections::BTreeMap;
use std::path::PathBuf;
use std::sync::Arc;

use crate::config::{Config, ConfigSource, changed_keys};
use crate::node::Node;
use crate::stderr_log;
use rrun_images::Registries;

/// What the last reload found.
pub(crate) struct Reload {
    source: ConfigSource,
    config: Config,
    registries: Registries,
    /// The hosts.toml files.
    hosts: BTreeMap<PathBuf, Vec<u8>>,
}

impl Reload {
    /// Logs what in the registries' configuration can't be understood. Blocks on the disk.
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

    /// Puts into force what can be, and logs which keys wait for the next start.
    fn take(&mut self, config: Config) {
        let mut changed = changed_keys(&self.config, &config);
        if changed.is_empty() {
            log::info!("SIGHUP: the configuration is as it was");
        }
        if config.debug != self.config.debug {
            stderr_log::set_level(config.debug);
            log::info!("SIGHUP: debug is {} now", config.debug);
        }
        changed.retain(|key| key != "debug");
        if !changed.is_empty() {
            log::warn!(
                "SIGHUP: changed, and in force with the next start: {}",
                changed.join(", ")
            );
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
