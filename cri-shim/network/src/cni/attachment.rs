//! The records of pods that CNI plugins connected to networks. A record contains the parameters
//! with which the plugins were run.

use std::sync::Arc;

use serde::{Deserialize, Serialize};
use serde_json::{Map, Value};
use tokio::time::Instant;

use super::chain::Target;
use super::configuration::ConfigurationList;

/// The in-memory data about a pod that CNI plugins have connected to networks or are going to
/// connect. The pod's [`AttachmentRecord`] in the store contains further data.
pub(super) struct AttachedPod {
    /// The networks of the pod. Each entry is a network name and the name of the pod's interface in
    /// this network.
    pub networks: Vec<(String, String)>,
    /// The pod's record while the pod's ADD has not succeeded yet. After that, the record is only
    /// in the store.
    pub record: Option<Arc<AttachmentRecord>>,
    /// The lock that is held while CNI plugins run for the pod. The lock prevents an ADD, a DEL and
    /// a CHECK for the same pod from running in parallel.
    pub plugin_lock: Arc<tokio::sync::Mutex<()>>,
    /// True if an earlier server process attached the pod. Plugins that the earlier process started
    /// may still be running.
    pub inherited: bool,
    /// True if a background task retries the pod's DEL.
    pub orphan: bool,
    /// The time at which the pod's DEL first failed. `None` if no DEL has failed.
    pub failing_since: Option<Instant>,
}

/// An entry of [`rrun_store::Table::ATTACHMENTS`]. The entry's key is the pod's id.
#[derive(Clone, Serialize, Deserialize)]
pub(super) struct AttachmentRecord {
    pub arguments: String,
    pub capabilities: Map<String, Value>,
    pub networks: Vec<NetworkRecord>,
}

#[derive(Clone, Serialize, Deserialize)]
pub(super) struct NetworkRecord {
    pub interface: String,
    /// The configuration of the network at the time when the pod was created.
    pub list: ConfigurationList,
    /// The result of ADD. `None` if the store contains no result of a successful ADD.
    pub result: Option<Value>,
}

impl AttachmentRecord {
    pub(super) fn names(&self) -> Vec<(String, String)> {
        let networks = self.networks.iter();
        networks
            .map(|one| (one.list.name.clone(), one.interface.clone()))
            .collect()
    }

    pub(super) fn target<'a>(
        &'a self,
        network: &'a NetworkRecord,
        pod: &'a str,
        netns: &'a str,
    ) -> Target<'a> {
        Target {
            pod,
            netns,
            interface: &network.interface,
            arguments: &self.arguments,
            capabilities: &self.capabilities,
        }
    }
}

impl AttachedPod {
    pub(super) fn new(record: &AttachmentRecord) -> Self {
        AttachedPod {
            networks: record.names(),
            record: None,
            plugin_lock: Arc::default(),
            inherited: false,
            orphan: false,
            failing_since: None,
        }
    }
}
