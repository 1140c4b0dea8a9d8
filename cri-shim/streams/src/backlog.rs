//! What clients have sent to programs in pods, and these have not read yet.
//!
//! Many connections to a pod come by one connection of a client, which knows no windows
//! ([`crate::spdy::Session`]): the reader takes in all of it, or nothing. So what comes for a program
//! that does not read waits here while there is room, and does not hold up the other programs' data.
//! While there is none ([`Backlog::is_full`], [`QueueSender::is_full`]) the client must not be read
//! from, and the reader has to bound for how long ([`QueueSender::stalled_for`]).

use std::collections::VecDeque;
use std::sync::atomic::{AtomicU64, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, MutexGuard};
use std::time::Duration;

use bytes::Bytes;
use tokio::sync::Notify;
use tokio::time::Instant;

use rrun_calls::lock::lock;

/// How many bytes may wait for one program before its queue is full.
const MAX_QUEUE_BYTES: usize = 1 << 20;

/// How many bytes may wait for all programs of a client together before the backlog is full.
const MAX_BACKLOG_BYTES: usize = 4 << 20;

/// What a piece costs beside its bytes.
const PIECE_OVERHEAD_BYTES: usize = 64;

/// Pieces shorter than this are copied: a slice would keep the whole read buffer alive.
const COPIED_PIECE_BYTES: usize = 8 << 10;

/// What waits for all programs of a client.
#[derive(Default)]
pub(crate) struct Backlog {
    waiting: AtomicUsize,
    shrunk: Notify,
}

struct Queue {
    all: Arc<Backlog>,
    state: Mutex<QueueState>,
    more: Notify,
    begin: Instant,
    /// When something was read, or the first that waits came: milliseconds after `begin`.
    moved: AtomicU64,
}

#[derive(Default)]
struct QueueState {
    queue: VecDeque<Bytes>,
    /// The cost of what is in the queue, and of what was taken out of it and not passed on yet.
    waiting: usize,
    /// The sender has closed the queue.
    ended: bool,
    /// The receiver is gone.
    gone: bool,
}

/// Puts into one program's queue. Dropping it ends the queue.
pub(crate) struct QueueSender(Arc<Queue>);

/// Takes out of the queue.
pub(crate) struct QueueReceiver(Arc<Queue>);

impl Backlog {
    /// A queue for another program.
    pub(crate) fn queue(self: &Arc<Self>) -> (QueueSender, QueueReceiver) {
        let queue = Arc::new(Queue {
            all: Arc::clone(self),
            state: Mutex::default(),
            more: Notify::new(),
            begin: Instant::now(),
            moved: AtomicU64::new(0),
        });
        (QueueSender(Arc::clone(&queue)), QueueReceiver(queue))
    }

    pub(crate) fn is_full(&self) -> bool {
        self.waiting.load(Ordering::Relaxed) > MAX_BACKLOG_BYTES
    }

    /// Waits until the backlog has shrunk; may wake spuriously. Only one task may wait.
    pub(crate) async fn shrunk(&self) {
        self.shrunk.notified().await;
    }
}

impl Queue {
    fn state(&self) -> MutexGuard<'_, QueueState> {
        lock(&self.state)
    }

    fn touch(&self) {
        let now = self.begin.elapsed().as_millis();
        let now = u64::try_from(now).unwrap_or(u64::MAX);
        self.moved.store(now, Ordering::Relaxed);
    }

    fn leave(&self, state: &mut QueueState, cost: usize) {
        state.waiting -= cost.min(state.waiting);
        self.all.waiting.fetch_sub(cost, Ordering::Relaxed);
        self.all.shrunk.notify_one();
    }
}

fn cost(bytes: &Bytes) -> usize {
    bytes.len() + PIECE_OVERHEAD_BYTES
}

impl QueueSender {
    /// Returns false if nobody will read it. Does not check whether there is room.
    pub(crate) fn push(&self, bytes: Bytes) -> bool {
        let bytes = if bytes.len() < COPIED_PIECE_BYTES {
            Bytes::copy_from_slice(&bytes)
        } else {
            bytes
        };
        let queue = &self.0;
        let mut state = queue.state();
        if state.gone || state.ended {
            return false;
        }
        if state.waiting == 0 {
            queue.touch();
        }
        state.waiting += cost(&bytes);
        queue.all.waiting.fetch_add(cost(&bytes), Ordering::Relaxed);
        state.queue.push_back(bytes);
        drop(state);
        queue.more.notify_one();
        true
    }

    /// Ends the queue.
    pub(crate) fn close(&self) {
        self.0.state().ended = true;
        self.0.more.notify_one();
    }

    pub(crate) fn is_full(&self) -> bool {
        self.waiting() > MAX_QUEUE_BYTES
    }

    pub(crate) fn waiting(&self) -> usize {
        self.0.state().waiting
    }

    /// For how long nothing of what waits has been read.
    pub(crate) fn stalled_for(&self) -> Duration {
        let moved = Duration::from_millis(self.0.moved.load(Ordering::Relaxed));
        self.0.begin.elapsed().saturating_sub(moved)
    }
}

impl Drop for QueueSender {
    fn drop(&mut self) {
        self.close();
    }
}

impl QueueReceiver {
    /// The next piece, `None` at the end. Call [`Self::passed`] when it has been written.
    pub(crate) async fn recv(&mut self) -> Option<Bytes> {
        loop {
            {
                let mut state = self.0.state();
                if let Some(piece) = state.queue.pop_front() {
                    return Some(piece);
                }
                // A short queue keeps no memory of a long one.
                state.queue = VecDeque::new();
                if state.ended {
                    return None;
                }
            }
            self.0.more.notified().await;
        }
    }

    /// The program has read something.
    pub(crate) fn progressed(&self) {
        self.0.touch();
    }

    /// All of a piece has gone to the program.
    pub(crate) fn passed(&self, piece: &Bytes) {
        self.0.touch();
        self.0.leave(&mut self.0.state(), cost(piece));
    }
}

impl Drop for QueueReceiver {
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
        let (first, mut receiver) = all.queue();
        let (second, others) = all.queue();
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
        all.shrunk().await;
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
