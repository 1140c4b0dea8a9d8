//! Writable layers on their way out: RemoveContainer does not wait until a million files are
//! unlinked. They are moved aside in one step, and a thread removes them, over restarts.

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

/// `ROOT/trash`, on the file system of the writable layers.
pub(crate) struct Trash {
    dir: PathBuf,
    /// Something came since the thread that empties looked last.
    more: Mutex<bool>,
    /// There is such a thread; changed with `more` locked.
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

    /// Moves a directory here, under a name that nothing else has, and has it removed. Right also
    /// when it is not there. Blocks for a rename.
    pub(crate) fn put(self: &Arc<Self>, path: &Path, name: &str) -> Result<()> {
        let what = || format!("move {} to {}", path.display(), self.dir.display());
        let target = self.dir.join(name);
        let moved = match std::fs::rename(path, &target) {
            // The trash is not there yet, or the directory is gone: the second try tells.
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

    /// Removes what is here, in a thread of its own.
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

    /// Waits, for so long at most, until all that was put here is gone from the disk.
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
                // What can't be removed now is tried again with the next removal.
                if let Err(errno) = layer::remove_path(&path) {
                    log::warn!("remove {}: {}", path.display(), describe(&errno.into()));
                }
            }
        }
    }
}
