//! Decides which layers may be fetched now.
//!
//! A fetch of a layer needs a slot. The number of slots limits how many layers all pulls together
//! fetch at the same time. A separate, lower limit applies to each host. One slow host therefore
//! can't block the pulls from all other hosts. A host is an IP address, or a name if the address is
//! not known. The port does not matter, because one server can listen on many ports.
//!
//! Several hosts together could still occupy all slots. If all normal slots are occupied, a pull
//! without a slot therefore gets one of the extra slots for a fetch from a host without a slot. The
//! extra slots have a separate limit. They are only for pulls that have had little slot time.
//!
//! A turn is a period in which a fetch has a slot. A fetch gives its slot to a waiting pull if
//! almost no bytes arrive, or if the turn is over. The received bytes are kept, and the fetch
//! continues after these bytes in its next turn.
//!
//! A pull that has had little slot time goes before other pulls. It waits only for short turns of
//! other fetches. A small image is therefore fetched soon, although many slow pulls wait.
//!
//! Two kinds of fetches must receive all bytes again in their next turn. One kind is the fetch of a
//! very small layer, because the layer's received bytes are not kept. The other kind is a fetch
//! from a registry that always sends a blob from its beginning. If a fetch of one of these kinds
//! receives almost no new bytes in a turn, its next turn is twice as long.

use std::cell::Cell;
use std::cmp::Reverse;
use std::collections::{HashMap, VecDeque};
use std::sync::atomic::{AtomicBool, AtomicU32, AtomicU64, Ordering};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use tokio::sync::oneshot;

use rrun_calls::lock::lock;

/// The minimum length of a turn. A turn is that short if a pull without a slot waits that has had
/// almost no slot time yet.
const FIRST_TURN: Duration = Duration::from_secs(3);

/// The normal length of a turn while another pull waits for a slot.
const SHORT_TURN: Duration = Duration::from_secs(60);

/// The length of a turn of a fast or large fetch while another pull waits for a further slot. A
/// fetch is fast if it reaches [`FAST_BYTES_PER_SECOND`]. A fetch is large if it received
/// [`LARGE_REPLAY_BYTES`] in earlier turns. At the beginning of each turn, all bytes from earlier
/// turns are unpacked again. A few long turns therefore cost less than many short turns.
const LONG_TURN: Duration = Duration::from_secs(600);

/// The rate at which the bytes from earlier turns are probably unpacked again, in bytes per second,
/// divided by four. If a pull without a slot waits, a turn in a normal slot lasts at most
/// [`SHORT_TURN`] plus the time for these bytes at this rate. A fetch then spends at most about a
/// quarter of its turns on bytes that it already had, and a fetch without such bytes does not keep
/// its slot longer than [`SHORT_TURN`], even if it is fast.
const REPLAY_BYTES_PER_SECOND: u64 = 16 << 20;

/// The maximum length of a turn while another pull waits for a slot.
const MAX_TURN: Duration = Duration::from_secs(3600);

/// The minimum rate, in bytes per second, of a fetch that counts as fast.
const FAST_BYTES_PER_SECOND: u64 = 1 << 20;

/// The minimum number of bytes from earlier turns for a fetch that counts as large.
const LARGE_REPLAY_BYTES: u64 = 64 << 20;

/// The maximum number of times that one layer queues again because of a redirection to another
/// host.
const MAX_MOVES: u64 = 3;

/// A layer waits in the queue as if it had arrived later. This factor, times the slot time of its
/// pull, is the delay. The maximum delay is [`LONG_TURN`], so that no layer waits forever behind the
/// layers of new pulls.
const DELAY_FACTOR: u32 = 10;

/// A fetch that has not called [`Slot::gives_way`] for this time can't give up its slot now, for
/// example because it waits before it repeats a failed request. Another fetch gives up its slot
/// instead.
const UNRESPONSIVE_TIME: Duration = Duration::from_secs(2);

/// The time after which a layer's wait for a slot is logged.
const WAIT_BEFORE_LOG: Duration = Duration::from_secs(10);

