//! Pods' networks by plugins, as the Container Network Interface specification, 1.1.0, has it.
//!
//! [`configuration`] reads the directory of configurations, [`plugin`] runs one plugin, [`chain`]
//! those of a network in their order, [`runtime_config`] says what plugins get to know of a pod,
//! [`attachment`] is what they were called with, [`result`] reads what they answer, [`readiness`]
//! asks them for their STATUS, [`teardown`] sees to it that each ADD meets its DEL, [`watch`]
//! notices new configurations.
//!
//! Before a pod's first ADD the store has what it is ADDed with, and after it the results: DEL gets
//! the same configuration, whatever has become of the files, after a crash, after a reboot.

mod attachment;
mod chain;
mod configuration;
mod leftover;
mod plugin;
mod readiness;
mod result;
mod runtime_config;
mod settings;
mod teardown;
mod watch;

use std::collections::{HashMap, HashSet};
use std::net::IpAddr;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use futures_util::future::join_all;
use rrun_proto::v1::PodSandboxConfig;
use serde_json::{Value, json};
use tokio::sync::{Notify, RwLock};
use tokio::time::Instant;

pub use settings::CniSettings;
pub use teardown::{DetachOutcome, RetryBy};

use crate::namespace::{self, Namespaces};
use attachment::{AttachedPod, AttachmentRecord, NetworkRecord};
use configuration::{ConfigurationList, Fingerprint};
use plugin::PluginDirs;
use readiness::Readiness;
use rrun_calls::error::{Error, Result};
use rrun_calls::lock::lock;
use rrun_calls::wait::{blocking, slow};
use rrun_store::{Change, Store, StoreError, Table};

/// How long a plugin may take for GC.
const GC_TIMEOUT: Duration = Duration::from_secs(10);

/// A file that is just being written is read again after this long.
const REREAD_DELAY: Duration = Duration::from_millis(100);

/// Where the node's ranges for pods are in [`Table::NETWORK`].
const RANGES_KEY: &str = "ranges";

/// The networks of the configuration directory; clones share one state.
#[derive(Clone)]
pub struct Cni {
    inner: Arc<CniState>,
}

struct CniState {
    settings: CniSettings,
    /// Where configurations are.
    conf_dir: PathBuf,
    /// Where pods' namespaces are.
    namespaces: Namespaces,
    directories: PluginDirs,
    store: Store,
    configured: Mutex<LoadedConfigurations>,
    attachments: Mutex<HashMap<String, AttachedPod>>,
    /// The node's ranges for pods, as kubelet tells them.
    ranges: Mutex<Vec<String>>,
    /// ADD and DEL share it, GC has it alone: the specification wants them apart.
    at_work: RwLock<()>,
    /// A new configuration is in use: it wants GC, and what failed may work now.
    changed: Notify,
    collect: Notify,
    readiness: Readiness,
    /// Set by `start`: half-made pods are known, so plugins may run.
    started: AtomicBool,
}

/// The configurations in use.
struct LoadedConfigurations {
    /// `None`: never looked.
    seen: Option<Fingerprint>,
    lists: std::result::Result<Arc<Vec<ConfigurationList>>, String>,
    /// How often they have changed.
    generation: u64,
}

impl Cni {
    /// Reads which pods plugins know. None is run until [`Cni::start`].
    ///
    /// `plugin_dirs`: the first directory that has a plugin wins.
    pub fn open(
        store: Store,
        settings: CniSettings,
        conf_dir: PathBuf,
        plugin_dirs: Vec<PathBuf>,
        namespaces: Namespaces,
    ) -> std::result::Result<Cni, StoreError> {
        let mut attachments = HashMap::new();
        for (pod, record) in store.load::<AttachmentRecord>(Table::ATTACHMENTS)? {
            let attachment = AttachedPod {
                inherited: true,
                ..AttachedPod::new(&record)
            };
            attachments.insert(pod, attachment);
        }
        let ranges = store.get(Table::NETWORK, RANGES_KEY)?.unwrap_or_default();
        Ok(Cni {
            inner: Arc::new(CniState {
                directories: PluginDirs::new(plugin_dirs),
                settings,
                conf_dir,
                namespaces,
                store,
                configured: Mutex::new(LoadedConfigurations {
                    seen: None,
                    lists: Ok(Arc::default()),
                    generation: 0,
                }),
                attachments: Mutex::new(attachments),
                ranges: Mutex::new(ranges),
                at_work: RwLock::default(),
                changed: Notify::new(),
                collect: Notify::new(),
                readiness: Readiness::default(),
                started: AtomicBool::new(false),
            }),
        })
    }

