//! The images of the node: the facade of this crate.

use std::io;
use std::path::{Path, PathBuf};
use std::pin::Pin;
use std::sync::atomic::{AtomicBool, AtomicU64};
use std::sync::{Arc, Mutex, OnceLock};
use std::time::Duration;

use crate::auth::Auth;
use crate::catalog::{Catalog, EMPTY_LAYER, Lease, empty_layer};
use crate::error::{ImageError, Kind};
use crate::fetch::Queues;
use crate::hosts::Registries;
use crate::image_store::{ImageStore, PullEnd};
use crate::record::Image;
use crate::reference::Name;
use crate::settings::ImageSettings;
use crate::unpacked_layer::remove;
use crate::{partial, pull};
use rrun_calls::lock::lock;
use rrun_store::{Store, StoreError, Table};

/// A commit to the store, on its way to the disk.
type Written = Pin<Box<dyn Future<Output = Result<(), StoreError>> + Send>>;

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
    pub(crate) store: Arc<ImageStore>,
}

impl Images {
    /// Loads the records under `root` (rrun-cri's `--root`) and removes what failed pulls left.
    /// Blocks on the disk.
    pub fn open(
        root: &Path,
        store: Store,
        registries: Registries,
        settings: ImageSettings,
    ) -> Result<Self, ImageError> {
        for dir in [root.join("layers"), root.join("ingest")] {
            make_private(&dir)?;
        }
        let empty = empty_layer(root);
        std::fs::create_dir_all(&empty).map_err(|error| failed("make", &empty, &error))?;
        let (mut catalog, mut changes) = Catalog::load(&store, root)?;
        let (_, swept) = catalog.sweep();
        changes.extend(swept);
        // Their directories go below, like everything that no record names. Were the store not
        // to learn of it, the next start would find the directories gone and do the same.
        drop(store.commit(changes));
        let next = remove_leavings(root, &catalog)?;
        Ok(Images {
            store: Arc::new(ImageStore {
                root: root.to_owned(),
                records: store,
                registries,
                queues: Arc::new(Queues::new(&settings)),
                settings,
                catalog: Mutex::new(catalog),
                pulls: Mutex::default(),
                fetches: Mutex::default(),
                next_layer: AtomicU64::new(next),
                next_pull: AtomicU64::new(1),
                preloading: tokio::sync::Mutex::default(),
                removing: Arc::default(),
                removals: Arc::default(),
                sweeping_partials: AtomicBool::new(false),
                observer: OnceLock::new(),
            }),
        })
    }

    /// From now on `observer` is called at the end of each pull. Only the first call has an effect.
    pub fn on_pull_end(&self, observer: fn(PullEnd)) {
        let _ = self.store.observer.set(observer);
    }

    /// Where registries are configured.
    pub fn registries(&self) -> &Registries {
        &self.store.registries
    }

    /// Fetches the image that `reference` names. A call for an image that is being pulled joins
    /// that pull. A pull continues for a while after its last caller has gone, so that a retry can
    /// join.
    pub async fn pull(
        &self,
        reference: &str,
        auth: Option<Auth>,
    ) -> Result<Arc<Image>, ImageError> {
        let name = Name::parse(reference)?;
        pull::join(&self.store, name, auth).await
    }

    /// The image of that name, digest reference, id, or unique beginning of an id.
    pub fn find(&self, name: &str) -> Option<Arc<Image>> {
        lock(&self.store.catalog).find(name)
    }

    /// Every image, in the order of their ids.
    pub fn list(&self) -> Vec<Arc<Image>> {
        lock(&self.store.catalog).list()
    }

    /// The unpacked size of an image on the disk, in bytes, not the registry's compressed size:
    /// kubelet's garbage collection relies on it.
    pub fn bytes_of(&self, image: &Image) -> u64 {
        lock(&self.store.catalog).bytes_of(image)
    }

    /// The whole configuration of an image as its builder wrote it (OCI image-spec, config.md).
    /// Blocks on the disk.
    pub fn configuration(&self, id: &str) -> Result<Option<serde_json::Value>, ImageError> {
        Ok(self.store.records.get(Table::CONFIGURATIONS, id)?)
    }

    /// Removes the image that `name` finds, with all its names; none there is no error. Layers
    /// under a lease stay until it is released.
    pub async fn remove(&self, name: &str) -> Result<(), ImageError> {
        let written = {
            let mut catalog = lock(&self.store.catalog);
            let Some(image) = catalog.find(name) else {
                return Ok(());
            };
            let changes = catalog.remove(&image.id);
            log::info!("remove image {}", image.id);
            self.store.records.commit(changes)
        };
        written.await?;
        self.store.sweep().await
    }

    /// Keeps the layers of an image for `owner` (a container's id), over restarts, until
    /// [`Images::release`]. Returns the overlay lower directories, uppermost first. Asked again
    /// for the same owner and image, answers the same, be the image there or not.
    pub async fn lease(&self, owner: &str, image_id: &str) -> Result<Vec<PathBuf>, ImageError> {
        let (lowers, written) = self.begin_lease(owner, image_id, true)?;
        if let Some(written) = written
            && let Err(error) = written.await
        {
            lock(&self.store.catalog).remove_lease(owner);
            return Err(error.into());
        }
        Ok(lowers)
    }

