//! Runs work that continues without its caller. A retry of the CRI request can then join the work.
//!
//! The work runs in its own task. A client can therefore cancel its request without cancelling the
//! work. A second request with the same key joins the work in flight and gets the same result.

use std::collections::HashMap;
use std::future::Future;
use std::sync::{Arc, Mutex};
use std::time::Duration;

use tokio::sync::watch;

use crate::error::{Error, Result};
use crate::lock::lock;

type Answer<T> = watch::Receiver<Option<Result<T>>>;

/// A table of the work in flight. Requests with the same key share one execution of the work.
pub struct SingleFlight<T> {
    work: Arc<Mutex<HashMap<String, Answer<T>>>>,
    /// The time after which a caller stops waiting for the result. The work then continues without
    /// this caller.
    timeout: Duration,
}

impl<T> Default for SingleFlight<T> {
    fn default() -> Self {
        SingleFlight::with_timeout(Duration::MAX)
    }
}

impl<T> SingleFlight<T> {
    /// Creates a `SingleFlight` with no work in progress. A caller waits at most `timeout` for a
    /// result, even if its CRI request has no deadline.
    pub fn with_timeout(timeout: Duration) -> Self {
        SingleFlight {
            work: Arc::default(),
            timeout,
        }
    }
}

impl<T: Clone + Send + Sync + 'static> SingleFlight<T> {
    /// Returns the result of the work with the key `key`. Calls `begin` to start the work if no
    /// work with this key is in flight.
    pub async fn join<F>(&self, key: &str, begin: impl FnOnce() -> F) -> Result<T>
    where
        F: Future<Output = Result<T>> + Send + 'static,
    {
        let mut answer = {
            let mut work = lock(&self.work);
            match work.get(key) {
                Some(answer) => answer.clone(),
                None => {
                    let (done, answer) = watch::channel(None);
                    work.insert(key.to_owned(), answer.clone());
                    let entry = KeyGuard {
                        work: Arc::clone(&self.work),
                        key: key.to_owned(),
                    };
                    let future = begin();
                    tokio::spawn(async move {
                        let result = future.await;
                        // Remove the key before publishing the result. A caller that arrives
                        // between the removal and the publication starts the work again. The second
                        // execution then finds the object that the first execution created.
                        drop(entry);
                        let _ = done.send(Some(result));
                    });
                    answer
                }
            }
        };
        let received = tokio::time::timeout(self.timeout, answer.wait_for(Option::is_some)).await;
        let Ok(received) = received else {
            return Err(Error::new(
                tonic::Code::DeadlineExceeded,
                format!(
                    "{key}: not finished within {} s; the work continues, and a retry of the request joins the work",
                    self.timeout.as_secs()
                ),
            ));
        };
        match received.map(|answer| answer.clone()) {
            Ok(Some(result)) => result,
            _ => Err(Error::internal(format!(
                "{key}: the task that executed the request was aborted"
            ))),
        }
    }
}

/// A guard that removes the key from the table on drop. The key is also removed if the work panics
/// or is aborted.
struct KeyGuard<T> {
    work: Arc<Mutex<HashMap<String, Answer<T>>>>,
    key: String,
}

impl<T> Drop for KeyGuard<T> {
    fn drop(&mut self) {
        lock(&self.work).remove(&self.key);
    }
}

#[cfg(test)]
mod tests {
    use std::sync::atomic::{AtomicU32, Ordering};

    use tokio::sync::Notify;

    use super::*;

    #[tokio::test]
    async fn a_retry_joins_the_work_that_a_cancelled_call_started() {
        let flights = Arc::new(SingleFlight::<u32>::default());
        let begun = Arc::new(AtomicU32::new(0));
        let go = Arc::new(Notify::new());
        let call = || {
            let (flights, begun, go) = (flights.clone(), begun.clone(), go.clone());
            async move {
                flights
                    .join("pod", || async move {
                        let n = begun.fetch_add(1, Ordering::SeqCst) + 1;
                        go.notified().await;
                        Ok(n)
                    })
                    .await
            }
        };
        let first = tokio::spawn(call());
        while begun.load(Ordering::SeqCst) == 0 {
            tokio::task::yield_now().await;
        }
        first.abort();
        let second = tokio::spawn(call());
        tokio::task::yield_now().await;
        go.notify_one();
        assert_eq!(second.await.ok().and_then(Result::ok), Some(1));
        assert_eq!(begun.load(Ordering::SeqCst), 1);
    }
}
