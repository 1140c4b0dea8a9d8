//! Removes directories of layers from the disk in the background.
//!
//! A layer can have millions of files, and their removal takes minutes. No pull, no turn to unpack
//! and no start of the server waits for a removal. If the server stops before a directory is
//! removed, no record names this directory, and the next start of the server begins the removal
//! again.
//!
//! Each removal has a thread, and the threads take turns. A container can make the removal of a file
//! take long: the kernel locks a directory while a process reads it, and a process can still have a
//! directory of a removed image or container open. The removals of an owner, such as a pod, therefore
//! run one after the other, and an owner can make at most one thread hang.

use std::cell::RefCell;
use std::collections::{HashMap, VecDeque};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use rustix::io::Errno;
use tokio::runtime::Handle;
use tokio::sync::{Semaphore, oneshot, watch};

use crate::layer;
use rrun_calls::lock::lock;
use rrun_calls::turns::{TurnTimes, Turns};
use rrun_calls::wait::slow;
use rrun_kernel::errno::describe;

/// The time after the first failed removal of a layer. Each further failure doubles the time, up to
/// about 17 minutes.
const RETRY_INTERVAL: Duration = Duration::from_secs(1);
const MAX_DOUBLINGS: u32 = 10;

/// A node that is short of disk space can have many layers to remove. One thread removes files faster
/// than three threads unpack them.
const TIMES: TurnTimes = TurnTimes {
    turn: Duration::from_secs(1),
    overtime: Duration::from_millis(500),
    pause: Duration::ZERO,
    late_pause_factor: 10,
};

/// The maximum number of threads. Each waits for its turn, or for a file that the kernel has not
/// removed yet.
const MAX_THREADS: usize = 256;

pub struct Removals {
    /// The removals that have not begun, by owner. An owner has an entry as long as a task removes its
    /// layers.
    waiting: Mutex<HashMap<String, VecDeque<LayerRemoval>>>,
    turns: Arc<Turns>,
    threads: Semaphore,
    /// The number of removals in progress of layers of removed images or containers, including the
    /// removals that wait for their turn.
    count: Arc<watch::Sender<usize>>,
    /// The number of owners that [`Removals::new_owner`] has returned.
    owners: AtomicU64,
    /// The runtime of the server. The threads that unpack layers do not belong to it.
    runtime: Handle,
}

struct LayerRemoval {
    path: PathBuf,
    failures: u32,
    counted: Option<Counted>,
}

/// Increments the number of removals in progress. Dropping this value decrements the number.
struct Counted(Arc<watch::Sender<usize>>);

impl Counted {
    fn new(count: &Arc<watch::Sender<usize>>) -> Self {
        count.send_modify(|count| *count += 1);
        Counted(Arc::clone(count))
    }
}

impl Drop for Counted {
    fn drop(&mut self) {
        self.0.send_modify(|count| *count = count.saturating_sub(1));
    }
}

impl Removals {
    pub fn new(runtime: Handle) -> Arc<Self> {
        Removals::with_times(runtime, TIMES)
    }

    fn with_times(runtime: Handle, times: TurnTimes) -> Arc<Self> {
        Arc::new(Removals {
            waiting: Mutex::default(),
            turns: Arc::new(Turns::new(times)),
            threads: Semaphore::new(MAX_THREADS),
            count: Arc::default(),
            owners: AtomicU64::new(0),
            runtime,
        })
    }

    /// Returns an owner for the layers of one image, which are removed one after the other.
    pub(crate) fn new_owner(&self) -> String {
        let number = self.owners.fetch_add(1, Ordering::Relaxed);
        format!("image {number}")
    }

    /// Removes the files of layers that were never complete. If one of them can't be removed, tries
    /// again later. Any thread can call this function, and the call does not block.
    pub(crate) fn begin(self: &Arc<Self>, owner: &str, paths: Vec<PathBuf>) {
        for path in paths {
            self.add(owner, path, 0, None);
        }
    }

    /// Removes the layers of removed images or containers like [`Removals::begin`]. [`Removals::done`]
    /// waits for the first attempt.
    pub fn begin_counted(self: &Arc<Self>, owner: &str, paths: Vec<PathBuf>) {
        for path in paths {
            self.add(owner, path, 0, Some(Counted::new(&self.count)));
        }
    }

    fn add(self: &Arc<Self>, owner: &str, path: PathBuf, failures: u32, counted: Option<Counted>) {
        let removal = LayerRemoval {
            path,
            failures,
            counted,
        };
        let mut waiting = lock(&self.waiting);
        if let Some(queue) = waiting.get_mut(owner) {
            queue.push_back(removal);
            return;
        }
        waiting.insert(owner.to_owned(), VecDeque::from([removal]));
        let (removals, owner) = (Arc::clone(self), owner.to_owned());
        self.runtime.spawn(async move {
            while let Some(removal) = removals.next(&owner) {
                removals.attempt(&owner, removal).await;
            }
        });
    }

    fn next(&self, owner: &str) -> Option<LayerRemoval> {
        let mut waiting = lock(&self.waiting);
        let next = waiting.get_mut(owner).and_then(VecDeque::pop_front);
        if next.is_none() {
            waiting.remove(owner);
        }
        next
    }

