//! What all calls about images share: the catalog, the store, and the pulls under way.

use std::collections::HashMap;
use std::path::PathBuf;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, OnceLock};
use std::time::Duration;

use tokio::sync::watch;

use crate::catalog::{Catalog, directory};
use crate::error::ImageError;
use crate::fetch::Queues;
use crate::hosts::Registries;
use crate::pulls_in_progress::{PullInProgress, PullKey, WeakFetch};
use crate::settings::ImageSettings;
use crate::{partial, unpacked_layer};
use rrun_calls::lock::lock;
use rrun_store::Store;

pub(crate) struct ImageStore {
    pub root: PathBuf,
    pub records: Store,
    pub registries: Registries,
    pub settings: ImageSettings,
    pub catalog: Mutex<Catalog>,
    pub pulls: Mutex<HashMap<PullKey, PullInProgress>>,
    /// By the layer's key.
    pub fetches: Mutex<HashMap<String, WeakFetch>>,
    /// The queues in which fetches of layers wait.
    pub queues: Arc<Queues>,
    pub next_layer: AtomicU64,
    pub next_pull: AtomicU64,
    /// Held while archives are imported.
    pub preloading: tokio::sync::Mutex<()>,
    /// Held while layers are removed from the disk.
    pub removing: Arc<tokio::sync::Mutex<()>>,
    /// How many removals are under way or waiting for their turn.
    pub removals: Arc<watch::Sender<usize>>,
    /// Someone will look for partial blobs that nobody came back for.
    pub sweeping_partials: AtomicBool,
    /// Called at the end of each pull.
    pub observer: OnceLock<fn(PullEnd)>,
}

/// How a pull ended.
#[derive(Clone, Copy, Debug)]
pub enum PullEnd {
    Pulled {
        /// Compressed bytes of the image's layers.
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

    /// Removes, once they are old enough, the partial blobs that nobody has come back for.
    pub(crate) fn sweep_partials_later(&self) {
        if self.sweeping_partials.swap(true, Ordering::Relaxed) {
            return;
        }
        let root = self.root.clone();
        tokio::spawn(async move {
            loop {
                tokio::time::sleep(partial::PARTIAL_LIFETIME).await;
                let root = root.clone();
                let _ = tokio::task::spawn_blocking(move || partial::sweep(&root)).await;
            }
        });
    }

    /// Removes the layers of a pull that has failed or was abandoned.
    pub(crate) async fn release_fetches(&self) -> Result<(), ImageError> {
        // Fetches that no pull needs have ended; the sweep removes their layers.
        lock(&self.fetches).retain(|_, fetching| fetching.upgrade().is_some());
        self.sweep_partials_later();
        self.sweep().await
    }

    /// Removes the layers that nobody needs, first from the store and then, with nobody waiting,
    /// from the disk: the next start removes what no record names.
    pub(crate) async fn sweep(&self) -> Result<(), ImageError> {
        let (layers, written) = {
            let (layers, changes) = lock(&self.catalog).sweep();
            if layers.is_empty() {
                return Ok(());
            }
            (layers, self.records.commit(changes))
        };
        written.await?;
        let root = self.root.clone();
        let removing = Arc::clone(&self.removing);
        let removals = Arc::clone(&self.removals);
        removals.send_modify(|count| *count += 1);
        tokio::spawn(async move {
            // One after the other: a node that runs out of room removes many.
            let _removing = removing.lock_owned().await;
            let removed = tokio::task::spawn_blocking(move || {
                for layer in layers {
                    unpacked_layer::remove(&directory(&root, layer.number));
                }
            });
            let _ = removed.await;
            removals.send_modify(|count| *count = count.saturating_sub(1));
        });
        Ok(())
    }
}
