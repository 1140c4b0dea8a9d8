//! The facade of this crate, with all operations on the node's images.

use std::io;
use std::os::unix::fs::MetadataExt as _;
use std::path::{Path, PathBuf};
use std::pin::Pin;
use std::sync::atomic::{AtomicBool, AtomicU64};
use std::sync::{Arc, Mutex, OnceLock};
use std::time::Duration;

use serde_json::value::RawValue;
use tokio::runtime::Handle;

use crate::auth::Auth;
use crate::catalog::{Catalog, EMPTY_LAYER, Lease, empty_layer};
use crate::documents::DocumentBudget;
use crate::error::{ImageError, Kind};
use crate::fetch::Queues;
use crate::hosts::Registries;
use crate::image_store::{ImageStore, PullEnd};
use crate::record::Image;
use crate::reference::Name;
use crate::removals::Removals;
use crate::settings::ImageSettings;
use crate::unpacked_layer::LayerDirectories;
use crate::{manifest, partial, pull};
use rrun_calls::lock::lock;
use rrun_kernel::errno::describe;
use rrun_store::{Store, StoreError, Table};

/// A future that resolves when a commit is on the disk.
type Written = Pin<Box<dyn Future<Output = Result<(), StoreError>> + Send>>;

/// The disk usage of all images and of the store.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct FsUsage {
    /// The directory that contains the layers.
    pub path: PathBuf,
    /// The number of bytes of all unpacked layers, of partial blobs and of the store.
    pub bytes: u64,
    /// The number of inodes of all unpacked layers and of partial blobs.
    pub inodes: u64,
}

/// All images of the node. Clones share the same images.
#[derive(Clone)]
pub struct Images {
    pub(crate) store: Arc<ImageStore>,
}

impl Images {
    /// Loads the records from `store`, and removes incomplete files of failed pulls from `root`
    /// (rrun-cri's `--root`) in the background. This call blocks on disk I/O. The caller must run
    /// in a runtime of tokio.
    pub fn open(
        root: &Path,
        store: Store,
        registries: Registries,
        settings: ImageSettings,
    ) -> Result<Self, ImageError> {
        let runtime = Handle::try_current().map_err(|error| {
            ImageError::new(
                Kind::Internal,
                format!("open the images in {}: {error}", root.display()),
            )
        })?;
        for dir in [root.join("layers"), root.join("ingest")] {
            make_private(&dir)?;
        }
        let empty = empty_layer(root);
        std::fs::create_dir_all(&empty)
            .map_err(|error| failed("create the directory", &empty, &error))?;
        let (mut catalog, mut changes) = Catalog::load(&store, root)?;
        catalog.pins = settings.pinned.clone();
        let (_, swept) = catalog.sweep();
        changes.extend(swept);
        // This function need not wait for the commit. All directories without a record are removed,
        // also the directories of the deleted records. If the commit does not reach the disk, the
        // next start finds these directories missing and deletes the records again.
        drop(store.commit(changes));
        let Leavings { paths, next } = leavings(root, &catalog)?;
        let removals = Removals::new(runtime);
        removals.begin("leftovers", paths);
        let directories = LayerDirectories::new(root, removals, next);
        Ok(Images {
            store: Arc::new(ImageStore {
                root: root.to_owned(),
                records: store,
                registries,
                queues: Arc::new(Queues::new(&settings, directories)),
                documents: DocumentBudget::new(settings.document_bytes),
                settings,
                catalog: Mutex::new(catalog),
                pulls: Mutex::default(),
                fetches: Mutex::default(),
                next_pull: AtomicU64::new(1),
                preloading: tokio::sync::Mutex::default(),
                sweeping_partials: AtomicBool::new(false),
                observer: OnceLock::new(),
            }),
        })
    }

    /// Registers `observer`, which is called at the end of each pull. Only the first call of this
    /// method has an effect.
    pub fn on_pull_end(&self, observer: fn(PullEnd)) {
        let _ = self.store.observer.set(observer);
    }

    /// Returns the registry configuration, which the hosts.toml files contain.
    pub fn registries(&self) -> &Registries {
        &self.store.registries
    }

    /// Fetches the image that `reference` names. If a pull of this image is already in progress,
    /// the call joins this pull. If all callers of a pull disconnect before its layers are
    /// known, the pull ends. Later, it continues for the time `image.abandoned_seconds`, and a retry
    /// within this time joins the pull.
    pub async fn pull(
        &self,
        reference: &str,
        auth: Option<Auth>,
    ) -> Result<Arc<Image>, ImageError> {
        let name = Name::parse(reference)?;
        pull::join(&self.store, name, auth).await
    }

    /// Finds an image by its name, its digest reference, its id, or a unique beginning of its id.
    pub fn find(&self, name: &str) -> Option<Arc<Image>> {
        lock(&self.store.catalog).find(name)
    }

    /// Returns all images, ordered by id.
    pub fn list(&self) -> Vec<Arc<Image>> {
        lock(&self.store.catalog).list()
    }

