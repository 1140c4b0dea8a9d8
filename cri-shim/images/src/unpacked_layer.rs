//! Moves unpacked layers to their final directories, and removes layers from the disk.

use std::io;
use std::path::{Path, PathBuf};

use rustix::io::Errno;

use crate::catalog::{Layer, directory};
use rrun_kernel::errno::describe;

use crate::layer::{self, LayerError, UnpackSummary};

/// Calls `fill` to unpack a layer into `ingest/NUMBER/fs`, then moves the layer to its final
/// directory. Returns `None` if `fill` created no layer.
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
    std::fs::create_dir(&ingest).map_err(|error| fail("create the directory", error))?;
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

/// An unpacked layer in its final directory, which no record names yet. Dropping this value removes
/// the layer from the disk.
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
            // This value can be dropped on a thread of the async runtime, and such a thread must
            // not block. A separate thread therefore removes the directory.
            let removal = std::thread::Builder::new().spawn(move || {
                remove(&path);
            });
            if let Err(error) = removal {
                log::warn!("cannot start a thread to remove a layer: {error}");
            }
        }
    }
}

/// Removes a directory that no record names. Returns whether the removal succeeded. A failure can
/// have a cause that passes, so the removal is repeated once. If it fails again, the next start of
/// the server removes the directory.
pub(crate) fn remove(path: &Path) -> bool {
    let removed = layer::remove_path(path).or_else(|_| layer::remove_path(path));
    if let Err(errno) = removed {
        log::warn!(
            "cannot remove {}: {}",
            path.display(),
            describe(&errno.into())
        );
    }
    removed.is_ok()
}
