//! Removes directories of layers from the disk in the background.
//!
//! A layer can have millions of files, and their removal takes minutes. No pull, no turn to unpack
//! and no start of the server waits for a removal. If the server stops before a directory is
//! removed, no record names this directory, and the next start of the server begins the removal
//! again.
//!
//! The removals take turns, and only one of them runs. But a container can make the removal of a file
//! take long: the kernel locks a directory while a process reads it, and a process can still have a
//! directory of a removed image or container open. It can also create files there while they are
//! being removed. If a removal does not end its turn in time, the next turn begins, and the removal
//! continues after a pause.

use std::path::{Path, PathBuf};
use std::pin::pin;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use futures_util::future::join_all;
use rustix::io::Errno;
use tokio::runtime::Handle;
use tokio::sync::{Semaphore, watch};

use crate::layer;
use rrun_calls::wait::slow;
use rrun_kernel::errno::describe;

/// The time after the first failed removal of a layer. Each further failure doubles the time, up to
/// about 17 minutes.
const RETRY_INTERVAL: Duration = Duration::from_secs(1);
const MAX_DOUBLINGS: u32 = 10;

/// The length of a turn. A removal that takes longer continues in a later turn.
const TURN: Duration = Duration::from_secs(1);

/// The time after a turn in which a removal must end it. If it does not, one file takes very long, and
/// the next turn begins.
const OVERTIME: Duration = Duration::from_millis(500);

/// The maximum number of removals that did not end their turn in time and do not delay others. Each
/// needs a thread until the kernel has removed the file.
const MAX_LATE: usize = 32;

/// The pause after a late turn is this number multiplied by the delay of the turn. Removals that are
/// always late then rarely use up the permits.
const LATE_PAUSE: u32 = 20;
const MAX_LATE_PAUSE: Duration = Duration::from_secs(300);

pub struct Removals {
    /// A node that is short of disk space can have many layers to remove. With this permit, only one
    /// removal runs at a time. One thread removes files faster than three threads unpack them. The
    /// semaphore is fair.
    turn: Semaphore,
    /// The permits of the removals that did not end their turn in time.
    late: Semaphore,
    /// The number of removals in progress of layers of removed images or containers, including the
    /// removals that wait for their turn.
    count: watch::Sender<usize>,
    /// The runtime of the server. The threads that unpack layers do not belong to it.
    runtime: Handle,
}

impl Removals {
    pub fn new(runtime: Handle) -> Arc<Self> {
        Arc::new(Removals {
            turn: Semaphore::new(1),
            late: Semaphore::new(MAX_LATE),
            count: watch::Sender::default(),
            runtime,
        })
    }

    /// Removes the files of layers that were never complete. If one of them can't be removed, tries
    /// again later. Any thread can call this function, and the call does not block.
    pub(crate) fn begin(self: &Arc<Self>, paths: Vec<PathBuf>) {
        if !paths.is_empty() {
            let removals = Arc::clone(self);
            self.runtime.spawn(async move {
                let left = removals.attempt(paths).await;
                removals.retry(left).await;
            });
        }
    }

    /// Removes the layers of removed images or containers like [`Removals::begin`]. [`Removals::done`]
    /// waits for the first attempt.
    pub fn begin_counted(self: &Arc<Self>, paths: Vec<PathBuf>) {
        let removals = Arc::clone(self);
        removals.count.send_modify(|count| *count += 1);
        self.runtime.spawn(async move {
            let left = removals.attempt(paths).await;
            let counted = |count: &mut usize| *count = count.saturating_sub(1);
            removals.count.send_modify(counted);
            removals.retry(left).await;
        });
    }

    /// Removes the paths, and returns those that can't be removed.
    async fn attempt(&self, paths: Vec<PathBuf>) -> Vec<PathBuf> {
        let attempts = paths.into_iter().map(async |path| {
            loop {
                let (what, removed) = (format!("remove {}", path.display()), path.clone());
                let removal = move |is_over: &AtomicBool| remove(&removed, is_over);
                match self.in_turn(what, removal).await {
                    Turn::Removed => return None,
                    Turn::Over => {}
                    Turn::Failed => return Some(path),
                }
            }
        });
        join_all(attempts).await.into_iter().flatten().collect()
    }

