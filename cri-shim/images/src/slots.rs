//! Decides which layers may be fetched now.
//!
//! The number of slots limits the fetches of all pulls together. One host may have fewer, or it
//! could hold up the pulls from all others. A fetch that receives almost nothing gives its slot up
//! as soon as another pull waits for it, and so does a fetch that has had its slot for long. The
//! bytes that have arrived are kept, and the fetch goes on from there in its next turn.
//!
//! That does not help a small layer, of which no bytes are kept, nor a layer of a registry that
//! sends each blob only from its beginning. Such a fetch gets longer turns until it comes farther.

use std::collections::VecDeque;
use std::sync::atomic::{AtomicBool, AtomicU32, AtomicU64, Ordering};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use tokio::sync::oneshot;

use rrun_calls::lock::lock;

/// How long a fetch keeps its slot while another pull waits for it.
const SHORT_TURN: Duration = Duration::from_secs(60);

/// The same for a fetch that is fast, or that already has many bytes. The next turn unpacks those
/// bytes again, and that must not become most of the work.
const LONG_TURN: Duration = Duration::from_secs(600);

/// The longest turn of a fetch whose turns are made longer. Others wait for as long.
const MAX_TURN: Duration = Duration::from_secs(3600);

/// The rate of a fast fetch, in bytes a second.
const FAST_BYTES_PER_SECOND: u64 = 1 << 20;

/// How many bytes of earlier turns count as many.
const LARGE_REPLAY_BYTES: u64 = 64 << 20;

/// How often a layer queues again because it comes from another host than expected.
const MAX_MOVES: u64 = 3;

/// How long a layer waits for its slot before the log says so.
const WAIT_BEFORE_LOG: Duration = Duration::from_secs(10);

/// The slots of a node.
pub(crate) struct Slots {
    /// How many there are over all hosts, and how many of them one host may have.
    most: usize,
    per_host: usize,
    state: Mutex<SlotTable>,
}

#[derive(Default)]
struct SlotTable {
    next: u64,
    holders: Vec<Holder>,
    /// In the order in which they came.
    waiters: VecDeque<Waiter>,
}

struct Holder {
    id: u64,
    pull: u64,
    host: String,
    since: Instant,
    gauge: Arc<Gauge>,
}

struct Waiter {
    id: u64,
    pull: u64,
    host: String,
    gauge: Arc<Gauge>,
    granted: oneshot::Sender<()>,
}

/// How many bytes of a layer arrived in earlier turns, and in this one.
#[derive(Default)]
struct Gauge {
    before: AtomicU64,
    now: AtomicU64,
    /// How often a turn was over before the fetch came farther than in earlier turns.
    in_vain: AtomicU32,
}

impl Holder {
    /// Bytes in a second.
    fn rate(&self, now: Instant) -> u64 {
        let seconds = now.duration_since(self.since).as_secs().max(1);
        self.gauge.now.load(Ordering::Relaxed) / seconds
    }

    fn has_had_its_turn(&self, now: Instant) -> bool {
        let much = self.gauge.before.load(Ordering::Relaxed) >= LARGE_REPLAY_BYTES;
        let turn = if much || self.rate(now) >= FAST_BYTES_PER_SECOND {
            LONG_TURN
        } else {
            SHORT_TURN
        };
        let longer = 2u32.saturating_pow(self.gauge.in_vain.load(Ordering::Relaxed));
        now.duration_since(self.since) >= turn.saturating_mul(longer).min(MAX_TURN)
    }
}

impl Slots {
    pub(crate) fn new(most: usize, per_host: usize) -> Arc<Self> {
        let most = most.max(1);
        Arc::new(Slots {
            most,
            per_host: per_host.clamp(1, most),
            state: Mutex::default(),
        })
    }

