//! Deletion of writable layers in the background.
//!
//! RemoveContainer does not wait until all files of a writable layer are deleted. RemoveContainer
//! renames the layer into the trash directory, and a thread deletes the entries of this directory.
//! If the server stops before the deletion is complete, the next start of the server continues the
//! deletion.

use std::io;
use std::path::{Path, PathBuf};
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
}

impl Trash {
    pub(crate) fn new(root: &Path) -> Self {
        Trash {
            dir: root.join("trash"),
            more: Mutex::default(),
            emptying: watch::Sender::new(false),
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
        tokio::task::spawn_blocking(move || trash.empty());
    }

    /// Waits until all entries of the trash are deleted from the disk, but not longer than `limit`.
    pub(crate) async fn emptied(&self, limit: Duration) {
        let mut emptying = self.emptying.subscribe();
        let _ = tokio::time::timeout(limit, emptying.wait_for(|emptying| !emptying)).await;
    }

    fn empty(&self) {
        loop {
            {
                let mut more = lock(&self.more);
                if !std::mem::take(&mut *more) {
                    self.emptying.send_replace(false);
                    return;
                }
            }
            let entries = std::fs::read_dir(&self.dir);
            for path in entries.into_iter().flatten().flatten().map(|e| e.path()) {
                // If an entry can't be deleted, the deletion is retried after the next removal of a
                // container.
                if let Err(errno) = layer::remove_path(&path) {
                    log::warn!("remove {}: {}", path.display(), describe(&errno.into()));
                }
            }
        }
    }
}
