//! Removes directories of layers from the disk in the background.
//!
//! A layer can have millions of files, and their removal takes minutes. No pull, no turn to unpack
//! and no start of the server waits for a removal. If the server stops before a directory is
//! removed, no record names this directory, and the next start of the server begins the removal
//! again.

use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use tokio::runtime::Handle;
use tokio::sync::watch;

use crate::unpacked_layer::remove;

/// The time after the first failed removal of a layer. Each further failure doubles the time, up to
/// about 17 minutes.
const RETRY_INTERVAL: Duration = Duration::from_secs(1);
const MAX_DOUBLINGS: u32 = 10;

pub(crate) struct Removals {
    /// A node that is short of disk space can have many layers to remove. With this lock, the
    /// removals run one after the other and use only one thread. One thread removes files faster
    /// than three threads unpack them.
    one: tokio::sync::Mutex<()>,
    /// The number of removals of layers of removed images in progress, including the removals that
    /// wait for the lock `one`.
    count: watch::Sender<usize>,
    /// The runtime of the server. The threads that unpack layers do not belong to it.
    runtime: Handle,
}

impl Removals {
    pub(crate) fn new(runtime: Handle) -> Arc<Self> {
        Arc::new(Removals {
            one: tokio::sync::Mutex::default(),
            count: watch::Sender::default(),
            runtime,
        })
    }

    /// Removes the files of layers that were never complete. If one of them can't be removed, tries
    /// again later. Any thread can call this function, and the call does not block.
    pub(crate) fn begin(self: &Arc<Self>, paths: Vec<PathBuf>) {
        if !paths.is_empty() {
            let removals = Arc::clone(self);
            self.runtime.spawn(async move {
                let left = removals.attempt(paths).await;
                removals.retry(left).await;
            });
        }
    }

    /// Removes the layers of removed images like [`Removals::begin`]. [`Removals::done`] waits for
    /// the first attempt.
    pub(crate) fn begin_counted(self: &Arc<Self>, paths: Vec<PathBuf>) {
        let removals = Arc::clone(self);
        removals.count.send_modify(|count| *count += 1);
        self.runtime.spawn(async move {
            let left = removals.attempt(paths).await;
            let counted = |count: &mut usize| *count = count.saturating_sub(1);
            removals.count.send_modify(counted);
            removals.retry(left).await;
        });
    }

    /// Removes the paths, and returns those that can't be removed.
    async fn attempt(&self, mut paths: Vec<PathBuf>) -> Vec<PathBuf> {
        let _one = self.one.lock().await;
        let removed = tokio::task::spawn_blocking(move || {
            paths.retain(|path| !remove(path));
            paths
        });
        removed.await.unwrap_or_default()
    }

    async fn retry(&self, mut left: Vec<PathBuf>) {
        let mut failures = 0;
        while !left.is_empty() {
            tokio::time::sleep(RETRY_INTERVAL * (1 << failures)).await;
            failures = (failures + 1).min(MAX_DOUBLINGS);
            left = self.attempt(left).await;
        }
    }

    /// Waits until no layer of a removed image is being removed, but at most for `limit`.
    pub(crate) async fn done(&self, limit: Duration) {
        let mut count = self.count.subscribe();
        let _ = tokio::time::timeout(limit, count.wait_for(|count| *count == 0)).await;
    }
}