    /// Whether there is a configuration, be it broken.
    pub(crate) async fn is_configured(&self) -> bool {
        let lists = self.lists().await;
        !lists.is_ok_and(|lists| lists.is_empty())
    }

    /// Whether plugins know the pod, or are about to.
    pub(crate) fn has(&self, pod: &str) -> bool {
        lock(&self.inner.attachments).contains_key(pod)
    }

    /// Refuses what could not be passed on to plugins.
    pub(crate) fn check(&self, config: &PodSandboxConfig) -> Result<()> {
        runtime_config::arguments("", config)?;
        runtime_config::capabilities(config, &[]).map(drop)
    }

    /// Writes down what the pod is to be ADDed with, ahead of [`Cni::attach`].
    pub(crate) async fn reserve(&self, pod: &str, config: &PodSandboxConfig) -> Result<()> {
        let mut lists = self.lists().await;
        if lists.is_err() {
            tokio::time::sleep(REREAD_DELAY).await;
            lists = self.lists().await;
        }
        let lists = lists.map_err(Error::internal)?;
        if lists.is_empty() {
            return Err(Error::internal(self.inner.none()));
        }
        // Before any is run: one that is not there could not DEL either.
        self.inner.all_there(&lists).map_err(Error::internal)?;
        let ranges = lock(&self.inner.ranges).clone();
        let capabilities = runtime_config::capabilities(config, &ranges)?;
        if capabilities.contains_key("portMappings")
            && !lists.iter().any(|list| list.takes("portMappings"))
        {
            log::warn!(
                "pod {pod} maps host ports (port_mappings), and no CNI plugin takes them \
                 (capabilities.portMappings): they will not be open"
            );
        }
        let networks = lists.iter().enumerate().map(|(at, list)| NetworkRecord {
            interface: format!("eth{at}"),
            list: list.clone(),
            result: None,
        });
        let record = AttachmentRecord {
            arguments: runtime_config::arguments(pod, config)?,
            capabilities,
            networks: networks.collect(),
        };
        let written = self.inner.write(pod, &record)?;
        let attachment = AttachedPod {
            record: Some(Arc::new(record.clone())),
            ..AttachedPod::new(&record)
        };
        lock(&self.inner.attachments).insert(pod.to_owned(), attachment);
        let written = written.await.map_err(Error::from);
        if written.is_err() {
            lock(&self.inner.attachments).remove(pod);
        }
        written
    }

    /// ADDs the pod, whose namespace is pinned at `netns`, to every network: its addresses. If it
    /// fails, [`Cni::detach`] has to follow.
    pub(crate) async fn attach(&self, pod: &str, netns: &Path) -> Result<Vec<IpAddr>> {
        let inner = &self.inner;
        let (plugin_lock, record) = {
            let attachments = lock(&inner.attachments);
            let attachment = attachments.get(pod);
            attachment
                .and_then(|one| {
                    Some((
                        Arc::clone(&one.plugin_lock),
                        Arc::clone(one.record.as_ref()?),
                    ))
                })
                .ok_or_else(|| Error::internal(format!("pod {pod} has no network to be made")))?
        };
        let _plugins = plugin_lock.lock().await;
        let _at_work = slow(
            format!("pod {pod}: the end of CNI's GC"),
            inner.at_work.read(),
        )
        .await;
        let netns = netns.to_string_lossy();
        let deadline = Instant::now() + inner.settings.timeout();
        let adds = record.networks.iter().map(|network| {
            let target = record.target(network, pod, &netns);
            chain::add(&inner.directories, &network.list, target, deadline)
        });
        let results = join_all(adds).await;
        let mut record = AttachmentRecord::clone(&record);
        let mut addresses = None;
        for (network, result) in record.networks.iter_mut().zip(results) {
            let name = &network.list.name;
            let failed = |why: &dyn std::fmt::Display| {
                Error::internal(format!("add it to the CNI network {name}: {why}"))
            };
            let result = result.map_err(|error| failed(&error))?;
            let found = result::addresses(&result, &network.interface);
            let found = found.map_err(|why| failed(&why))?;
            // The status shows those of the first.
            addresses.get_or_insert(found);
            network.result = Some(result);
        }
        let addresses = addresses.unwrap_or_default();
        if addresses.is_empty() {
            return Err(Error::internal(format!(
                "the CNI network {} gave it no address",
                record.networks.first().map_or("", |one| &one.list.name)
            )));
        }
        inner.write(pod, &record)?.await.map_err(Error::from)?;
        if let Some(attachment) = lock(&inner.attachments).get_mut(pod) {
            attachment.record = None;
        }
        Ok(addresses)
    }

