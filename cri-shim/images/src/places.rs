//! Limits how many layers are partly unpacked at the same time.
//!
//! A layer has a place from the start of its thread until all its data is unpacked. Each place
//! costs a thread and the memory of a decoder.
//!
//! The layers of a hostile image can be tiny blobs that need hours to be unpacked. Such layers
//! could occupy all places. A pull that has no place therefore gets one even if all normal places
//! are occupied. Only these extra places have a separate limit.

use std::collections::VecDeque;
use std::sync::{Arc, Mutex};

use tokio::sync::oneshot;

use rrun_calls::lock::lock;

/// The number of extra places for each normal place.
const EXTRA_FACTOR: usize = 2;

pub(crate) struct Places {
    /// The number of normal places.
    normal: usize,
    state: Mutex<PlaceTable>,
}

#[derive(Default)]
struct PlaceTable {
    next: u64,
    holders: Vec<TakenPlace>,
    /// The layers that wait for a place. The layer that has waited longest is first.
    waiters: VecDeque<PlaceRequest>,
}

struct TakenPlace {
    id: u64,
    pull: u64,
}

struct PlaceRequest {
    id: u64,
    pull: u64,
    granted: oneshot::Sender<()>,
}

impl Places {
    pub(crate) fn new(normal: usize) -> Arc<Self> {
        Arc::new(Places {
            normal: normal.max(1),
            state: Mutex::default(),
        })
    }

    /// Waits for a place for one layer of the pull `pull`.
    pub(crate) async fn take(self: &Arc<Self>, pull: u64) -> Place {
        let (granted, answer) = oneshot::channel();
        let place = {
            let mut state = lock(&self.state);
            state.next += 1;
            let id = state.next;
            state.waiters.push_back(PlaceRequest { id, pull, granted });
            self.grant(&mut state);
            Place {
                places: Arc::clone(self),
                id,
            }
        };
        // The queue contains the sender until the place is granted. Receiving therefore can't fail
        // earlier.
        let _ = answer.await;
        place
    }

    /// Grants the free places to waiting layers. Each place is granted to a layer of the pull with
    /// the fewest places.
    fn grant(&self, state: &mut PlaceTable) {
        state.waiters.retain(|waiter| !waiter.granted.is_closed());
        loop {
            let of_pull = |pull| state.holders.iter().filter(|h| h.pull == pull).count();
            let waiters = state.waiters.iter().enumerate();
            let next = waiters
                .map(|(at, waiter)| (at, of_pull(waiter.pull)))
                .min_by_key(|(_, places)| *places);
            let Some((at, places)) = next else { return };
            let extra = self.normal.saturating_mul(EXTRA_FACTOR);
            let limit = match places {
                0 => self.normal.saturating_add(extra),
                _ => self.normal,
            };
            if state.holders.len() >= limit {
                return;
            }
            let Some(PlaceRequest { id, pull, granted }) = state.waiters.remove(at) else {
                return;
            };
            if granted.send(()).is_ok() {
                state.holders.push(TakenPlace { id, pull });
            }
        }
    }
}

/// The place of one layer, which may still wait for the grant. Dropping this value releases the place.
pub(crate) struct Place {
    places: Arc<Places>,
    id: u64,
}

impl Drop for Place {
    fn drop(&mut self) {
        let mut state = lock(&self.places.state);
        state.waiters.retain(|waiter| waiter.id != self.id);
        state.holders.retain(|holder| holder.id != self.id);
        self.places.grant(&mut state);
    }
}

#[cfg(test)]
mod tests {
    use futures_util::FutureExt as _;

    use super::*;

    /// Returns a place, if it is granted immediately.
    fn take(places: &Arc<Places>, pull: u64) -> Option<Place> {
        places.take(pull).now_or_never()
    }

    #[tokio::test]
    async fn one_pull_can_not_occupy_the_places_of_other_pulls() {
        let places = Places::new(2);
        let first = [1, 1].map(|pull| take(&places, pull));
        assert!(first.iter().all(Option::is_some));
        assert!(take(&places, 1).is_none());
        let others: Vec<_> = (2..6).map(|pull| take(&places, pull)).collect();
        assert!(others.iter().all(Option::is_some));
        assert!(take(&places, 2).is_none());
        assert!(take(&places, 9).is_none(), "the extra places have no limit");
        drop(others);
        let mut same = Box::pin(places.take(1));
        let mut other = Box::pin(places.take(2));
        assert!((&mut same).now_or_never().is_none());
        let other = (&mut other).now_or_never();
        assert!(other.is_some());
        drop(first);
        assert!((&mut same).now_or_never().is_some());
    }

    #[tokio::test]
    async fn a_free_place_is_given_to_the_pull_with_the_fewest_places() {
        let places = Places::new(3);
        let mut held: Vec<_> = [1, 1, 2].map(|pull| take(&places, pull)).into();
        let mut of_first = Box::pin(places.take(1));
        let mut of_second = Box::pin(places.take(2));
        assert!((&mut of_first).now_or_never().is_none());
        assert!((&mut of_second).now_or_never().is_none());
        held.remove(0);
        held.remove(1);
        // The first pull has one place, and the second pull has none.
        assert!((&mut of_second).now_or_never().is_some());
        assert!((&mut of_first).now_or_never().is_some());
        // A place is not granted to a waiter that was dropped.
        drop((of_first, of_second, held));
        let all: Vec<_> = [5; 3].map(|pull| take(&places, pull)).into();
        assert!(all.iter().all(Option::is_some));
    }
}
