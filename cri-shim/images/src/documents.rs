//! Limits how much memory the documents of all pulls together occupy (`image.document_bytes`).
//!
//! A document is an index, a manifest or a configuration. Almost all documents are small, and a
//! small document ([`SMALL_BYTES`]) does not count. A larger document reserves memory in steps. If the
//! limit is reached, one pull fails. This is the pull with the largest document, among the pulls from
//! the registry whose documents occupy the most bytes. A pull from a registry with less than its fair
//! share therefore never fails for this reason, and never waits for slow answers of other registries.

use std::collections::HashMap;
use std::ops::Deref;
use std::pin::pin;
use std::sync::{Arc, Mutex};

use bytes::Bytes;
use tokio::sync::{Notify, Semaphore};

use crate::error::{ImageError, Kind};
use rrun_calls::lock::lock;
use rrun_calls::wait::{blocking, slow};

/// The maximum number of bytes of each manifest, index or configuration.
pub(crate) const DOCUMENT_BYTES: u64 = 8 << 20;

/// The maximum number of bytes of a document that needs no room. Such a document is also parsed
/// without a separate thread.
pub(crate) const SMALL_BYTES: usize = 64 << 10;

/// A document that needs room takes it in steps of this size.
const STEP: u64 = 256 << 10;

/// The memory for the documents of all pulls.
pub(crate) struct DocumentBudget {
    limit: u64,
    table: Mutex<PullTable>,
    /// Wakes the documents that wait for room.
    freed: Notify,
    /// The permission to parse a large document. A parsed document can need more memory than its
    /// text, so only one large document is parsed at a time.
    parsing: Arc<Semaphore>,
}

#[derive(Default)]
struct PullTable {
    next: u64,
    pulls: HashMap<u64, PullEntry>,
}

struct PullEntry {
    registry: String,
    bytes: u64,
    /// True if the pull was chosen to give up its room. It gives back its room when it ends.
    stopped: bool,
    /// True if the pull may no longer be chosen, because its image is being recorded.
    finishing: bool,
    stop: Arc<Notify>,
}

#[derive(Debug, PartialEq, Eq)]
enum Taken {
    Yes,
    /// A stopped pull gives back enough room.
    Later,
    /// The pull itself has the largest document of the registry with the most bytes.
    No,
}

impl DocumentBudget {
    pub(crate) fn new(limit: u64) -> Arc<Self> {
        Arc::new(DocumentBudget {
            limit,
            table: Mutex::default(),
            freed: Notify::new(),
            parsing: Arc::new(Semaphore::new(1)),
        })
    }

    /// Creates the share of one pull, which has no room yet.
    pub(crate) fn share(self: &Arc<Self>, registry: &str) -> Arc<DocumentShare> {
        let stop = Arc::new(Notify::new());
        let mut table = lock(&self.table);
        table.next += 1;
        let id = table.next;
        let entry = PullEntry {
            registry: registry.to_owned(),
            bytes: 0,
            stopped: false,
            finishing: false,
            stop: Arc::clone(&stop),
        };
        table.pulls.insert(id, entry);
        Arc::new(DocumentShare {
            budget: Arc::clone(self),
            id,
            stop,
        })
    }

    fn no_room(&self) -> ImageError {
        ImageError::new(
            Kind::ResourceExhausted,
            format!(
                "the documents of all images that are being pulled need more than {} bytes, and this image has the largest document of the registry with the most bytes (image.document_bytes)",
                self.limit
            ),
        )
    }
}

impl PullTable {
    /// Reserves `more` bytes for the pull `id`. If the limit is reached, stops other pulls.
    fn take(&mut self, id: u64, more: u64, limit: u64) -> Taken {
        loop {
            let sum = |stopped| {
                let pulls = self.pulls.values().filter(move |p| p.stopped == stopped);
                pulls.map(|pull| pull.bytes).sum::<u64>()
            };
            let (kept, leaving) = (sum(false), sum(true));
            if kept + leaving + more <= limit {
                if let Some(pull) = self.pulls.get_mut(&id) {
                    pull.bytes += more;
                }
                return Taken::Yes;
            }
            if kept + more <= limit {
                return Taken::Later;
            }
            let chosen = self.largest(id, more).filter(|chosen| *chosen != id);
            let Some(pull) = chosen.and_then(|chosen| self.pulls.get_mut(&chosen)) else {
                return Taken::No;
            };
            pull.stopped = true;
            pull.stop.notify_one();
        }
    }

