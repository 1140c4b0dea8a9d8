//! Limits how many layers are partly unpacked at the same time.
//!
//! A layer has a place from the start of its thread until all its data is unpacked. Each place
//! costs a thread and the memory of a decoder.
//!
//! The layers of a hostile image can be tiny blobs that need hours to be unpacked. Such layers
//! could occupy all places. A layer that has been processed for [`QUICK_TIME`] therefore leaves the
//! normal places, and only counts towards the limit for all layers. If a pull without a place waits
//! at this limit, a layer with more processing time is preempted: it gives its place to the pull,
//! waits for another place, and is unpacked again from its beginning.

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

/// A layer can be preempted if its current turn is at least as long as all its earlier turns
/// together, and at least [`QUICK_TIME`]. A layer that needs a long time is therefore unpacked in
/// the end. For a layer that has not been processed for [`QUICK_TIME`], other layers are preempted
/// after this time. A new pull therefore does not wait long for layers that need hours.
const LONG_TURN: Duration = Duration::from_secs(64);

/// The interval at which a waiting layer looks for layers that no longer need a normal place.
const CHECK_INTERVAL: Duration = Duration::from_millis(500);

/// The minimum time between two preemptions. Within this time, the thread of a preempted layer
/// stops, unless its disk hangs.
const PREEMPTION_INTERVAL: Duration = Duration::from_secs(1);

pub(crate) struct Places {
    /// The number of normal places for layers of pulls that already have a place.
    normal: usize,
    state: Mutex<PlaceTable>,
}

#[derive(Default)]
struct PlaceTable {
    next: u64,
    holders: Vec<Claim>,
    waiters: Vec<(Claim, oneshot::Sender<()>)>,
    preempted: Option<Instant>,
}

/// One layer that has a place or waits for a place.
struct Claim {
    id: u64,
    pull: u64,
    effort: Arc<Effort>,
}

impl Places {
    pub(crate) fn new(normal: usize) -> Arc<Self> {
        Arc::new(Places {
            normal: normal.max(1),
            state: Mutex::default(),
        })
    }

    /// Returns a place for one turn of a layer of the pull `pull`. The place is not granted yet.
    pub(crate) fn place(self: &Arc<Self>, pull: u64, effort: &Arc<Effort>) -> Place {
        effort.begin_turn();
        let mut state = lock(&self.state);
        state.next += 1;
        Place {
            places: Arc::clone(self),
            id: state.next,
            pull,
            effort: Arc::clone(effort),
        }
    }

    /// Grants the free places to waiting layers. Each place is granted to a layer of the pull with
    /// the fewest places. Among these layers, the layer that has waited longest goes first, but
    /// layers that have had little processing time go before some layers that have had much.
    fn grant(&self, state: &mut PlaceTable) {
        state.waiters.retain(|(_, granted)| !granted.is_closed());
        loop {
            let of_pull = |pull| state.holders.iter().filter(|h| h.pull == pull).count();
            let order = |claim: &Claim| {
                let position = claim.id + claim.effort.later_threads();
                (of_pull(claim.pull), position, claim.id)
            };
            let waiters = state.waiters.iter().enumerate();
            let next = waiters.min_by_key(|(_, (claim, _))| order(claim));
            let Some((at, (claim, _))) = next else { return };
            let places = of_pull(claim.pull);
            let limit = match places {
                0 => self.normal.saturating_mul(FIRST_FACTOR),
                _ => self.normal,
            };
            let quick = state.holders.iter().filter(|h| h.is_quick()).count();
            if claim.is_quick() && quick >= limit {
                return;
            }
            if state.holders.len() >= self.normal.saturating_mul(ALL_FACTOR) {
                let processed = claim.effort.processed();
                if places == 0 {
                    preempt_one(state, processed, Instant::now());
                }
                return;
            }
            let (claim, granted) = state.waiters.remove(at);
            if granted.send(()).is_ok() {
                state.holders.push(claim);
            }
        }
    }
}

impl Claim {
    fn is_quick(&self) -> bool {
        self.effort.processed() < QUICK_TIME
    }

