//! Limits how many layers are partly unpacked at the same time.
//!
//! A layer has a place from the start of its thread until all its data is unpacked. Each place
//! costs a thread and the memory of a decoder.
//!
//! The layers of a hostile image can be tiny blobs that need hours to be unpacked. Such layers
//! could occupy all places. A layer that has been processed for [`QUICK_TIME`] therefore leaves the
//! normal places, and only counts towards the limit for all layers. If a pull without a place waits
//! at this limit, the layer with the most processing time for its size is ended.

use std::collections::VecDeque;
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use tokio::sync::oneshot;

use crate::turns::Effort;
use rrun_calls::lock::lock;

/// After this processing time, a layer no longer counts towards the limits of normal places.
const QUICK_TIME: Duration = Duration::from_secs(2);

/// The limit of normal places for the layers of pulls without a place, as a multiple of the limit
/// for other layers. One pull can't occupy all these places.
const FIRST_FACTOR: usize = 2;

/// The limit for all layers, as a multiple of the limit of normal places.
const ALL_FACTOR: usize = 3;

/// The interval at which a waiting layer looks for layers that no longer need a normal place.
const CHECK_INTERVAL: Duration = Duration::from_millis(500);

/// The minimum time between two layers that are ended. Within this time, the thread of an ended
/// layer stops, unless its disk hangs.
const END_INTERVAL: Duration = Duration::from_secs(1);

pub(crate) struct Places {
    /// The number of normal places for layers of pulls that already have a place.
    normal: usize,
    state: Mutex<PlaceTable>,
}

#[derive(Default)]
struct PlaceTable {
    next: u64,
    holders: Vec<TakenPlace>,
    /// The layers that wait for a place. The layer that has waited longest is first.
    waiters: VecDeque<PlaceRequest>,
    /// The time at which a layer was last ended.
    ended: Option<Instant>,
}

struct TakenPlace {
    id: u64,
    pull: u64,
    effort: Arc<Effort>,
}

struct PlaceRequest {
    id: u64,
    pull: u64,
    effort: Arc<Effort>,
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
    pub(crate) async fn take(self: &Arc<Self>, pull: u64, effort: &Arc<Effort>) -> Place {
        let (granted, mut answer) = oneshot::channel();
        let place = {
            let mut state = lock(&self.state);
            state.next += 1;
            let id = state.next;
            state.waiters.push_back(PlaceRequest {
                id,
                pull,
                effort: Arc::clone(effort),
                granted,
            });
            self.grant(&mut state);
            Place {
                places: Arc::clone(self),
                id,
            }
        };
        // The queue contains the sender until the place is granted. Receiving therefore can't fail
        // earlier.
        while tokio::time::timeout(CHECK_INTERVAL, &mut answer)
            .await
            .is_err()
        {
            self.grant(&mut lock(&self.state));
        }
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
            let limit = match places {
                0 => self.normal.saturating_mul(FIRST_FACTOR),
                _ => self.normal,
            };
            let quick = state.holders.iter().filter(|h| h.is_quick()).count();
            if quick >= limit {
                return;
            }
            if state.holders.len() >= self.normal.saturating_mul(ALL_FACTOR) {
                if places == 0 {
                    end_one(state, Instant::now());
                }
                return;
            }
            let Some(waiter) = state.waiters.remove(at) else {
                return;
            };
            if waiter.granted.send(()).is_ok() {
                state.holders.push(TakenPlace {
                    id: waiter.id,
                    pull: waiter.pull,
                    effort: waiter.effort,
                });
            }
        }
    }
}

impl TakenPlace {
    fn is_quick(&self) -> bool {
        self.effort.processed() < QUICK_TIME
    }
}

/// Ends the unpacking of the layer that needs the most processing time for its size. An ordinary
/// layer needs little time for each of its bytes, even if it is large.
fn end_one(state: &mut PlaceTable, now: Instant) {
    let recently = |ended| now.saturating_duration_since(ended) < END_INTERVAL;
    if state.ended.is_some_and(recently) {
        return;
    }
    let slow = state.holders.iter().filter(|h| !h.is_quick());
    let running = slow.filter(|h| !h.effort.is_ended());
    if let Some(worst) = running.max_by_key(|h| h.effort.per_mebibyte()) {
        worst.effort.end();
        state.ended = Some(now);
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
        places.take(pull, &Arc::default()).now_or_never()
    }

    #[tokio::test]
    async fn one_pull_can_not_occupy_the_places_of_other_pulls() {
        let places = Places::new(2);
        let first = [1, 1].map(|pull| take(&places, pull));
        assert!(first.iter().all(Option::is_some));
        assert!(take(&places, 1).is_none());
        let others: Vec<_> = (2..4).map(|pull| take(&places, pull)).collect();
        assert!(others.iter().all(Option::is_some));
        assert!(take(&places, 2).is_none());
        assert!(take(&places, 9).is_none(), "the places have no limit");
        drop(others);
        let effort = Arc::default();
        let mut same = Box::pin(places.take(1, &effort));
        let mut other = Box::pin(places.take(2, &effort));
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
        let effort = Arc::default();
        let mut of_first = Box::pin(places.take(1, &effort));
        let mut of_second = Box::pin(places.take(2, &effort));
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

    #[tokio::test]
    async fn a_layer_that_needs_a_long_time_gives_up_its_place() {
        let places = Places::new(2);
        let mut held = Vec::new();
        let efforts: Vec<Arc<Effort>> = (0..6).map(|_| Arc::default()).collect();
        for (pull, effort) in (0..).zip(&efforts) {
            held.push(places.take(pull, effort).now_or_never());
            effort.add(QUICK_TIME + Duration::from_millis(pull));
        }
        assert!(
            held.iter().all(Option::is_some),
            "a layer waited for layers that need much processing time"
        );
        // The layer with the most processing time is large.
        efforts[5].add_read(64 << 20);
        let same = Arc::default();
        let mut same = Box::pin(places.take(1, &same));
        assert!((&mut same).now_or_never().is_none());
        let ended = || efforts.iter().map(|effort| effort.is_ended());
        assert!(!ended().any(|ended| ended));
        let mut first = Box::pin(take_later(&places, 9));
        assert!((&mut first).now_or_never().is_none());
        let expected = [false, false, false, false, true, false];
        assert!(ended().eq(expected), "{:?}", ended().collect::<Vec<_>>());
        // No further layer is ended immediately.
        let mut second = Box::pin(take_later(&places, 10));
        assert!((&mut second).now_or_never().is_none());
        assert!(ended().eq(expected), "{:?}", ended().collect::<Vec<_>>());
        held.remove(4);
        assert!((&mut first).now_or_never().is_some());
    }

    async fn take_later(places: &Arc<Places>, pull: u64) -> Place {
        places.take(pull, &Arc::default()).await
    }

    #[tokio::test]
    async fn a_waiting_layer_gets_the_place_of_a_layer_that_needs_a_long_time() {
        let places = Places::new(1);
        let effort = Arc::default();
        let _long = places.take(1, &effort).await;
        let mut waits = Box::pin(take_later(&places, 1));
        assert!((&mut waits).now_or_never().is_none());
        effort.add(QUICK_TIME);
        waits.await;
    }
}
