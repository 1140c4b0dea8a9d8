//! Waits that an operator should know of.

use std::fmt::Display;
use std::future::Future;
use std::pin::pin;
use std::time::{Duration, Instant};

/// How long a step may take before the log says what it waits for.
const REPORT_AFTER: Duration = Duration::from_secs(10);

/// Waits for `step`, and says in the log what it is if that takes over ten seconds, and when it
/// has ended after all. `what` as in "pod 12ab: mount the root file system".
pub async fn slow<F: Future>(what: impl Display, step: F) -> F::Output {
    let mut step = pin!(step);
    let begin = Instant::now();
    let mut interval = REPORT_AFTER;
    let mut reported = false;
    loop {
        match tokio::time::timeout(interval, step.as_mut()).await {
            Ok(output) => {
                if reported {
                    log::warn!("{what}: ended after {} s", begin.elapsed().as_secs());
                }
                return output;
            }
            Err(_) => {
                reported = true;
                log::warn!("{what}: waiting for {} s", begin.elapsed().as_secs());
                interval = (interval * 2).min(Duration::from_secs(600));
            }
        }
    }
}

/// Runs what blocks (files, mounts) on a thread of its own, so that a hung file system stalls
/// nobody else. As [`slow`] for the rest.
pub async fn blocking<T: Send + 'static>(
    what: impl Display,
    work: impl FnOnce() -> T + Send + 'static,
) -> T {
    match slow(what, tokio::task::spawn_blocking(work)).await {
        Ok(output) => output,
        Err(error) => match error.try_into_panic() {
            // The thread's panic goes on here, as if the work had been called.
            Ok(panic) => std::panic::resume_unwind(panic),
            // The runtime is being shut down, and nobody waits for an answer any more.
            Err(_) => std::future::pending().await,
        },
    }
}
