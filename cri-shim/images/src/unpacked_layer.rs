//! Creates the directories of layers.

use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use rustix::io::Errno;

use crate::catalog::{Layer, directory};

use crate::layer::{LayerError, UnpackSummary};
use crate::removals::Removals;

/// Creates the directories of new layers.
pub(crate) struct LayerDirectories {
    pub root: PathBuf,
    pub removals: Arc<Removals>,
    /// The number of the next directory.
    next: AtomicU64,
}

impl LayerDirectories {
    pub(crate) fn new(root: &Path, removals: Arc<Removals>, next: u64) -> Arc<Self> {
        Arc::new(LayerDirectories {
            root: root.to_owned(),
            removals,
            next: next.into(),
        })
    }

    /// Calls `fill` to unpack a layer into `layers/NUMBER/fs`. Returns `None` if `fill` created no
    /// layer. If the layer is not complete, its files are removed in the background. No two calls have
    /// the same number, because the removal of an earlier attempt can still be in progress.
    ///
    /// The layer is never moved to another directory: the kernel moves only one file between
    /// directories of a file system at a time, and a container can make such a move take long.
    pub(crate) fn make(
        &self,
        fill: impl FnOnce(&Path) -> Result<Option<UnpackSummary>, LayerError>,
    ) -> Result<Option<UnpackedLayer>, LayerError> {
        let number = self.next.fetch_add(1, Ordering::Relaxed);
        let path = directory(&self.root, number);
        std::fs::create_dir(&path).map_err(|error| LayerError::System {
            what: format!("create the directory {}", path.display()),
            errno: Errno::from_io_error(&error).unwrap_or(Errno::IO),
        })?;
        let mut layer = UnpackedLayer {
            path: Some(path.clone()),
            number,
            unpacked: UnpackSummary::default(),
            removals: Arc::clone(&self.removals),
        };
        let unpacked = fill(&path.join("fs"))?;
        Ok(unpacked.map(|unpacked| {
            layer.unpacked = unpacked;
            layer
        }))
    }
}

/// A layer that no record names yet. Dropping this value removes the layer from the disk.
pub(crate) struct UnpackedLayer {
    path: Option<PathBuf>,
    number: u64,
    unpacked: UnpackSummary,
    removals: Arc<Removals>,
}

impl UnpackedLayer {
    pub(crate) fn keep(mut self) -> Layer {
        self.path = None;
        Layer {
            number: self.number,
            bytes: self.unpacked.bytes,
            inodes: self.unpacked.inodes,
            opaque_root: self.unpacked.opaque_root,
            unlisted: self.unpacked.unlisted > 0,
        }
    }
}

impl Drop for UnpackedLayer {
    fn drop(&mut self) {
        if let Some(path) = self.path.take() {
            let owner = path.to_string_lossy().into_owned();
            self.removals.begin(&owner, vec![path]);
        }
    }
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use tokio::runtime::Handle;

    use super::*;

    #[tokio::test]
    async fn neither_a_failed_nor_a_dropped_layer_delays_its_thread()
    -> Result<(), Box<dyn std::error::Error>> {
        let root = std::env::temp_dir().join(format!("rrun-failed-{}", std::process::id()));
        std::fs::create_dir_all(root.join("layers"))?;
        let removals = Removals::new(Handle::current());
        let directories = LayerDirectories::new(&root, removals, 1);
        let fill = |fs: &Path| {
            let made = std::fs::create_dir(fs).and_then(|()| std::fs::write(fs.join("file"), ""));
            made.map_err(LayerError::Stream)
        };
        let failed = directories.make(|fs| {
            fill(fs)?;
            Err(LayerError::Digest("the digest is wrong".to_owned()))
        });
        assert!(failed.is_err());
        let whole = directories.make(|fs| {
            fill(fs)?;
            Ok(Some(UnpackSummary::default()))
        })?;
        drop(whole);
        // The runtime of this test has one thread, so the removals begin at the next `await`.
        let left = ["layers/1", "layers/2"].map(|path| root.join(path));
        assert!(left.iter().all(|path| path.join("fs/file").exists()));
        while left.iter().any(|path| path.exists()) {
            tokio::time::sleep(Duration::from_millis(10)).await;
        }
        Ok(std::fs::remove_dir_all(&root)?)
    }
}
