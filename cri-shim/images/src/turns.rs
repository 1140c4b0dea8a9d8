//! Decides which threads may unpack layers now, and limits the number of these threads.
//!
//! A turn is the permission to unpack. A thread takes a turn when it has bytes to unpack. While it
//! waits for more bytes, it gives the turn back. A layer that arrives slowly therefore delays no
//! other layer. After a time slice ([`TURN_SLICE`]), a thread gives its turn to a waiting thread,
//! and queues again. The thread checks the time slice after each piece of unpacked data, because a
//! few received bytes can decompress to gigabytes.
//!
//! The hosts share the turns, as in start-time fair queueing: the layers from one host together get
//! as many turns as the layers from another host. With two hosts, each gets half of the turns, however
//! many layers it has.
//!
//! A layer that has been unpacked for a long time waits longer for its turns. The layers of a
//! hostile image can need hours, and a layer that needs only a second must not wait for them.

use std::cell::Cell;
use std::collections::{BTreeSet, HashMap};
use std::io::{self, Read};
use std::rc::Rc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Condvar, Mutex, PoisonError};
use std::time::{Duration, Instant};

use rrun_calls::lock::lock;

/// The maximum time for which a thread keeps its turn to unpack while another thread waits.
const TURN_SLICE: Duration = Duration::from_millis(100);

/// Each doubling of a layer's processing time lets this number of later threads go first. There are
/// rarely as many layers with a place, so the layer with half of the processing time usually goes
/// first. The number is finite, so no layer waits forever.
const LATER_THREADS: u64 = 24;

/// The time after which a layer's wait for a turn is logged.
const WAIT_BEFORE_LOG: Duration = Duration::from_secs(10);

pub(crate) struct UnpackTurns {
    most: usize,
    state: Mutex<TurnQueue>,
    changed: Condvar,
}

#[derive(Default)]
struct TurnQueue {
    taken: usize,
    next: u64,
    /// The virtual time, which is the highest start of a granted turn. The turns of one host have
    /// consecutive starts. The first turn of a host starts at `now`.
    now: u64,
    /// The start of each host's next turn, if it is later than `now`.
    starts: HashMap<String, u64>,
    /// The waiting threads. Each thread has its position and a unique number.
    waiting: BTreeSet<(u64, u64)>,
}

impl TurnQueue {
    /// Returns the start of the next turn of a layer from `host`.
    fn start(&mut self, host: &str) -> u64 {
        let now = self.now;
        self.starts.retain(|_, start| *start > now);
        let start = self.starts.get(host).copied().unwrap_or(now);
        self.starts.insert(host.to_owned(), start + 1);
        start
    }
}

/// The effort for unpacking one layer. A layer that is preempted has several turns with a place.
#[derive(Default)]
pub(crate) struct Effort {
    /// The host from which the layer is fetched. The host is empty if it is not known, or if the
    /// layer is in an archive.
    pub host: String,
    /// The processing time in microseconds, in all turns together.
    processed: AtomicU64,
    /// The processing time in microseconds before the current turn.
    before: AtomicU64,
    preempted: AtomicBool,
}

impl Effort {
    pub(crate) fn new(host: String) -> Arc<Self> {
        Arc::new(Effort {
            host,
            ..Effort::default()
        })
    }

    pub(crate) fn processed(&self) -> Duration {
        Duration::from_micros(self.processed.load(Ordering::Relaxed))
    }

    /// Returns the processing time in the current turn.
    pub(crate) fn turn(&self) -> Duration {
        let before = Duration::from_micros(self.before.load(Ordering::Relaxed));
        self.processed().saturating_sub(before)
    }

    pub(crate) fn begin_turn(&self) {
        let processed = self.processed.load(Ordering::Relaxed);
        self.before.store(processed, Ordering::Relaxed);
        self.preempted.store(false, Ordering::Relaxed);
    }

    /// Ends the current turn of the layer, because another layer needs its place or no pull needs
    /// the layer any more.
    pub(crate) fn preempt(&self) {
        self.preempted.store(true, Ordering::Relaxed);
    }

    pub(crate) fn is_preempted(&self) -> bool {
        self.preempted.load(Ordering::Relaxed)
    }

    /// Adds `time` to the processing time.
    pub(crate) fn add(&self, time: Duration) {
        let time = u64::try_from(time.as_micros()).unwrap_or(u64::MAX);
        self.processed.fetch_add(time, Ordering::Relaxed);
    }

    /// Returns how many later threads may go before the thread of this layer.
    pub(crate) fn later_threads(&self) -> u64 {
        let seconds = self.processed().as_secs();
        let doublings = seconds.checked_ilog2().map_or(0, |log| log + 1);
        u64::from(doublings) * LATER_THREADS
    }
}

impl UnpackTurns {
    pub(crate) fn new(most: usize) -> Arc<Self> {
        Arc::new(UnpackTurns {
            most: most.max(1),
            state: Mutex::default(),
            changed: Condvar::new(),
        })
    }

