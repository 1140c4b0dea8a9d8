//! Takes pods' interfaces away after the call that asked for it has returned.
//!
//! Deleting a network device ends with the kernel waiting for RCU, 10 to 20 ms, most of it once
//! for however many devices are deleted together. So the pods that are detached meanwhile wait
//! for each other and go together, and their addresses in one transaction.

use std::sync::{Arc, Mutex};

use tokio::sync::Notify;

use super::pod_lock::PodLock;
use super::state::EmbeddedState;
use crate::error::NetworkError;
use rrun_calls::lock::lock;
use rrun_calls::wait::blocking;

pub(super) struct Teardown {
    state: Arc<EmbeddedState>,
    queue: Mutex<TeardownQueue>,
    idle: Notify,
}

#[derive(Default)]
struct TeardownQueue {
    /// The next to go.
    waiting: Vec<PodLock>,
    /// The pods that the task takes away right now.
    going: Vec<String>,
    /// Whether there is a task.
    running: bool,
}

impl Teardown {
    pub(super) fn new(state: Arc<EmbeddedState>) -> Self {
        Teardown {
            state,
            queue: Mutex::default(),
            idle: Notify::new(),
        }
    }

    /// Whether the pod is about to go.
    pub(super) fn has(&self, pod: &str) -> bool {
        let queue = lock(&self.queue);
        queue.going.iter().any(|going| going == pod)
            || queue.waiting.iter().any(|locked| locked.pod() == pod)
    }

    /// Takes the pod of `locked` away, soon. The lock ends with that.
    pub(super) fn add(self: &Arc<Self>, locked: PodLock) {
        let mut queue = lock(&self.queue);
        queue.waiting.push(locked);
        if !queue.running {
            queue.running = true;
            tokio::spawn(run(Arc::clone(self)));
        }
    }

    pub(super) async fn settled(&self) {
        loop {
            // Made before looking, so that an end in between is noticed.
            let idle = self.idle.notified();
            if !lock(&self.queue).running {
                return;
            }
            idle.await;
        }
    }

    /// What waits, or the end.
    fn next(&self) -> Option<Vec<PodLock>> {
        let mut queue = lock(&self.queue);
        let locks = std::mem::take(&mut queue.waiting);
        queue.going = locks.iter().map(|locked| locked.pod().to_owned()).collect();
        queue.running = !locks.is_empty();
        queue.running.then_some(locks)
    }
}

async fn run(teardown: Arc<Teardown>) {
    while let Some(locks) = teardown.next() {
        let pods: Vec<String> = locks.iter().map(|locked| locked.pod().to_owned()).collect();
        if let Err(error) = take_away(&teardown.state, pods.clone()).await {
            log::warn!(
                "take away the network of the pods {}: {error}; it is tried again when they are \
                 removed again, or after a restart",
                pods.join(", ")
            );
        }
        // Before the locks end: what is attached from then on is not going.
        lock(&teardown.queue).going.clear();
        drop(locks);
    }
    teardown.idle.notify_waiters();
}

/// First the interfaces, then the addresses: none is given again while it is in use.
async fn take_away(state: &Arc<EmbeddedState>, pods: Vec<String>) -> Result<(), NetworkError> {
    let (on_thread, doomed) = (Arc::clone(state), pods.clone());
    let what = format!("delete the interfaces of the pods {}", pods.join(", "));
    blocking(what, move || on_thread.bridge().disconnect(&doomed)).await?;
    state.forget(&pods).await
}