    /// As [`Images::lease`], with nobody waiting for the disk: whoever restarts the server takes
    /// the lease again for what is still there. What is removed later is removed from the store
    /// later.
    pub fn lease_soon(&self, owner: &str, image_id: &str) -> Result<Vec<PathBuf>, ImageError> {
        let (lowers, written) = self.begin_lease(owner, image_id, false)?;
        if let Some(written) = written {
            let owner = owner.to_owned();
            tokio::spawn(async move {
                if let Err(error) = written.await {
                    log::error!("write down that {owner} keeps its image: {error}");
                }
            });
        }
        Ok(lowers)
    }

    fn begin_lease(
        &self,
        owner: &str,
        image_id: &str,
        awaited: bool,
    ) -> Result<(Vec<PathBuf>, Option<Written>), ImageError> {
        let root = &self.store.root;
        let mut catalog = lock(&self.store.catalog);
        let before = catalog
            .lease(owner)
            .filter(|lease| lease.image == image_id)
            .cloned();
        let (lease, known) = match before {
            Some(lease) => (lease, true),
            None => {
                let image = catalog.image(image_id).ok_or_else(|| {
                    ImageError::new(
                        Kind::NotFound,
                        format!("the image {image_id} is not here; pull it first"),
                    )
                })?;
                let lease = Lease {
                    image: image_id.to_owned(),
                    layers: image.keys().into_iter().map(str::to_owned).collect(),
                };
                (lease, false)
            }
        };
        let lowers = catalog
            .lowers(lease.layers.iter().map(String::as_str), root)
            .ok_or_else(|| {
                ImageError::new(
                    Kind::DataLoss,
                    format!("layers of the image {image_id} are gone; pull it again"),
                )
            })?;
        if known {
            return Ok((lowers, None));
        }
        let changes = catalog.add_lease(owner, lease)?;
        // Queued under the lock, so that a release comes after it.
        let written: Written = if awaited {
            Box::pin(self.store.records.commit(changes))
        } else {
            Box::pin(self.store.records.commit_soon(changes))
        };
        Ok((lowers, Some(written)))
    }

    /// Lets go of what `owner` leased; nothing leased is no error.
    pub async fn release(&self, owner: &str) -> Result<(), ImageError> {
        let written = {
            let mut catalog = lock(&self.store.catalog);
            let changes = catalog.remove_lease(owner);
            if changes.is_empty() {
                return Ok(());
            }
            self.store.records.commit(changes)
        };
        written.await?;
        self.store.sweep().await
    }

    /// Owners of all leases, for the reconciliation after a start.
    pub fn leases(&self) -> Vec<String> {
        lock(&self.store.catalog).owners()
    }

    /// Waits, for so long at most, until the layers that nobody needs are gone from the disk.
    pub async fn removed(&self, limit: Duration) {
        let mut removals = self.store.removals.subscribe();
        let _ = tokio::time::timeout(limit, removals.wait_for(|count| *count == 0)).await;
    }

    /// What the unpacked layers take, by accounting: nothing is walked.
    pub fn fs_usage(&self) -> FsUsage {
        let (bytes, inodes) = lock(&self.store.catalog).usage();
        FsUsage {
            path: self.store.root.join("layers"),
            bytes,
            inodes,
        }
    }
}

pub(crate) fn failed(what: &str, path: &Path, error: &io::Error) -> ImageError {
    ImageError::new(
        Kind::Internal,
        format!("{what} {}: {error}", path.display()),
    )
}

/// Nobody but root may look into layers: set-uid programs of every image lie there.
fn make_private(dir: &Path) -> Result<(), ImageError> {
    use std::os::unix::fs::PermissionsExt as _;
    std::fs::create_dir_all(dir).map_err(|error| failed("make", dir, &error))?;
    std::fs::set_permissions(dir, std::fs::Permissions::from_mode(0o700))
        .map_err(|error| failed("set the mode of", dir, &error))
}

/// Empties `ingest/` but for what a pull can go on from, removes the layers that no record names,
/// and returns the first number that no directory has.
fn remove_leavings(root: &Path, catalog: &Catalog) -> Result<u64, ImageError> {
    let read = |dir: &Path| -> Result<Vec<PathBuf>, ImageError> {
        std::fs::read_dir(dir)
            .and_then(|entries| entries.map(|entry| entry.map(|e| e.path())).collect())
            .map_err(|error| failed("read", dir, &error))
    };
    for path in read(&root.join("ingest"))? {
        if partial::is_fresh(&path) {
            continue;
        }
        log::info!("remove what a broken-off pull left: {}", path.display());
        remove(&path);
    }
    let numbers = catalog.numbers();
    let mut last = numbers.iter().copied().max().unwrap_or(EMPTY_LAYER);
    for path in read(&root.join("layers"))? {
        let number = path
            .file_name()
            .and_then(|name| name.to_str())
            .and_then(|name| name.parse::<u64>().ok());
        match number {
            Some(EMPTY_LAYER) => {}
            Some(number) if numbers.contains(&number) => {}
            _ => {
                log::info!("remove a layer that no record names: {}", path.display());
                remove(&path);
                last = last.max(number.unwrap_or(EMPTY_LAYER));
            }
        }
    }
    Ok(last + 1)
}
