//! Imports the image archives in `ROOT/preload/` at start and at SIGHUP, for nodes that can't reach
//! a registry.

use std::io;
use std::os::unix::fs::MetadataExt as _;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use serde::{Deserialize, Serialize};

use crate::archive::{ArchivedImage, ImageArchive};
use crate::error::{ImageError, Kind};
use crate::fetch::Origin;
use crate::image_store::ImageStore;
use crate::images::{Images, failed};
use crate::install::install;
use crate::reference::Name;
use rrun_calls::lock::lock;
use rrun_store::{Change, Table};

/// The record of an imported archive. If an archive has not changed since its import, the server
/// does not read it again.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
struct ImportRecord {
    length: u64,
    /// The archive's ctime: the time of the last change of its content or attributes, in
    /// nanoseconds since 1970.
    changed: i128,
    inode: u64,
    /// The ids of the imported images, each with the image's names in the archive.
    images: Vec<(String, Vec<String>)>,
}

impl ImportRecord {
    fn of(path: &Path) -> io::Result<Self> {
        let metadata = std::fs::metadata(path)?;
        if !metadata.is_file() {
            return Err(io::Error::other("it is not a regular file"));
        }
        Ok(ImportRecord {
            length: metadata.len(),
            changed: i128::from(metadata.ctime()) * 1_000_000_000
                + i128::from(metadata.ctime_nsec()),
            inode: metadata.ino(),
            images: Vec::new(),
        })
    }

    fn is_same_file(&self, other: &ImportRecord) -> bool {
        (self.length, self.changed, self.inode) == (other.length, other.changed, other.inode)
    }
}

impl Images {
    /// Imports the archives in `ROOT/preload` whose images are not on the node yet. If an archive
    /// can't be imported, the error is logged and the other archives are still imported. Concurrent
    /// calls of this function run one after the other.
    pub async fn preload(&self) {
        let store = &self.store;
        let _one = store.preloading.lock().await;
        let root = store.root.clone();
        let listed = tokio::task::spawn_blocking(move || archives(&root)).await;
        let archives = match listed {
            Ok(Ok(archives)) => archives,
            Ok(Err(error)) => {
                log::warn!("preload images: {error}");
                return;
            }
            Err(error) => {
                log::error!("preload images: {error}");
                return;
            }
        };
        if archives.is_empty() {
            return;
        }
        let known = match store.records.load::<ImportRecord>(Table::PRELOADS) {
            Ok(known) => known.into_iter().collect(),
            Err(error) => {
                log::error!("preload images: {error}");
                std::collections::HashMap::new()
            }
        };
        for path in archives {
            let name = path
                .file_name()
                .unwrap_or_default()
                .to_string_lossy()
                .into_owned();
            if let Err(error) = import(store, &path, &name, known.get(&name)).await {
                log::warn!("preload {}: {error}", path.display());
            }
        }
    }
}

/// Returns the paths of the archives, ordered by name.
fn archives(root: &Path) -> Result<Vec<PathBuf>, ImageError> {
    let dir = root.join("preload");
    let entries = match std::fs::read_dir(&dir) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(Vec::new()),
        other => other.map_err(|error| failed("read", &dir, &error))?,
    };
    let is_archive = |path: &PathBuf| {
        let name = path.file_name().unwrap_or_default().to_string_lossy();
        let endings = [".tar", ".tar.gz", ".tgz", ".tar.zst", ".tar.zstd"];
        endings.iter().any(|ending| name.ends_with(ending)) && !name.starts_with('.')
    };
    let mut archives: Vec<PathBuf> = entries
        .flatten()
        .map(|entry| entry.path())
        .filter(is_archive)
        .collect();
    archives.sort();
    Ok(archives)
}

async fn import(
    store: &Arc<ImageStore>,
    path: &Path,
    name: &str,
    known: Option<&ImportRecord>,
) -> Result<(), ImageError> {
    let mut now = ImportRecord::of(path).map_err(|error| {
        ImageError::new(
            Kind::DataLoss,
            format!("the archive can't be read: {error}"),
        )
    })?;
    if known.is_some_and(|known| known.is_same_file(&now) && is_here(store, known)) {
        log::debug!(
            "preload {}: the images in the archive are already on the node",
            path.display()
        );
        return Ok(());
    }
    let (archive, images) = open_archive(store, path).await?;
    let origin = Arc::new(Origin::Archive(archive));
    for ArchivedImage {
        names,
        digest,
        image,
    } in images
    {
        let log_name = path.display().to_string();
        let image = install(
            store,
            &origin,
            image,
            &names,
            digest.as_deref(),
            &log_name,
            None,
        )
        .await?;
        let names: Vec<String> = names.iter().map(Name::canonical).collect();
        log::info!(
            "preload {log_name}: image {} imported as {}",
            image.id,
            if names.is_empty() {
                "an image without a name, because the archive contains no name for it".to_owned()
            } else {
                names.join(", ")
            }
        );
        now.images.push((image.id.clone(), names));
    }
    let change = Change::put(Table::PRELOADS, name, &now)?;
    Ok(store.records.commit(vec![change]).await?)
}

/// Opens an archive and returns the archive and its images. Reads the archive on a separate thread,
/// because the read blocks.
async fn open_archive(
    store: &ImageStore,
    path: &Path,
) -> Result<(ImageArchive, Vec<ArchivedImage>), ImageError> {
    let (archive, scratch) = (path.to_owned(), store.root.join("ingest"));
    let most = store.settings.layer_bytes;
    let opened = tokio::task::spawn_blocking(move || {
        let mut archive = ImageArchive::open(&archive, &scratch, most)?;
        let images = archive.images()?;
        Ok::<_, ImageError>((archive, images))
    });
    opened.await.map_err(|error| {
        ImageError::new(
            Kind::Internal,
            format!("the task that reads the archive failed: {error}"),
        )
    })?
}

/// Returns whether the catalog contains all images of an imported archive and all their names. A
/// name that was moved to another image after the import also counts as present.
fn is_here(store: &ImageStore, known: &ImportRecord) -> bool {
    let catalog = lock(&store.catalog);
    known.images.iter().all(|(id, names)| {
        catalog.image(id).is_some() && names.iter().all(|name| catalog.find(name).is_some())
    })
}
