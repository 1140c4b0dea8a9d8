//! Passes the bytes of a layer from the network to the thread that unpacks them.
//!
//! The bytes pass through a short queue in memory. A layer can wait long for its turn to be
//! unpacked. If the queue is full, its chunks therefore move to the file that keeps the received
//! bytes for a retry. The transfer then ends as soon as the network allows, and other layers can use
//! its slot. Without such a file, the transfer waits until the thread has taken a chunk.

use std::collections::VecDeque;
use std::io::{self, Read};
use std::rc::Rc;
use std::sync::{Arc, Condvar, Mutex, PoisonError};
use std::time::Duration;

use bytes::{Buf, Bytes};
use tokio::sync::Notify;

use crate::layer::LayerError;
use crate::partial::{self, Partial};
use crate::turns::UnpackTurn;
use rrun_calls::lock::lock;
use rrun_calls::wait::blocking;

/// The maximum number of chunks in the queue. A chunk from the HTTP client has at most 400 KiB, so
/// one queue contains at most about 3 MiB.
const QUEUE_LENGTH: usize = 8;

/// The interval at which a thread that waits for bytes checks whether its layer was preempted.
const CHECK_INTERVAL: Duration = Duration::from_millis(500);

struct BlobQueue {
    /// The name of the layer for the log, for example "layer sha256:…".
    what: String,
    state: Mutex<QueueState>,
    /// The file with the first bytes of the blob. The chunks in the queue follow these bytes. This
    /// mutex is locked during disk I/O, and async code must not lock it. A thread that needs both
    /// mutexes locks this one first.
    file: Mutex<Option<Partial>>,
    /// Wakes the thread.
    arrived: Condvar,
    /// Wakes the sender.
    taken: Notify,
}

#[derive(Default)]
struct QueueState {
    chunks: VecDeque<Bytes>,
    /// The length of the file in bytes.
    in_file: u64,
    /// True if chunks can move to the file.
    has_file: bool,
    sender_ended: bool,
    /// True if the transfer ended before its last byte.
    broke_off: bool,
    reader_ended: bool,
}

impl BlobQueue {
    /// Moves all chunks in the queue to the file. Chunks for which the file has no room remain in
    /// the queue. This call blocks on disk I/O.
    fn move_to_file(&self) {
        let mut file = lock(&self.file);
        let mut chunks = std::mem::take(&mut lock(&self.state).chunks);
        while let Some(chunk) = chunks.front() {
            if !self.append(&mut file, chunk) {
                break;
            }
            chunks.pop_front();
        }
        let mut state = lock(&self.state);
        state.in_file = length(&file);
        state.has_file &= chunks.is_empty();
        // The sender can have added chunks meanwhile.
        chunks.append(&mut state.chunks);
        state.chunks = chunks;
        self.arrived.notify_one();
    }

    /// Appends a chunk to the file, if there is a file with room, and returns whether the file
    /// contains the chunk.
    fn append(&self, file: &mut Option<Partial>, chunk: &[u8]) -> bool {
        let Some(partial) = file else { return false };
        let appended = partial.append(chunk);
        appended.unwrap_or_else(|error| {
            // The fetch continues without a copy of the received bytes. A disk that is too full for
            // this copy can still have enough space for the unpacked layer.
            let what = &self.what;
            log::warn!("{what}: cannot keep the received bytes for a retry: {error}");
            partial.remove();
            false
        })
    }
}

fn length(file: &Option<Partial>) -> u64 {
    file.as_ref().map_or(0, Partial::length)
}

/// Creates the queue for one attempt to fetch a blob. `what` names the layer in the log.
pub(crate) fn blob_queue(what: String) -> (BlobSender, BlobReceiver) {
    let queue = Arc::new(BlobQueue {
        what,
        state: Mutex::default(),
        file: Mutex::default(),
        arrived: Condvar::new(),
        taken: Notify::new(),
    });
    (BlobSender(Arc::clone(&queue)), BlobReceiver(queue))
}

/// The end of the queue to which the bytes from the network are added. If this value is dropped
/// without a call of [`BlobSender::finish`], the transfer broke off, and the thread stops at once.
pub(crate) struct BlobSender(Arc<BlobQueue>);

