//! Decides which threads may unpack layers now, and limits their number.
//!
//! A thread takes a turn when it has bytes to unpack and gives it back while it waits for more, so
//! that a layer that arrives slowly holds up no other. A thread that has had its turn for long
//! gives it to one that waits, and queues again.

use std::collections::VecDeque;
use std::io::{self, Read};
use std::sync::{Arc, Condvar, Mutex, PoisonError};
use std::time::{Duration, Instant};

use rrun_calls::lock::lock;

/// How long a turn may be while another thread waits.
const TURN_SLICE: Duration = Duration::from_millis(100);

/// How long a layer waits for its turn before the log says so.
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
                    "{what}: waiting for {} s to be unpacked: at most {} layers are unpacked at once",
                    begun.elapsed().as_secs(),
                    self.most
                );
            }
        }
        state.waiting.pop_front();
        state.taken += 1;
        // The next thread may find a free turn, too.
        self.changed.notify_all();
    }

    fn give_back(&self) {
        let mut state = lock(&self.state);
        state.taken = state.taken.saturating_sub(1);
        if !state.waiting.is_empty() {
            self.changed.notify_all();
        }
    }

    fn wanted(&self) -> bool {
        !lock(&self.state).waiting.is_empty()
    }
}

/// One thread's turn, taken or not.
pub(crate) struct UnpackTurn {
    turns: Arc<UnpackTurns>,
    what: String,
    since: Option<Instant>,
}

impl UnpackTurn {
    /// `what` is for the log: "layer sha256:…".
    pub(crate) fn new(turns: &Arc<UnpackTurns>, what: String) -> Self {
        UnpackTurn {
            turns: Arc::clone(turns),
            what,
            since: None,
        }
    }

    /// Waits for a turn. A thread that has had one for long lets others go first. Blocks.
    pub(crate) fn take(&mut self) {
        match self.since {
            Some(since) if since.elapsed() < TURN_SLICE || !self.turns.wanted() => return,
            Some(_) => self.give_back(),
            None => {}
        }
        self.turns.take(&self.what);
        self.since = Some(Instant::now());
    }

    pub(crate) fn give_back(&mut self) {
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

/// A reader that is used in turns and whose bytes are always available.
pub(crate) struct ReaderInTurns<R> {
    pub reader: R,
    pub turn: UnpackTurn,
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
    fn no_more_threads_than_allowed_have_a_turn_and_each_gets_one() {
        let turns = UnpackTurns::new(2);
        let (inside, most) = (AtomicUsize::new(0), AtomicUsize::new(0));
        let rounds = AtomicUsize::new(0);
        std::thread::scope(|scope| {
            for _ in 0..8 {
                scope.spawn(|| {
                    let mut turn = UnpackTurn::new(&turns, "a layer".to_owned());
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
