//! The disk usage of containers' writable layers. A request for statistics starts a walk through
//! each layer, which counts the layer's files and bytes. If the walk takes too long, the server
//! reports the result of the previous walk.

use std::collections::HashMap;
use std::os::unix::fs::MetadataExt;
use std::path::Path;
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use crate::clock::now;
use crate::node::Node;
use rrun_calls::lock::lock;

/// The factor between the duration of a layer's count and the pause before the next count. The
/// counts of a layer therefore use at most a hundredth of one CPU's time, unless `MAX_AGE` shortens
/// the pause.
const WALK_SHARE: u32 = 100;

/// The maximum age of a layer's last count. An older count is repeated even if counting takes a
/// long time. Kubelet needs recent counts to evict the pods that use the most disk space.
const MAX_AGE: Duration = Duration::from_secs(30);

/// The maximum time that a request for statistics waits for walks through layers.
const REFRESH_TIMEOUT: Duration = Duration::from_millis(100);

/// The maximum number of entries that one walk counts. If a layer has more entries, only the
/// counted entries and their bytes are reported.
const MAX_ENTRIES: u64 = 1 << 20;

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
    counts: Counts,
}

type Counts = Arc<Mutex<HashMap<String, CountedUsage>>>;

#[derive(Clone, Copy, Default)]
struct CountedUsage {
    usage: Usage,
    duration: Duration,
    counting: bool,
}

impl CountedUsage {
    fn is_due(&self, now: i64) -> bool {
        let age = u128::from(now.saturating_sub(self.usage.at).unsigned_abs());
        let rest = self.duration.saturating_mul(WALK_SHARE).min(MAX_AGE);
        !self.counting && age > rest.as_nanos()
    }
}

impl UsageCache {
    pub(super) fn forget(&self, id: &str) {
        lock(&self.counts).remove(id);
    }

    /// Returns the bytes and inodes that the last count found in the writable layer of the
    /// container `id`.
    pub(super) fn of(&self, id: &str) -> Usage {
        let counts = lock(&self.counts);
        counts.get(id).map(|entry| entry.usage).unwrap_or_default()
    }

    /// Counts each writable layer of the containers `ids` again, if the layer's last count is old
    /// enough. Waits at most `REFRESH_TIMEOUT` for the results.
    pub(super) async fn refresh(&self, node: &Node, ids: impl IntoIterator<Item = &str>) {
        let mut due = Vec::new();
        {
            let (mut counts, now) = (lock(&self.counts), now());
            for id in ids {
                let entry = counts.entry(id.to_owned()).or_default();
                if entry.is_due(now) {
                    entry.counting = true;
                    due.push((
                        entry.duration,
                        id.to_owned(),
                        node.writable_layer(id).join("upper"),
                    ));
                }
            }
        }
        if due.is_empty() {
            return;
        }
        // The layers with the shortest walks are counted first. They then do not wait for large
        // layers.
        due.sort_unstable();
        let counts = Arc::clone(&self.counts);
        let walks = tokio::task::spawn_blocking(move || {
            for (_, id, dir) in due {
                let began = Instant::now();
                let usage = count(&dir);
                // A container without an entry in `counts` was removed during the walk, so it gets
                // no new entry.
                if let Some(entry) = lock(&counts).get_mut(&id) {
                    *entry = CountedUsage {
                        usage,
                        duration: began.elapsed(),
                        counting: false,
                    };
                }
            }
        });
        let _ = tokio::time::timeout(REFRESH_TIMEOUT, walks).await;
    }
}

/// Counts the entries below a directory and the bytes of these entries, without following symbolic
/// links.
fn count(dir: &Path) -> Usage {
    let mut usage = Usage {
        at: now(),
        bytes: 0,
        inodes: 0,
    };
    let mut todo = vec![dir.to_owned()];
    while let Some(dir) = todo.pop() {
        let Ok(entries) = std::fs::read_dir(&dir) else {
            continue;
        };
        for entry in entries.flatten() {
            let Ok(metadata) = entry.metadata() else {
                continue;
            };
            usage.inodes += 1;
            // The bytes of a file with several hard links are divided equally among its names. A
            // directory's bytes are not divided, because its link count depends on its
            // subdirectories.
            let names = if metadata.is_dir() {
                1
            } else {
                metadata.nlink().max(1)
            };
            // st_blocks counts in units of 512 bytes, stat(2).
            usage.bytes += metadata.blocks() * 512 / names;
            if usage.inodes >= MAX_ENTRIES {
                return usage;
            }
            if metadata.is_dir() {
                todo.push(entry.path());
            }
        }
    }
    usage
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
            counting: false,
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
        let counting = CountedUsage {
            counting: true,
            ..CountedUsage::default()
        };
        assert!(!counting.is_due(now));
    }
}
