//! Removes the interfaces and addresses of detached pods in the background.
//!
//! When the kernel deletes a network device, it waits 10 to 20 ms for RCU. If several devices are
//! deleted together, the kernel waits hardly longer than for one device. For this reason, the
//! background task works in rounds. A pod that is detached during a round waits for the next round.
//! A round deletes the interfaces of all waiting pods together. It then deletes the addresses of
//! these pods from the store in one transaction.

use std::sync::atomic::{AtomicU32, Ordering};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use tokio::sync::Notify;

use super::pod_lock::PodLock;
use super::state::EmbeddedState;
use crate::error::NetworkError;
use rrun_calls::lock::lock;
use rrun_calls::wait::blocking;

/// The time between the first failed round and the next attempt. Each further failure doubles the
/// time, up to about 17 minutes.
const RETRY_INTERVAL: Duration = Duration::from_secs(1);
const MAX_DOUBLINGS: u32 = 10;

pub(super) struct Teardown {
    state: Arc<EmbeddedState>,
    queue: Mutex<TeardownQueue>,
    idle: Notify,
    /// The number of failed rounds since the last successful round.
    failures: AtomicU32,
}

#[derive(Default)]
struct TeardownQueue {
    /// The pods whose networks the background task removes next.
    waiting: Vec<PodLock>,
    /// The pods whose networks the background task is removing now.
    removing: Vec<String>,
    /// True while the background task runs.
    running: bool,
}

impl Teardown {
    pub(super) fn new(state: Arc<EmbeddedState>) -> Self {
        Teardown {
            state,
            queue: Mutex::default(),
            idle: Notify::new(),
            failures: AtomicU32::new(0),
        }
    }

    /// Returns whether the pod's network is being removed or is going to be removed.
    pub(super) fn has(&self, pod: &str) -> bool {
        let queue = lock(&self.queue);
        queue.removing.iter().any(|removing| removing == pod)
            || queue.waiting.iter().any(|locked| locked.pod() == pod)
    }

    /// Adds the locked pod to the queue of the background task. The task removes the pod's network
    /// and then unlocks the pod.
    pub(super) fn add(self: &Arc<Self>, locked: PodLock) {
        let mut queue = lock(&self.queue);
        queue.waiting.push(locked);
        if !queue.running {
            queue.running = true;
            tokio::spawn(run(Arc::clone(self)));
        }
    }

    /// Adds the pods again after a failed round, but later. The pods are not locked meanwhile, so
    /// another detach of a pod does not wait.
    fn add_later(self: Arc<Self>, pods: Vec<String>) {
        let failures = self.failures.fetch_add(1, Ordering::Relaxed);
        let pause = RETRY_INTERVAL * (1 << failures.min(MAX_DOUBLINGS));
        tokio::spawn(async move {
            tokio::time::sleep(pause).await;
            for pod in pods {
                let locked = self.state.lock(&pod).await;
                self.add(locked);
            }
        });
    }

    /// Waits until the background task has removed the networks of all detached pods.
    pub(super) async fn settled(&self) {
        loop {
            // The waiter is created before `running` is checked. The background task can end
            // directly after the check. A waiter that is created after the check would miss the
            // task's notification.
            let idle = self.idle.notified();
            if !lock(&self.queue).running {
                return;
            }
            idle.await;
        }
    }

    /// Returns the pods of the next round, or `None` if no pod is waiting.
    fn next(&self) -> Option<Vec<PodLock>> {
        let mut queue = lock(&self.queue);
        let locks = std::mem::take(&mut queue.waiting);
        queue.removing = locks.iter().map(|locked| locked.pod().to_owned()).collect();
        queue.running = !locks.is_empty();
        queue.running.then_some(locks)
    }
}

async fn run(teardown: Arc<Teardown>) {
    while let Some(locks) = teardown.next() {
        let pods: Vec<String> = locks.iter().map(|locked| locked.pod().to_owned()).collect();
        let removed = remove(&teardown.state, pods.clone()).await;
        // `removing` must be cleared before the pods are unlocked. A pod can be attached and
        // detached again after the unlock. If this pod were still in `removing`, the detach would
        // do nothing.
        lock(&teardown.queue).removing.clear();
        drop(locks);
        match removed {
            Ok(()) => teardown.failures.store(0, Ordering::Relaxed),
            Err(error) => {
                log::warn!(
                    "remove the networks of the pods {}: {error}; the server tries again later",
                    pods.join(", ")
                );
                Arc::clone(&teardown).add_later(pods);
            }
        }
    }
    teardown.idle.notify_waiters();
}

/// Deletes the interfaces first and then frees the addresses. With this order, no address is
/// assigned again while an interface still has it.
async fn remove(state: &Arc<EmbeddedState>, pods: Vec<String>) -> Result<(), NetworkError> {
    let (on_thread, doomed) = (Arc::clone(state), pods.clone());
    let addresses: Vec<_> = pods
        .iter()
        .flat_map(|pod| state.addresses_of(pod))
        .collect();
    let what = format!("delete the interfaces of the pods {}", pods.join(", "));
    blocking(what, move || {
        on_thread.bridge().disconnect(&doomed, &addresses)
    })
    .await?;
    state.forget(pods).await
}
