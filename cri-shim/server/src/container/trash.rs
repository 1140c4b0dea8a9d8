//! Deletion of writable layers in the background.
//!
//! RemoveContainer does not wait until all files of a writable layer are deleted. RemoveContainer
//! renames the layer into the trash directory, and a thread deletes the entries of this directory.
//! If an entry can't be deleted, the server tries again later. If the server stops before the
//! deletion is complete, the next start of the server continues the deletion.

use std::io;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU32, Ordering};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use tokio::sync::watch;

use crate::sandbox::files::private_dir;
use rrun_calls::error::{During, Result};
use rrun_calls::lock::lock;
use rrun_images::layer;
use rrun_kernel::errno::describe;

/// The directory `ROOT/trash`. The directory and the writable layers are on the same file system,
/// because rename(2) can't move a layer to another file system.
pub(crate) struct Trash {
    dir: PathBuf,
    /// True if an entry was added since the deleting thread last read the directory.
    more: Mutex<bool>,
    /// True while a deleting thread runs. The value changes only while `more` is locked.
    emptying: watch::Sender<bool>,
    /// The number of times in a row that the deleting thread failed to delete all entries.
    failures: AtomicU32,
}

/// The time between the first failed deletion and the next attempt. Each further failure doubles
/// the time, up to 2^[`MAX_DOUBLINGS`] seconds.
const RETRY_INTERVAL: Duration = Duration::from_secs(1);

/// About 17 minutes.
const MAX_DOUBLINGS: u32 = 10;

impl Trash {
    pub(crate) fn new(root: &Path) -> Self {
        Trash {
            dir: root.join("trash"),
            more: Mutex::default(),
            emptying: watch::Sender::new(false),
            failures: AtomicU32::new(0),
        }
    }

    /// Moves a directory into the trash, under a unique name, and starts its deletion. A missing
    /// directory is not an error. The call blocks for the duration of one rename(2).
    pub(crate) fn put(self: &Arc<Self>, path: &Path, name: &str) -> Result<()> {
        let what = || format!("move {} to {}", path.display(), self.dir.display());
        let target = self.dir.join(name);
        let moved = match std::fs::rename(path, &target) {
            // Either the trash directory or `path` does not exist. The next line creates the trash
            // directory. If the second rename(2) fails with ENOENT too, `path` does not exist.
            Err(error) if error.kind() == io::ErrorKind::NotFound => {
                private_dir(&self.dir)?;
                std::fs::rename(path, &target)
            }
            moved => moved,
        };
        match moved {
            Ok(()) => self.empty_soon(),
            Err(error) if error.kind() == io::ErrorKind::NotFound => {}
            Err(error) => return Err(error).during(what),
        }
        Ok(())
    }

    /// Starts the deletion of all entries of the trash in a separate thread.
    pub(crate) fn empty_soon(self: &Arc<Self>) {
        {
            let mut more = lock(&self.more);
            *more = true;
            if self.emptying.send_replace(true) {
                return;
            }
        }
        let trash = Arc::clone(self);
        tokio::spawn(async move {
            let emptied = Arc::clone(&trash);
            let done = tokio::task::spawn_blocking(move || emptied.empty()).await;
            if done.is_ok_and(|done| done) {
                trash.failures.store(0, Ordering::Relaxed);
                return;
            }
            let failures = trash.failures.fetch_add(1, Ordering::Relaxed);
            tokio::time::sleep(RETRY_INTERVAL * (1 << failures.min(MAX_DOUBLINGS))).await;
            trash.empty_soon();
        });
    }

    /// Waits until all entries of the trash are deleted from the disk.
    pub(crate) async fn emptied(&self) {
        let mut emptying = self.emptying.subscribe();
        let _ = emptying.wait_for(|emptying| !emptying).await;
    }

    /// Deletes the entries until no entry was added meanwhile. Returns whether the last deletion
    /// succeeded.
    fn empty(&self) -> bool {
        let mut done = true;
        loop {
            {
                let mut more = lock(&self.more);
                if !std::mem::take(&mut *more) {
                    self.emptying.send_replace(false);
                    return done;
                }
            }
            done = self.delete_entries();
        }
    }

    /// Deletes all entries. Returns false if an entry remains.
    fn delete_entries(&self) -> bool {
        let what = |error: &io::Error| {
            log::warn!("empty {}: {}", self.dir.display(), describe(error));
        };
        let entries = match std::fs::read_dir(&self.dir) {
            Ok(entries) => entries,
            Err(error) if error.kind() == io::ErrorKind::NotFound => return true,
            Err(error) => {
                what(&error);
                return false;
            }
        };
        let mut done = true;
        for entry in entries {
            let removed = entry.and_then(|entry| Ok(layer::remove_path(&entry.path())?));
            if let Err(error) = removed {
                what(&error);
                done = false;
            }
        }
        done
    }
}
