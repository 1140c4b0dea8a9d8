//! How much is in a container's writable layer: counted in the background, now and then, by a
//! walk.

use std::collections::HashMap;
use std::os::unix::fs::MetadataExt;
use std::path::Path;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use crate::node::{Node, now};

/// How old a count may be before the next one begins.
const MAX_AGE: Duration = Duration::from_secs(30);

/// The most entries that one walk looks at; a layer with more is told as so large.
const ENTRIES: u64 = 1 << 20;

/// A count, and when it was made (nanoseconds since the epoch, 0: not yet).
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Usage {
    pub at: i64,
    pub bytes: u64,
    pub inodes: u64,
}

#[derive(Default)]
pub struct Cache {
    counts: Arc<Mutex<HashMap<String, Entry>>>,
}

#[derive(Clone, Copy, Default)]
struct Entry {
    usage: Usage,
    counting: bool,
}

impl Cache {
    pub fn forget(&self, id: &str) {
        self.lock().remove(id);
    }

    fn lock(&self) -> std::sync::MutexGuard<'_, HashMap<String, Entry>> {
        self.counts.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// The last count; begins a new one if that is old.
    pub fn of(&self, node: &Node, id: &str) -> Usage {
        let mut counts = self.lock();
        let entry = counts.entry(id.to_owned()).or_default();
        let age = u128::from(now().saturating_sub(entry.usage.at).unsigned_abs());
        if !entry.counting && age > MAX_AGE.as_nanos() {
            entry.counting = true;
            let counts = Arc::clone(&self.counts);
            let (id, dir) = (id.to_owned(), node.writable_layer(id).join("upper"));
            tokio::task::spawn_blocking(move || {
                let usage = count(&dir);
                let mut counts = counts.lock().unwrap_or_else(PoisonError::into_inner);
                // Gone meanwhile: not again.
                if let Some(entry) = counts.get_mut(&id) {
                    *entry = Entry {
                        usage,
                        counting: false,
                    };
                }
            });
        }
        entry.usage
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
            if usage.inodes >= ENTRIES {
                return usage;
            }
            if metadata.is_dir() {
                todo.push(entry.path());
            }
        }
    }
    usage
}
