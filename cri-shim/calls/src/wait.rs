//! Waits for steps of a CRI request, and logs a warning if a step is slow.

use std::fmt::Display;
use std::future::Future;
use std::pin::pin;
use std::time::{Duration, Instant};

/// The time after which an unfinished step is logged for the first time.
const REPORT_AFTER: Duration = Duration::from_secs(10);

/// Waits for `step`. If the step takes over ten seconds, logs a warning with `what`, and another
/// warning when the step finishes. `what` names the step, for example "pod 12ab: mount the root
/// file system".
pub async fn slow<F: Future>(what: impl Display, step: F) -> F::Output {
    let mut step = pin!(step);
    let begin = Instant::now();
    let mut interval = REPORT_AFTER;
    let mut reported = false;
    loop {
        match tokio::time::timeout(interval, step.as_mut()).await {
            Ok(output) => {
                if reported {
                    log::warn!("{what}: finished after {} s", begin.elapsed().as_secs());
                }
                return output;
            }
            Err(_) => {
                reported = true;
                log::warn!(
                    "{what}: has been waiting for {} s",
                    begin.elapsed().as_secs()
                );
                interval = (interval * 2).min(Duration::from_secs(600));
            }
        }
    }
}

/// The interval at which [`keep_one_thread`] uses a thread of the pool. tokio ends a thread that was
/// idle for ten seconds.
const KEEP_INTERVAL: Duration = Duration::from_secs(5);

/// Starts a thread for [`blocking`], and a task that keeps this thread alive. If the pool has a
/// thread, work waits for this thread when the kernel refuses to start another, for example because
/// the limit on processes is reached. If the pool has no thread, tokio panics instead.
pub async fn keep_one_thread() {
    use_a_thread().await;
    tokio::spawn(async {
        loop {
            tokio::time::sleep(KEEP_INTERVAL).await;
            use_a_thread().await;
        }
    });
}

async fn use_a_thread() {
    let _ = tokio::task::spawn_blocking(|| ()).await;
}

/// Runs `work` on a separate thread. `work` can block on files or mounts, and a hung file system
/// must not stall other CRI requests. Logs a warning if the work takes over ten seconds, like
/// [`slow`].
pub async fn blocking<T: Send + 'static>(
    what: impl Display,
    work: impl FnOnce() -> T + Send + 'static,
) -> T {
    match slow(what, tokio::task::spawn_blocking(work)).await {
        Ok(output) => output,
        Err(error) => match error.try_into_panic() {
            // `work` panicked. Continue its panic in this task, as if the task had called `work`
            // itself.
            Ok(panic) => std::panic::resume_unwind(panic),
            // The runtime is shutting down, so no caller waits for the result any more.
            Err(_) => std::future::pending().await,
        },
    }
}