impl BlobSender {
    /// Ends a transfer after its last byte.
    pub(crate) fn finish(self) {
        lock(&self.0.state).sender_ended = true;
    }

    /// Adds a chunk to the queue. Returns false if the thread does not receive any more.
    pub(crate) async fn send(&self, chunk: Bytes) -> bool {
        loop {
            let has_file = {
                let mut state = lock(&self.0.state);
                if state.reader_ended {
                    return false;
                }
                if state.chunks.len() < QUEUE_LENGTH {
                    state.chunks.push_back(chunk);
                    self.0.arrived.notify_one();
                    return true;
                }
                state.has_file
            };
            if has_file {
                let queue = Arc::clone(&self.0);
                let what = format!("{}: move received bytes to a file", self.0.what);
                blocking(what, move || queue.move_to_file()).await;
            } else {
                self.0.taken.notified().await;
            }
        }
    }
}

impl Drop for BlobSender {
    fn drop(&mut self) {
        let mut state = lock(&self.0.state);
        state.broke_off = !state.sender_ended;
        state.sender_ended = true;
        self.0.arrived.notify_one();
    }
}

/// The end of the queue for the thread. Dropping this value makes the sender stop.
pub(crate) struct BlobReceiver(Arc<BlobQueue>);

impl Drop for BlobReceiver {
    fn drop(&mut self) {
        lock(&self.0.state).reader_ended = true;
        self.0.taken.notify_one();
    }
}

/// A reader for one blob. The reader first returns the bytes that were kept from an earlier attempt
/// to fetch the blob. After the kept bytes, the reader returns the bytes from the network. The
/// reader appends these bytes to the file with the kept bytes.
pub(crate) struct BlobReader {
    queue: BlobReceiver,
    current: Bytes,
    /// The turn of the thread that unpacks the blob. The reader gives the turn back while it waits
    /// for bytes from the network.
    turn: Rc<UnpackTurn>,
    /// The number of kept bytes from an earlier attempt to fetch the blob.
    pub replay: u64,
    /// The number of bytes that were read from the file or taken from the queue.
    position: u64,
}

impl BlobReader {
    pub(crate) fn new(queue: BlobReceiver, turn: Rc<UnpackTurn>, partial: Option<Partial>) -> Self {
        let replay = length(&partial);
        let has_file = partial.is_some();
        *lock(&queue.0.file) = partial;
        let mut state = lock(&queue.0.state);
        (state.in_file, state.has_file) = (replay, has_file);
        drop(state);
        BlobReader {
            queue,
            current: Bytes::new(),
            turn,
            replay,
            position: 0,
        }
    }

    /// Ends reading, and keeps or removes the file with the received bytes. The file is kept if the
    /// layer was preempted. The file is also kept if the transfer broke off without an error on this
    /// node, but then only for a blob of at least `MIN_KEPT_BYTES`, or if the fetch gave its slot to
    /// another pull (`gave_way`). In all other cases, the file is removed.
    pub(crate) fn end(self, error: Option<&LayerError>, size: u64, gave_way: bool) {
        let broke_off = {
            let mut state = lock(&self.queue.0.state);
            state.reader_ended = true;
            state.broke_off
        };
        let ours = matches!(
            error,
            Some(LayerError::System { .. } | LayerError::Bound(_))
        );
        let worth = gave_way || size >= partial::MIN_KEPT_BYTES;
        let is_preempted = self.turn.effort().is_preempted();
        let again = is_preempted || (broke_off && worth && !ours);
        let keep = error.is_some() && again;
        if keep {
            self.queue.0.move_to_file();
        }
        let partial = lock(&self.queue.0.file).take();
        if let Some(partial) = partial.filter(|partial| !keep || partial.length() == 0) {
            partial.remove();
        }
    }

    /// Takes the next chunk from the queue, and appends it to the file. Returns `None` if the queue
    /// is empty, or if the file contains bytes that were not read yet.
    fn next_chunk(&self) -> Option<Bytes> {
        let queue = &*self.queue.0;
        let mut file = lock(&queue.file);
        let chunk = {
            let mut state = lock(&queue.state);
            let is_next = state.in_file <= self.position;
            is_next.then(|| state.chunks.pop_front()).flatten()?
        };
        queue.taken.notify_one();
        queue.append(&mut file, &chunk);
        lock(&queue.state).in_file = length(&file);
        Some(chunk)
    }

