//! The data from clients that programs in pods have not read yet.
//!
//! A client sends the data of many forwarded connections on one connection. Kubernetes' clients
//! have no flow control per stream ([`crate::spdy::Session`]). For this reason, the server can't
//! read the data of only some of the forwarded connections. Each program has a queue for the data
//! that it has not read yet. If a program does not read, only the data in its own queue waits. The
//! backlog is the total amount of data in the queues of a client. While the backlog or a queue is
//! full ([`Backlog::is_full`], [`QueueSender::is_full`]), the server must not read from the client.
//! The server must also limit how long a queue remains full ([`QueueSender::stalled_for`]).

use std::collections::VecDeque;
use std::sync::atomic::{AtomicU64, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, MutexGuard};
use std::time::Duration;

use bytes::Bytes;
use tokio::sync::Notify;
use tokio::time::Instant;

use rrun_calls::lock::lock;

/// The number of waiting bytes at which the queue of one program is full.
const MAX_QUEUE_BYTES: usize = 1 << 20;

/// The number of waiting bytes at which the backlog is full. The backlog counts the bytes for all
/// programs of a client.
const MAX_BACKLOG_BYTES: usize = 4 << 20;

/// The limit on the waiting bytes of all clients together. A client's backlog is already full when
/// it contains half of the bytes that are left of this limit. A few clients can therefore not use up
/// the limit.
const MAX_TOTAL_BYTES: usize = 128 << 20;

/// The number of waiting bytes that each client can have, even if [`MAX_TOTAL_BYTES`] is reached.
const MIN_BACKLOG_BYTES: usize = 64 << 10;

/// The waiting bytes of all clients together.
static TOTAL: AtomicUsize = AtomicUsize::new(0);

/// The number of bytes that each waiting piece of data counts in addition to its length. Even a
/// short piece occupies memory in the queue.
const PIECE_OVERHEAD_BYTES: usize = 64;

/// A piece of data that is shorter than this number of bytes is copied into its own memory. If a
/// short piece remained a slice of the read buffer, it would keep the whole buffer allocated.
const COPIED_PIECE_BYTES: usize = 8 << 10;

/// The total amount of data that waits for all programs to which one client is connected.
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
    /// The time of the last progress, in milliseconds after `begin`. Progress means that the
    /// program read data, or that data arrived in an empty queue.
    moved: AtomicU64,
}

#[derive(Default)]
struct QueueState {
    queue: VecDeque<Bytes>,
    /// The total [`cost`] of the data that the program has not received yet. The total also
    /// includes data that the receiver has removed from the queue, but has not written to the
    /// program yet.
    waiting: usize,
    /// True once the sender has closed the queue.
    ended: bool,
    /// True once the receiver has been dropped.
    gone: bool,
}

/// The sending end of one program's queue. Dropping the sender closes the queue.
pub(crate) struct QueueSender(Arc<Queue>);

/// The receiving end of a queue.
pub(crate) struct QueueReceiver(Arc<Queue>);

impl Backlog {
    /// Creates a queue for the data that the client sends to one program.
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
        self.waiting.load(Ordering::Relaxed) > backlog_limit(TOTAL.load(Ordering::Relaxed))
    }

    fn enter(&self, cost: usize) {
        self.waiting.fetch_add(cost, Ordering::Relaxed);
        TOTAL.fetch_add(cost, Ordering::Relaxed);
    }

    fn leave(&self, cost: usize) {
        self.waiting.fetch_sub(cost, Ordering::Relaxed);
        TOTAL.fetch_sub(cost, Ordering::Relaxed);
        self.shrunk.notify_one();
    }

    /// Waits until the backlog has shrunk. The call can also return without a change. For this
    /// reason, the caller must check the backlog again. Only one task may wait for the backlog at a
    /// time.
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
        self.all.leave(cost);
    }
}

/// Returns the number of waiting bytes at which a client's backlog is full. `total` is the number of
/// waiting bytes of all clients.
fn backlog_limit(total: usize) -> usize {
    let left = MAX_TOTAL_BYTES.saturating_sub(total);
    (left / 2).clamp(MIN_BACKLOG_BYTES, MAX_BACKLOG_BYTES)
}

fn cost(bytes: &Bytes) -> usize {
    bytes.len() + PIECE_OVERHEAD_BYTES
}

impl QueueSender {
    /// Adds a piece of data to the queue. Returns false if the queue is closed or its receiver was
    /// dropped. `push` does not check whether the queue is full.
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
        queue.all.enter(cost(&bytes));
        state.queue.push_back(bytes);
        drop(state);
        queue.more.notify_one();
        true
    }

    /// Closes the queue.
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

    /// Returns the time for which the program has not read any of the waiting data.
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
    /// Returns the next piece of data, or `None` if the queue is empty and closed. After the caller
    /// has written the piece to the program, it must call [`Self::passed`].
    pub(crate) async fn recv(&mut self) -> Option<Bytes> {
        loop {
            {
                let mut state = self.0.state();
                if let Some(piece) = state.queue.pop_front() {
                    return Some(piece);
                }
                // The queue is empty. Free the memory that the queue needed earlier.
                state.queue = VecDeque::new();
                if state.ended {
                    return None;
                }
            }
            self.0.more.notified().await;
        }
    }

    /// Records that the program has read data.
    pub(crate) fn progressed(&self) {
        self.0.touch();
    }

    /// Records that the caller has written a piece of data to the program completely.
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

    #[test]
    fn a_clients_limit_shrinks_if_the_clients_together_have_much_waiting_data() {
        assert_eq!(backlog_limit(0), MAX_BACKLOG_BYTES);
        assert_eq!(backlog_limit(MAX_TOTAL_BYTES - (2 << 20)), 1 << 20);
        assert_eq!(backlog_limit(MAX_TOTAL_BYTES), MIN_BACKLOG_BYTES);
        assert_eq!(backlog_limit(usize::MAX), MIN_BACKLOG_BYTES);
        // All clients push as much data as their limits allow.
        let mut total = 0;
        for _ in 0..1024 {
            total += backlog_limit(total);
        }
        assert!(total <= MAX_TOTAL_BYTES + 1024 * MIN_BACKLOG_BYTES);
    }

    #[tokio::test]
    async fn waiting_data_is_counted_for_its_queue_and_for_the_backlog() {
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
        // `passed` has notified the backlog, so `shrunk` returns immediately.
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
