//! Pulls and layer fetches in progress. Later callers can join a pull, and later pulls can join a
//! fetch.

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use futures_util::future::{BoxFuture, Shared, WeakShared};
use tokio::sync::watch;

use crate::auth::Auth;
use crate::error::ImageError;
use crate::record::Image;
use crate::reference::Name;
use crate::turns::Effort;

pub(crate) type PullResult = Result<Arc<Image>, ImageError>;

/// One pull and the number of callers that wait for it.
pub(crate) struct PullInProgress {
    pub answer: Shared<BoxFuture<'static, PullResult>>,
    /// The number of callers that wait for the pull.
    pub callers: Arc<watch::Sender<usize>>,
}

/// A guard that counts as one caller of a pull. Dropping the guard reduces the count.
pub(crate) struct Caller(Arc<watch::Sender<usize>>);

impl Caller {
    pub(crate) fn new(callers: &Arc<watch::Sender<usize>>) -> Self {
        callers.send_modify(|count| *count += 1);
        Caller(Arc::clone(callers))
    }
}

impl Drop for Caller {
    fn drop(&mut self) {
        self.0.send_modify(|count| *count = count.saturating_sub(1));
    }
}

type FetchResult = Result<(), ImageError>;

/// The interval at which a pull checks the rate of the fetch that it has joined.
const JOIN_INTERVAL: Duration = Duration::from_secs(10);

/// The key of a fetch in progress. A pull joins a fetch only if both request the same blob from the
/// same registry. An image can claim any layer of another image. If pulls from other registries
/// joined the fetch of such a layer, a slow registry would delay them.
#[derive(Clone, PartialEq, Eq, Hash)]
pub(crate) struct FetchKey {
    /// The name of the registry, or `None` for an archive on this node.
    pub registry: Option<String>,
    pub digest: String,
    pub size: u64,
    /// The key of the layer in the catalog.
    pub layer: String,
}

/// The fetch of one layer in progress.
#[derive(Clone)]
pub(crate) struct FetchInProgress {
    pub result: Shared<BoxFuture<'static, FetchResult>>,
    pub state: Arc<FetchState>,
}

pub(crate) struct FetchState {
    /// The number of the pull that started the fetch.
    pub pull: u64,
    /// The number of received bytes of the blob.
    pub received: AtomicU64,
    pub effort: Arc<Effort>,
}

impl FetchInProgress {
    pub(crate) fn downgrade(&self) -> Option<WeakFetch> {
        Some(WeakFetch {
            result: self.result.downgrade()?,
            state: Arc::clone(&self.state),
        })
    }

    /// Waits for the result of a fetch that another pull has started. Returns `None` if fewer than
    /// `rate` bytes of the blob arrive per second. For example, the fetch can be the last of many
    /// that the other pull has started. When all `size` bytes have arrived, returns `None` if the
    /// layer was not processed during the last interval. If `rate` is 0, always waits.
    pub(crate) async fn join(&self, size: u64, rate: u64) -> Option<FetchResult> {
        let min_bytes = rate.saturating_mul(JOIN_INTERVAL.as_secs());
        loop {
            let before = self.state.received.load(Ordering::Relaxed);
            let processed = self.state.effort.processed();
            let waited = tokio::time::timeout(JOIN_INTERVAL, self.result.clone()).await;
            if let Ok(result) = waited {
                return Some(result);
            }
            let received = self.state.received.load(Ordering::Relaxed);
            let is_slow = if received < size {
                received.saturating_sub(before) < min_bytes
            } else {
                rate > 0 && self.state.effort.processed() == processed
            };
            if is_slow {
                return None;
            }
        }
    }
}

/// A weak reference to the fetch of one layer. The reference does not keep the fetch running. The
/// fetch stops when no pull needs it any more.
pub(crate) struct WeakFetch {
    result: WeakShared<BoxFuture<'static, FetchResult>>,
    pub state: Arc<FetchState>,
}

impl WeakFetch {
    pub(crate) fn upgrade(&self) -> Option<FetchInProgress> {
        Some(FetchInProgress {
            result: self.result.upgrade()?,
            state: Arc::clone(&self.state),
        })
    }
}

/// The key of a pull in progress. A call joins a pull only if the call and the pull have the same
/// key. The key includes the credentials. Otherwise, a caller without valid credentials could join
/// another caller's pull and get a private image.
pub(crate) type PullKey = (Name, Option<Auth>);
