//! Keeps the beginning of a large blob in a file while the rest arrives, and the bytes of a layer that
//! waits to be unpacked.
//!
//! If a pull fails or the server stops, the next pull of the image continues after the bytes in the
//! file. If a fetch gives its download slot to another pull, it also continues after these bytes in
//! its next slot. The file's content is not trusted. Its bytes are hashed together with the bytes
//! from the network. The file is removed when the layer is unpacked or invalid. If no pull uses the
//! file for an hour, the file is also removed.

use std::fs::{File, OpenOptions};
use std::io;
use std::os::unix::fs::{FileExt as _, MetadataExt as _, OpenOptionsExt as _};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::{Duration, SystemTime};

use rustix::fs::{FlockOperation, flock};

use crate::layer::{LayerDescriptor, digest_of};
use crate::partial_budget::{PartialBudget, Reservation};
use rrun_calls::wait::blocking;

/// The minimum size of a blob whose beginning is kept for a later pull. Fetching a smaller blob
/// again costs less than keeping its beginning.
pub(crate) const MIN_KEPT_BYTES: u64 = 4 << 20;

/// The minimum size of a blob whose received bytes are kept during the wait for another slot.
const MIN_PIECE_BYTES: u64 = 64 << 10;

/// The time after which a partial blob is removed, counted from the arrival of its last byte.
pub(crate) const PARTIAL_LIFETIME: Duration = Duration::from_secs(3600);

const SUFFIX: &str = ".partial";

/// The suffix of the file that keeps the beginning of a small blob. Files with this suffix are not
/// kept for a later pull. When the server starts, it also removes all files with this suffix.
const PIECE_SUFFIX: &str = ".piece";

/// The file with the beginning of one blob. A lock on the file prevents two fetches of the same
/// blob from writing to it.
pub(crate) struct Partial {
    file: File,
    path: PathBuf,
    length: u64,
    /// The size of the whole blob in bytes.
    size: u64,
    room: Reservation,
    /// True if there was no room for more bytes. The file contains the bytes before.
    full: bool,
}

/// The path of the file with the beginning of one blob from one registry. Fetches from two
/// registries have different files, because each of them could add wrong bytes or lock the file.
#[derive(Clone)]
pub(crate) struct PartialName {
    path: PathBuf,
    /// The size of the whole blob in bytes.
    size: u64,
    budget: Arc<PartialBudget>,
}

impl PartialName {
    pub(crate) fn new(
        (root, budget): (&Path, &Arc<PartialBudget>),
        registry: &str,
        layer: &LayerDescriptor,
    ) -> Self {
        let suffix = if layer.size < MIN_KEPT_BYTES {
            PIECE_SUFFIX
        } else {
            SUFFIX
        };
        let digest = &layer.digest;
        let hex = digest.strip_prefix("sha256:").unwrap_or(digest);
        let of_registry = digest_of(registry.as_bytes());
        let registry = of_registry.get(7..23).unwrap_or_default();
        PartialName {
            path: root
                .join("ingest")
                .join(format!("{hex}-{registry}{suffix}")),
            size: layer.size,
            budget: Arc::clone(budget),
        }
    }

    /// Returns whether the file contains all bytes of the blob.
    pub(crate) async fn is_whole(&self) -> bool {
        let (path, size) = (self.path.clone(), self.size);
        let what = format!("read the size of {}", path.display());
        let is_whole = move || std::fs::symlink_metadata(path).is_ok_and(|file| file.len() == size);
        blocking(what, is_whole).await
    }

    /// Removes the file.
    pub(crate) fn discard(&self) {
        match remove(&self.path) {
            Ok(()) => self.budget.forget(&self.path),
            Err(error) => log::warn!(
                "cannot remove the beginning of a blob, {}: {error}",
                self.path.display()
            ),
        }
    }
}

