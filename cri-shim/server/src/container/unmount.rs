//! Unmounts the file systems of a container that are mounted in its bundle.

use std::path::{Path, PathBuf};

use crate::sandbox::files::unmount;
use rrun_calls::error::{Error, Result};
use rrun_calls::wait::blocking;

/// The directory in the bundle in which image volumes are mounted.
pub(super) const IMAGES: &str = "images";

/// Unmounts the container's root file system and its image volumes. A file system that is not mounted is
/// not an error. This call blocks.
pub(crate) fn bundle(bundle: &Path) -> Result<()> {
    unmount(&bundle.join("rootfs"))?;
    let Ok(entries) = std::fs::read_dir(bundle.join(IMAGES)) else {
        return Ok(());
    };
    for entry in entries.flatten() {
        unmount(&entry.path())?;
    }
    Ok(())
}

/// Unmounts the file systems of an exited container in the background. Kubelet keeps exited containers
/// for a long time, and the kernel needs memory for each layer of their images meanwhile. `name` is the
/// name of the container in the log.
pub(crate) fn soon(name: &str, directory: PathBuf) {
    let what = format!("{name}: unmount the file systems of the exited container");
    tokio::spawn(async move {
        if let Err(error) = blocking(what.clone(), move || bundle(&directory)).await {
            log::warn!("{what}: {}", Error::sentence(&error));
        }
    });
}
