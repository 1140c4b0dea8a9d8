//! Pulls and layer fetches in progress. Later callers can join a pull, and later pulls can join a
//! fetch.

use std::sync::Arc;

use futures_util::future::{BoxFuture, Shared, WeakShared};
use tokio::sync::watch;

use crate::auth::Auth;
use crate::error::ImageError;
use crate::record::Image;
use crate::reference::Name;

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

pub(crate) type FetchInProgress = Shared<BoxFuture<'static, Result<(), ImageError>>>;

/// A weak reference to the fetch of one layer. The reference does not keep the fetch running. The
/// fetch stops when no pull needs it any more.
pub(crate) type WeakFetch = WeakShared<BoxFuture<'static, Result<(), ImageError>>>;

/// The key of a pull in progress. A call joins a pull only if the call and the pull have the same
/// key. The key includes the credentials. Otherwise, a caller without valid credentials could join
/// another caller's pull and get a private image.
pub(crate) type PullKey = (Name, Option<Auth>);
