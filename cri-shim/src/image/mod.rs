//! Images: references, registries, pulls, records.

mod auth;
mod challenge;
mod error;
mod hosts;
mod manifest;
mod record;
mod reference;
mod registry;
mod source;

use std::path::{Path, PathBuf};
use std::sync::Arc;

pub use auth::Auth;
pub use error::{ImageError, Kind};
pub use hosts::Registries;
pub use record::{Image, ImageConfig, LayerName};

use crate::store::Store;

/// Bounds on a pull.
#[derive(Clone, Debug)]
pub struct Limits {
    /// Layers downloaded and unpacked at once, over all pulls.
    pub parallel_layers: usize,
    /// The most bytes that one layer may unpack to.
    pub layer_bytes: u64,
    /// The most files that one layer may hold.
    pub layer_entries: u64,
}

impl Default for Limits {
    fn default() -> Self {
        Limits {
            parallel_layers: 3,
            layer_bytes: 64 << 30,
            layer_entries: 4 << 20,
        }
    }
}

/// What the images take on the disk.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct FsUsage {
    /// The directory that holds the layers.
    pub path: PathBuf,
    /// Bytes of all unpacked layers.
    pub bytes: u64,
    /// Inodes of all unpacked layers.
    pub inodes: u64,
}

/// All the images of the node. Clones share one set.
#[derive(Clone)]
pub struct Images {
    inner: Arc<Inner>,
}

struct Inner {
    root: PathBuf,
    _store: Store,
    _registries: Registries,
    _limits: Limits,
}

fn not_yet() -> ImageError {
    ImageError::new(Kind::Unimplemented, "images are not there yet")
}

impl Images {
    /// Loads the records under `root` (rrun-cri's `--root`) and removes what failed pulls left.
    /// Blocks on the disk.
    pub fn open(
        root: &Path,
        store: Store,
        registries: Registries,
        limits: Limits,
    ) -> Result<Self, ImageError> {
        Ok(Images {
            inner: Arc::new(Inner {
                root: root.to_owned(),
                _store: store,
                _registries: registries,
                _limits: limits,
            }),
        })
    }

    /// Fetches the image that `reference` names. Whoever asks for what is being pulled already
    /// joins that pull; it goes on when all who asked have gone.
    pub async fn pull(
        &self,
        reference: &str,
        auth: Option<Auth>,
    ) -> Result<Arc<Image>, ImageError> {
        let _ = (reference, auth);
        Err(not_yet())
    }

    /// The image of that name, digest reference, id, or unique beginning of an id.
    pub fn find(&self, name: &str) -> Option<Arc<Image>> {
        let _ = name;
        None
    }

    /// Every image, in the order of their ids.
    pub fn list(&self) -> Vec<Arc<Image>> {
        Vec::new()
    }

    /// Removes the image that `name` finds, with all its names; none there is no error. Layers
    /// under a lease stay until it is released.
    pub async fn remove(&self, name: &str) -> Result<(), ImageError> {
        let _ = name;
        Err(not_yet())
    }

    /// Keeps the layers of an image for `owner` (a container's id), over restarts, until
    /// [`Images::release`]. Returns the overlay lower directories, uppermost first. Asked again
    /// for the same owner and image, answers the same.
    pub async fn lease(&self, owner: &str, image_id: &str) -> Result<Vec<PathBuf>, ImageError> {
        let _ = (owner, image_id);
        Err(not_yet())
    }

    /// Lets go of what `owner` leased; nothing leased is no error.
    pub async fn release(&self, owner: &str) -> Result<(), ImageError> {
        let _ = owner;
        Ok(())
    }

    /// Owners of all leases, for the reconciliation after a start.
    pub fn leases(&self) -> Vec<String> {
        Vec::new()
    }

    pub fn fs_usage(&self) -> FsUsage {
        FsUsage {
            path: self.inner.root.join("layers"),
            bytes: 0,
            inodes: 0,
        }
    }
}