impl Partial {
    /// Opens the file with the beginning of the blob, or creates an empty file. Returns `None` if
    /// the blob is too small, the file can't be used, or there is no room for the file. No bytes of
    /// the blob are then kept. This call blocks on disk I/O.
    pub(crate) fn open(name: &PartialName) -> Option<Self> {
        let (path, size) = (name.path.clone(), name.size);
        if size < MIN_PIECE_BYTES {
            return None;
        }
        let opened = OpenOptions::new()
            .read(true)
            .write(true)
            .create(true)
            .truncate(false)
            .mode(0o600)
            .open(&path);
        let file = opened
            .map_err(|error| {
                log::warn!("cannot keep a partial blob in {}: {error}", path.display())
            })
            .ok()?;
        flock(&file, FlockOperation::NonBlockingLockExclusive).ok()?;
        let mut length = file.metadata().ok()?.len();
        if length > size {
            file.set_len(0).ok()?;
            length = 0;
        }
        let Some(room) = name.budget.reserve(&path, length) else {
            log_no_room(&path);
            let _ = remove(&path);
            return None;
        };
        Some(Partial {
            file,
            path,
            length,
            size,
            room,
            full: false,
        })
    }

    /// Returns how many bytes of the blob the file contains.
    pub(crate) fn length(&self) -> u64 {
        self.length
    }

    pub(crate) fn read_at(&self, buffer: &mut [u8], offset: u64) -> io::Result<usize> {
        match self.file.read_at(buffer, offset)? {
            0 => Err(io::ErrorKind::UnexpectedEof.into()),
            count => Ok(count),
        }
    }

    /// Adds bytes to the file, if there is room for them. Returns whether the file contains the
    /// bytes. Without room, or after an error, the file does not change any more.
    pub(crate) fn append(&mut self, bytes: &[u8]) -> io::Result<bool> {
        let length = self.length + bytes.len() as u64;
        if self.full || length > self.size {
            self.full = true;
            return Ok(false);
        }
        if !self.room.grow(length) {
            self.full = true;
            log_no_room(&self.path);
            return Ok(false);
        }
        if let Err(error) = self.file.write_all_at(bytes, self.length) {
            self.full = true;
            return Err(error);
        }
        self.length = length;
        Ok(true)
    }

    /// Removes the name of the file. The bytes in the file can still be read.
    pub(crate) fn remove(&self) {
        if let Err(error) = remove(&self.path) {
            log::warn!(
                "cannot remove the partial blob {}: {error}",
                self.path.display()
            );
        }
    }
}

impl Drop for Partial {
    fn drop(&mut self) {
        // Another fetch of the same blob can have removed or replaced the file.
        let inode = |metadata: std::fs::Metadata| metadata.ino();
        let exists = match (self.file.metadata(), std::fs::symlink_metadata(&self.path)) {
            (Ok(ours), Ok(there)) => inode(ours) == inode(there),
            _ => false,
        };
        self.room.end(exists.then_some(self.length));
    }
}

fn log_no_room(path: &Path) {
    log::info!(
        "keep no more bytes of the partial blob {}, because all partial blobs together reach their limit (image.partial_bytes)",
        path.display()
    );
}

/// Returns the part of a file's name that stands for the registry.
pub(crate) fn registry_of(path: &Path) -> &str {
    let name = path.file_stem().and_then(|name| name.to_str());
    name.and_then(|name| name.rsplit_once('-'))
        .map_or("", |(_, registry)| registry)
}

/// Removes a file, if it exists. A failure can have a cause that passes, so the removal is repeated
/// once.
pub(crate) fn remove(path: &Path) -> io::Result<()> {
    let attempt = || match std::fs::remove_file(path) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(()),
        removed => removed,
    };
    attempt().or_else(|_| attempt())
}

/// A guard for the file with the beginning of a small blob. Dropping the guard removes the file,
/// because the file of a small blob is not kept for a later pull.
pub(crate) struct DiscardOnDrop<'a>(&'a PartialName);

