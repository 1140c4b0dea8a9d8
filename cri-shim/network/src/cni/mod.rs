//! Pod networks that CNI plugins create, according to the Container Network Interface specification
//! 1.1.0.
//!
//! [`configuration`] reads the CNI configurations from their directory. [`plugin`] runs one plugin,
//! and [`chain`] runs the plugins of a network in their order. [`runtime_config`] collects the data
//! that plugins receive about a pod. [`attachment`] records the parameters with which plugins are
//! run. [`result`] parses the results of plugins. [`readiness`] runs the STATUS command of plugins.
//! [`teardown`] ensures that each ADD is followed by a DEL. [`watch`] detects changed
//! configurations.
//!
//! Before a pod's ADD, the server writes the parameters of the ADD to the store. After the ADD, the
//! server writes the results to the store. DEL therefore gets the same configuration as ADD, even
//! if the files have changed. The same applies after a crash or a reboot.

mod attachment;
mod chain;
mod configuration;
#[cfg(feature = "fuzz")]
pub(crate) mod fuzz;
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

use crate::host_ports::Listener;
use crate::namespace::{self, Namespaces};
use attachment::{AttachedPod, AttachmentRecord, NetworkRecord};
use configuration::{ConfigurationList, Fingerprint};
use plugin::PluginDirs;
use readiness::Readiness;
use rrun_calls::error::{Error, Result};
use rrun_calls::lock::lock;
use rrun_calls::wait::{blocking, slow};
use rrun_store::{Change, Store, StoreError, Table};

/// The timeout of the GC command of a plugin.
const GC_TIMEOUT: Duration = Duration::from_secs(10);

/// The delay after which invalid configurations are read again. A configuration can be invalid
/// because its file was read while a program was writing it. The background task for GC also uses
/// this constant, as the interval between its attempts to lock `gc_lock`.
const REREAD_DELAY: Duration = Duration::from_millis(100);

/// The key in [`Table::NETWORK`] under which the node's pod ranges are stored.
const RANGES_KEY: &str = "ranges";

/// The networks that the CNI configurations in the configuration directory define. Clones share one
/// state.
#[derive(Clone)]
pub struct Cni {
    inner: Arc<CniState>,
}

struct CniState {
    settings: CniSettings,
    /// The directory that contains the CNI configurations.
    conf_dir: PathBuf,
    /// The pods' network namespaces.
    namespaces: Namespaces,
    directories: PluginDirs,
    store: Store,
    configured: Mutex<LoadedConfigurations>,
    attachments: Mutex<HashMap<String, AttachedPod>>,
    /// The node's pod ranges, which kubelet sends with UpdateRuntimeConfig.
    ranges: Mutex<Vec<String>>,
    /// The lock that keeps GC apart from ADD and DEL. ADD and DEL lock it for reading, and GC locks
    /// it for writing. The CNI specification requires that GC never runs in parallel with ADD or
    /// DEL.
    gc_lock: RwLock<()>,
    /// The notification that the configurations have changed. The background tasks for failed DELs
    /// wait for this notification, because a DEL may succeed with the new configurations.
    changed: Notify,
    /// The notification that wakes the background task for GC.
    collect: Notify,
    readiness: Readiness,
    /// True after [`Cni::start`] was called. Before `start`, DEL runs no plugins, because the
    /// server has not yet found all partly created pods.
    started: AtomicBool,
}

/// The CNI configurations that the server uses, as it last read them from the files.
struct LoadedConfigurations {
    /// The fingerprint of the configuration files at the time when they were last read. `None`
    /// means that the files must be read again, because the last attempt failed. The failure can
    /// have a cause that passes, for example a lack of descriptors.
    seen: Option<Fingerprint>,
    /// True after the first attempt to read the files.
    was_read: bool,
    lists: std::result::Result<Arc<Vec<ConfigurationList>>, String>,
    /// The number of times that the CNI configurations have changed since the server's start.
    generation: u64,
}

