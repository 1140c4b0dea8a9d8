//! The state that all operations on images share: the catalog, the store, and the pulls in
//! progress.

use std::collections::HashMap;
use std::path::PathBuf;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, OnceLock};
use std::time::Duration;

use crate::catalog::{Catalog, directory};
use crate::documents::DocumentBudget;
use crate::error::ImageError;
use crate::fetch::Queues;
use crate::hosts::Registries;
use crate::partial;
use crate::pulls_in_progress::{FetchKey, PullInProgress, PullKey, WeakFetch};
use crate::removals::Removals;
use crate::settings::ImageSettings;
use rrun_calls::lock::lock;
use rrun_store::Store;

pub(crate) struct ImageStore {
    pub root: PathBuf,
    pub records: Store,
    pub registries: Registries,
    pub settings: ImageSettings,
    pub catalog: Mutex<Catalog>,
    pub pulls: Mutex<HashMap<PullKey, PullInProgress>>,
    pub fetches: Mutex<HashMap<FetchKey, WeakFetch>>,
    /// The queues in which fetches of layers wait, and the directories of new layers.
    pub queues: Arc<Queues>,
    /// The memory for the documents of all pulls.
    pub documents: Arc<DocumentBudget>,
    pub next_pull: AtomicU64,
    /// The lock for the import of archives.
    pub preloading: tokio::sync::Mutex<()>,
    /// True if the task for the removal of expired partial blobs was started.
    pub sweeping_partials: AtomicBool,
    /// A function that is called at the end of each pull.
    pub observer: OnceLock<fn(PullEnd)>,
}

/// The result of a pull.
#[derive(Clone, Copy, Debug)]
pub enum PullEnd {
    Pulled {
        /// The compressed size of the image in bytes.
        bytes: u64,
        took: Duration,
    },
    Failed,
}

impl ImageStore {
    pub(crate) fn observe(&self, end: PullEnd) {
        if let Some(observer) = self.observer.get() {
            observer(end);
        }
    }

    /// Starts a task that regularly removes expired partial blobs. Only the first call has an
    /// effect.
    pub(crate) fn sweep_partials_later(&self) {
        if self.sweeping_partials.swap(true, Ordering::Relaxed) {
            return;
        }
        let (root, budget) = (self.root.clone(), Arc::clone(&self.queues.partials));
        tokio::spawn(async move {
            loop {
                tokio::time::sleep(partial::PARTIAL_LIFETIME).await;
                let (root, budget) = (root.clone(), Arc::clone(&budget));
                let swept = tokio::task::spawn_blocking(move || partial::sweep(&root, &budget));
                let _ = swept.await;
            }
        });
    }

    /// Removes the layers of a pull that failed or was abandoned.
    pub(crate) async fn release_fetches(&self) -> Result<(), ImageError> {
        // A fetch stops by itself when no pull needs it. The entries of stopped fetches are removed
        // from the table here, and `sweep` removes the layers of stopped fetches.
        lock(&self.fetches).retain(|_, fetching| fetching.upgrade().is_some());
        self.sweep_partials_later();
        self.sweep_with(Removals::begin).await
    }

    /// Removes the layers that no image, lease or pull needs. The records are deleted before this
    /// call returns. The directories are removed in the background. If the server stops before a
    /// directory is removed, no record names this directory. The next start of the server then
    /// removes the directory. If the records could not be deleted, the store repeats the deletion.
    /// If the server stops before, its next start finds no directory for a record, and deletes the
    /// record.
    pub(crate) async fn sweep(&self) -> Result<(), ImageError> {
        self.sweep_with(Removals::begin_counted).await
    }

    async fn sweep_with(
        &self,
        begin: fn(&Arc<Removals>, &str, Vec<PathBuf>),
    ) -> Result<(), ImageError> {
        let (layers, written) = {
            let (layers, changes) = lock(&self.catalog).sweep();
            if layers.is_empty() {
                return Ok(());
            }
            (layers, self.records.commit_now(changes))
        };
        let written = written.await;
        let directories = layers
            .iter()
            .map(|layer| directory(&self.root, layer.number))
            .collect();
        let removals = &self.queues.directories.removals;
        begin(removals, &removals.new_owner(), directories);
        Ok(written?)
    }
}
