//! Taking pods' interfaces away behind the back of whoever asked.
//!
//! Deleting a network device ends with the kernel waiting for RCU, 10 to 20 ms, most of it once
//! for however many devices are deleted together. So the pods that are detached meanwhile wait
//! for each other and go in one stroke, and their addresses in one transaction.

use std::sync::{Arc, Mutex};

use tokio::sync::Notify;

use super::{Inner, Turn, blocking, lock};
use rrun_store::{Change, Table};

#[derive(Default)]
pub(super) struct Teardown {
    state: Mutex<State>,
    idle: Notify,
}

#[derive(Default)]
struct State {
    /// The next to go.
    waiting: Vec<Turn>,
    /// Those that go right now; they have no task besides.
    going: Vec<String>,
    running: bool,
}

impl Teardown {
    /// Whether the pod is about to go.
    pub(super) fn has(&self, pod: &str) -> bool {
        let state = lock(&self.state);
        state.going.iter().any(|going| going == pod)
            || state.waiting.iter().any(|turn| turn.pod == pod)
    }

    /// Takes the pod of `turn` away, soon. Its turn ends with that.
    pub(super) fn add(inner: &Arc<Inner>, turn: Turn) {
        let mut state = lock(&inner.teardown.state);
        state.waiting.push(turn);
        if !state.running {
            state.running = true;
            tokio::spawn(run(Arc::clone(inner)));
        }
    }

    pub(super) async fn settled(&self) {
        loop {
            // Made before looking, so that an end in between is noticed.
            let idle = self.idle.notified();
            if !lock(&self.state).running {
                return;
            }
            idle.await;
        }
    }

    /// What waits, or the end.
    fn next(&self) -> Option<Vec<Turn>> {
        let mut state = lock(&self.state);
        let turns = std::mem::take(&mut state.waiting);
        state.going = turns.iter().map(|turn| turn.pod.clone()).collect();
        state.running = !turns.is_empty();
        state.running.then_some(turns)
    }
}

async fn run(inner: Arc<Inner>) {
    while let Some(turns) = inner.teardown.next() {
        let pods: Vec<String> = turns.iter().map(|turn| turn.pod.clone()).collect();
        if let Err(error) = take_away(&inner, pods.clone()).await {
            log::warn!(
                "take away the network of the pods {}: {error}; it is tried again when they are \
                 removed again, or after a restart",
                pods.join(", ")
            );
        }
        // Before the turns end: what is attached from then on is not going.
        lock(&inner.teardown.state).going.clear();
        drop(turns);
    }
    inner.teardown.idle.notify_waiters();
}

/// First the interfaces, then the addresses: none is given again while it is in use.
async fn take_away(inner: &Arc<Inner>, pods: Vec<String>) -> Result<(), super::NetworkError> {
    let (of, doomed) = (Arc::clone(inner), pods.clone());
    blocking(move || of.bridge.disconnect(&doomed)).await?;
    let mut gone = Vec::new();
    for pod in &pods {
        for address in inner.addresses_of(pod) {
            gone.push(Change::delete(Table::ADDRESSES, &address.to_string()));
        }
        gone.push(Change::delete(Table::ADDRESSES, &super::ports_key(pod)));
    }
    inner.store.commit(gone).await?;
    for pod in &pods {
        inner.free(pod);
    }
    Ok(())
}