    /// Waits for a turn. Returns false if the layer was preempted.
    fn take(&self, what: &str, effort: &Effort) -> bool {
        let mut state = lock(&self.state);
        if state.taken < self.most && state.waiting.is_empty() {
            state.taken += 1;
            return true;
        }
        state.next += 1;
        let start = state.start(&effort.host);
        // The virtual time advances by one in a round of all hosts.
        let later = effort.later_threads() / (state.starts.len() as u64).max(1);
        let ours = (start + later, state.next);
        state.waiting.insert(ours);
        let begun = Instant::now();
        let mut next_log = WAIT_BEFORE_LOG;
        while !effort.is_preempted()
            && (state.taken >= self.most || state.waiting.first() != Some(&ours))
        {
            let waited = self.changed.wait_timeout(state, WAIT_BEFORE_LOG);
            state = waited.unwrap_or_else(PoisonError::into_inner).0;
            if begun.elapsed() >= next_log {
                next_log *= 2;
                log::warn!(
                    "{what}: has been waiting for {} s to be unpacked: the limit is {} layers at a time",
                    begun.elapsed().as_secs(),
                    self.most
                );
            }
        }
        state.waiting.remove(&ours);
        let granted = !effort.is_preempted();
        if granted {
            state.now = state.now.max(start);
        }
        state.taken += usize::from(granted);
        // If another turn is free, the next waiting thread can take it now.
        self.changed.notify_all();
        granted
    }

    fn give_back(&self) {
        let mut state = lock(&self.state);
        state.taken = state.taken.saturating_sub(1);
        if !state.waiting.is_empty() {
            self.changed.notify_all();
        }
    }

    fn has_waiters(&self) -> bool {
        !lock(&self.state).waiting.is_empty()
    }
}

/// The object through which one thread takes its turns to unpack and gives them back.
pub(crate) struct UnpackTurn {
    turns: Arc<UnpackTurns>,
    what: String,
    effort: Arc<Effort>,
    since: Cell<Option<Instant>>,
}

impl UnpackTurn {
    /// Creates the `UnpackTurn` of a thread that does not have a turn yet. `what` names the layer
    /// in the log, for example "layer sha256:…".
    pub(crate) fn new(turns: &Arc<UnpackTurns>, what: String, effort: &Arc<Effort>) -> Self {
        UnpackTurn {
            turns: Arc::clone(turns),
            what,
            effort: Arc::clone(effort),
            since: Cell::new(None),
        }
    }

    /// Waits until this thread has a turn. If this thread already has a turn, keeps it for at most
    /// [`TURN_SLICE`]. If other threads wait after this time, gives the turn back and queues again.
    /// If the layer was preempted, returns immediately without a turn. This call blocks.
    pub(crate) fn take(&self) {
        if let Some(since) = self.since.get() {
            let turn = since.elapsed();
            if turn < TURN_SLICE {
                return;
            }
            if !self.turns.has_waiters() {
                self.effort.add(turn);
                self.since.set(Some(Instant::now()));
                return;
            }
            self.give_back();
        }
        if self.turns.take(&self.what, &self.effort) {
            self.since.set(Some(Instant::now()));
        }
    }

    pub(crate) fn give_back(&self) {
        if let Some(since) = self.since.take() {
            self.effort.add(since.elapsed());
            self.turns.give_back();
        }
    }

    pub(crate) fn effort(&self) -> &Effort {
        &self.effort
    }
}

impl Drop for UnpackTurn {
    fn drop(&mut self) {
        self.give_back();
    }
}

/// A reader that waits for a turn to unpack before each read. The thread keeps its turn during and
/// between the reads. `reader` must therefore never wait for bytes from the network.
pub(crate) struct ReaderInTurns<R> {
    pub reader: R,
    pub turn: Rc<UnpackTurn>,
}

impl<R: Read> Read for ReaderInTurns<R> {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        self.turn.take();
        self.reader.read(buffer)
    }
}

#[cfg(test)]
mod tests {
    use std::sync::atomic::{AtomicUsize, Ordering};

    use super::*;

    #[test]
    fn the_number_of_turns_is_limited_and_every_thread_gets_a_turn() {
        let turns = UnpackTurns::new(2);
        let (inside, most) = (AtomicUsize::new(0), AtomicUsize::new(0));
        let rounds = AtomicUsize::new(0);
        std::thread::scope(|scope| {
            for _ in 0..8 {
                scope.spawn(|| {
                    let turn = UnpackTurn::new(&turns, "a layer".to_owned(), &Arc::default());
                    for _ in 0..200 {
                        turn.take();
                        most.fetch_max(inside.fetch_add(1, Ordering::SeqCst) + 1, Ordering::SeqCst);
                        std::thread::yield_now();
                        inside.fetch_sub(1, Ordering::SeqCst);
                        turn.give_back();
                        rounds.fetch_add(1, Ordering::SeqCst);
                    }
                });
            }
        });
        assert_eq!(rounds.load(Ordering::SeqCst), 8 * 200);
        assert!(most.load(Ordering::SeqCst) <= 2, "{most:?}");
    }

    #[test]
    fn a_host_with_many_waiting_layers_gets_no_more_turns_than_another_host() {
        let mut queue = TurnQueue::default();
        let many: Vec<u64> = (0..20).map(|_| queue.start("many")).collect();
        assert_eq!(many, (0..20).collect::<Vec<_>>());
        for turn in 0..10 {
            queue.now = turn;
            assert_eq!(queue.start("few"), turn);
        }
        queue.now = 30;
        assert_eq!(queue.start("many"), 30);
        assert_eq!(queue.starts.len(), 1);
    }
}
