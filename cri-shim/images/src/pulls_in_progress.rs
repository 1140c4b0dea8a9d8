//! The pulls and the fetches of layers that are under way, which callers and pulls join.

use std::sync::Arc;

use futures_util::future::{BoxFuture, Shared, WeakShared};
use tokio::sync::watch;

use crate::auth::Auth;
use crate::error::ImageError;
use crate::record::Image;
use crate::reference::Name;

pub(crate) type PullResult = Result<Arc<Image>, ImageError>;

/// One pull that any number of callers wait for.
pub(crate) struct PullInProgress {
    pub answer: Shared<BoxFuture<'static, PullResult>>,
    /// How many callers wait.
    pub callers: Arc<watch::Sender<usize>>,
}

/// A caller that waits for a pull.
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

/// One layer's fetch; it stops when no pull wants it any more.
pub(crate) type WeakFetch = WeakShared<BoxFuture<'static, Result<(), ImageError>>>;

/// What makes two pulls the same: with other credentials it is another, or the first to ask
/// would vouch for the second.
pub(crate) type PullKey = (Name, Option<Auth>);