    /// Reads bytes from the file, if it contains bytes that were not read yet.
    fn read_file(&mut self, buffer: &mut [u8]) -> io::Result<Option<usize>> {
        let left = {
            let state = lock(&self.queue.0.state);
            state.in_file.saturating_sub(self.position)
        };
        if left == 0 {
            return Ok(None);
        }
        self.turn.take();
        let left = usize::try_from(left).unwrap_or(usize::MAX);
        let most = left.min(buffer.len());
        let file = lock(&self.queue.0.file);
        let Some(partial) = &*file else {
            return Err(io::ErrorKind::UnexpectedEof.into());
        };
        let count = partial.read_at(&mut buffer[..most], self.position)?;
        self.position += count as u64;
        Ok(Some(count))
    }

    /// Waits for bytes without a turn. Returns false if no more bytes will arrive.
    fn wait(&self) -> bool {
        let is_idle = |state: &QueueState| {
            state.chunks.is_empty() && state.in_file <= self.position && !state.sender_ended
        };
        let queue = &*self.queue.0;
        if is_idle(&lock(&queue.state)) {
            self.turn.give_back();
        }
        let mut state = lock(&queue.state);
        while is_idle(&state) && !self.turn.effort().is_preempted() {
            let waited = queue.arrived.wait_timeout(state, CHECK_INTERVAL);
            state = waited.unwrap_or_else(PoisonError::into_inner).0;
        }
        !state.chunks.is_empty() || state.in_file > self.position || !state.sender_ended
    }
}

impl Read for BlobReader {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        loop {
            // A preempted layer needs its next bytes in a later turn. The thread must not wait for
            // them.
            if self.turn.effort().is_preempted() {
                return Err(io::Error::other("the layer was preempted"));
            }
            // The bytes that have arrived are useless without the rest.
            if lock(&self.queue.0.state).broke_off {
                return Err(io::ErrorKind::UnexpectedEof.into());
            }
            if !self.current.is_empty() {
                let count = buffer.len().min(self.current.len());
                self.current.copy_to_slice(&mut buffer[..count]);
                return Ok(count);
            }
            if let Some(count) = self.read_file(buffer)? {
                return Ok(count);
            }
            if let Some(chunk) = self.next_chunk() {
                self.position += chunk.len() as u64;
                self.current = chunk;
            } else if !self.wait() {
                return Ok(0);
            }
            self.turn.take();
        }
    }
}

#[cfg(test)]
mod tests {
    use std::path::PathBuf;

    use futures_util::FutureExt as _;

    use super::*;
    use crate::layer::LayerDescriptor;
    use crate::partial::PartialName;
    use crate::partial_budget::PartialBudget;
    use crate::turns::{Effort, UnpackTurns};

    type Result<T = ()> = std::result::Result<T, Box<dyn std::error::Error>>;

    /// A directory for the files of partial blobs, which is removed at the end.
    struct Dir(PathBuf);

    impl Dir {
        fn new(test: &str) -> Result<Self> {
            let name = format!("rrun-queue-{test}-{}", std::process::id());
            let root = std::env::temp_dir().join(name);
            std::fs::create_dir_all(root.join("ingest"))?;
            Ok(Dir(root))
        }

        /// Opens the file of a blob with `size` bytes. All files together have at most `limit` bytes.
        fn partial(&self, size: u64, limit: u64) -> Option<Partial> {
            let layer = LayerDescriptor {
                digest: "sha256:0123".to_owned(),
                size,
                diff_id: "sha256:4567".to_owned(),
            };
            let budget = PartialBudget::new(&self.0, limit);
            Partial::open(&PartialName::new((&self.0, &budget), "r", &layer))
        }
    }

    impl Drop for Dir {
        fn drop(&mut self) {
            let _ = std::fs::remove_dir_all(&self.0);
        }
    }

