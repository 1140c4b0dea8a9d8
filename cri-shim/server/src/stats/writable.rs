//! The disk usage of containers' writable layers, including the volumes that their images declare. A
//! request for statistics starts a walk through each layer, which counts the layer's files and
//! bytes. If the walk takes too long, the server reports the result of the previous walk.

mod walk;

use std::collections::{HashMap, HashSet, VecDeque};
use std::path::PathBuf;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use tokio::sync::Semaphore;

use self::walk::Count;
use crate::clock::now;
use crate::container::Container;
use crate::node::Node;
use rrun_calls::lock::lock;
use rrun_calls::turns::{Turn, TurnTimes, Turns};

/// The factor between the duration of a layer's count and the pause before the next count. The
/// counts of a layer therefore use at most a hundredth of one CPU's time, unless `MAX_AGE` shortens
/// the pause.
const WALK_SHARE: u32 = 100;

/// The maximum age of a layer's last count. An older count is repeated even if counting takes a
/// long time. Kubelet needs recent counts to evict the pods that use the most disk space. If a count
/// takes longer than this time, the pause before the next count is as long as the count.
const MAX_AGE: Duration = Duration::from_secs(30);

/// The maximum time that a request for statistics waits for walks through layers.
const REFRESH_TIMEOUT: Duration = Duration::from_millis(100);

/// The time after which a walk counts as long. A long walk does not delay the walks through the layers
/// of other pods. A container can also make a walk sleep in the kernel for a long time: the kernel
/// locks a directory while a process of the container reads it.
const LONG_WALK: Duration = Duration::from_secs(1);

/// The maximum number of long walks that do not delay the walks through other layers. Each needs a
/// thread. A pod has at most one walk at a time.
const MAX_LONG_WALKS: usize = 256;

/// The turns of long walks. Only one long walk runs at a time, and it then pauses for the same time. A
/// container with millions of files can therefore use at most one CPU's time for its counts, together
/// with all other such containers.
const LONG_WALK_TIMES: TurnTimes = TurnTimes {
    turn: Duration::from_millis(100),
    overtime: Duration::from_millis(900),
    pause: Duration::from_millis(100),
    late_pause_factor: 1,
};

/// The number of bytes and inodes in a container's writable layer. `at` is the time at which they
/// were counted, in nanoseconds since the epoch. Before the first count, `at` is 0.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) struct Usage {
    pub at: i64,
    pub bytes: u64,
    pub inodes: u64,
}

#[derive(Default)]
pub(super) struct UsageCache {
    shared: Arc<Shared>,
}

struct Shared {
    counts: Mutex<Counts>,
    /// The turns of the long walks.
    turns: Turns,
    /// The permits of the long walks that do not delay the walks through other layers.
    long_walks: Arc<Semaphore>,
}

#[derive(Default)]
struct Counts {
    /// The usage of each container, by the container's id.
    usages: HashMap<String, CountedUsage>,
    /// The ids of the pods with a walk in progress.
    busy_pods: HashSet<String>,
}

impl Default for Shared {
    fn default() -> Self {
        Shared {
            counts: Mutex::default(),
            turns: Turns::new(LONG_WALK_TIMES),
            long_walks: Arc::new(Semaphore::new(MAX_LONG_WALKS)),
        }
    }
}

/// The layers that must be counted for a request.
struct Batch {
    due: Mutex<VecDeque<Due>>,
    /// The number of walks that have begun.
    begun: AtomicUsize,
}

#[derive(Clone, Copy, Default)]
struct CountedUsage {
    usage: Usage,
    duration: Duration,
}

impl CountedUsage {
    fn is_due(&self, now: i64) -> bool {
        let age = u128::from(now.saturating_sub(self.usage.at).unsigned_abs());
        let rest = self.duration.saturating_mul(WALK_SHARE);
        let rest = rest.min(MAX_AGE.max(self.duration));
        age > rest.as_nanos()
    }

