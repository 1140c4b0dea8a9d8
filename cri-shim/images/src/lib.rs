//! Images: references, registries, pulls, records.
//!
//! `pull` tells a pull's story: `source` asks the `registry` endpoints that `hosts` names for the
//! `manifest`, `fetch` brings each layer, and the `catalog` holds what is here. `preload` brings
//! images from an `archive` instead.

mod archive;
mod auth;
mod catalog;
mod challenge;
mod client;
mod error;
mod fetch;
mod hosts;
mod identity;
pub mod layer;
mod manifest;
mod pace;
mod partial;
mod pin;
pub mod position;
mod preload;
mod pull;
mod record;
mod reference;
mod registry;
mod settings;
mod slots;
mod source;
mod turns;

use std::collections::HashMap;
use std::io;
use std::path::{Path, PathBuf};
use std::pin::Pin;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, OnceLock, PoisonError};
use std::time::Duration;

use tokio::sync::watch;

pub use auth::Auth;
pub use error::{ImageError, Kind};
pub use hosts::Registries;
pub use record::{Image, ImageConfig, LayerName};
pub use reference::Name;
pub use settings::ImageSettings;

use catalog::{Catalog, EMPTY_LAYER, Lease, directory};
use rrun_store::{Store, StoreError, Table};

/// What is on its way to the disk.
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
    inner: Arc<Inner>,
}

struct Inner {
    root: PathBuf,
    store: Store,
    registries: Registries,
    limits: ImageSettings,
    catalog: Mutex<Catalog>,
    pulls: Mutex<HashMap<pull::Key, pull::Pulling>>,
    /// By the layer's key.
    fetches: Mutex<HashMap<String, pull::Fetching>>,
    /// The queues in which fetches of layers wait.
    queues: Arc<fetch::Queues>,
    next_layer: AtomicU64,
    next_pull: AtomicU64,
    /// Held while archives are imported.
    preloading: tokio::sync::Mutex<()>,
    /// Held while layers are removed from the disk.
    removing: Arc<tokio::sync::Mutex<()>>,
    /// How many removals are under way or waiting for their turn.
    removals: Arc<watch::Sender<usize>>,
    /// Someone will look for partial blobs that nobody came back for.
    sweeping_partials: AtomicBool,
    /// Called at the end of each pull.
    observer: OnceLock<fn(PullEnd)>,
}

/// How a pull ended.
#[derive(Clone, Copy, Debug)]
pub enum PullEnd {
    Pulled {
        /// Compressed bytes of the image's layers.
        bytes: u64,
        took: Duration,
    },
    Failed,
}

/// What is locked here is only read and changed, never waited under; a panic in between can't
/// leave it half done.
fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

impl Inner {
    fn observe(&self, end: PullEnd) {
        if let Some(observer) = self.observer.get() {
            observer(end);
        }
    }
}