    /// Sees to pods that are gone, whatever kept their DEL, watches the directory, and collects
    /// what belongs to nobody. `live` are the pods that are there.
    pub(crate) fn start(&self, live: &HashSet<String>) {
        self.inner.started.store(true, Ordering::Release);
        let dead: Vec<String> = {
            let attachments = lock(&self.inner.attachments);
            let pods = attachments.keys();
            pods.filter(|pod| !live.contains(*pod)).cloned().collect()
        };
        for pod in dead {
            log::info!("pod {pod}: is not there, its CNI networks are taken away");
            self.adopt(&pod);
        }
        tokio::spawn(self.clone().watch());
        tokio::spawn(self.clone().collect_garbage());
        tokio::spawn(self.clone().check_all(live.clone()));
        self.inner.collect.notify_one();
    }

    /// Looks at the directory again.
    pub(crate) async fn reload(&self) {
        // What is wrong has been logged.
        let _ = self.lists().await;
        self.inner.changed.notify_waiters();
    }

    /// Looks at the directory again whenever it changes, until the server ends.
    async fn watch(self) {
        let dir = &self.inner.conf_dir;
        loop {
            self.reload().await;
            if let Err(error) = watch::changed(dir).await {
                log::warn!(
                    "watch {}: {error}; new configurations are found when pods are made",
                    dir.display()
                );
                return;
            }
        }
    }

    /// The node's ranges for pods, comma-separated, for plugins that take `ipRanges`.
    pub(crate) async fn set_ranges(&self, cidrs: &str) -> Result<()> {
        let ranges: Vec<String> = cidrs.split(',').map(|one| one.trim().to_owned()).collect();
        let is_range = |text: &String| {
            let parts = text.split_once('/');
            parts.is_some_and(|(address, prefix)| {
                let most = match address.parse() {
                    Ok(IpAddr::V4(_)) => 32,
                    Ok(IpAddr::V6(_)) => 128,
                    Err(_) => return false,
                };
                prefix.parse::<u8>().is_ok_and(|prefix| prefix <= most)
            })
        };
        if let Some(wrong) = ranges.iter().find(|range| !is_range(range)) {
            return Err(Error::invalid(format!(
                "pod_cidr has {wrong:?}, which is no range of addresses"
            )));
        }
        let change = Change::put(Table::NETWORK, RANGES_KEY, &ranges).map_err(Error::from)?;
        let written = {
            let mut now = lock(&self.inner.ranges);
            *now = ranges;
            self.inner.store.commit(vec![change])
        };
        written.await.map_err(Error::from)
    }