    fn finish(&mut self, at: i64, duration: Duration, count: &Count) {
        // An incomplete count must not lower the usage. Otherwise, a container could hide its files
        // by moving directories.
        if count.incomplete {
            self.raise(count);
        } else {
            (self.usage.bytes, self.usage.inodes) = (count.bytes, count.inodes);
        }
        self.usage.at = at;
        self.duration = duration;
    }

    /// Raises the usage to the numbers of an unfinished or incomplete walk. Numbers that are lower
    /// than those of the previous walk are ignored.
    fn raise(&mut self, count: &Count) {
        self.usage.bytes = self.usage.bytes.max(count.bytes);
        self.usage.inodes = self.usage.inodes.max(count.inodes);
    }
}

/// A container whose layer must be counted. The layers with the shortest walks are counted first. They
/// then do not wait for large layers.
#[derive(PartialEq, Eq, PartialOrd, Ord)]
struct Due {
    /// The duration of the last count.
    duration: Duration,
    container: String,
    pod: String,
    layer: PathBuf,
}

impl UsageCache {
    pub(super) fn forget(&self, id: &str) {
        lock(&self.shared.counts).usages.remove(id);
    }

    /// Returns the bytes and inodes that the last count found in the writable layer of the
    /// container `id`.
    pub(super) fn of(&self, id: &str) -> Usage {
        let counts = lock(&self.shared.counts);
        counts
            .usages
            .get(id)
            .map(|entry| entry.usage)
            .unwrap_or_default()
    }

    /// Counts the writable layers of the containers again, if their last counts are old enough. Waits
    /// at most `REFRESH_TIMEOUT` for the results.
    pub(super) async fn refresh(&self, node: &Node, containers: &[Arc<Container>]) {
        let mut due = Vec::new();
        {
            let (mut counts, now) = (lock(&self.shared.counts), now());
            for container in containers {
                let entry = counts.usages.entry(container.id.clone()).or_default();
                if entry.is_due(now) {
                    due.push(Due {
                        duration: entry.duration,
                        container: container.id.clone(),
                        pod: container.sandbox.id.clone(),
                        layer: node.writable_layer(&container.id),
                    });
                }
            }
        }
        if due.is_empty() {
            return;
        }
        due.sort_unstable();
        let batch = Arc::new(Batch {
            due: Mutex::new(due.into()),
            begun: AtomicUsize::new(0),
        });
        let walks = tokio::spawn(Arc::clone(&self.shared).count_all(batch));
        let _ = tokio::time::timeout(REFRESH_TIMEOUT, walks).await;
    }
}

impl Shared {
    /// Counts all layers of a batch on one thread. If a walk takes long, another thread counts the
    /// remaining layers.
    async fn count_all(self: Arc<Self>, batch: Arc<Batch>) {
        loop {
            let (shared, layers) = (Arc::clone(&self), Arc::clone(&batch));
            let mut walks = tokio::task::spawn_blocking(move || shared.count(&layers));
            let mut before = 0;
            loop {
                if tokio::time::timeout(LONG_WALK, &mut walks).await.is_ok() {
                    return;
                }
                let now = batch.begun.load(Ordering::Relaxed);
                if std::mem::replace(&mut before, now) == now {
                    break;
                }
            }
            let Ok(permit) = Arc::clone(&self.long_walks).try_acquire_owned() else {
                let _ = walks.await;
                return;
            };
            tokio::spawn(async move {
                let _ = walks.await;
                drop(permit);
            });
        }
    }

    /// Counts one layer of a batch after the other. This call blocks.
    fn count(&self, batch: &Batch) {
        loop {
            let next = lock(&batch.due).pop_front();
            let Some(due) = next else { return };
            batch.begun.fetch_add(1, Ordering::Relaxed);
            let at = now();
            if self.begin(&due, at) {
                self.count_layer(&due, at);
                lock(&self.counts).busy_pods.remove(&due.pod);
            }
        }
    }