/// The slots for fetching layers on this node.
pub(crate) struct Slots {
    /// The maximum number of normal slots for all hosts together.
    most: usize,
    /// The maximum number of extra slots. If there is only one normal slot, there are no extra
    /// slots.
    extra: usize,
    /// The maximum number of slots for one host.
    per_host: usize,
    state: Mutex<SlotTable>,
}

#[derive(Default)]
struct SlotTable {
    next: u64,
    holders: Vec<Holder>,
    /// The layers that wait for a slot. The layer that has waited longest is first.
    waiters: VecDeque<Waiter>,
    pulls: HashMap<u64, PullTime>,
}

/// The slot time of one pull.
#[derive(Default)]
struct PullTime {
    /// The number of the pull's [`Slot`] values.
    slots: usize,
    /// The sum of the pull's turns that are over.
    had: Duration,
}

struct Holder {
    id: u64,
    pull: u64,
    host: String,
    /// True if the fetch has an extra slot.
    extra: bool,
    since: Instant,
    /// The time of the last call of [`Slot::gives_way`].
    checked: Instant,
    /// True if this fetch was chosen to give up its slot.
    chosen: Cell<bool>,
    gauge: Arc<Gauge>,
}

struct Waiter {
    id: u64,
    pull: u64,
    host: String,
    since: Instant,
    gauge: Arc<Gauge>,
    granted: oneshot::Sender<()>,
}

/// The counters for the received bytes of one layer. `before` counts the bytes from earlier turns,
/// and `now` counts the bytes from the current turn.
#[derive(Default)]
struct Gauge {
    before: AtomicU64,
    now: AtomicU64,
    /// The number of turns in vain. In a turn in vain, almost all received bytes were bytes that
    /// earlier turns had already received.
    in_vain: AtomicU32,
}

impl Waiter {
    fn wants(&self) -> (u64, &str) {
        (self.pull, &self.host)
    }
}

impl Holder {
    /// Returns the rate of this fetch in bytes per second.
    fn rate(&self, now: Instant) -> u64 {
        let seconds = now.duration_since(self.since).as_secs().max(1);
        self.gauge.now.load(Ordering::Relaxed) / seconds
    }

    /// Returns whether this fetch must give its slot to another pull. If the other pull has no slot,
    /// `first` is the slot time that the other pull has had.
    fn has_had_its_turn(&self, now: Instant, first: Option<Duration>) -> bool {
        let before = self.gauge.before.load(Ordering::Relaxed);
        let turn = if let Some(had) = first {
            let turn = had.clamp(FIRST_TURN, SHORT_TURN);
            // No fetch keeps an extra slot longer. The extra slots are for new pulls.
            if self.extra {
                return now.duration_since(self.since) >= turn;
            }
            let replay = Duration::from_secs(before / REPLAY_BYTES_PER_SECOND);
            turn.saturating_add(replay).min(LONG_TURN)
        } else if before >= LARGE_REPLAY_BYTES || self.rate(now) >= FAST_BYTES_PER_SECOND {
            LONG_TURN
        } else {
            SHORT_TURN
        };
        let longer = 2u32.saturating_pow(self.gauge.in_vain.load(Ordering::Relaxed));
        now.duration_since(self.since) >= turn.saturating_mul(longer).min(MAX_TURN)
    }
}

impl SlotTable {
    /// Returns the slot time of a pull until now.
    fn time_of(&self, pull: u64, now: Instant) -> Duration {
        let turns = self.holders.iter().filter(|h| h.pull == pull);
        let turns: Duration = turns.map(|h| now.duration_since(h.since)).sum();
        self.pulls.get(&pull).map_or(turns, |time| time.had + turns)
    }

    /// Ends a turn, and returns whether the layer `id` had a slot.
    fn release(&mut self, id: u64) -> bool {
        let Some(at) = self.holders.iter().position(|h| h.id == id) else {
            return false;
        };
        let holder = self.holders.remove(at);
        if let Some(time) = self.pulls.get_mut(&holder.pull) {
            time.had += holder.since.elapsed();
        }
        true
    }
}

