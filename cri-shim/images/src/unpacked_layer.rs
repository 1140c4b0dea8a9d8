//! Layers in their place on the disk, and their removal.

use std::io;
use std::path::{Path, PathBuf};

use rustix::io::Errno;

use crate::catalog::{Layer, directory};
use crate::layer::{self, LayerError, UnpackSummary};

/// Lets `fill` make a layer in `ingest/NUMBER/fs`, and moves the layer to its place. `None`: `fill`
/// made no layer.
pub(crate) fn make(
    root: &Path,
    number: u64,
    fill: impl FnOnce(&Path) -> Result<Option<UnpackSummary>, LayerError>,
) -> Result<Option<UnpackedLayer>, LayerError> {
    let ingest = root.join("ingest").join(number.to_string());
    let fail = |what: &str, error: io::Error| LayerError::System {
        what: format!("{what} {}", ingest.display()),
        errno: Errno::from_io_error(&error).unwrap_or(Errno::IO),
    };
    std::fs::create_dir(&ingest).map_err(|error| fail("make the directory", error))?;
    let result = fill(&ingest.join("fs")).and_then(|unpacked| {
        let Some(unpacked) = unpacked else {
            return Ok(None);
        };
        let path = directory(root, number);
        std::fs::rename(&ingest, &path).map_err(|error| fail("move the layer from", error))?;
        Ok(Some(UnpackedLayer {
            path: Some(path),
            number,
            unpacked,
        }))
    });
    if !matches!(result, Ok(Some(_))) {
        remove(&ingest);
    }
    result
}

/// A layer in its place that belongs to nobody yet; it goes when it is dropped.
pub(crate) struct UnpackedLayer {
    path: Option<PathBuf>,
    number: u64,
    unpacked: UnpackSummary,
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
            // It may be dropped where nothing must block.
            let removal = std::thread::Builder::new().spawn(move || remove(&path));
            if let Err(error) = removal {
                log::warn!("start a thread to remove a layer: {error}");
            }
        }
    }
}

/// Removes a directory that nobody names; what can't be removed now is at the next start.
pub(crate) fn remove(path: &Path) {
    if let Err(error) = layer::remove_path(path) {
        log::warn!("remove {}: {}", path.display(), io::Error::from(error));
    }
}