    /// Calls `removal` on a separate thread when no other removal has its turn. The argument of
    /// `removal` becomes true when its turn is over. `what` describes the removal for the log.
    async fn in_turn(
        &self,
        what: String,
        removal: impl FnOnce(&AtomicBool) -> Turn + Send + 'static,
    ) -> Turn {
        // The semaphores are never closed.
        let Ok(turn) = self.turn.acquire().await else {
            return Turn::Failed;
        };
        let is_over = Arc::new(AtomicBool::new(false));
        let over = Arc::clone(&is_over);
        let removal = tokio::task::spawn_blocking(move || removal(&over));
        let mut removal = pin!(removal);
        if let Ok(ended) = tokio::time::timeout(TURN, &mut removal).await {
            return ended.unwrap_or(Turn::Failed);
        }
        is_over.store(true, Ordering::Relaxed);
        if let Ok(ended) = tokio::time::timeout(OVERTIME, &mut removal).await {
            return ended.unwrap_or(Turn::Failed);
        }
        let begun = Instant::now();
        let late = self.late.try_acquire();
        let turn = late.is_err().then_some(turn);
        let ended = slow(what, removal).await.unwrap_or(Turn::Failed);
        drop((turn, late));
        if ended == Turn::Over {
            // The next turn of this removal will probably be late, too.
            let pause = begun.elapsed() * LATE_PAUSE;
            tokio::time::sleep(pause.min(MAX_LATE_PAUSE)).await;
        }
        ended
    }

    async fn retry(&self, mut left: Vec<PathBuf>) {
        let mut failures = 0;
        while !left.is_empty() {
            tokio::time::sleep(RETRY_INTERVAL * (1 << failures)).await;
            failures = (failures + 1).min(MAX_DOUBLINGS);
            left = self.attempt(left).await;
        }
    }

    /// Waits until no layer of a removed image or container is being removed, but at most for `limit`.
    pub async fn done(&self, limit: Duration) {
        let mut count = self.count.subscribe();
        let _ = tokio::time::timeout(limit, count.wait_for(|count| *count == 0)).await;
    }
}

/// The result of a turn of a removal.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Turn {
    Removed,
    /// The turn is over, and files remain.
    Over,
    Failed,
}

/// Removes a directory that no record names, until `is_over` becomes true. A failure can have a cause
/// that passes, so the removal is repeated once.
fn remove(path: &Path, is_over: &AtomicBool) -> Turn {
    let go_on = || {
        if is_over.load(Ordering::Relaxed) {
            return Err(Errno::CANCELED);
        }
        Ok(())
    };
    let remove = || layer::remove_path_and(path, &go_on);
    let removed = match remove() {
        Err(errno) if errno != Errno::CANCELED => remove(),
        removed => removed,
    };
    match removed {
        Ok(()) => Turn::Removed,
        Err(Errno::CANCELED) => Turn::Over,
        Err(errno) => {
            let reason = describe(&errno.into());
            log::warn!("cannot remove {}: {reason}", path.display());
            Turn::Failed
        }
    }
}

#[cfg(test)]
mod tests {
    use std::sync::mpsc::{Sender, channel};
    use std::thread::sleep;

    use super::*;

    const STEP: Duration = Duration::from_millis(10);

    #[tokio::test]
    async fn a_removal_that_takes_long_is_continued_in_a_later_turn() {
        let removals = Removals::new(Handle::current());
        let endless = |is_over: &AtomicBool| {
            while !is_over.load(Ordering::Relaxed) {
                sleep(STEP);
            }
            Turn::Over
        };
        let (first, second) = tokio::join!(
            removals.in_turn("remove without end".to_owned(), endless),
            removals.in_turn("remove".to_owned(), |_| Turn::Removed),
        );
        assert_eq!((first, second), (Turn::Over, Turn::Removed));
        assert_eq!(removals.late.available_permits(), MAX_LATE);
    }

    /// Begins a removal that hangs until the returned sender is dropped.
    fn begin_hanging(removals: &Arc<Removals>) -> Sender<()> {
        let (end, ended) = channel();
        let removals = Arc::clone(removals);
        tokio::spawn(async move {
            let removal = move |_: &AtomicBool| {
                let _ = ended.recv();
                Turn::Over
            };
            removals.in_turn("hang".to_owned(), removal).await
        });
        end
    }

    #[tokio::test]
    async fn a_removal_that_hangs_does_not_delay_the_next_one() {
        let removals = Removals::new(Handle::current());
        let hanging = begin_hanging(&removals);
        tokio::task::yield_now().await;
        let removed = removals.in_turn("remove".to_owned(), |_| Turn::Removed);
        assert_eq!(removed.await, Turn::Removed);
        assert_eq!(removals.late.available_permits(), MAX_LATE - 1);
        drop(hanging);
    }
}