    /// Returns whether this layer can be preempted for a layer that has been processed for
    /// `processed`.
    fn has_had_its_turn(&self, processed: Duration) -> bool {
        let (turn, all) = (self.effort.turn(), self.effort.processed());
        let mut least = (all - turn).max(QUICK_TIME);
        if processed < QUICK_TIME {
            least = least.min(LONG_TURN);
        }
        all > processed && turn >= least
    }
}

/// Preempts one layer for a layer that has been processed for `processed`. The preempted layer is
/// from a host with the most layers that are not quick. Among these layers, it has the most
/// processing time. The size of a layer does not matter, because the author of a layer can choose
/// it. The number of layers of a pull does not matter either: a hostile registry can offer many
/// images with one layer.
fn preempt_one(state: &mut PlaceTable, processed: Duration, now: Instant) {
    let recently = |at| now.saturating_duration_since(at) < PREEMPTION_INTERVAL;
    if state.preempted.is_some_and(recently) {
        return;
    }
    let of_host = |host: &str| {
        let slow = state.holders.iter().filter(|h| !h.is_quick());
        slow.filter(|holder| holder.effort.host == host).count()
    };
    let chosen = state
        .holders
        .iter()
        .filter(|holder| !holder.effort.is_preempted() && holder.has_had_its_turn(processed))
        .max_by_key(|holder| (of_host(&holder.effort.host), holder.effort.processed()));
    if let Some(chosen) = chosen {
        chosen.effort.preempt();
        state.preempted = Some(now);
    }
}

/// The place of one layer for one turn. Dropping this value releases the place.
pub(crate) struct Place {
    places: Arc<Places>,
    id: u64,
    pull: u64,
    effort: Arc<Effort>,
}

impl Place {
    /// Waits until the place is granted. A wait that was ended by [`Place::leave`] can begin again.
    /// The layer then has the same position in the queue as before.
    pub(crate) async fn granted(&self) {
        let (granted, mut answer) = oneshot::channel();
        {
            let mut state = lock(&self.places.state);
            let claim = Claim {
                id: self.id,
                pull: self.pull,
                effort: Arc::clone(&self.effort),
            };
            state.waiters.push((claim, granted));
            self.places.grant(&mut state);
        }
        // The queue contains the sender until the place is granted. Receiving therefore can't fail
        // earlier.
        while tokio::time::timeout(CHECK_INTERVAL, &mut answer)
            .await
            .is_err()
        {
            self.places.grant(&mut lock(&self.places.state));
        }
    }

    /// Releases the place, or leaves the queue.
    pub(crate) fn leave(&self) {
        let mut state = lock(&self.places.state);
        state.waiters.retain(|(waiter, _)| waiter.id != self.id);
        state.holders.retain(|holder| holder.id != self.id);
        self.places.grant(&mut state);
    }
}

impl Drop for Place {
    fn drop(&mut self) {
        self.leave();
    }
}

#[cfg(test)]
mod tests {
    use futures_util::FutureExt as _;

    use super::*;