    /// A slot for one layer of one pull, not held yet. `what` is for the log: "layer sha256:…".
    pub(crate) fn slot(self: &Arc<Self>, pull: u64, what: String) -> Slot {
        let mut state = lock(&self.state);
        state.next += 1;
        Slot {
            id: state.next,
            slots: Arc::clone(self),
            pull,
            what,
            gauge: Arc::default(),
            gave_way: Arc::default(),
            turn_was_over: AtomicBool::new(false),
            moves: AtomicU64::new(0),
        }
    }

    fn from_host(state: &SlotTable, host: &str) -> usize {
        state.holders.iter().filter(|h| h.host == host).count()
    }

    /// Grants the free slots. The pull that has the fewest goes first, or the next image would have
    /// to wait for all layers of an image that has many.
    fn grant(&self, state: &mut SlotTable) {
        state.waiters.retain(|waiter| !waiter.granted.is_closed());
        while state.holders.len() < self.most {
            let of_pull = |pull| state.holders.iter().filter(|h| h.pull == pull).count();
            let next = state
                .waiters
                .iter()
                .enumerate()
                .filter(|(_, waiter)| Self::from_host(state, &waiter.host) < self.per_host)
                .min_by_key(|(_, waiter)| of_pull(waiter.pull))
                .map(|(at, _)| at);
            let Some(waiter) = next.and_then(|at| state.waiters.remove(at)) else {
                return;
            };
            if waiter.granted.send(()).is_ok() {
                waiter.gauge.now.store(0, Ordering::Relaxed);
                state.holders.push(Holder {
                    id: waiter.id,
                    pull: waiter.pull,
                    host: waiter.host,
                    since: Instant::now(),
                    gauge: waiter.gauge,
                });
            }
        }
    }

    /// Whether this holder must give its slot to another pull that waits. Layers of the same image
    /// keep their slots, since the image gains nothing if they take turns.
    fn must_leave(&self, state: &SlotTable, id: u64, still: bool, now: Instant) -> bool {
        let Some(ours) = state.holders.iter().find(|holder| holder.id == id) else {
            return false;
        };
        let full = state.holders.len() >= self.most;
        let waiting = state.waiters.iter().filter(|w| !w.granted.is_closed());
        for waiter in waiting.filter(|waiter| waiter.pull != ours.pull) {
            let host_full = Self::from_host(state, &waiter.host) >= self.per_host;
            let helps = |holder: &Holder| {
                if host_full {
                    holder.host == waiter.host
                } else {
                    full
                }
            };
            if !helps(ours) {
                continue;
            }
            if still {
                return true;
            }
            // The slowest of the holders whose turn is over must leave.
            let slowest = state
                .holders
                .iter()
                .filter(|holder| holder.pull != waiter.pull && helps(holder))
                .filter(|holder| holder.has_had_its_turn(now))
                .min_by_key(|holder| holder.rate(now));
            if slowest.is_some_and(|slowest| slowest.id == id) {
                return true;
            }
        }
        false
    }
}

/// The right to fetch one layer, held or not. To drop it gives it back.
pub(crate) struct Slot {
    slots: Arc<Slots>,
    id: u64,
    pull: u64,
    what: String,
    gauge: Arc<Gauge>,
    gave_way: Arc<AtomicBool>,
    /// It gave way because its turn was over.
    turn_was_over: AtomicBool,
    moves: AtomicU64,
}

impl Slot {
    /// Waits until the layer may be fetched from `host`, and gives up a slot held for another host.
    /// The caller must not hold anything that a holder of a slot may wait for: that would be a
    /// deadlock.
    pub(crate) async fn at(&self, host: &str) {
        let (granted, answer) = oneshot::channel();
        {
            let mut state = lock(&self.slots.state);
            let held = state.holders.iter().position(|h| h.id == self.id);
            if let Some(at) = held {
                if state.holders[at].host == host {
                    return;
                }
                state.holders.remove(at);
            }
            state.waiters.push_back(Waiter {
                id: self.id,
                pull: self.pull,
                host: host.to_owned(),
                gauge: Arc::clone(&self.gauge),
                granted,
            });
            self.slots.grant(&mut state);
        }
        let mut answer = answer;
        let begun = Instant::now();
        let mut pause = WAIT_BEFORE_LOG;
        // The sender stays in the queue until the slot is granted, so that this does not end early.
        while tokio::time::timeout(pause, &mut answer).await.is_err() {
            pause = (pause * 2).min(LONG_TURN);
            if self.stands_for_its_pull() {
                let Slots { most, per_host, .. } = &*self.slots;
                log::warn!(
                    "{}: waiting for {} s to be fetched: at most {per_host} layers are fetched at once from {host}, and {most} from all hosts",
                    self.what,
                    begun.elapsed().as_secs()
                );
            }
        }
    }

