//! The state of the node. The server reads this state from memory, and writes each change to the
//! store.

use std::cmp::Reverse;
use std::collections::BTreeMap;
use std::path::PathBuf;
use std::sync::{Arc, Mutex, MutexGuard};
use std::time::Duration;

use rrun_proto::v1::PodSandboxMetadata;

use crate::config::Config;
use crate::container::Container;
use crate::events::Bus;
use crate::handlers::Handlers;
use crate::id::by_prefix;
use crate::sandbox::Sandbox;
use crate::selinux::Selinux;
use crate::stats::StatsCache;
use crate::streaming::exec_output::OutputBudget;
use crate::streaming::tickets::Streams;
use rrun_calls::error::{Error, Result};
use rrun_calls::lock::lock;
use rrun_calls::singleflight::SingleFlight;
use rrun_images::{Images, Removals};
use rrun_network::PodNetwork;
use rrun_network::namespace::Namespaces;
use rrun_store::Store;
use tokio::runtime::Handle;

/// The limit on the time that a caller waits for the creation of a pod or a container. A creation
/// takes longer only if a file system hangs.
const CREATE_TIMEOUT: Duration = Duration::from_secs(5 * 60);

/// The shared state of all gRPC methods of the server.
pub(crate) struct Node {
    pub config: Config,
    /// The paths at which pods' network namespaces are pinned.
    pub namespaces: Namespaces,
    pub store: Store,
    pub images: Images,
    pub network: PodNetwork,
    pub selinux: Selinux,
    pub events: Bus,
    pub stats: StatsCache,
    /// The removal of the writable layers of removed containers in the background.
    pub removals: Arc<Removals>,
    pub handlers: Handlers,
    pub streams: Streams,
    /// The memory for the output of the commands that ExecSync runs.
    pub exec_outputs: Arc<OutputBudget>,
    /// The creations of pods and containers that are in progress. Two requests for the same pod or
    /// container have the same key. The second request therefore joins the creation in progress.
    /// The result of a creation is the id of the pod or container.
    pub creations: SingleFlight<String>,
    /// The operations on existing pods and containers that are in progress, such as stops. The key
    /// of an operation contains its name and the id of the pod or container.
    pub changes: SingleFlight<()>,
    index: Mutex<Index>,
}

#[derive(Default)]
struct Index {
    sandboxes: BTreeMap<String, Arc<Sandbox>>,
    containers: BTreeMap<String, Arc<Container>>,
}

impl Node {
    /// The caller must run in the server's tokio runtime.
    pub(crate) fn new(
        config: Config,
        store: Store,
        images: Images,
        network: PodNetwork,
        selinux: Selinux,
    ) -> Self {
        Node {
            removals: Removals::new(Handle::current()),
            handlers: Handlers::new(&config),
            namespaces: config.namespaces(),
            streams: Streams::new(config.stream_sessions()),
            exec_outputs: OutputBudget::new(config.exec_output_bytes.get()),
            config,
            store,
            images,
            network,
            selinux,
            events: Bus::default(),
            stats: StatsCache::default(),
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

    /// Returns the pod's containers, newest first. The order matters: with its feature EventedPLEG,
    /// kubelet does not sort the statuses in PodSandboxStatus. If several containers have the same
    /// name, kubelet treats the first one as the current container. In another order, the first one
    /// could be an exited container. Kubelet would then start another container although one is
    /// running.
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

    /// Returns the pod whose id is `id`. A prefix of the id is sufficient if no other id has this
    /// prefix.
    pub(crate) fn sandbox(&self, id: &str) -> Result<Arc<Sandbox>> {
        by_prefix(&self.index().sandboxes, id)
            .ok_or_else(|| Error::not_found(format!("the pod {id:?} does not exist")))
    }

    /// Returns the container whose id is `id`. A prefix of the id is sufficient if no other id has
    /// this prefix.
    pub(crate) fn container(&self, id: &str) -> Result<Arc<Container>> {
        by_prefix(&self.index().containers, id)
            .ok_or_else(|| Error::not_found(format!("the container {id:?} does not exist")))
    }

    /// Returns the pod that was created with this metadata.
    pub(crate) fn sandbox_named(&self, metadata: &PodSandboxMetadata) -> Option<Arc<Sandbox>> {
        let index = self.index();
        let mut all = index.sandboxes.values();
        all.find(|sandbox| sandbox.config.metadata.as_ref() == Some(metadata))
            .cloned()
    }

    /// Returns the pod's directory, `STATE/pods/POD`.
    pub(crate) fn sandbox_dir(&self, sandbox: &str) -> PathBuf {
        self.config.state.join("pods").join(sandbox)
    }

    /// Returns the path at which the pod's network namespace is pinned.
    pub(crate) fn netns(&self, sandbox: &str) -> PathBuf {
        self.namespaces.of(sandbox)
    }

    /// Returns the path of the container's bundle, `STATE/pods/POD/containers/CID`.
    pub(crate) fn bundle(&self, sandbox: &str, container: &str) -> PathBuf {
        let mut bundle = self.sandbox_dir(sandbox);
        bundle.push("containers");
        bundle.push(container);
        bundle
    }

    /// Returns the path of the container's writable layer, `ROOT/containers/CID`.
    pub(crate) fn writable_layer(&self, container: &str) -> PathBuf {
        self.config.root.join("containers").join(container)
    }
}
