//! What clients have sent to programs in pods, and these have not read yet.
//!
//! Many connections to a pod come by one connection of a client, which knows no windows
//! ([`super::spdy::session`]): the reader can only take in all of it, or nothing. So what comes for
//! a program that does not read waits here while there is room, and does not hold up the others'.
//! Whoever reads from the client stops while there is none ([`Backlog::is_full`],
//! [`Sender::is_full`]), and has to say for how long ([`Sender::still`]).

use std::collections::VecDeque;
use std::sync::atomic::{AtomicU64, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, MutexGuard};
use std::time::Duration;

use bytes::Bytes;
use tokio::sync::Notify;
use tokio::time::Instant;

use rrun_calls::lock::lock;

/// The most bytes that wait for one program, but for one piece.
const MAX_LINE: usize = 1 << 20;

/// The most bytes that wait for all programs of a client together, but for one piece.
const MAX_TOGETHER: usize = 4 << 20;

/// What a piece costs beside its bytes.
const PIECE: usize = 64;

/// A piece that is shorter is taken out of the buffer that it was read into, which would live as
/// long as any piece of it.
const SHORT: usize = 8 << 10;

/// What waits for all programs of a client.
#[derive(Default)]
pub struct Backlog {
    waiting: AtomicUsize,
    less: Notify,
}

struct Line {
    all: Arc<Backlog>,
    state: Mutex<State>,
    more: Notify,
    begin: Instant,
    /// When something was read, or the first that waits came: milliseconds after `begin`.
    moved: AtomicU64,
}

#[derive(Default)]
struct State {
    queue: VecDeque<Bytes>,
    /// What is in the queue, and what was taken out of it and has not passed.
    waiting: usize,
    /// No more will come.
    ended: bool,
    /// Nobody takes anything any more.
    gone: bool,
}

/// Puts into one program's line. Its end is the line's.
pub struct Sender(Arc<Line>);

/// Takes out of it.
pub struct Receiver(Arc<Line>);

impl Backlog {
    /// A line for another program.
    pub fn line(self: &Arc<Self>) -> (Sender, Receiver) {
        let line = Arc::new(Line {
            all: Arc::clone(self),
            state: Mutex::default(),
            more: Notify::new(),
            begin: Instant::now(),
            moved: AtomicU64::new(0),
        });
        (Sender(Arc::clone(&line)), Receiver(line))
    }

    pub fn is_full(&self) -> bool {
        self.waiting.load(Ordering::Relaxed) > MAX_TOGETHER
    }

    /// Waits until less waits, or a moment for nothing. For one task.
    pub async fn less(&self) {
        self.less.notified().await;
    }
}

impl Line {
    fn state(&self) -> MutexGuard<'_, State> {
        lock(&self.state)
    }

    fn touch(&self) {
        let now = self.begin.elapsed().as_millis();
        let now = u64::try_from(now).unwrap_or(u64::MAX);
        self.moved.store(now, Ordering::Relaxed);
    }

    fn leave(&self, state: &mut State, cost: usize) {
        state.waiting -= cost.min(state.waiting);
        self.all.waiting.fetch_sub(cost, Ordering::Relaxed);
        self.all.less.notify_one();
    }
}

fn cost(bytes: &Bytes) -> usize {
    bytes.len() + PIECE
}

impl Sender {
    /// False if nobody will read it. Does not ask whether there is room.
    pub fn push(&self, bytes: Bytes) -> bool {
        let bytes = match bytes.len() < SHORT {
            true => Bytes::copy_from_slice(&bytes),
            false => bytes,
        };
        let line = &self.0;
        let mut state = line.state();
        if state.gone || state.ended {
            return false;
        }
        if state.waiting == 0 {
            line.touch();
        }
        state.waiting += cost(&bytes);
        line.all.waiting.fetch_add(cost(&bytes), Ordering::Relaxed);
        state.queue.push_back(bytes);
        drop(state);
        line.more.notify_one();
        true
    }

    /// No more will come.
    pub fn close(&self) {
        self.0.state().ended = true;
        self.0.more.notify_one();
    }

    pub fn is_full(&self) -> bool {
        self.waiting() > MAX_LINE
    }

    pub fn waiting(&self) -> usize {
        self.0.state().waiting
    }

    /// For how long nothing of what waits has been read.
    pub fn still(&self) -> Duration {
        let moved = Duration::from_millis(self.0.moved.load(Ordering::Relaxed));
        self.0.begin.elapsed().saturating_sub(moved)
    }
}

impl Drop for Sender {
    fn drop(&mut self) {
        self.close();
    }
}

impl Receiver {
    /// The next piece, `None` at the end. [`Self::passed`] is to be told of it.
    pub async fn recv(&mut self) -> Option<Bytes> {
        loop {
            {
                let mut state = self.0.state();
                if let Some(piece) = state.queue.pop_front() {
                    return Some(piece);
                }
                // A short line needs no memory for a long one.
                state.queue = VecDeque::new();
                if state.ended {
                    return None;
                }
            }
            self.0.more.notified().await;
        }
    }

    /// The program has read something.
    pub fn moved(&self) {
        self.0.touch();
    }

    /// All of a piece has gone to the program.
    pub fn passed(&self, piece: &Bytes) {
        self.0.touch();
        self.0.leave(&mut self.0.state(), cost(piece));
    }
}

impl Drop for Receiver {
    fn drop(&mut self) {
        let mut state = self.0.state();
        state.gone = true;
        state.queue = VecDeque::new();
        let waiting = state.waiting;
        self.0.leave(&mut state, waiting);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn what_waits_is_counted_for_one_and_for_all() {
        let all = Arc::new(Backlog::default());
        let (first, mut receiver) = all.line();
        let (second, others) = all.line();
        let piece = Bytes::from(vec![0; 64 << 10]);
        for _ in 0..16 {
            assert!(!first.is_full());
            assert!(first.push(piece.clone()));
        }
        assert!(first.is_full() && !all.is_full() && !second.is_full());
        let read = receiver.recv().await.unwrap_or_default();
        receiver.passed(&read);
        assert!(!first.is_full());
        // One that holds a permit: nobody waits for it in vain.
        all.less().await;
        while !all.is_full() {
            assert!(second.push(piece.clone()));
        }
        drop(others);
        assert!(!all.is_full());
        assert!(!second.push(piece.clone()));
        assert_eq!(second.waiting(), 0);
        first.close();
        assert!(!first.push(piece));
        let mut left = 0;
        while let Some(piece) = receiver.recv().await {
            receiver.passed(&piece);
            left += 1;
        }
        assert_eq!((left, first.waiting()), (15, 0));
        drop(receiver);
        assert_eq!(all.waiting.load(Ordering::Relaxed), 0);
    }
}