    /// Notes that the layer comes from `host`, for which the slot may not be held. False: no
    /// further layer may come from there now, and the slot has been given up.
    pub(crate) fn moves_to(&self, host: &str) -> bool {
        let mut state = lock(&self.slots.state);
        let room = Slots::from_host(&state, host) < self.slots.per_host;
        let Some(at) = state.holders.iter().position(|h| h.id == self.id) else {
            return false;
        };
        if state.holders[at].host == host {
            return true;
        }
        // Hosts that redirect to each other must not make the layer queue for ever.
        let stays = room || self.moves.fetch_add(1, Ordering::Relaxed) >= MAX_MOVES;
        if stays {
            host.clone_into(&mut state.holders[at].host);
        } else {
            self.gave_way.store(true, Ordering::Relaxed);
            state.holders.remove(at);
        }
        self.slots.grant(&mut state);
        stays
    }

    /// Whether no layer of this pull is fetched now and this is the first of those that wait. Only
    /// the first one logs its wait: one line is enough for the pull.
    fn stands_for_its_pull(&self) -> bool {
        let state = lock(&self.slots.state);
        let mut waiting = state.waiters.iter().filter(|w| w.pull == self.pull);
        let fetched = state.holders.iter().any(|h| h.pull == self.pull);
        !fetched && waiting.next().is_some_and(|first| first.id == self.id)
    }

    /// Gives the slot back.
    pub(crate) fn leave(&self) {
        let mut state = lock(&self.slots.state);
        let before = state.holders.len();
        state.holders.retain(|holder| holder.id != self.id);
        if state.holders.len() != before {
            self.slots.grant(&mut state);
        }
    }

    /// Notes how many bytes earlier turns have left.
    pub(crate) fn begins_at(&self, bytes: u64) {
        self.gauge.before.store(bytes, Ordering::Relaxed);
    }

    /// Counts bytes that have arrived.
    pub(crate) fn came(&self, bytes: u64) {
        self.gauge.now.fetch_add(bytes, Ordering::Relaxed);
    }

    /// Gives the slot to another pull that waits, if it is time to. `still`: almost nothing
    /// arrives.
    pub(crate) fn gives_way(&self, still: bool) -> bool {
        let mut state = lock(&self.slots.state);
        if !self
            .slots
            .must_leave(&state, self.id, still, Instant::now())
        {
            return false;
        }
        self.gave_way.store(true, Ordering::Relaxed);
        self.turn_was_over.store(!still, Ordering::Relaxed);
        // It has fetched for a while, so hosts that redirect to each other cannot repeat this fast.
        self.moves.store(0, Ordering::Relaxed);
        state.holders.retain(|holder| holder.id != self.id);
        self.slots.grant(&mut state);
        true
    }

    /// Whether the slot has been given to another pull.
    pub(crate) fn gave_way(&self) -> bool {
        self.gave_way.load(Ordering::Relaxed)
    }

    /// As [`Slot::gave_way`], for a thread that may outlive the fetch and must not keep the slot.
    pub(crate) fn whether_it_gave_way(&self) -> Arc<AtomicBool> {
        Arc::clone(&self.gave_way)
    }

    /// The next turn begins.
    pub(crate) fn again(&self) {
        self.gave_way.store(false, Ordering::Relaxed);
        self.turn_was_over.store(false, Ordering::Relaxed);
    }