    fn reader(queue: BlobReceiver, effort: &Arc<Effort>, partial: Option<Partial>) -> BlobReader {
        let turn = UnpackTurn::new(&UnpackTurns::new(1), "a layer".to_owned(), effort);
        BlobReader::new(queue, Rc::new(turn), partial)
    }

    /// Returns the chunk with the number `number`. Each chunk has 100,000 bytes.
    fn chunk(number: u8) -> Bytes {
        vec![number; 100_000].into()
    }

    const CHUNKS: u8 = 60;
    const SIZE: u64 = CHUNKS as u64 * 100_000;

    fn all_chunks() -> Vec<u8> {
        (0..CHUNKS).flat_map(chunk).collect()
    }

    #[tokio::test]
    async fn a_transfer_with_a_file_does_not_wait_for_the_thread() -> Result {
        let dir = Dir::new("file")?;
        let (sender, queue) = blob_queue("a layer".to_owned());
        let effort = Arc::default();
        let mut reader = reader(queue, &effort, dir.partial(SIZE, 1 << 30));
        for number in 0..CHUNKS {
            assert!(sender.send(chunk(number)).await);
        }
        assert!(lock(&sender.0.state).chunks.len() <= QUEUE_LENGTH);
        sender.finish();
        let mut read = Vec::new();
        reader.read_to_end(&mut read)?;
        assert!(read == all_chunks());
        Ok(())
    }

    #[tokio::test]
    async fn a_transfer_without_a_file_waits_for_the_thread() {
        let (sender, queue) = blob_queue("a layer".to_owned());
        let effort = Arc::default();
        let mut reader = reader(queue, &effort, None);
        for number in 0..8 {
            assert!(sender.send(chunk(number)).await);
        }
        let mut next = Box::pin(sender.send(chunk(8)));
        assert!((&mut next).now_or_never().is_none());
        assert!(reader.read(&mut [0]).is_ok());
        assert_eq!(next.now_or_never(), Some(true));
        drop(reader);
        assert!(!sender.send(chunk(9)).await);
    }

    /// The file has room for a third of the blob.
    #[tokio::test]
    async fn the_rest_of_a_blob_without_room_passes_through_the_queue() -> Result {
        let dir = Dir::new("rest")?;
        let partial = dir.partial(SIZE, SIZE / 3);
        assert!(partial.is_some());
        let (sender, queue) = blob_queue("a layer".to_owned());
        let thread = std::thread::spawn(move || {
            let mut reader = reader(queue, &Arc::default(), partial);
            // The sender fills the file meanwhile.
            std::thread::sleep(Duration::from_millis(300));
            let mut read = Vec::new();
            reader.read_to_end(&mut read).map(|_| read)
        });
        for number in 0..CHUNKS {
            assert!(sender.send(chunk(number)).await);
            if number % 7 == 0 {
                tokio::time::sleep(Duration::from_millis(20)).await;
            }
        }
        sender.finish();
        let read = thread.join().map_err(|_| "the thread panicked")??;
        assert!(read == all_chunks());
        Ok(())
    }

    #[tokio::test]
    async fn all_received_bytes_of_a_preempted_layer_are_kept() -> Result {
        let dir = Dir::new("preempted")?;
        let (sender, queue) = blob_queue("a layer".to_owned());
        let effort = Arc::<Effort>::default();
        let mut first = reader(queue, &effort, dir.partial(SIZE, 1 << 30));
        for number in 0..12 {
            assert!(sender.send(chunk(number)).await);
        }
        assert_eq!(first.read(&mut [0; 10])?, 10);
        effort.preempt();
        assert!(first.read(&mut [0]).is_err());
        let error = LayerError::Stream(io::ErrorKind::Other.into());
        first.end(Some(&error), SIZE, false);
        assert!(!sender.send(chunk(12)).await);
        effort.begin_turn();
        let (sender, queue) = blob_queue("a layer".to_owned());
        let mut second = reader(queue, &effort, dir.partial(SIZE, 1 << 30));
        assert_eq!(second.replay, 1_200_000);
        for number in 12..CHUNKS {
            assert!(sender.send(chunk(number)).await);
        }
        sender.finish();
        let mut read = Vec::new();
        second.read_to_end(&mut read)?;
        assert!(read == all_chunks());
        Ok(())
    }
}
