//! The life cycle of a pod.
//!
//! [`run`] creates the resources that the containers of a pod share, and [`stop`] releases and
//! removes these resources. [`files`] mounts /dev/shm, and writes the files that containers see in
//! /etc. [`namespaces`] decides which namespaces the pod shares with the node, and [`users`] maps
//! the pod's user ids. The module `pause` creates the cgroup of the pod's pause process. [`watch`]
//! handles the events of the pod's monitor, and [`status`] builds the CRI messages.

pub(crate) mod files;
pub(crate) mod namespaces;
mod pause;
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

/// The name of the file with the pod's record, in the pod's directory.
pub(crate) const RECORD: &str = "pod.json";

/// A pod. The field `state` contains everything that can change. The lock on `state` is never held
/// during I/O.
pub(crate) struct Sandbox {
    pub id: String,
    pub config: PodSandboxConfig,
    /// The name of the pod's runtime handler. An empty name selects the default handler.
    pub handler: String,
    /// The time of the pod's creation, in nanoseconds since the epoch.
    pub created_at: i64,
    /// The pod's cgroup, which is the parent of its containers' cgroups, such as `/kubepods/pod1`.
    pub cgroup: String,
    /// The cgroup directories that this server created for the pod, outermost first.
    pub cgroups_made: Vec<PathBuf>,
    /// The pod's SELinux labels, or `None` if SELinux is not used.
    pub selinux: Option<Labels>,
    /// The reservation of the pod's SELinux level. While it exists, no other pod gets the same
    /// level.
    _level: Option<LevelHold>,
    pub monitor: MonitorClient,
    state: Mutex<SandboxState>,
    /// The number of unfinished CreateContainer calls in this pod. The pod's removal waits until
    /// this number is 0.
    pub creating: tokio::sync::watch::Sender<usize>,
    /// The pod's record in the store.
    record: Entry,
}

/// The part of a pod's data that can change.
#[derive(Clone, Debug, Default, PartialEq)]
pub(crate) struct SandboxState {
    pub ready: bool,
    /// The pod's addresses, the primary address first. If the pod is in the node's network, the
    /// list is empty.
    pub addresses: Vec<IpAddr>,
    /// The process id of the monitor, or 0 after the monitor's exit.
    pub monitor: i32,
    /// The process id of the first process in the pod's PID namespace, or `None` after its exit.
    pub pid1: Option<i32>,
    /// The id of the process whose namespaces the pod uses, or `None` if this process is the
    /// monitor or has exited.
    pub holder: Option<i32>,
    /// See [`rrun_protocol::Hello::passes_after`].
    pub passes_after: bool,
    /// See [`rrun_protocol::Hello::relays`].
    pub relays: bool,
    /// See [`rrun_protocol::Hello::relays_terminals`].
    pub relays_terminals: bool,
    /// True after the monitor was instructed to exit. If this field is true, a lost connection to
    /// the monitor is not an error.
    pub retired: bool,
    /// The resources in the last RunPodSandbox or UpdatePodSandboxResources call.
    pub resources: Option<LinuxContainerResources>,
    pub overhead: Option<LinuxContainerResources>,
}

/// The pod's record in the store. During the pod's creation, the record is only in the file
/// `pod.json` in the pod's directory.
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

    /// Writes the record `STATE/pods/POD/pod.json`. If the server is killed, it reads this file
    /// when it starts again. If `ready` is false, the file describes a partially created pod, which
    /// the server removes. If `ready` is true, the file describes a complete pod. The server adds
    /// this pod to the store if the store has no record of it. A reboot ends the pod and also
    /// deletes the file.
    pub(crate) fn write_pod_json(&self, node: &Node) -> Result<()> {
        files::write_record(&node.sandbox_dir(&self.id).join(RECORD), &self.to_record())
    }

    /// Writes the pod to the store in the background. RunPodSandbox does not wait for the disk,
    /// because `pod.json` already contains the record. But the write begins immediately, because a
    /// reboot deletes `pod.json`. The resources that CNI plugins have reserved for the pod survive
    /// a reboot, and the server needs the record to release these resources.
    pub(crate) fn save_soon(self: &Arc<Self>, node: &Arc<Node>) {
        let (sandbox, node) = (Arc::clone(self), Arc::clone(node));
        tokio::spawn(async move {
            let saved = sandbox.record.save_now(&node.store, || sandbox.to_record());
            if let Err(error) = saved.await {
                log::error!("{}: {error}; the server tries again", sandbox.name());
            }
        });
    }

    /// Writes the pod's state to the store and waits until the state is on the disk.
    pub(crate) async fn save(&self, node: &Node) -> Result<()> {
        let saved = self.record.save(&node.store, || self.to_record());
        let written = slow(format!("{}: write the pod's record", self.name()), saved).await;
        written.map_err(Error::from)
    }

    /// Deletes the pod's record from the store.
    pub(crate) async fn delete_record(&self, node: &Node) -> Result<()> {
        let deleted = self.record.delete(&node.store);
        let written = slow(format!("{}: delete the pod's record", self.name()), deleted).await;
        written.map_err(Error::from)
    }

    /// Returns the id of the process whose namespaces (`/proc/PID/ns/…`) are the pod's namespaces.
    /// Returns `None` if this process has exited.
    pub(crate) fn namespaces(&self) -> Option<i32> {
        let sharing = namespaces::sharing(&self.config).ok()?;
        let state = self.state();
        if sharing.own_users {
            state.holder
        } else {
            Some(state.monitor).filter(|pid| *pid > 0)
        }
    }

    /// Returns whether the pod's pause process has exited. `pid1` and `holder` are the fields of the
    /// monitor's Hello.
    fn lacks_pause_process(&self, pid1: Option<i32>, holder: Option<i32>) -> bool {
        namespaces::sharing(&self.config).is_ok_and(|sharing| {
            sharing.shared_pid && pid1.is_none() || sharing.own_users && holder.is_none()
        })
    }

    /// Counts one more container in `creating` until the returned guard is dropped.
    pub(crate) fn begin_create(&self) -> Creating<'_> {
        self.creating.send_modify(|count| *count += 1);
        Creating(self)
    }

    /// Returns `pod NAMESPACE/NAME (ID)`, for log messages and errors.
    pub(crate) fn name(&self) -> String {
        name(&self.id, &self.config)
    }
}

/// Returns the same name as [`Sandbox::name`] for the pod with this id and this configuration.
pub(crate) fn name(id: &str, config: &PodSandboxConfig) -> String {
    let metadata = config.metadata.clone().unwrap_or_default();
    let short = crate::id::short(id);
    format!("pod {}/{} ({short})", metadata.namespace, metadata.name)
}

/// The guard that [`Sandbox::begin_create`] returns.
pub(crate) struct Creating<'a>(&'a Sandbox);

impl Drop for Creating<'_> {
    fn drop(&mut self) {
        self.0.creating.send_modify(|count| *count -= 1);
    }
}