    /// Notes that the last turn brought only bytes that earlier turns had brought as well. If it
    /// was not long enough, the next one is twice as long. A fetch that stood still gains nothing.
    pub(crate) fn came_no_farther(&self) {
        if self.turn_was_over.load(Ordering::Relaxed) {
            self.gauge.in_vain.fetch_add(1, Ordering::Relaxed);
        }
    }
}

impl Drop for Slot {
    fn drop(&mut self) {
        self.leave();
    }
}

#[cfg(test)]
mod tests {
    use futures_util::FutureExt as _;

    use super::*;

    fn slot(slots: &Arc<Slots>, pull: u64) -> Slot {
        slots.slot(pull, "a layer".to_owned())
    }

    /// Whether the slot is granted at once.
    fn enters(slot: &Slot, host: &str) -> bool {
        slot.at(host).now_or_never().is_some()
    }

    #[tokio::test]
    async fn one_host_never_has_all_slots() {
        let slots = Slots::new(3, 2);
        let all: Vec<Slot> = (0..4).map(|_| slot(&slots, 1)).collect();
        assert!(enters(&all[0], "a"));
        assert!(enters(&all[1], "a"));
        assert!(!enters(&all[2], "a"));
        assert!(enters(&all[3], "b"));
    }

    #[tokio::test]
    async fn who_waits_is_let_in_when_a_slot_is_free_and_not_before_others() {
        let slots = Slots::new(2, 1);
        let (first, second, third) = (slot(&slots, 1), slot(&slots, 2), slot(&slots, 3));
        assert!(enters(&first, "a"));
        let mut second_waits = Box::pin(second.at("a"));
        assert!((&mut second_waits).now_or_never().is_none());
        let mut third_waits = Box::pin(third.at("a"));
        assert!((&mut third_waits).now_or_never().is_none());
        drop(first);
        assert!((&mut third_waits).now_or_never().is_none());
        assert!((&mut second_waits).now_or_never().is_some());
        // A waiter that is dropped takes no slot.
        drop(third_waits);
        drop(second_waits);
        drop(second);
        assert!(enters(&slot(&slots, 4), "a"));
    }

    #[tokio::test]
    async fn a_redirection_counts_where_it_leads() {
        let slots = Slots::new(3, 1);
        let (first, second) = (slot(&slots, 1), slot(&slots, 2));
        assert!(enters(&first, "a"));
        assert!(enters(&second, "b"));
        assert!(!second.moves_to("a"), "a second one from the same host");
        assert!(second.gave_way());
        // `second` holds no slot any more.
        let third = slot(&slots, 3);
        assert!(enters(&third, "b"));
        assert!(third.moves_to("c"));
        assert!(enters(&second, "b"));
        // After enough redirections between full hosts, the layer stays where it is.
        for _ in 1..MAX_MOVES {
            assert!(!second.moves_to("a"));
            assert!(enters(&second, "b"));
        }
        assert!(second.moves_to("a"));
    }

    #[tokio::test]
    async fn what_does_not_move_gives_way_to_whoever_waits_for_it() {
        let slots = Slots::new(2, 1);
        let (still, other) = (slot(&slots, 1), slot(&slots, 1));
        assert!(enters(&still, "a"));
        assert!(enters(&other, "b"));
        assert!(!still.gives_way(true), "nobody waits");
        let sibling = slot(&slots, 1);
        let mut sibling_waits = Box::pin(sibling.at("b"));
        assert!((&mut sibling_waits).now_or_never().is_none());
        assert!(!other.gives_way(true), "a layer of the same image can wait");
        let waiter = slot(&slots, 2);
        let mut waits = Box::pin(waiter.at("b"));
        assert!((&mut waits).now_or_never().is_none());
        assert!(!still.gives_way(true), "it would be of no use");
        assert!(!other.gives_way(false), "it moves");
        assert!(other.gives_way(true) && other.gave_way());
        // The other image gets it before the layer of an image that already has a slot.
        assert!((&mut waits).now_or_never().is_some());
        assert!((&mut sibling_waits).now_or_never().is_none());
    }

