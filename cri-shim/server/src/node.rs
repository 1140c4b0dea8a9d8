//! What the server knows of its node. Memory is what it works from; the store follows.

use std::cmp::Reverse;
use std::collections::BTreeMap;
use std::path::PathBuf;
use std::sync::{Arc, Mutex, MutexGuard};
use std::time::Duration;

use rrun_proto::v1::PodSandboxMetadata;

use crate::config::Config;
use crate::container::Container;
use crate::container::trash::Trash;
use crate::events::Bus;
use crate::handlers::Handlers;
use crate::id::by_prefix;
use crate::sandbox::Sandbox;
use crate::selinux::Selinux;
use crate::stats::StatsCache;
use crate::streaming::tickets::Streams;
use rrun_calls::error::{Error, Result};
use rrun_calls::lock::lock;
use rrun_calls::singleflight::SingleFlight;
use rrun_images::Images;
use rrun_network::PodNetwork;
use rrun_network::namespace::Namespaces;
use rrun_store::Store;

/// How long a caller waits for a pod or a container: what takes longer hangs in a file system.
const CREATE_TIMEOUT: Duration = Duration::from_secs(5 * 60);

/// Everything that a call needs.
pub(crate) struct Node {
    pub config: Config,
    /// Where pods' network namespaces are pinned.
    pub namespaces: Namespaces,
    pub store: Store,
    pub images: Images,
    pub network: PodNetwork,
    pub selinux: Selinux,
    pub events: Bus,
    pub stats: StatsCache,
    /// Where removed writable layers go.
    pub trash: Arc<Trash>,
    pub handlers: Handlers,
    pub streams: Streams,
    /// Calls that make something, by what they make; the answer is an id.
    pub creations: SingleFlight<String>,
    /// Calls that change or end something, by what they do.
    pub changes: SingleFlight<()>,
    index: Mutex<Index>,
}

#[derive(Default)]
struct Index {
    sandboxes: BTreeMap<String, Arc<Sandbox>>,
    containers: BTreeMap<String, Arc<Container>>,
}

impl Node {
    pub(crate) fn new(
        config: Config,
        store: Store,
        images: Images,
        network: PodNetwork,
        selinux: Selinux,
    ) -> Self {
        Node {
            trash: Arc::new(Trash::new(&config.root)),
            handlers: Handlers::new(&config),
            namespaces: config.namespaces(),
            config,
            store,
            images,
            network,
            selinux,
            events: Bus::default(),
            stats: StatsCache::default(),
            streams: Streams::default(),
            creations: SingleFlight::with_timeout(CREATE_TIMEOUT),
            changes: SingleFlight::default(),
            index: Mutex::default(),
        }
    }

    fn index(&self) -> MutexGuard<'_, Index> {
        lock(&self.index)
    }

    pub(crate) fn add_sandbox(&self, sandbox: Arc<Sandbox>) {
        self.index().sandboxes.insert(sandbox.id.clone(), sandbox);
    }

    pub(crate) fn add_container(&self, container: Arc<Container>) {
        let id = container.id.clone();
        self.index().containers.insert(id, container);
    }

    pub(crate) fn forget_sandbox(&self, id: &str) {
        self.index().sandboxes.remove(id);
    }

    pub(crate) fn forget_container(&self, id: &str) {
        self.index().containers.remove(id);
    }

    pub(crate) fn sandboxes(&self) -> Vec<Arc<Sandbox>> {
        self.index().sandboxes.values().cloned().collect()
    }

    pub(crate) fn containers(&self) -> Vec<Arc<Container>> {
        self.index().containers.values().cloned().collect()
    }

    /// The pod's containers, the newest first: where kubelet does not sort them itself (the statuses
    /// in PodSandboxStatus, by which it goes with EventedPLEG) it takes the first of a name for the
    /// one that counts, and would start a second beside a running one that comes later.
    pub(crate) fn containers_of(&self, sandbox: &str) -> Vec<Arc<Container>> {
        let index = self.index();
        let of = index.containers.values();
        let mut found: Vec<_> = of
            .filter(|container| container.sandbox.id == sandbox)
            .cloned()
            .collect();
        found.sort_by_key(|container| Reverse(container.created_at));
        found
    }

    /// The pod with this id, or with the only id that begins so.
    pub(crate) fn sandbox(&self, id: &str) -> Result<Arc<Sandbox>> {
        by_prefix(&self.index().sandboxes, id)
            .ok_or_else(|| Error::not_found(format!("there is no pod {id:?}")))
    }

    /// The container with this id, or with the only id that begins so.
    pub(crate) fn container(&self, id: &str) -> Result<Arc<Container>> {
        by_prefix(&self.index().containers, id)
            .ok_or_else(|| Error::not_found(format!("there is no container {id:?}")))
    }

    /// The pod made for this metadata.
    pub(crate) fn sandbox_named(&self, metadata: &PodSandboxMetadata) -> Option<Arc<Sandbox>> {
        let index = self.index();
        let mut all = index.sandboxes.values();
        all.find(|sandbox| sandbox.config.metadata.as_ref() == Some(metadata))
            .cloned()
    }

    /// `STATE/pods/POD`.
    pub(crate) fn sandbox_dir(&self, sandbox: &str) -> PathBuf {
        self.config.state.join("pods").join(sandbox)
    }

    /// Where the pod's network namespace is pinned.
    pub(crate) fn netns(&self, sandbox: &str) -> PathBuf {
        self.namespaces.of(sandbox)
    }

    /// `STATE/pods/POD/containers/CID`.
    pub(crate) fn bundle(&self, sandbox: &str, container: &str) -> PathBuf {
        let mut bundle = self.sandbox_dir(sandbox);
        bundle.push("containers");
        bundle.push(container);
        bundle
    }

    /// `ROOT/containers/CID`.
    pub(crate) fn writable_layer(&self, container: &str) -> PathBuf {
        self.config.root.join("containers").join(container)
    }
}