    /// Returns the pull that must give up its room if the pull `id` gets `more` bytes.
    fn largest(&self, id: u64, more: u64) -> Option<u64> {
        let with_more = |at: u64, bytes: u64| if at == id { bytes + more } else { bytes };
        let remaining = || self.pulls.iter().filter(|(_, pull)| !pull.stopped);
        let mut of_registry: HashMap<&str, u64> = HashMap::new();
        for (at, pull) in remaining() {
            *of_registry.entry(&pull.registry).or_default() += with_more(*at, pull.bytes);
        }
        remaining()
            .filter(|(_, pull)| !pull.finishing)
            .max_by_key(|(at, pull)| {
                let all = of_registry.get(pull.registry.as_str()).copied();
                (all, with_more(**at, pull.bytes), **at == id)
            })
            .map(|(at, _)| *at)
    }
}

/// The share of one pull in the memory for documents.
pub(crate) struct DocumentShare {
    budget: Arc<DocumentBudget>,
    id: u64,
    stop: Arc<Notify>,
}

impl DocumentShare {
    /// Creates the room of one document, which has no bytes yet.
    pub(crate) fn room(self: &Arc<Self>) -> DocumentRoom {
        DocumentRoom {
            share: Arc::clone(self),
            bytes: 0,
        }
    }

    /// Waits until the pull must give up its room, and returns the error with which the pull fails.
    pub(crate) async fn stopped(&self) -> ImageError {
        self.stop.notified().await;
        self.budget.no_room()
    }

    /// Prevents that the pull must give up its room. Fails if the pull must already do this.
    pub(crate) fn finish(&self) -> Result<(), ImageError> {
        match lock(&self.budget.table).pulls.get_mut(&self.id) {
            Some(pull) if !pull.stopped => {
                pull.finishing = true;
                Ok(())
            }
            _ => Err(self.budget.no_room()),
        }
    }
}

impl Drop for DocumentShare {
    fn drop(&mut self) {
        lock(&self.budget.table).pulls.remove(&self.id);
    }
}

/// The room of one document. Dropping this value gives the room back.
pub(crate) struct DocumentRoom {
    share: Arc<DocumentShare>,
    bytes: u64,
}

impl DocumentRoom {
    /// Makes room for a document of `length` bytes in total. Returns the number of bytes for which
    /// there is room.
    pub(crate) async fn grow(&mut self, length: usize) -> Result<usize, ImageError> {
        if length <= SMALL_BYTES {
            return Ok(SMALL_BYTES);
        }
        let wanted = (length as u64).div_ceil(STEP).saturating_mul(STEP);
        let more = wanted.saturating_sub(self.bytes);
        if more > 0 {
            self.take(more).await?;
            self.bytes = wanted;
        }
        Ok(usize::try_from(self.bytes).unwrap_or(usize::MAX))
    }

    async fn take(&self, more: u64) -> Result<(), ImageError> {
        let budget = &self.share.budget;
        let taking = async {
            loop {
                let mut freed = pin!(budget.freed.notified());
                // From here on, `freed` receives every notification.
                freed.as_mut().enable();
                let taken = lock(&budget.table).take(self.share.id, more, budget.limit);
                match taken {
                    Taken::Yes => return Ok(()),
                    Taken::Later => freed.await,
                    Taken::No => return Err(budget.no_room()),
                }
            }
        };
        slow(
            "a pull: wait for memory for a document (image.document_bytes)",
            taking,
        )
        .await
    }
}

impl Drop for DocumentRoom {
    fn drop(&mut self) {
        if self.bytes > 0 {
            if let Some(pull) = lock(&self.share.budget.table).pulls.get_mut(&self.share.id) {
                pull.bytes = pull.bytes.saturating_sub(self.bytes);
            }
            self.share.budget.freed.notify_waiters();
        }
    }
}

/// The text of a document, with the room that it occupies.
pub(crate) struct DocumentText {
    bytes: Bytes,
    /// The room of the document, or `None` for a document from an archive.
    room: Option<DocumentRoom>,
}

impl DocumentText {
    pub(crate) fn new(bytes: Bytes, room: DocumentRoom) -> Self {
        let room = Some(room);
        DocumentText { bytes, room }
    }

    /// Prevents that the document must give up its room. Fails if the document must already do
    /// this.
    pub(crate) fn finish(&self) -> Result<(), ImageError> {
        self.room
            .as_ref()
            .map_or(Ok(()), |room| room.share.finish())
    }