    #[tokio::test]
    async fn after_its_turn_the_slowest_gives_way_to_another_pull() {
        let slots = Slots::new(2, 2);
        let (slow, fast) = (slot(&slots, 1), slot(&slots, 1));
        assert!(enters(&slow, "a"));
        assert!(enters(&fast, "a"));
        slow.came(1000);
        fast.came(100_000);
        let sibling = slot(&slots, 1);
        let mut sibling_waits = Box::pin(sibling.at("b"));
        assert!((&mut sibling_waits).now_or_never().is_none());
        let must = |slot: &Slot, after| {
            let state = lock(&slots.state);
            slots.must_leave(&state, slot.id, false, Instant::now() + after)
        };
        assert!(
            !must(&slow, SHORT_TURN),
            "a layer of the same image can wait"
        );
        let other = slot(&slots, 2);
        let mut other_waits = Box::pin(other.at("b"));
        assert!((&mut other_waits).now_or_never().is_none());
        assert!(!must(&slow, SHORT_TURN / 2));
        assert!(must(&slow, SHORT_TURN));
        assert!(!must(&fast, SHORT_TURN));
        slow.begins_at(LARGE_REPLAY_BYTES);
        assert!(!must(&slow, SHORT_TURN), "there is much to unpack anew");
        assert!(must(&slow, LONG_TURN));
    }

    /// Whether the slot must leave, for another pull, after it has been held for this long.
    fn must_leave_after(slot: &Slot, held: Duration) -> bool {
        let mut state = lock(&slot.slots.state);
        for holder in state.holders.iter_mut().filter(|h| h.id == slot.id) {
            holder.since = Instant::now().checked_sub(held).unwrap_or(holder.since);
        }
        drop(state);
        slot.gives_way(false)
    }

    #[tokio::test]
    async fn turns_without_progress_become_longer_until_the_layer_comes_farther() {
        let slots = Slots::new(1, 1);
        let small = slot(&slots, 1);
        let second = Duration::from_secs(1);
        let mut turn = SHORT_TURN;
        for _ in 0..8 {
            small.again();
            assert!(enters(&small, "a"));
            let other = slot(&slots, 2);
            let mut waits = Box::pin(other.at("a"));
            assert!((&mut waits).now_or_never().is_none());
            assert!(!must_leave_after(&small, turn - second), "{turn:?}");
            assert!(must_leave_after(&small, turn), "{turn:?}");
            small.came_no_farther();
            turn = (turn * 2).min(MAX_TURN);
        }
        assert_eq!(turn, MAX_TURN);
    }

    #[tokio::test]
    async fn a_fetch_that_stands_still_gets_no_longer_turns() {
        let slots = Slots::new(1, 1);
        let still = slot(&slots, 1);
        for _ in 0..3 {
            still.again();
            assert!(enters(&still, "a"));
            let other = slot(&slots, 2);
            let mut waits = Box::pin(other.at("a"));
            assert!((&mut waits).now_or_never().is_none());
            assert!(still.gives_way(true));
            still.came_no_farther();
        }
        assert_eq!(still.gauge.in_vain.load(Ordering::Relaxed), 0);
    }

    #[tokio::test]
    async fn each_turn_may_queue_again_for_another_host() {
        let slots = Slots::new(2, 1);
        let (first, second) = (slot(&slots, 1), slot(&slots, 2));
        assert!(enters(&first, "a"));
        for _ in 0..MAX_MOVES {
            assert!(enters(&second, "b"));
            assert!(!second.moves_to("a"));
        }
        assert!(enters(&second, "b"));
        let other = slot(&slots, 3);
        let mut waits = Box::pin(other.at("b"));
        assert!((&mut waits).now_or_never().is_none());
        assert!(second.gives_way(true));
        drop(waits);
        drop(other);
        assert!(enters(&second, "b"));
        assert!(!second.moves_to("a"), "a second one from the same host");
    }
}