impl<'a> DiscardOnDrop<'a> {
    pub(crate) fn of_small(name: &'a PartialName) -> Option<Self> {
        // `then_some` would always create the guard. For a large blob, `then_some` would then drop
        // the guard, and this drop would remove the blob's file.
        (name.size < MIN_KEPT_BYTES).then(|| DiscardOnDrop(name))
    }
}

impl Drop for DiscardOnDrop<'_> {
    fn drop(&mut self) {
        self.0.discard();
    }
}

/// Returns whether `path` is the file of a partial blob that a later pull can still use.
pub(crate) fn is_fresh(path: &Path) -> bool {
    let named = path
        .file_name()
        .and_then(|name| name.to_str())
        .is_some_and(|name| name.ends_with(SUFFIX));
    let age = std::fs::symlink_metadata(path)
        .ok()
        .filter(std::fs::Metadata::is_file)
        .and_then(|metadata| metadata.modified().ok())
        .map(|modified| SystemTime::now().duration_since(modified));
    // A file time in the future means that the clock was set back; such a file counts as fresh.
    named && age.is_some_and(|age| age.map_or(true, |age| age < PARTIAL_LIFETIME))
}

/// Removes the partial blobs whose lifetime has passed. This call blocks on disk I/O.
pub(crate) fn sweep(root: &Path, budget: &PartialBudget) {
    let Ok(entries) = std::fs::read_dir(root.join("ingest")) else {
        return;
    };
    for path in entries.flatten().map(|entry| entry.path()) {
        if path.to_string_lossy().ends_with(SUFFIX) && !is_fresh(&path) {
            log::info!(
                "remove the partial blob {}, which no pull has used for an hour",
                path.display()
            );
            if std::fs::remove_file(&path).is_ok() {
                budget.forget(&path);
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn named(place: (&Path, &Arc<PartialBudget>), registry: &str, size: u64) -> PartialName {
        let layer = LayerDescriptor {
            digest: "sha256:0123".to_owned(),
            size,
            diff_id: "sha256:4567".to_owned(),
        };
        PartialName::new(place, registry, &layer)
    }

    #[test]
    fn the_bytes_in_a_file_are_reused_unless_the_file_is_longer_than_the_blob() -> io::Result<()> {
        let root = std::env::temp_dir().join(format!("rrun-partial-{}", std::process::id()));
        std::fs::create_dir_all(root.join("ingest"))?;
        let budget = PartialBudget::new(&root, 1 << 30);
        let place = (&*root, &budget);
        assert!(Partial::open(&named(place, "r", MIN_PIECE_BYTES - 1)).is_none());
        let name = named(place, "r", MIN_KEPT_BYTES);
        let mut first = Partial::open(&name).ok_or(io::ErrorKind::Other)?;
        first.append(b"one")?;
        assert!(
            Partial::open(&name).is_none(),
            "two fetches of the same blob opened the file of the blob at the same time"
        );
        let other = Partial::open(&named(place, "another registry", MIN_KEPT_BYTES));
        let other = other.ok_or(io::ErrorKind::Other)?;
        assert_eq!(other.length(), 0);
        other.remove();
        drop((other, first));
        let again = Partial::open(&name).ok_or(io::ErrorKind::Other)?;
        assert_eq!(again.length(), 3);
        again.file.set_len(MIN_KEPT_BYTES + 1)?;
        drop(again);
        let again = Partial::open(&name).ok_or(io::ErrorKind::Other)?;
        assert_eq!(again.length(), 0);
        assert!(is_fresh(&name.path));
        sweep(&root, &budget);
        let long_ago = SystemTime::now() - PARTIAL_LIFETIME;
        again.file.set_modified(long_ago)?;
        sweep(&root, &budget);
        assert!(!name.path.exists());
        drop(again);
        assert_eq!(budget.used(), (0, 0));
        std::fs::remove_dir_all(&root)
    }
}