    /// Calls `work` with the document. For a large document, calls `work` on a separate thread, and
    /// waits until no other large document is being parsed. The other requests to the server
    /// therefore do not wait for `work`.
    pub(crate) async fn read<T: Send + 'static>(
        self,
        work: impl FnOnce(Self) -> T + Send + 'static,
    ) -> T {
        let room = self.room.as_ref();
        let Some(room) = room.filter(|_| self.bytes.len() > SMALL_BYTES) else {
            return work(self);
        };
        let parsing = Arc::clone(&room.share.budget.parsing);
        let what = "a pull: parse a large document";
        // The semaphore is never closed, so this call can't fail.
        let permit = slow(what, parsing.acquire_owned()).await;
        blocking(what, move || {
            let _permit = permit;
            work(self)
        })
        .await
    }
}

impl From<Bytes> for DocumentText {
    fn from(bytes: Bytes) -> Self {
        DocumentText { bytes, room: None }
    }
}

impl Deref for DocumentText {
    type Target = [u8];

    fn deref(&self) -> &[u8] {
        &self.bytes
    }
}

#[cfg(test)]
mod tests {
    use futures_util::FutureExt;

    use super::*;

    const MIB: usize = 1 << 20;

    async fn held(budget: &Arc<DocumentBudget>, registry: &str, length: usize) -> DocumentRoom {
        let mut room = budget.share(registry).room();
        assert!(room.grow(length).await.is_ok());
        room
    }

    fn is_stopped(room: &DocumentRoom) -> bool {
        let table = lock(&room.share.budget.table);
        table
            .pulls
            .get(&room.share.id)
            .is_some_and(|pull| pull.stopped)
    }

    #[tokio::test]
    async fn the_registry_with_the_most_bytes_loses_its_largest_document() {
        let budget = DocumentBudget::new(8 << 20);
        let small = held(&budget, "small", MIB).await;
        let lesser = held(&budget, "big", 2 * MIB).await;
        let larger = held(&budget, "big", 4 * MIB).await;
        let mut needs = held(&budget, "other", MIB).await;
        {
            let mut grows = pin!(needs.grow(2 * MIB));
            assert!(
                grows.as_mut().now_or_never().is_none(),
                "there is no room yet"
            );
            assert!(is_stopped(&larger) && !is_stopped(&lesser) && !is_stopped(&small));
            assert!(larger.share.stopped().now_or_never().is_some());
            assert!(larger.share.finish().is_err());
            drop(larger);
            assert!(grows.now_or_never().is_some_and(|grown| grown.is_ok()));
        }
        let error = needs.grow(7 * MIB).await.map_err(|error| error.to_string());
        assert!(error.is_err_and(|why| why.contains("image.document_bytes")));
        assert!(!is_stopped(&small) && !is_stopped(&lesser));
        drop((small, lesser, needs));
        assert!(lock(&budget.table).pulls.is_empty());
    }

    #[tokio::test]
    async fn many_registries_leave_a_share_for_one_more() {
        let budget = DocumentBudget::new(8 << 20);
        let mut hostile = Vec::new();
        for number in 0..8 {
            hostile.push(held(&budget, &number.to_string(), MIB).await);
        }
        let mut room = budget.share("last").room();
        assert!(room.grow(MIB / 2).now_or_never().is_none());
        let mut stopped = hostile.iter().filter(|room| is_stopped(room));
        assert!(stopped.next().is_some() && stopped.next().is_none());
        hostile.retain(|room| !is_stopped(room));
        assert!(
            room.grow(MIB / 2)
                .now_or_never()
                .is_some_and(|grown| grown.is_ok())
        );
    }

    #[tokio::test]
    async fn a_small_document_needs_no_room_and_a_pull_at_its_end_is_not_stopped() {
        let budget = DocumentBudget::new(1 << 20);
        let full = held(&budget, "one", MIB).await;
        let mut small = budget.share("two").room();
        assert_eq!(small.grow(SMALL_BYTES).await.ok(), Some(SMALL_BYTES));
        assert!(full.share.finish().is_ok());
        assert!(small.grow(SMALL_BYTES + 1).await.is_err());
        assert!(!is_stopped(&full));
    }

    #[tokio::test]
    async fn large_documents_are_parsed_one_at_a_time_on_separate_threads() {
        let budget = DocumentBudget::new(1 << 20);
        let text = |length| {
            let bytes = Bytes::from(vec![b' '; length]);
            DocumentText::new(bytes, budget.share("one").room())
        };
        let here = std::thread::current().id();
        let thread = |_| std::thread::current().id();
        assert_eq!(text(SMALL_BYTES).read(thread).await, here);
        assert_ne!(text(SMALL_BYTES + 1).read(thread).await, here);
        let permit = Arc::clone(&budget.parsing).acquire_owned().await;
        let mut waits = pin!(text(SMALL_BYTES + 1).read(thread));
        assert!(waits.as_mut().now_or_never().is_none());
        drop(permit);
        assert_ne!(waits.await, here);
    }
}
