//! A pod's life.
//!
//! [`run`] makes everything that the containers of a pod share; [`stop`] gives it back, and ends
//! in removal. [`files`] are what containers see in /etc and /dev/shm, [`namespaces`] says who
//! shares what, [`users`] whose ids the pod's are, [`watch`] follows the pod's monitor, [`status`] is the CRI's view.

pub(crate) mod files;
pub(crate) mod namespaces;
pub(crate) mod run;
pub(crate) mod status;
pub(crate) mod stop;
pub(crate) mod sysctl;
pub(crate) mod users;
pub(crate) mod watch;

use std::net::IpAddr;
use std::path::PathBuf;
use std::sync::{Arc, Mutex, MutexGuard};

use rrun_proto::v1::{LinuxContainerResources, PodSandboxConfig};
use serde::{Deserialize, Serialize};

use crate::node::Node;
use crate::selinux::Labels;
use crate::selinux::categories::LevelHold;
use rrun_calls::error::{Error, Result};
use rrun_calls::lock::lock;
use rrun_calls::wait::slow;
use rrun_monitor_client::MonitorClient;
use rrun_protocol::SOCKET_NAME;
use rrun_store::{Entry, Table};

/// The name of the record in a pod's directory.
pub(crate) const RECORD: &str = "pod.json";

/// One pod. What can change is in `state`, which is never locked across I/O.
pub(crate) struct Sandbox {
    pub id: String,
    pub config: PodSandboxConfig,
    /// As the pod asked; empty is the default handler.
    pub handler: String,
    /// Nanoseconds since the epoch.
    pub created_at: i64,
    /// The pod's cgroup, under which its containers' are: `/kubepods/pod1`.
    pub cgroup: String,
    /// The directories of it that this server made, outermost first.
    pub cgroups_made: Vec<PathBuf>,
    /// `None` where pods have no labels.
    pub selinux: Option<Labels>,
    /// No other pod is given its level.
    _level: Option<LevelHold>,
    pub monitor: MonitorClient,
    state: Mutex<SandboxState>,
    /// Containers being made; the pod's removal waits for them.
    pub creating: tokio::sync::watch::Sender<usize>,
    /// The record in the store.
    record: Entry,
}

/// What changes in a pod's life.
#[derive(Clone, Debug, Default, PartialEq)]
pub(crate) struct SandboxState {
    pub ready: bool,
    /// The primary address first; none in the node's network.
    pub addresses: Vec<IpAddr>,
    /// The monitor's process, 0 once it is gone.
    pub monitor: i32,
    /// The first process of the pod's PID namespace.
    pub pid1: Option<i32>,
    /// The process whose namespaces are the pod's, if that is not the monitor.
    pub holder: Option<i32>,
    /// See [`rrun_protocol::Hello::passes_after`].
    pub passes_after: bool,
    /// The monitor was told to end: its silence is no accident.
    pub retired: bool,
    /// As last told by RunPodSandbox or UpdatePodSandboxResources.
    pub resources: Option<LinuxContainerResources>,
    pub overhead: Option<LinuxContainerResources>,
}

/// The pod in the store, and in its directory while it is being made.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub(crate) struct SandboxRecord {
    pub id: String,
    #[serde(with = "rrun_store::record")]
    pub config: PodSandboxConfig,
    pub handler: String,
    pub created_at: i64,
    pub cgroup: String,
    pub cgroups_made: Vec<PathBuf>,
    pub ready: bool,
    pub addresses: Vec<IpAddr>,
    #[serde(default)]
    pub selinux: Option<Labels>,
}