    /// Returns the size of an image on the disk in bytes: its unpacked layers and its configuration.
    /// Kubelet's garbage collection relies on this number.
    pub fn bytes_of(&self, image: &Image) -> u64 {
        lock(&self.store.catalog).bytes_of(image)
    }

    /// Returns the complete configuration of an image as its builder wrote it (OCI image-spec,
    /// config.md). This call blocks on disk I/O.
    pub fn configuration(&self, id: &str) -> Result<Option<Box<RawValue>>, ImageError> {
        Ok(self.store.records.get(Table::CONFIGURATIONS, id)?)
    }

    /// Returns the image with its whole `config`. The catalog does not contain large configurations.
    /// If the image has a large configuration, this call blocks on disk I/O.
    pub fn complete(&self, image: Arc<Image>) -> Result<Arc<Image>, ImageError> {
        if !image.large_config {
            return Ok(image);
        }
        let gone = || {
            let what = format!(
                "the configuration of the image {} no longer exists; pull the image again",
                image.id
            );
            ImageError::new(Kind::DataLoss, what)
        };
        let text = self.configuration(&image.id)?.ok_or_else(gone)?;
        let config = manifest::parse_configuration(text.get().as_bytes())?.config;
        Ok(Arc::new(Image {
            config,
            ..Image::clone(&image)
        }))
    }

    /// Removes the image that `name` refers to, with all its names. Does nothing if `name` refers
    /// to no image. If a lease keeps a layer, the layer remains until the lease is released.
    pub async fn remove(&self, name: &str) -> Result<(), ImageError> {
        let written = {
            let mut catalog = lock(&self.store.catalog);
            let Some(image) = catalog.find(name) else {
                return Ok(());
            };
            let changes = catalog.remove(&image.id);
            log::info!("remove image {}", image.id);
            self.store.records.commit_now(changes)
        };
        // The layers are removed even if the record could not be deleted, for example on a full
        // disk. The store repeats the deletion.
        let written = written.await;
        self.store.sweep().await?;
        Ok(written?)
    }

    /// Keeps the layers of an image for `owner` until [`Images::release`] is called, even across
    /// restarts of the server. `owner` is a container's id, or `ID:NUMBER` for an image volume of
    /// the container. Returns the overlay lower directories, uppermost first. A repeated call for
    /// the same owner and image returns the same directories, even if the image has been removed.
    pub async fn lease(&self, owner: &str, image_id: &str) -> Result<Vec<PathBuf>, ImageError> {
        let (lowers, written) = self.begin_lease(owner, image_id, true)?;
        if let Some(written) = written
            && let Err(error) = written.await
        {
            // Parts of a failed commit can nevertheless be in the store.
            let changes = lock(&self.store.catalog).remove_lease(owner);
            drop(self.store.records.commit_soon(changes));
            return Err(error.into());
        }
        Ok(lowers)
    }