    /// Returns whether a count of the layer can begin. It can't if another layer of the pod is being
    /// counted, or if another request has counted the layer since, or if the container was removed.
    fn begin(&self, due: &Due, now: i64) -> bool {
        let mut counts = lock(&self.counts);
        let entry = counts.usages.get(&due.container);
        entry.is_some_and(|entry| entry.is_due(now)) && counts.busy_pods.insert(due.pod.clone())
    }

    fn count_layer(&self, due: &Due, at: i64) {
        let (id, begun) = (&due.container, Instant::now());
        let mut turn: Option<Turn<'_>> = None;
        let pause = |count: &Count| {
            if begun.elapsed() < LONG_WALK {
                return true;
            }
            match &mut turn {
                Some(turn) => turn.go_on(),
                None => turn = Some(self.turns.wait()),
            }
            // A container without an entry was removed during the walk.
            let mut counts = lock(&self.counts);
            let entry = counts.usages.get_mut(id);
            entry.map(|entry| entry.raise(count)).is_some()
        };
        // The directory `work` is overlayfs's own.
        let roots = [due.layer.join("upper"), due.layer.join("volumes")];
        let count = Count::of(&[&roots[0], &roots[1]], pause);
        // A container without an entry gets no new entry.
        if let Some(entry) = lock(&self.counts).usages.get_mut(id) {
            entry.finish(at, begun.elapsed(), &count);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_layer_with_a_long_walk_is_counted_less_often() {
        let entry = |duration, at| CountedUsage {
            usage: Usage {
                at,
                ..Usage::default()
            },
            duration,
        };
        let second = 1_000_000_000;
        let now = 1000 * second;
        assert!(
            CountedUsage::default().is_due(now),
            "a layer that was never counted is not due for a count"
        );
        let short = Duration::from_micros(50);
        assert!(entry(short, now - second).is_due(now));
        assert!(!entry(short, now - 1000).is_due(now));
        let long = Duration::from_secs(3);
        assert!(!entry(long, now - 29 * second).is_due(now));
        assert!(entry(long, now - 31 * second).is_due(now));
        let very_long = Duration::from_secs(100);
        assert!(!entry(very_long, now - 99 * second).is_due(now));
        assert!(entry(very_long, now - 101 * second).is_due(now));
    }

    #[test]
    fn an_incomplete_count_never_lowers_the_usage() {
        let count = |bytes, inodes, incomplete| Count {
            bytes,
            inodes,
            incomplete,
        };
        let mut entry = CountedUsage::default();
        let usage = |entry: &CountedUsage| (entry.usage.bytes, entry.usage.inodes);
        entry.finish(1, Duration::ZERO, &count(100, 10, false));
        entry.raise(&count(50, 11, false));
        assert_eq!(usage(&entry), (100, 11));
        entry.finish(2, Duration::ZERO, &count(70, 7, true));
        assert_eq!(usage(&entry), (100, 11));
        entry.finish(3, Duration::ZERO, &count(70, 7, false));
        assert_eq!(usage(&entry), (70, 7));
        assert_eq!(entry.usage.at, 3);
    }

    #[test]
    fn a_pod_has_one_count_at_a_time() {
        let shared = Shared::default();
        let due = |container: &str, pod: &str| {
            let entry = CountedUsage::default();
            lock(&shared.counts)
                .usages
                .insert(container.to_owned(), entry);
            Due {
                duration: Duration::ZERO,
                container: container.to_owned(),
                pod: pod.to_owned(),
                layer: PathBuf::from("/nonexistent"),
            }
        };
        assert!(shared.begin(&due("a", "pod 1"), now()));
        assert!(!shared.begin(&due("a", "pod 1"), now()));
        assert!(!shared.begin(&due("b", "pod 1"), now()));
        assert!(shared.begin(&due("c", "pod 2"), now()));
    }
}
