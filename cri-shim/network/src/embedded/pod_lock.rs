//! One call at a time works on a pod; the others wait.

use std::collections::HashMap;
use std::sync::{Arc, Mutex};

use tokio::sync::OwnedMutexGuard;

use rrun_calls::lock::lock;

/// The locks of the pods that a call works on or waits for; other pods have no entry.
#[derive(Default)]
pub(super) struct PodLocks {
    by_pod: Mutex<HashMap<String, Arc<tokio::sync::Mutex<()>>>>,
}

impl PodLocks {
    pub(super) async fn lock(self: &Arc<Self>, pod: &str) -> PodLock {
        let mutex = Arc::clone(lock(&self.by_pod).entry(pod.to_owned()).or_default());
        PodLock {
            locks: Arc::clone(self),
            pod: pod.to_owned(),
            guard: Some(mutex.lock_owned().await),
        }
    }

    /// Whether a call waits for the pod's lock.
    pub(super) fn is_awaited(&self, pod: &str) -> bool {
        // The map has one reference, the holder of the lock another.
        lock(&self.by_pod)
            .get(pod)
            .is_some_and(|mutex| Arc::strong_count(mutex) > 2)
    }
}

/// The right to work on a pod.
pub(super) struct PodLock {
    locks: Arc<PodLocks>,
    pod: String,
    guard: Option<OwnedMutexGuard<()>>,
}

impl PodLock {
    pub(super) fn pod(&self) -> &str {
        &self.pod
    }
}

impl Drop for PodLock {
    fn drop(&mut self) {
        let mut by_pod = lock(&self.locks.by_pod);
        self.guard = None;
        // Only the map has a reference: nobody waits.
        if by_pod
            .get(&self.pod)
            .is_some_and(|mutex| Arc::strong_count(mutex) == 1)
        {
            by_pod.remove(&self.pod);
        }
    }
}