    /// Creates a lease like [`Images::lease`], but does not wait until the lease is on the disk. If
    /// the server stops before the lease is written, the lease is lost. The next start of the
    /// server creates the missing leases of all existing containers again.
    pub fn lease_soon(&self, owner: &str, image_id: &str) -> Result<Vec<PathBuf>, ImageError> {
        let (lowers, written) = self.begin_lease(owner, image_id, false)?;
        if let Some(written) = written {
            let owner = owner.to_owned();
            tokio::spawn(async move {
                if let Err(error) = written.await {
                    log::error!("cannot store the image lease of {owner}: {error}");
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
                        format!("the image {image_id} is not on this node; pull it first"),
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
                    format!("layers of the image {image_id} no longer exist; pull the image again"),
                )
            })?;
        if known {
            return Ok((lowers, None));
        }
        let changes = catalog.add_lease(owner, lease)?;
        // Queue the change under the catalog's lock. A later release of this lease is then written
        // after the lease.
        let written: Written = if awaited {
            Box::pin(self.store.records.commit(changes))
        } else {
            Box::pin(self.store.records.commit_soon(changes))
        };
        Ok((lowers, Some(written)))
    }

    /// Releases the lease of `owner`. Does nothing if `owner` has no lease.
    pub async fn release(&self, owner: &str) -> Result<(), ImageError> {
        let (kept, written) = {
            let mut catalog = lock(&self.store.catalog);
            let kept = catalog.image_keeps_lease(owner);
            let changes = catalog.remove_lease(owner);
            if changes.is_empty() {
                return Ok(());
            }
            (kept, self.store.records.commit_now(changes))
        };
        let written = written.await;
        // A sweep examines every layer of the node. It is not needed for most removals of
        // containers, because the container's image is usually still on the node.
        if !kept {
            self.store.sweep().await?;
        }
        Ok(written?)
    }

    /// Returns the owners of all leases. When the server starts, it releases the leases of
    /// containers that no longer exist.
    pub fn leases(&self) -> Vec<String> {
        lock(&self.store.catalog).owners()
    }

    /// Waits until the layers of removed images are removed from the disk, but at most for `limit`.
    pub async fn removed(&self, limit: Duration) {
        self.store.queues.directories.removals.done(limit).await;
    }

    /// Returns the disk usage of the unpacked layers, of partial blobs and of the store, which contains
    /// the images' configurations. The usage of the layers is computed from the records without walking the
    /// directories. This call blocks on disk I/O.
    pub fn fs_usage(&self) -> Result<FsUsage, ImageError> {
        let (bytes, inodes) = lock(&self.store.catalog).usage();
        let records = self.store.records.path();
        let (of_partials, partials) = self.store.queues.partials.used();
        let of_records = std::fs::metadata(records)
            .map_err(|error| failed("find the size of", records, &error))?
            .blocks()
            .saturating_mul(512);
        Ok(FsUsage {
            path: self.store.root.join("layers"),
            bytes: bytes.saturating_add(of_records).saturating_add(of_partials),
            inodes: inodes.saturating_add(partials),
        })
    }
}

pub(crate) fn failed(what: &str, path: &Path, error: &io::Error) -> ImageError {
    let kind = match error.kind() {
        io::ErrorKind::StorageFull | io::ErrorKind::QuotaExceeded => Kind::ResourceExhausted,
        _ => Kind::Internal,
    };
    ImageError::new(
        kind,
        format!("{what} {}: {}", path.display(), describe(error)),
    )
}

/// Creates a directory that only root can enter. Without this protection, every user of the node
/// could run the set-uid programs in the layers of all images.
fn make_private(dir: &Path) -> Result<(), ImageError> {
    use std::os::unix::fs::PermissionsExt as _;
    std::fs::create_dir_all(dir).map_err(|error| failed("create the directory", dir, &error))?;
    std::fs::set_permissions(dir, std::fs::Permissions::from_mode(0o700))
        .map_err(|error| failed("set the mode of", dir, &error))
}

/// The remains of interrupted pulls and removals.
struct Leavings {
    paths: Vec<PathBuf>,
    /// The number for the next new layer directory. The names of the remains contain only lower
    /// numbers.
    next: u64,
}

/// Finds the interrupted downloads in `ingest/`, except partial blobs that a pull can resume, and
/// the layer directories that no record names.
fn leavings(root: &Path, catalog: &Catalog) -> Result<Leavings, ImageError> {
    let read = |name: &str| -> Result<Vec<PathBuf>, ImageError> {
        let dir = root.join(name);
        std::fs::read_dir(&dir)
            .and_then(|entries| entries.map(|entry| entry.map(|e| e.path())).collect())
            .map_err(|error| failed("read", &dir, &error))
    };
    let number = |path: &Path| path.file_name()?.to_str()?.parse::<u64>().ok();
    let recorded = catalog.numbers();
    let mut paths = read("ingest")?;
    paths.retain(|path| !partial::is_fresh(path));
    for path in read("layers")? {
        let is_used = |number| number == EMPTY_LAYER || recorded.contains(&number);
        if !number(&path).is_some_and(is_used) {
            paths.push(path);
        }
    }
    for path in &paths {
        log::info!(
            "remove the remains of an interrupted pull or removal: {}",
            path.display()
        );
    }
    let left = paths.iter().filter_map(|path| number(path));
    let last = recorded.into_iter().chain(left).max();
    Ok(Leavings {
        next: last.unwrap_or(EMPTY_LAYER).saturating_add(1),
        paths,
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::layer::{LayerError, UnpackSummary};

    #[tokio::test]
    async fn the_start_does_not_wait_for_the_removal_of_remains()
    -> Result<(), Box<dyn std::error::Error>> {
        let root = std::env::temp_dir().join(format!("rrun-remains-{}", std::process::id()));
        let remains = ["layers/5", "layers/other", "ingest/9", "ingest/a.piece"];
        let paths = remains.map(|path| root.join(path));
        for path in &paths {
            std::fs::create_dir_all(path.join("fs/etc"))?;
            std::fs::write(path.join("fs/etc/file"), "")?;
        }
        let images = Images::open(
            &root,
            Store::open(&root.join("meta.redb"))?,
            Registries::new(&root.join("certs.d")),
            ImageSettings::default(),
        )?;
        // The runtime of this test has one thread, so the removals begin at the next `await`.
        assert!(paths.iter().all(|path| path.exists()));
        while paths.iter().any(|path| path.exists()) {
            tokio::time::sleep(Duration::from_millis(10)).await;
        }
        assert!(empty_layer(&root).exists());
        let fill = |fs: &Path| {
            std::fs::create_dir(fs).map_err(LayerError::Stream)?;
            Ok(Some(UnpackSummary::default()))
        };
        let layer = images.store.queues.directories.make(fill)?;
        assert!(layer.is_some_and(|layer| layer.keep().number == 10));
        Ok(std::fs::remove_dir_all(&root)?)
    }
}