    /// What the verbose Status shows, by containerd's names.
    pub(crate) async fn shown(&self) -> [(&'static str, String); 2] {
        let lists = self.lists().await;
        let loaded = match &lists {
            Ok(lists) if lists.is_empty() => self.inner.none(),
            Ok(_) => "OK".to_owned(),
            Err(error) => error.clone(),
        };
        let lists = lists.unwrap_or_default();
        let networks = lists.iter().enumerate();
        let networks = networks.map(|(at, list)| list.shown(&format!("eth{at}")));
        let networks: Vec<Value> = networks.collect();
        let config = json!({
            "PluginDirs": self.inner.directories.all(),
            "PluginConfDir": self.inner.conf_dir,
            "PluginMaxConfNum": self.inner.settings.max_conf_num,
            "Prefix": "eth",
            "Networks": networks,
        });
        [
            ("cniconfig", config.to_string()),
            ("lastCNILoadStatus", loaded),
        ]
    }

    /// What ADD gave the pod, by network, for the verbose PodSandboxStatus.
    pub(crate) async fn results(&self, pod: &str) -> Option<Value> {
        if !self.has(pod) {
            return None;
        }
        let record = self.inner.record(pod).await.ok()??;
        let results = record.networks.into_iter();
        let results = results.map(|one| (one.list.name, one.result.unwrap_or_default()));
        Some(Value::Object(results.collect()))
    }

    async fn lists(&self) -> std::result::Result<Arc<Vec<ConfigurationList>>, String> {
        let inner = Arc::clone(&self.inner);
        let what = format!(
            "read the CNI configurations in {}",
            inner.conf_dir.display()
        );
        blocking(what, move || inner.refresh()).await
    }

    /// GC at the start and after each change, while no ADD or DEL is under way.
    async fn collect_garbage(self) {
        loop {
            self.inner.collect.notified().await;
            let Ok(lists) = self.lists().await else {
                continue;
            };
            // A writer that waits would hold up every ADD behind one that hangs.
            let _alone = loop {
                match self.inner.at_work.try_write() {
                    Ok(alone) => break alone,
                    Err(_) => tokio::time::sleep(REREAD_DELAY).await,
                }
            };
            for list in lists.iter() {
                let valid = self.inner.valid(&list.name);
                let collected = chain::gc(&self.inner.directories, list, &valid, GC_TIMEOUT).await;
                if let Err(error) = collected {
                    log::warn!("collect garbage of the CNI network {}: {error}", list.name);
                }
            }
        }
    }

    /// CHECKs the pods that an earlier life of the server has left, one after another. The log has
    /// what is wrong: it is not for the runtime to mend.
    async fn check_all(self, live: HashSet<String>) {
        for pod in live {
            let plugin_lock = lock(&self.inner.attachments)
                .get(&pod)
                .map(|one| Arc::clone(&one.plugin_lock));
            let Some(plugin_lock) = plugin_lock else {
                continue;
            };
            let _plugins = plugin_lock.lock().await;
            let Ok(Some(record)) = self.inner.record(&pod).await else {
                continue;
            };
            let netns = self.inner.pinned(&pod);
            let deadline = Instant::now() + self.inner.settings.timeout();
            for network in &record.networks {
                let Some(result) = &network.result else {
                    continue;
                };
                let target = record.target(network, &pod, &netns);
                let (list, directories) = (&network.list, &self.inner.directories);
                let checked = chain::check(directories, list, target, result, deadline).await;
                if let Err(error) = checked {
                    let name = &list.name;
                    log::warn!("pod {pod}: its CNI network {name} is not as it was made: {error}");
                }
            }
        }
    }
}

impl CniState {
    /// The configurations as they are now; unchanged ones are not read again. Blocks.
    fn refresh(&self) -> std::result::Result<Arc<Vec<ConfigurationList>>, String> {
        let (files, seen) = configuration::look(&self.conf_dir)?;
        {
            let configured = lock(&self.configured);
            if configured.seen.as_ref() == Some(&seen) {
                return configured.lists.clone();
            }
        }
        let lists = configuration::load(&files, self.settings.max_conf_num).map(Arc::new);
        let mut configured = lock(&self.configured);
        let first = configured.seen.is_none();
        configured.seen = Some(seen);
        if configured.lists == lists && !first {
            return lists;
        }
        match &lists {
            Ok(lists) if lists.is_empty() && first => {}
            Ok(lists) if lists.is_empty() => log::info!("{}", self.none()),
            Ok(lists) => {
                for list in lists.iter() {
                    log::info!(
                        "the CNI network {} of {}, version {}, is in use",
                        list.name,
                        list.file.display(),
                        list.version
                    );
                }
                if let Err(missing) = self.all_there(lists) {
                    log::warn!("no pod can be given a network: {missing}");
                }
            }
            Err(error) => log::error!("no CNI network can be used: {error}"),
        }
        configured.lists.clone_from(&lists);
        configured.generation += 1;
        drop(configured);
        self.changed.notify_waiters();
        self.collect.notify_one();
        lists
    }

    /// A sentence if a plugin's binary is missing.
    fn all_there(&self, lists: &[ConfigurationList]) -> std::result::Result<(), String> {
        for list in lists {
            for plugin in &list.plugins {
                let found = self.directories.find(configuration::kind(plugin));
                found.map_err(|error| format!("{}: {error}", list.file.display()))?;
            }
        }
        Ok(())
    }

    fn none(&self) -> String {
        format!(
            "there is no CNI configuration in {}",
            self.conf_dir.display()
        )
    }

    /// Queues the record to be written; the future ends when it is on the disk.
    fn write(
        &self,
        pod: &str,
        record: &AttachmentRecord,
    ) -> Result<impl Future<Output = std::result::Result<(), StoreError>> + use<>> {
        let change = Change::put(Table::ATTACHMENTS, pod, record).map_err(Error::from)?;
        Ok(self.store.commit(vec![change]))
    }

    async fn record(&self, pod: &str) -> Result<Option<AttachmentRecord>> {
        let (store, key) = (self.store.clone(), pod.to_owned());
        let read = move || store.get(Table::ATTACHMENTS, &key);
        blocking(format!("pod {pod}: read its CNI networks"), read)
            .await
            .map_err(Error::from)
    }

    /// The path of the pod's namespace; empty if it is gone.
    fn pinned(&self, pod: &str) -> String {
        let path = self.namespaces.of(pod);
        if namespace::is_pinned(&path) {
            path.to_string_lossy().into_owned()
        } else {
            String::new()
        }
    }

    /// The attachments of a network, pod and interface.
    fn valid(&self, network: &str) -> Vec<(String, String)> {
        let attachments = lock(&self.attachments);
        let mut valid = Vec::new();
        for (pod, attachment) in attachments.iter() {
            for (name, interface) in &attachment.networks {
                if name == network {
                    valid.push((pod.clone(), interface.clone()));
                }
            }
        }
        valid
    }
}