impl Images {
    /// Loads the records under `root` (rrun-cri's `--root`) and removes what failed pulls left.
    /// Blocks on the disk.
    pub fn open(
        root: &Path,
        store: Store,
        registries: Registries,
        limits: ImageSettings,
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
            inner: Arc::new(Inner {
                root: root.to_owned(),
                store,
                registries,
                queues: Arc::new(fetch::Queues::new(&limits)),
                limits,
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
        let _ = self.inner.observer.set(observer);
    }

    /// Where registries are configured.
    pub fn registries(&self) -> &Registries {
        &self.inner.registries
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
        pull::join(&self.inner, name, auth).await
    }

    /// The image of that name, digest reference, id, or unique beginning of an id.
    pub fn find(&self, name: &str) -> Option<Arc<Image>> {
        lock(&self.inner.catalog).find(name)
    }

    /// Every image, in the order of their ids.
    pub fn list(&self) -> Vec<Arc<Image>> {
        lock(&self.inner.catalog).list()
    }

    /// What an image takes on the disk, in bytes. Not what its registry says of it, for nothing
    /// compressed is kept: who removes images to make room counts on these bytes.
    pub fn bytes_of(&self, image: &Image) -> u64 {
        lock(&self.inner.catalog).bytes_of(image)
    }

    /// The whole configuration of an image as its builder wrote it (OCI image-spec, config.md).
    /// Blocks on the disk.
    pub fn configuration(&self, id: &str) -> Result<Option<serde_json::Value>, ImageError> {
        Ok(self.inner.store.get(Table::CONFIGURATIONS, id)?)
    }

    /// Removes the image that `name` finds, with all its names; none there is no error. Layers
    /// under a lease stay until it is released.
    pub async fn remove(&self, name: &str) -> Result<(), ImageError> {
        let written = {
            let mut catalog = lock(&self.inner.catalog);
            let Some(image) = catalog.find(name) else {
                return Ok(());
            };
            let changes = catalog.remove(&image.id);
            log::info!("remove image {}", image.id);
            self.inner.store.commit(changes)
        };
        written.await?;
        self.inner.sweep().await
    }

    /// Keeps the layers of an image for `owner` (a container's id), over restarts, until
    /// [`Images::release`]. Returns the overlay lower directories, uppermost first. Asked again
    /// for the same owner and image, answers the same, be the image there or not.
    pub async fn lease(&self, owner: &str, image_id: &str) -> Result<Vec<PathBuf>, ImageError> {
        let (lowers, written) = self.begin_lease(owner, image_id, true)?;
        if let Some(written) = written
            && let Err(error) = written.await
        {
            lock(&self.inner.catalog).remove_lease(owner);
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
        let root = &self.inner.root;
        let mut catalog = lock(&self.inner.catalog);
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
            Box::pin(self.inner.store.commit(changes))
        } else {
            Box::pin(self.inner.store.commit_soon(changes))
        };
        Ok((lowers, Some(written)))
    }

    /// Lets go of what `owner` leased; nothing leased is no error.
    pub async fn release(&self, owner: &str) -> Result<(), ImageError> {
        let written = {
            let mut catalog = lock(&self.inner.catalog);
            let changes = catalog.remove_lease(owner);
            if changes.is_empty() {
                return Ok(());
            }
            self.inner.store.commit(changes)
        };
        written.await?;
        self.inner.sweep().await
    }

    /// Owners of all leases, for the reconciliation after a start.
    pub fn leases(&self) -> Vec<String> {
        lock(&self.inner.catalog).owners()
    }

    /// Waits, for so long at most, until the layers that nobody needs are gone from the disk.
    pub async fn removed(&self, limit: Duration) {
        let mut removals = self.inner.removals.subscribe();
        let _ = tokio::time::timeout(limit, removals.wait_for(|count| *count == 0)).await;
    }

    /// What the unpacked layers take, by accounting: nothing is walked.
    pub fn fs_usage(&self) -> FsUsage {
        let (bytes, inodes) = lock(&self.inner.catalog).usage();
        FsUsage {
            path: self.inner.root.join("layers"),
            bytes,
            inodes,
        }
    }
}

impl Inner {
    /// Removes, once they are old enough, the partial blobs that nobody has come back for.
    fn sweep_partials_later(&self) {
        if self.sweeping_partials.swap(true, Ordering::Relaxed) {
            return;
        }
        let root = self.root.clone();
        tokio::spawn(async move {
            loop {
                tokio::time::sleep(partial::KEPT).await;
                let root = root.clone();
                let _ = tokio::task::spawn_blocking(move || partial::sweep(&root)).await;
            }
        });
    }

    /// Removes the layers that nobody needs, first from the store and then, with nobody waiting,
    /// from the disk: the next start removes what no record names.
    async fn sweep(&self) -> Result<(), ImageError> {
        let (layers, written) = {
            let (layers, changes) = lock(&self.catalog).sweep();
            if layers.is_empty() {
                return Ok(());
            }
            (layers, self.store.commit(changes))
        };
        written.await?;
        let root = self.root.clone();
        let removing = Arc::clone(&self.removing);
        let removals = Arc::clone(&self.removals);
        removals.send_modify(|count| *count += 1);
        tokio::spawn(async move {
            // One after the other: a node that runs out of room removes many.
            let _turn = removing.lock_owned().await;
            let removed = tokio::task::spawn_blocking(move || {
                for layer in layers {
                    fetch::remove(&directory(&root, layer.number));
                }
            });
            let _ = removed.await;
            removals.send_modify(|count| *count = count.saturating_sub(1));
        });
        Ok(())
    }
}

/// The overlay lower directory with nothing in it.
pub fn empty_layer(root: &Path) -> PathBuf {
    directory(root, EMPTY_LAYER).join("fs")
}

fn failed(what: &str, path: &Path, error: &io::Error) -> ImageError {
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

/// Empties `ingest/` but for what a pull can go on from, removes the layers that no record names, and returns the first number that
/// no directory has.
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
        fetch::remove(&path);
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
                fetch::remove(&path);
                last = last.max(number.unwrap_or(EMPTY_LAYER));
            }
        }
    }
    Ok(last + 1)
}
