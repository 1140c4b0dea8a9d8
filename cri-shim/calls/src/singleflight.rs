//! Work that its caller may give up on and ask for again.
//!
//! The work runs in a task of its own, so a client that cancels cancels nothing; whoever asks for
//! the same key meanwhile waits for the same work and gets the same answer.

use std::collections::HashMap;
use std::future::Future;
use std::sync::{Arc, Mutex};
use std::time::Duration;

use tokio::sync::watch;

use crate::error::{Error, Result};
use crate::lock::lock;

type Answer<T> = watch::Receiver<Option<Result<T>>>;

/// The work under way, by key.
pub struct SingleFlight<T> {
    work: Arc<Mutex<HashMap<String, Answer<T>>>>,
    /// How long a caller waits; the work goes on.
    timeout: Duration,
}

impl<T> Default for SingleFlight<T> {
    fn default() -> Self {
        SingleFlight::with_timeout(Duration::MAX)
    }
}

impl<T> SingleFlight<T> {
    /// Work that nobody waits for longer, not even who has no deadline of his own.
    pub fn with_timeout(timeout: Duration) -> Self {
        SingleFlight {
            work: Arc::default(),
            timeout,
        }
    }
}

impl<T: Clone + Send + Sync + 'static> SingleFlight<T> {
    /// The answer of the work under `key`, which `begin` starts if there is none under way.
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
                        // First out of the table, then told: who comes between begins anew and
                        // finds what has been made.
                        drop(entry);
                        let _ = done.send(Some(result));
                    });
                    answer
                }
            }
        };
        let told = tokio::time::timeout(self.timeout, answer.wait_for(Option::is_some)).await;
        let Ok(told) = told else {
            return Err(Error::new(
                tonic::Code::DeadlineExceeded,
                format!(
                    "{key}: it has not ended within {} s and goes on; the same call again joins it",
                    self.timeout.as_secs()
                ),
            ));
        };
        match told.map(|told| told.clone()) {
            Ok(Some(result)) => result,
            _ => Err(Error::internal(format!("{key}: the work was aborted"))),
        }
    }
}

/// Takes the key out of the table, however the work ends.
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
    async fn a_retry_joins_and_a_caller_that_gave_up_cancels_nothing() {
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