impl Sandbox {
    pub(crate) fn from_record(node: &Node, record: SandboxRecord) -> Self {
        let linux = record.config.linux.as_ref();
        let state = SandboxState {
            ready: record.ready,
            addresses: record.addresses,
            resources: linux.and_then(|linux| linux.resources.clone()),
            overhead: linux.and_then(|linux| linux.overhead.clone()),
            ..SandboxState::default()
        };
        Sandbox {
            monitor: MonitorClient::new(node.sandbox_dir(&record.id).join(SOCKET_NAME)),
            record: Entry::new(Table::SANDBOXES, &record.id),
            id: record.id,
            config: record.config,
            handler: record.handler,
            created_at: record.created_at,
            cgroup: record.cgroup,
            cgroups_made: record.cgroups_made,
            _level: record
                .selinux
                .as_ref()
                .map(|labels| node.selinux.hold(labels)),
            selinux: record.selinux,
            state: Mutex::new(state),
            creating: tokio::sync::watch::Sender::new(0),
        }
    }

    pub(crate) fn state(&self) -> MutexGuard<'_, SandboxState> {
        lock(&self.state)
    }

    pub(crate) fn to_record(&self) -> SandboxRecord {
        let state = self.state();
        let mut config = self.config.clone();
        if let Some(linux) = &mut config.linux {
            linux.resources.clone_from(&state.resources);
            linux.overhead.clone_from(&state.overhead);
        }
        SandboxRecord {
            id: self.id.clone(),
            config,
            handler: self.handler.clone(),
            created_at: self.created_at,
            cgroup: self.cgroup.clone(),
            cgroups_made: self.cgroups_made.clone(),
            ready: state.ready,
            addresses: state.addresses.clone(),
            selinux: self.selinux.clone(),
        }
    }

    /// `STATE/pods/POD/pod.json`: the pod as it is being made, and, once it says `ready`, as it is,
    /// until the store has it. It is what a kill of the server leaves; a reboot, after which there
    /// is no pod, takes it along.
    pub(crate) fn write_down(&self, node: &Node) -> Result<()> {
        files::write_record(&node.sandbox_dir(&self.id).join(RECORD), &self.to_record())
    }

    /// Writes the pod to the store without anyone waiting for the disk; it has been written down.
    /// At once all the same: what CNI plugins hold for a pod, a reboot does not take along.
    pub(crate) fn save_soon(self: &Arc<Self>, node: &Arc<Node>) {
        let (sandbox, node) = (Arc::clone(self), Arc::clone(node));
        tokio::spawn(async move {
            if let Err(error) = sandbox.save(&node).await {
                log::error!("{}: {error}", sandbox.name());
            }
        });
    }

    /// Writes the pod's state to the store.
    pub(crate) async fn save(&self, node: &Node) -> Result<()> {
        let saved = self.record.save(&node.store, || self.to_record());
        let written = slow(format!("{}: write its record", self.name()), saved).await;
        written.map_err(Error::from)
    }

    /// Takes the pod out of the store, for good.
    pub(crate) async fn delete_record(&self, node: &Node) -> Result<()> {
        let deleted = self.record.delete(&node.store);
        let written = slow(format!("{}: write its record", self.name()), deleted).await;
        written.map_err(Error::from)
    }

    /// The process whose `/proc/PID/ns/…` are the pod's.
    pub(crate) fn namespaces(&self) -> i32 {
        let state = self.state();
        state.holder.unwrap_or(state.monitor)
    }

    /// Counts a container as being made until the guard goes.
    pub(crate) fn begin_create(&self) -> Creating<'_> {
        self.creating.send_modify(|count| *count += 1);
        Creating(self)
    }

    /// `pod NAMESPACE/NAME (ID)`, for the log and for errors.
    pub(crate) fn name(&self) -> String {
        name(&self.id, &self.config)
    }
}

/// See [`Sandbox::name`].
pub(crate) fn name(id: &str, config: &PodSandboxConfig) -> String {
    let metadata = config.metadata.clone().unwrap_or_default();
    let short = crate::id::short(id);
    format!("pod {}/{} ({short})", metadata.namespace, metadata.name)
}

/// See [`Sandbox::begin_create`].
pub(crate) struct Creating<'a>(&'a Sandbox);

impl Drop for Creating<'_> {
    fn drop(&mut self) {
        self.0.creating.send_modify(|count| *count -= 1);
    }
}