    /// Removes a layer. If this fails, tries again later.
    async fn attempt(self: &Arc<Self>, owner: &str, removal: LayerRemoval) {
        let LayerRemoval {
            path,
            failures,
            counted,
        } = removal;
        let is_removed = self.remove(&path).await;
        drop(counted);
        if is_removed {
            return;
        }
        let (removals, owner) = (Arc::clone(self), owner.to_owned());
        self.runtime.spawn(async move {
            tokio::time::sleep(RETRY_INTERVAL * (1 << failures)).await;
            let failures = (failures + 1).min(MAX_DOUBLINGS);
            removals.add(&owner, path, failures, None);
        });
    }

    /// Removes a directory that no record names. Returns whether the directory was removed.
    async fn remove(&self, path: &Path) -> bool {
        let what = format!("remove {}", path.display());
        slow(what, self.remove_on_a_thread(path)).await
    }

    /// The process can end while the thread runs.
    async fn remove_on_a_thread(&self, path: &Path) -> bool {
        // The semaphore is never closed.
        let _thread = self.threads.acquire().await;
        let (sender, removed) = oneshot::channel();
        let (turns, removed_path) = (Arc::clone(&self.turns), path.to_owned());
        let removal = move || {
            let turn = RefCell::new(turns.wait());
            let go_on = || {
                turn.borrow_mut().go_on();
                Ok(())
            };
            let _ = sender.send(remove(&removed_path, &go_on));
        };
        if let Err(error) = std::thread::Builder::new().spawn(removal) {
            let reason = describe(&error);
            log::warn!(
                "cannot remove {}: create a thread: {reason}",
                path.display()
            );
            return false;
        }
        removed.await.unwrap_or(false)
    }

    /// Waits until no layer of a removed image or container is being removed, but at most for `limit`.
    pub async fn done(&self, limit: Duration) {
        let mut count = self.count.subscribe();
        let _ = tokio::time::timeout(limit, count.wait_for(|count| *count == 0)).await;
    }
}

/// Removes a directory. A failure can have a cause that passes, so the removal is repeated once.
/// Returns whether the directory was removed.
fn remove(path: &Path, go_on: &dyn Fn() -> Result<(), Errno>) -> bool {
    let removed = layer::remove_path_and(path, go_on);
    match removed.or_else(|_| layer::remove_path_and(path, go_on)) {
        Ok(()) => true,
        Err(errno) => {
            let reason = describe(&errno.into());
            log::warn!("cannot remove {}: {reason}", path.display());
            false
        }
    }
}

#[cfg(test)]
mod tests {
    use rustix::fs::{CWD, Mode, OFlags, mkdirat, openat};

    use super::*;

    const STEP: Duration = Duration::from_millis(1);

    type Outcome = Result<(), Box<dyn std::error::Error>>;

    /// Creates a directory that contains a directory, and so on.
    fn make_deep(name: &str, levels: usize) -> Result<PathBuf, Box<dyn std::error::Error>> {
        let root = std::env::temp_dir().join(format!("rrun-{name}-{}", std::process::id()));
        std::fs::create_dir_all(&root)?;
        let flags = OFlags::PATH | OFlags::DIRECTORY | OFlags::CLOEXEC;
        let mut at = openat(CWD, &root, flags, Mode::empty())?;
        for _ in 0..levels {
            mkdirat(&at, "d", Mode::RWXU)?;
            at = openat(&at, "d", flags, Mode::empty())?;
        }
        Ok(root)
    }

    fn with_short_turns() -> Arc<Removals> {
        Removals::with_times(
            Handle::current(),
            TurnTimes {
                turn: STEP,
                overtime: STEP,
                pause: Duration::ZERO,
                late_pause_factor: 1,
            },
        )
    }

    /// The way down to the first directory without entries takes longer than a turn.
    #[tokio::test]
    async fn trees_that_need_many_turns_are_removed() -> Outcome {
        let removals = with_short_turns();
        let paths = [make_deep("deep-1", 10_000)?, make_deep("deep-2", 10_000)?];
        for path in &paths {
            removals.begin_counted(&path.to_string_lossy(), vec![path.clone()]);
        }
        removals.done(Duration::from_secs(60)).await;
        assert!(!paths.iter().any(|path| path.exists()));
        Ok(())
    }

    #[tokio::test]
    async fn a_removal_that_hangs_delays_only_its_owner() -> Outcome {
        let removals = with_short_turns();
        let paths = [make_deep("hang-1", 1)?, make_deep("hang-2", 1)?];
        // This queue has no task, as if the first removal of the owner hung.
        lock(&removals.waiting).insert("pod".to_owned(), VecDeque::new());
        let turns = Arc::clone(&removals.turns);
        let hanging = turns.wait();
        removals.begin("pod", vec![paths[0].clone()]);
        removals.begin_counted("other pod", vec![paths[1].clone()]);
        removals.done(Duration::from_secs(60)).await;
        drop(hanging);
        assert_eq!(paths.each_ref().map(|path| path.exists()), [true, false]);
        Ok(std::fs::remove_dir_all(&paths[0])?)
    }
}