impl Slots {
    pub(crate) fn new(most: usize, per_host: usize) -> Arc<Self> {
        let most = most.max(1);
        Arc::new(Slots {
            most,
            extra: most - 1,
            per_host: per_host.clamp(1, most),
            state: Mutex::default(),
        })
    }

    /// Creates a slot for one layer of one pull. The slot is not granted yet. `what` names the
    /// layer in the log, for example "layer sha256:…".
    pub(crate) fn slot(self: &Arc<Self>, pull: u64, what: String) -> Slot {
        let mut state = lock(&self.state);
        state.next += 1;
        state.pulls.entry(pull).or_default().slots += 1;
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

    /// Returns the number of layers that are being fetched, and the number of layers that wait.
    #[cfg(test)]
    pub(crate) fn counts(&self) -> (usize, usize) {
        let state = lock(&self.state);
        (state.holders.len(), state.waiters.len())
    }

    fn from_host(state: &SlotTable, host: &str) -> usize {
        state.holders.iter().filter(|h| h.host == host).count()
    }

    /// Looks for a slot for a fetch of `pull` from `host`. Returns whether the free slot is an extra
    /// slot, or `None` if no slot is free. The slot of the holder `without` counts as free.
    fn free(
        &self,
        state: &SlotTable,
        (pull, host): (u64, &str),
        without: Option<u64>,
        now: Instant,
    ) -> Option<bool> {
        let others = || state.holders.iter().filter(|h| Some(h.id) != without);
        let from_host = others().filter(|h| h.host == host).count();
        let extra = others().filter(|h| h.extra).count();
        if from_host >= self.per_host {
            None
        } else if others().count() - extra < self.most {
            Some(false)
        } else {
            let is_first = from_host == 0 && others().all(|h| h.pull != pull);
            let is_new = state.time_of(pull, now) < SHORT_TURN;
            (is_first && is_new && extra < self.extra).then_some(true)
        }
    }

    /// Grants the free slots to waiting layers. Each free slot is granted to a layer of the pull
    /// with the fewest slots. A pull therefore need not wait until all layers of an earlier, larger
    /// pull are fetched. Among these layers, a layer of a pull with little slot time goes first.
    fn grant(&self, state: &mut SlotTable) {
        state.waiters.retain(|waiter| !waiter.granted.is_closed());
        loop {
            let now = Instant::now();
            let order = |waiter: &Waiter| {
                let slots = state.holders.iter().filter(|h| h.pull == waiter.pull);
                let delay = state.time_of(waiter.pull, now).saturating_mul(DELAY_FACTOR);
                (slots.count(), waiter.since + delay.min(LONG_TURN))
            };
            let waiters = state.waiters.iter().enumerate();
            let next = waiters
                .filter_map(|(at, waiter)| {
                    Some((at, waiter, self.free(state, waiter.wants(), None, now)?))
                })
                .min_by_key(|(_, waiter, _)| order(waiter))
                .map(|(at, _, extra)| (at, extra));
            let Some((at, extra)) = next else { return };
            let Some(waiter) = state.waiters.remove(at) else {
                return;
            };
            if waiter.granted.send(()).is_ok() {
                waiter.gauge.now.store(0, Ordering::Relaxed);
                state.holders.push(Holder {
                    id: waiter.id,
                    pull: waiter.pull,
                    host: waiter.host,
                    extra,
                    since: now,
                    checked: now,
                    chosen: Cell::new(false),
                    gauge: waiter.gauge,
                });
            }
        }
    }

    /// Returns whether the fetch with the slot `id` must give this slot to another pull. A fetch
    /// never gives its slot to a layer of the same pull, because the pull would not end earlier.
    fn must_leave(&self, state: &SlotTable, id: u64, stalled: bool, now: Instant) -> bool {
        let Some(ours) = state.holders.iter().find(|holder| holder.id == id) else {
            return false;
        };
        let waiting = state.waiters.iter().filter(|w| !w.granted.is_closed());
        for waiter in waiting.filter(|waiter| waiter.pull != ours.pull) {
            let helps = |holder: &Holder| {
                let free = |without| self.free(state, waiter.wants(), without, now);
                free(None).is_none() && free(Some(holder.id)).is_some()
            };
            if !helps(ours) {
                continue;
            }
            if stalled {
                return true;
            }
            let is_first = state.holders.iter().all(|h| h.pull != waiter.pull);
            let first = is_first.then(|| state.time_of(waiter.pull, now));
            // If the turns of several fetches are over, only one of them gives up its slot: a fetch
            // from the host with the most slots, and the slowest fetch from such a host. The choice
            // must not change until this fetch checks: each fetch checks just after it has received
            // bytes, so each of several equally slow fetches would choose another one.
            let leaving = state
                .holders
                .iter()
                .filter(|holder| holder.pull != waiter.pull && helps(holder))
                .filter(|holder| holder.has_had_its_turn(now, first))
                .filter(|holder| now.duration_since(holder.checked) < UNRESPONSIVE_TIME)
                .min_by_key(|holder| {
                    let slots = Self::from_host(state, &holder.host);
                    (!holder.chosen.get(), Reverse(slots), holder.rate(now))
                });
            if let Some(leaving) = leaving {
                leaving.chosen.set(true);
                if leaving.id == id {
                    return true;
                }
            }
        }
        false
    }
}

/// The slot of one layer. The layer may be fetched only while the slot is granted. Dropping this
/// value releases the slot.
pub(crate) struct Slot {
    slots: Arc<Slots>,
    id: u64,
    pull: u64,
    what: String,
    gauge: Arc<Gauge>,
    gave_way: Arc<AtomicBool>,
    /// True if the fetch gave up the slot at the end of its turn.
    turn_was_over: AtomicBool,
    moves: AtomicU64,
}

impl Slot {
    /// Waits until the slot is granted for a fetch from `host`. If this layer already has the slot
    /// for another host, releases that slot first. The caller must not hold any resource that other
    /// fetches need. A fetch without this resource could not finish and release its slot, and the
    /// result would be a deadlock.
    pub(crate) async fn at(&self, host: &str) {
        let (granted, answer) = oneshot::channel();
        {
            let mut state = lock(&self.slots.state);
            let held = state.holders.iter().find(|h| h.id == self.id);
            if held.is_some_and(|held| held.host == host) {
                return;
            }
            state.release(self.id);
            state.waiters.push_back(Waiter {
                id: self.id,
                pull: self.pull,
                host: host.to_owned(),
                since: Instant::now(),
                gauge: Arc::clone(&self.gauge),
                granted,
            });
            self.slots.grant(&mut state);
        }
        let mut answer = answer;
        let begun = Instant::now();
        let mut pause = WAIT_BEFORE_LOG;
        // The queue contains the sender until the slot is granted. Receiving from `answer`
        // therefore can't fail earlier.
        while tokio::time::timeout(pause, &mut answer).await.is_err() {
            pause = (pause * 2).min(LONG_TURN);
            if self.represents_its_pull() {
                let Slots { most, per_host, .. } = &*self.slots;
                log::warn!(
                    "{}: has been waiting for {} s to be fetched: the limit is {per_host} layers at a time from {host}, and {most} from all hosts",
                    self.what,
                    begun.elapsed().as_secs()
                );
            }
        }
    }

