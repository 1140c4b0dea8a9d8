//! The locks of pods. A call locks the pod before it changes the pod's network. Other calls for the
//! same pod wait until the pod is unlocked.

use std::collections::HashMap;
use std::sync::{Arc, Mutex};

use tokio::sync::OwnedMutexGuard;

use rrun_calls::lock::lock;

/// The locks of all pods. A pod has an entry only while a call has the pod's lock or waits for the
/// lock.
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

    /// Returns whether a call waits for the pod's lock.
    pub(super) fn is_awaited(&self, pod: &str) -> bool {
        // The map has one reference to the mutex, and the call that has the lock has another
        // reference. Every call that waits for the lock has one more reference.
        lock(&self.by_pod)
            .get(pod)
            .is_some_and(|mutex| Arc::strong_count(mutex) > 2)
    }
}

/// The lock of a pod. The owner of this value has the exclusive right to change the pod's network.
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
        // If only the map has a reference to the mutex, no call waits for the lock.
        if by_pod
            .get(&self.pod)
            .is_some_and(|mutex| Arc::strong_count(mutex) == 1)
        {
            by_pod.remove(&self.pod);
        }
    }
}
