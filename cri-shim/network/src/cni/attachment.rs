//! What a pod's plugins were called with, in memory and in the store.

use std::sync::Arc;

use serde::{Deserialize, Serialize};
use serde_json::{Map, Value};
use tokio::time::Instant;

use super::chain::Target;
use super::configuration::ConfigurationList;

/// A pod that plugins know, or are about to. What is large of it is in the store.
pub(super) struct AttachedPod {
    /// The name of each network, and of its interface in the pod.
    pub networks: Vec<(String, String)>,
    /// Until its ADD has ended.
    pub record: Option<Arc<AttachmentRecord>>,
    /// Plugins of a pod never run side by side but for different networks.
    pub plugin_lock: Arc<tokio::sync::Mutex<()>>,
    /// Of an earlier life of the server, whose plugins may still run.
    pub inherited: bool,
    /// A task of its own sees to its DEL.
    pub orphan: bool,
    pub failing_since: Option<Instant>,
}

/// An entry of [`rrun_store::Table::ATTACHMENTS`]; the key is the pod's id.
#[derive(Clone, Serialize, Deserialize)]
pub(super) struct AttachmentRecord {
    pub arguments: String,
    pub capabilities: Map<String, Value>,
    pub networks: Vec<NetworkRecord>,
}

#[derive(Clone, Serialize, Deserialize)]
pub(super) struct NetworkRecord {
    pub interface: String,
    /// As it was when the pod was made.
    pub list: ConfigurationList,
    /// What ADD gave; `None`: it has not ended well, as far as is known.
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