    /// Records that the layer is now fetched from `host`. The slot can have been granted for
    /// another host. If the maximum number of layers is already being fetched from `host`, releases
    /// the slot and returns false.
    pub(crate) fn moves_to(&self, host: &str) -> bool {
        let mut state = lock(&self.slots.state);
        let room = Slots::from_host(&state, host) < self.slots.per_host;
        let Some(at) = state.holders.iter().position(|h| h.id == self.id) else {
            return false;
        };
        if state.holders[at].host == host {
            return true;
        }
        // After MAX_MOVES moves to other hosts, the host's limit is ignored. Without this rule, a
        // layer could wait again and again if two hosts redirect its fetch to each other.
        let stays = room || self.moves.fetch_add(1, Ordering::Relaxed) >= MAX_MOVES;
        if stays {
            host.clone_into(&mut state.holders[at].host);
        } else {
            self.gave_way.store(true, Ordering::Relaxed);
            state.release(self.id);
        }
        self.slots.grant(&mut state);
        stays
    }

    /// Returns whether this layer must log its wait. Only one layer logs the wait of the whole
    /// pull: the pull's first waiting layer. While another layer of the pull is being fetched, no
    /// layer logs a wait.
    fn represents_its_pull(&self) -> bool {
        let state = lock(&self.slots.state);
        let mut waiting = state.waiters.iter().filter(|w| w.pull == self.pull);
        let fetched = state.holders.iter().any(|h| h.pull == self.pull);
        !fetched && waiting.next().is_some_and(|first| first.id == self.id)
    }