impl Cni {
    /// Loads from the store the records of all pods that CNI plugins have connected. No plugin is
    /// run before [`Cni::start`].
    ///
    /// `plugin_dirs` are the directories that contain plugins. If several directories contain the
    /// same plugin, the first of these directories takes precedence.
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
                    was_read: false,
                    lists: Ok(Arc::default()),
                    generation: 0,
                }),
                attachments: Mutex::new(attachments),
                ranges: Mutex::new(ranges),
                gc_lock: RwLock::default(),
                changed: Notify::new(),
                collect: Notify::new(),
                readiness: Readiness::default(),
                started: AtomicBool::new(false),
            }),
        })
    }

    /// Returns whether a CNI configuration exists, even if the configuration is invalid.
    pub(crate) async fn is_configured(&self) -> bool {
        let lists = self.read_lists().await;
        !lists.is_ok_and(|lists| lists.is_empty())
    }

    /// Reads the configurations like [`Cni::lists`], but reads them a second time after a failure.
    /// Another program can be writing a configuration file.
    async fn read_lists(&self) -> std::result::Result<Arc<Vec<ConfigurationList>>, String> {
        match self.lists().await {
            Ok(lists) => Ok(lists),
            Err(_) => {
                tokio::time::sleep(REREAD_DELAY).await;
                self.lists().await
            }
        }
    }

    /// Returns the numbers of all TCP host ports.
    pub(crate) fn tcp_ports(&self) -> Result<Vec<u16>> {
        let records = self.inner.store.load(Table::ATTACHMENTS)?.into_iter();
        let ports = records.flat_map(|(_, record): (String, AttachmentRecord)| {
            runtime_config::tcp_ports(&record.capabilities)
        });
        Ok(ports.collect())
    }

    /// Returns whether plugins have connected the pod or are going to connect it.
    pub(crate) fn has(&self, pod: &str) -> bool {
        lock(&self.inner.attachments).contains_key(pod)
    }

    /// Returns an error if CNI_ARGS or the capability arguments cannot represent the pod
    /// configuration.
    pub(crate) fn check(&self, config: &PodSandboxConfig) -> Result<()> {
        runtime_config::arguments("", config)?;
        runtime_config::capabilities(config, &[]).map(drop)
    }

    /// Writes the parameters of the pod's ADD to the store. The caller must call this function
    /// before [`Cni::attach`]. `listeners` are the sockets on which the server itself listens.
    pub(crate) async fn reserve(
        &self,
        pod: &str,
        config: &PodSandboxConfig,
        listeners: &[Listener],
    ) -> Result<()> {
        let lists = self.read_lists().await.map_err(Error::internal)?;
        if lists.is_empty() {
            return Err(Error::internal(self.inner.no_configuration()));
        }
        // The binaries of all plugins are checked before the first plugin is run. Without this
        // check, ADD would fail at a missing binary. A DEL must follow each ADD, and this DEL would
        // fail for the same reason.
        self.inner.check_binaries(&lists).map_err(Error::internal)?;
        let ranges = lock(&self.inner.ranges).clone();
        let capabilities = runtime_config::capabilities(config, &ranges)?;
        if lists.iter().any(|list| list.requests("portMappings")) {
            runtime_config::check_listeners(config, listeners)?;
        } else if capabilities.contains_key("portMappings") {
            log::warn!(
                "pod {pod} maps host ports (port_mappings), but no CNI plugin has the capability \
                 portMappings: the ports will not be open"
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
            // Parts of a failed commit can nevertheless be in the store.
            let deletion = Change::delete(Table::ATTACHMENTS, pod);
            drop(self.inner.store.commit_soon(vec![deletion]));
            lock(&self.inner.attachments).remove(pod);
        }
        written
    }

    /// Runs ADD for the pod in every network, and returns the pod's addresses. The pod's network
    /// namespace is pinned at `netns`. If this call fails, the caller must call [`Cni::detach`].
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
                .ok_or_else(|| {
                    Error::internal(format!("pod {pod}: no CNI network was reserved for it"))
                })?
        };
        let _plugins = plugin_lock.lock().await;
        let _gc_lock = slow(
            format!("pod {pod}: wait until CNI's GC ends"),
            inner.gc_lock.read(),
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
                Error::internal(format!("add the pod to the CNI network {name}: {why}"))
            };
            let result = result.map_err(|error| failed(&error))?;
            let found = result::addresses(&result, &network.interface);
            let found = found.map_err(|why| failed(&why))?;
            // The pod's status shows only the addresses that the pod has in the first network.
            addresses.get_or_insert(found);
            network.result = Some(result);
        }
        let addresses = addresses.unwrap_or_default();
        if addresses.is_empty() {
            return Err(Error::internal(format!(
                "the CNI network {} assigned no address to the pod",
                record.networks.first().map_or("", |one| &one.list.name)
            )));
        }
        inner.write(pod, &record)?.await.map_err(Error::from)?;
        if let Some(attachment) = lock(&inner.attachments).get_mut(pod) {
            attachment.record = None;
        }
        Ok(addresses)
    }

    /// Starts the background tasks, which run DEL for deleted pods, watch the configuration
    /// directory, and run GC and CHECK. `live` contains the ids of the pods that still exist.
    pub(crate) fn start(&self, live: &HashSet<String>) {
        self.inner.started.store(true, Ordering::Release);
        let dead: Vec<String> = {
            let attachments = lock(&self.inner.attachments);
            let pods = attachments.keys();
            pods.filter(|pod| !live.contains(*pod)).cloned().collect()
        };
        for pod in dead {
            log::info!(
                "pod {pod}: the pod no longer exists, so the server removes its CNI networks"
            );
            self.adopt(&pod);
        }
        tokio::spawn(self.clone().watch());
        tokio::spawn(self.clone().collect_garbage());
        tokio::spawn(self.clone().check_all(live.clone()));
        self.inner.collect.notify_one();
    }

    /// Reads the configuration directory again, and wakes the tasks that retry failed DELs.
    pub(crate) async fn reload(&self) {
        // An error is ignored here, because `lists` has already logged it.
        let _ = self.lists().await;
        self.inner.changed.notify_waiters();
    }

    /// Reads the configuration directory again whenever it changes, until the server exits.
    async fn watch(self) {
        let dir = &self.inner.conf_dir;
        loop {
            self.reload().await;
            if let Err(error) = watch::changed(dir).await {
                log::warn!(
                    "watch {}: {error}; the server detects changed CNI configurations only when it \
                     creates pods",
                    dir.display()
                );
                return;
            }
        }
    }

    /// Sets the node's pod ranges, for plugins with the capability `ipRanges`. `cidrs` is a
    /// comma-separated list of the ranges.
    pub(crate) async fn set_ranges(&self, cidrs: &str) -> Result<()> {
        let ranges: Vec<String> = cidrs.split(',').map(|one| one.trim().to_owned()).collect();
        let is_range = |text: &String| {
            let parts = text.split_once('/');
            parts.is_some_and(|(address, prefix)| {
                let max_prefix = match address.parse() {
                    Ok(IpAddr::V4(_)) => 32,
                    Ok(IpAddr::V6(_)) => 128,
                    Err(_) => return false,
                };
                prefix
                    .parse::<u8>()
                    .is_ok_and(|prefix| prefix <= max_prefix)
            })
        };
        if let Some(wrong) = ranges.iter().find(|range| !is_range(range)) {
            return Err(Error::invalid(format!(
                "pod_cidr contains {wrong:?}, which is not an address range such as 10.1.0.0/24"
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

    /// Returns the entries about CNI for the response to a verbose Status request, under the names
    /// that containerd uses.
    pub(crate) async fn status_info(&self) -> [(&'static str, String); 2] {
        let lists = self.lists().await;
        let loaded = match &lists {
            Ok(lists) if lists.is_empty() => self.inner.no_configuration(),
            Ok(_) => "OK".to_owned(),
            Err(error) => error.clone(),
        };
        let lists = lists.unwrap_or_default();
        let networks = lists.iter().enumerate();
        let networks = networks.map(|(at, list)| list.status_info(&format!("eth{at}")));
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

    /// Returns the result of the pod's ADD for each network, for the response to a verbose
    /// PodSandboxStatus request.
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

    /// Runs GC after the server's start and after each change of the configurations. GC waits until
    /// no ADD or DEL is in progress.
    async fn collect_garbage(self) {
        loop {
            self.inner.collect.notified().await;
            let Ok(lists) = self.lists().await else {
                continue;
            };
            // This loop repeatedly tries to lock `gc_lock` and never waits for the lock. If GC
            // waited for the lock with `write`, one hanging ADD would delay GC. GC would then delay
            // all later ADDs.
            let _alone = loop {
                match self.inner.gc_lock.try_write() {
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

    /// Runs CHECK for the pods that an earlier server process attached, one pod after another. A
    /// failed CHECK is only logged, because a runtime must not repair a pod's network.
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
                    log::warn!("pod {pod}: CHECK of its CNI network {name} failed: {error}");
                }
            }
        }
    }
}

impl CniState {
    /// Returns the current CNI configurations. The configuration files are read again only if they
    /// have changed. This function blocks on disk I/O.
    fn refresh(&self) -> std::result::Result<Arc<Vec<ConfigurationList>>, String> {
        let (files, seen) = configuration::scan(&self.conf_dir)?;
        {
            let configured = lock(&self.configured);
            if configured.seen.as_ref() == Some(&seen) {
                return configured.lists.clone();
            }
        }
        let lists = configuration::load(&files, self.settings.max_conf_num).map(Arc::new);
        let mut configured = lock(&self.configured);
        let first = !std::mem::replace(&mut configured.was_read, true);
        configured.seen = lists.is_ok().then_some(seen);
        if configured.lists == lists && !first {
            return lists;
        }
        match &lists {
            Ok(lists) if lists.is_empty() && first => {}
            Ok(lists) if lists.is_empty() => log::info!("{}", self.no_configuration()),
            Ok(lists) => {
                for list in lists.iter() {
                    log::info!(
                        "the CNI network {} of {}, version {}, is in use",
                        list.name,
                        list.file.display(),
                        list.version
                    );
                }
                if let Err(missing) = self.check_binaries(lists) {
                    log::warn!("no pod can be connected to a network: {missing}");
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

    /// Fails if the binary of a plugin is missing. The error is a sentence.
    fn check_binaries(&self, lists: &[ConfigurationList]) -> std::result::Result<(), String> {
        for list in lists {
            for plugin in &list.plugins {
                let found = self.directories.find(configuration::kind(plugin));
                found.map_err(|error| format!("{}: {error}", list.file.display()))?;
            }
        }
        Ok(())
    }

    fn no_configuration(&self) -> String {
        format!(
            "there is no CNI configuration in {}",
            self.conf_dir.display()
        )
    }

    /// Queues a write of the pod's attachment record to the store. The returned future completes
    /// when the record is on the disk.
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

    /// Returns the path of the pod's pinned network namespace. The path is empty if the namespace
    /// no longer exists.
    fn pinned(&self, pod: &str) -> String {
        let path = self.namespaces.of(pod);
        if namespace::is_pinned(&path) {
            path.to_string_lossy().into_owned()
        } else {
            String::new()
        }
    }

    /// Returns the attachments of a network. Each attachment is a pair of a pod id and an interface
    /// name.
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
