//! How much is in a container's writable layer: counted by a walk when somebody asks, and told as it
//! was last where the walk takes long.

use std::collections::HashMap;
use std::os::unix::fs::MetadataExt;
use std::path::Path;
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use crate::clock::now;
use crate::node::Node;
use rrun_calls::lock::lock;

/// A layer is counted again after so many times what the last walk took: at most a hundredth of one
/// CPU's time goes there. kubelet evicts who uses most by these figures, so that they must not lag
/// behind what the disk itself says.
const WALK_SHARE: u32 = 100;

/// How old a count may be before the next one begins in any case.
const MAX_AGE: Duration = Duration::from_secs(30);

/// How long an answer waits for walks.
const REFRESH_TIMEOUT: Duration = Duration::from_millis(100);

/// The most entries that one walk looks at; a layer with more is told as so large.
const MAX_ENTRIES: u64 = 1 << 20;

/// A count, and when it was made (nanoseconds since the epoch, 0: not yet).
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
    took: Duration,
    counting: bool,
}

impl CountedUsage {
    fn is_due(&self, now: i64) -> bool {
        let age = u128::from(now.saturating_sub(self.usage.at).unsigned_abs());
        let rest = self.took.saturating_mul(WALK_SHARE).min(MAX_AGE);
        !self.counting && age > rest.as_nanos()
    }
}

impl UsageCache {
    pub(super) fn forget(&self, id: &str) {
        lock(&self.counts).remove(id);
    }

    /// The last count.
    pub(super) fn of(&self, id: &str) -> Usage {
        let counts = lock(&self.counts);
        counts.get(id).map(|entry| entry.usage).unwrap_or_default()
    }

    /// Counts again what is due of these containers; waits a moment for it, and no longer.
    pub(super) async fn refresh(&self, node: &Node, ids: impl IntoIterator<Item = &str>) {
        let mut due = Vec::new();
        {
            let (mut counts, now) = (lock(&self.counts), now());
            for id in ids {
                let entry = counts.entry(id.to_owned()).or_default();
                if entry.is_due(now) {
                    entry.counting = true;
                    due.push((
                        entry.took,
                        id.to_owned(),
                        node.writable_layer(id).join("upper"),
                    ));
                }
            }
        }
        if due.is_empty() {
            return;
        }
        // Nobody waits for a large one before a small one.
        due.sort_unstable();
        let counts = Arc::clone(&self.counts);
        let walks = tokio::task::spawn_blocking(move || {
            for (_, id, dir) in due {
                let began = Instant::now();
                let usage = count(&dir);
                // Gone meanwhile: not again.
                if let Some(entry) = lock(&counts).get_mut(&id) {
                    *entry = CountedUsage {
                        usage,
                        took: began.elapsed(),
                        counting: false,
                    };
                }
            }
        });
        let _ = tokio::time::timeout(REFRESH_TIMEOUT, walks).await;
    }
}

/// Walks without following links.
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
            // Each name of a file with several has its share; a directory's links are its
            // children.
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
    fn what_took_long_is_counted_seldom() {
        let entry = |took, at| CountedUsage {
            usage: Usage {
                at,
                ..Usage::default()
            },
            took,
            counting: false,
        };
        let second = 1_000_000_000;
        let now = 1000 * second;
        assert!(CountedUsage::default().is_due(now), "never counted");
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