    /// Releases the slot.
    pub(crate) fn leave(&self) {
        let mut state = lock(&self.slots.state);
        if state.release(self.id) {
            self.slots.grant(&mut state);
        }
    }

    /// Records how many bytes earlier turns received.
    pub(crate) fn begins_at(&self, bytes: u64) {
        self.gauge.before.store(bytes, Ordering::Relaxed);
    }

    /// Adds `bytes` to the number of bytes that were received in this turn.
    pub(crate) fn count_received(&self, bytes: u64) {
        self.gauge.now.fetch_add(bytes, Ordering::Relaxed);
    }

    /// Gives up the slot if another pull must get it, and returns whether the slot was given up.
    /// `stalled` is true if almost no bytes arrive.
    pub(crate) fn gives_way(&self, stalled: bool) -> bool {
        let mut state = lock(&self.slots.state);
        let now = Instant::now();
        let ours = state.holders.iter_mut().find(|h| h.id == self.id);
        if let Some(ours) = ours {
            ours.checked = now;
        }
        if !self.slots.must_leave(&state, self.id, stalled, now) {
            return false;
        }
        self.gave_way.store(true, Ordering::Relaxed);
        self.turn_was_over.store(!stalled, Ordering::Relaxed);
        // The next turn counts the moves between hosts from 0 again. If two hosts redirect the
        // fetch to each other, the moves continue. The moves are not a busy loop, because each turn
        // lasts some time.
        self.moves.store(0, Ordering::Relaxed);
        state.release(self.id);
        self.slots.grant(&mut state);
        true
    }

    /// Returns whether the slot was given to another pull.
    pub(crate) fn gave_way(&self) -> bool {
        self.gave_way.load(Ordering::Relaxed)
    }

    /// Returns the flag that [`Slot::gave_way`] reads. The unpacking thread uses this flag instead
    /// of the `Slot`. This thread can outlive the fetch, and must not keep the slot in use.
    pub(crate) fn gave_way_flag(&self) -> Arc<AtomicBool> {
        Arc::clone(&self.gave_way)
    }

    /// Resets the flags `gave_way` and `turn_was_over` before the next turn.
    pub(crate) fn begin_turn(&self) {
        self.gave_way.store(false, Ordering::Relaxed);
        self.turn_was_over.store(false, Ordering::Relaxed);
    }

    /// Records at the end of a turn that the fetch received `gained` bytes for the first time. If
    /// fewer than a quarter of the turn's bytes were new and the fetch gave up its slot because its
    /// turn was over, the next turn is twice as long. If the fetch gave up its slot because almost
    /// no bytes arrived, its turns do not become longer.
    pub(crate) fn end_turn(&self, gained: u64) {
        let received = self.gauge.now.load(Ordering::Relaxed);
        let in_vain = gained == 0 || gained < received / 4;
        if in_vain && self.turn_was_over.load(Ordering::Relaxed) {
            self.gauge.in_vain.fetch_add(1, Ordering::Relaxed);
        }
    }
}

impl Drop for Slot {
    fn drop(&mut self) {
        self.leave();
        let mut state = lock(&self.slots.state);
        if let Some(time) = state.pulls.get_mut(&self.pull) {
            time.slots -= 1;
            if time.slots == 0 {
                state.pulls.remove(&self.pull);
            }
        }
    }
}

#[cfg(test)]
mod tests;