    /// Returns a place, if it is granted immediately.
    fn take(places: &Arc<Places>, pull: u64) -> Option<Place> {
        take_later(places, pull).now_or_never()
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
        let mut same = Box::pin(take_later(&places, 1));
        let mut other = Box::pin(take_later(&places, 2));
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
        let mut of_first = Box::pin(take_later(&places, 1));
        let mut of_second = Box::pin(take_later(&places, 2));
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
    async fn a_layer_that_leaves_the_queue_keeps_its_position() {
        let places = Places::new(1);
        let held = [1, 2].map(|pull| take(&places, pull));
        assert!(held.iter().all(Option::is_some));
        let first = places.place(3, &Arc::default());
        let mut second = Box::pin(take_later(&places, 4));
        assert!((&mut second).now_or_never().is_none());
        assert!(first.granted().now_or_never().is_none());
        first.leave();
        let mut granted = Box::pin(first.granted());
        assert!((&mut granted).now_or_never().is_none());
        drop(held);
        assert!(granted.now_or_never().is_some());
        let second = second.now_or_never();
        assert!(second.is_some());
        let mut third = Box::pin(take_later(&places, 5));
        assert!((&mut third).now_or_never().is_none());
        first.leave();
        assert!(third.now_or_never().is_some());
    }

    #[tokio::test]
    async fn a_layer_that_needs_a_long_time_gives_up_its_place() {
        let places = Places::new(2);
        let mut held = Vec::new();
        // The layer with the most processing time is from another host.
        let hosts = ["registry"; 5].into_iter().chain(["another"]);
        let efforts: Vec<_> = hosts.map(|host| Effort::new(host.to_owned())).collect();
        for (pull, effort) in (0..).zip(&efforts) {
            held.push(take_for(&places, pull, effort).now_or_never());
            effort.add(QUICK_TIME + Duration::from_millis(pull));
        }
        assert!(
            held.iter().all(Option::is_some),
            "a layer waited for layers that need much processing time"
        );
        let mut same = Box::pin(take_later(&places, 1));
        assert!((&mut same).now_or_never().is_none());
        let preempted = || efforts.iter().map(|effort| effort.is_preempted());
        assert!(!preempted().any(|preempted| preempted));
        let mut first = Box::pin(take_later(&places, 9));
        assert!((&mut first).now_or_never().is_none());
        let expected = [false, false, false, false, true, false];
        let shown = || preempted().collect::<Vec<_>>();
        assert_eq!(shown(), expected);
        // No further layer is preempted immediately.
        let mut second = Box::pin(take_later(&places, 10));
        assert!((&mut second).now_or_never().is_none());
        assert_eq!(shown(), expected);
        held.remove(4);
        assert!((&mut first).now_or_never().is_some());
    }

    /// Returns whether one of `holders` is preempted for a new layer that has been processed for
    /// `processed`.
    fn preempts(holders: &[&Arc<Effort>], processed: Duration) -> bool {
        let holders = holders.iter().zip(0..).map(|(effort, id)| Claim {
            id,
            pull: id,
            effort: Arc::clone(effort),
        });
        let mut state = PlaceTable {
            holders: holders.collect(),
            ..PlaceTable::default()
        };
        preempt_one(&mut state, processed, Instant::now());
        state.preempted.is_some()
    }

    #[test]
    fn each_turn_is_as_long_as_all_earlier_turns_and_has_a_limit_for_new_layers() {
        let turns = |processed| {
            let effort = Arc::<Effort>::default();
            let turn = |_| {
                effort.begin_turn();
                while !preempts(&[&effort], processed) {
                    effort.add(Duration::from_secs(1));
                }
                effort.turn().as_secs()
            };
            (0..9).map(turn).collect::<Vec<_>>()
        };
        assert_eq!(turns(Duration::ZERO), [2, 2, 4, 8, 16, 32, 64, 64, 64]);
        assert_eq!(turns(QUICK_TIME), [3, 3, 6, 12, 24, 48, 96, 192, 384]);
    }

    #[test]
    fn a_layer_is_preempted_only_for_layers_with_less_processing_time() {
        let [little, much] = [3, 300].map(|seconds| {
            let effort = Arc::<Effort>::default();
            effort.add(Duration::from_secs(seconds));
            effort
        });
        assert!(!preempts(&[&little], much.processed()));
        assert!(!preempts(&[&much], much.processed()));
        assert!(preempts(&[&little, &much], little.processed()));
        assert!(much.is_preempted() && !little.is_preempted());
    }

    async fn take_later(places: &Arc<Places>, pull: u64) -> Place {
        take_for(places, pull, &Effort::new("registry".to_owned())).await
    }

    async fn take_for(places: &Arc<Places>, pull: u64, effort: &Arc<Effort>) -> Place {
        let place = places.place(pull, effort);
        place.granted().await;
        place
    }

    #[tokio::test]
    async fn a_waiting_layer_gets_the_place_of_a_layer_that_needs_a_long_time() {
        let places = Places::new(1);
        let effort = Arc::default();
        let _long = take_for(&places, 1, &effort).await;
        let mut waits = Box::pin(take_later(&places, 1));
        assert!((&mut waits).now_or_never().is_none());
        effort.add(QUICK_TIME);
        waits.await;
    }
}
