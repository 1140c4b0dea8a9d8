//! Decides which threads may unpack layers now, and limits the number of these threads.
//!
//! A turn is the permission to unpack. A thread takes a turn when it has bytes to unpack. While it
//! waits for more bytes, it gives the turn back. A layer that arrives slowly therefore delays no
//! other layer. After a time slice ([`TURN_SLICE`]), a thread gives its turn to a waiting thread,
//! and queues again. The thread checks the time slice after each piece of unpacked data, because a
//! few received bytes can decompress to gigabytes.

use std::cell::Cell;
use std::collections::VecDeque;
use std::io::{self, Read};
use std::rc::Rc;
use std::sync::{Arc, Condvar, Mutex, PoisonError};
use std::time::{Duration, Instant};

use rrun_calls::lock::lock;

/// The maximum time for which a thread keeps its turn to unpack while another thread waits.
const TURN_SLICE: Duration = Duration::from_millis(100);

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
    waiting: VecDeque<u64>,
}

impl UnpackTurns {
    pub(crate) fn new(most: usize) -> Arc<Self> {
        Arc::new(UnpackTurns {
            most: most.max(1),
            state: Mutex::default(),
            changed: Condvar::new(),
        })
    }

    fn take(&self, what: &str) {
        let mut state = lock(&self.state);
        if state.taken < self.most && state.waiting.is_empty() {
            state.taken += 1;
            return;
        }
        let ours = state.next;
        state.next += 1;
        state.waiting.push_back(ours);
        let begun = Instant::now();
        let mut next_log = WAIT_BEFORE_LOG;
        while state.taken >= self.most || state.waiting.front() != Some(&ours) {
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
        state.waiting.pop_front();
        state.taken += 1;
        // If another turn is free, the next waiting thread can take it now.
        self.changed.notify_all();
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
    since: Cell<Option<Instant>>,
}

impl UnpackTurn {
    /// Creates the `UnpackTurn` of a thread that does not have a turn yet. `what` names the layer
    /// in the log, for example "layer sha256:…".
    pub(crate) fn new(turns: &Arc<UnpackTurns>, what: String) -> Self {
        UnpackTurn {
            turns: Arc::clone(turns),
            what,
            since: Cell::new(None),
        }
    }

    /// Waits until this thread has a turn. If this thread already has a turn, keeps it for at most
    /// [`TURN_SLICE`]. If other threads wait after this time, gives the turn back and queues again.
    /// This call blocks.
    pub(crate) fn take(&self) {
        match self.since.get() {
            Some(since) if since.elapsed() < TURN_SLICE || !self.turns.has_waiters() => return,
            Some(_) => self.give_back(),
            None => {}
        }
        self.turns.take(&self.what);
        self.since.set(Some(Instant::now()));
    }

    pub(crate) fn give_back(&self) {
        if self.since.take().is_some() {
            self.turns.give_back();
        }
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
                    let turn = UnpackTurn::new(&turns, "a layer".to_owned());
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
}
