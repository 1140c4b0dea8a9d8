//! Keeps the beginning of a large blob in a file while the rest arrives.
//!
//! If a pull fails or the server stops, the next pull of the image continues after the bytes in the
//! file. If a fetch gives its download slot to another pull, it also continues after these bytes in
//! its next slot. The file's content is not trusted. Its bytes are hashed together with the bytes
//! from the network. The file is removed when the blob is complete or invalid. If no pull uses the
//! file for an hour, the file is also removed.

use std::fs::{File, OpenOptions};
use std::io;
use std::os::unix::fs::{FileExt as _, OpenOptionsExt as _};
use std::path::{Path, PathBuf};
use std::time::{Duration, SystemTime};

use rustix::fs::{FlockOperation, flock};

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
}

fn path_of(root: &Path, digest: &str, size: u64) -> PathBuf {
    let hex = digest.strip_prefix("sha256:").unwrap_or(digest);
    let suffix = if size < MIN_KEPT_BYTES {
        PIECE_SUFFIX
    } else {
        SUFFIX
    };
    root.join("ingest").join(format!("{hex}{suffix}"))
}

impl Partial {
    /// Opens the file with the beginning of the blob, or creates an empty file. Returns `None` if
    /// the blob is too small or the file can't be used. No bytes of the blob are then kept. This
    /// call blocks on disk I/O.
    pub(crate) fn open(root: &Path, digest: &str, size: u64) -> Option<Self> {
        if size < MIN_PIECE_BYTES {
            return None;
        }
        let path = path_of(root, digest, size);
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
        Some(Partial { file, path, length })
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

    pub(crate) fn append(&mut self, bytes: &[u8]) -> io::Result<()> {
        self.file.write_all_at(bytes, self.length)?;
        self.length += bytes.len() as u64;
        Ok(())
    }

    pub(crate) fn remove(self) {
        if let Err(error) = remove(&self.path) {
            log::warn!(
                "cannot remove the partial blob {}: {error}",
                self.path.display()
            );
        }
    }
}

/// Removes the file with the beginning of a blob.
pub(crate) fn discard(root: &Path, digest: &str, size: u64) {
    if let Err(error) = remove(&path_of(root, digest, size)) {
        log::warn!("cannot remove the beginning of the blob {digest}: {error}");
    }
}

/// Removes a file, if it exists. A failure can have a cause that passes, so the removal is repeated
/// once.
fn remove(path: &Path) -> io::Result<()> {
    let attempt = || match std::fs::remove_file(path) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(()),
        removed => removed,
    };
    attempt().or_else(|_| attempt())
}

/// A guard for the file with the beginning of a small blob. Dropping the guard removes the file,
/// because the file of a small blob is not kept for a later pull.
pub(crate) struct DiscardOnDrop<'a> {
    root: &'a Path,
    digest: &'a str,
    size: u64,
}

impl<'a> DiscardOnDrop<'a> {
    pub(crate) fn of_small(root: &'a Path, digest: &'a str, size: u64) -> Option<Self> {
        // `then_some` would always create the guard. For a large blob, `then_some` would then drop
        // the guard, and this drop would remove the blob's file.
        (size < MIN_KEPT_BYTES).then(|| DiscardOnDrop { root, digest, size })
    }
}

impl Drop for DiscardOnDrop<'_> {
    fn drop(&mut self) {
        discard(self.root, self.digest, self.size);
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
pub(crate) fn sweep(root: &Path) {
    let Ok(entries) = std::fs::read_dir(root.join("ingest")) else {
        return;
    };
    for path in entries.flatten().map(|entry| entry.path()) {
        if path.to_string_lossy().ends_with(SUFFIX) && !is_fresh(&path) {
            log::info!(
                "remove the partial blob {}, which no pull has used for an hour",
                path.display()
            );
            let _ = std::fs::remove_file(&path);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const DIGEST: &str = "sha256:0123";

    #[test]
    fn the_bytes_in_a_file_are_reused_unless_the_file_is_longer_than_the_blob() -> io::Result<()> {
        let root = std::env::temp_dir().join(format!("rrun-partial-{}", std::process::id()));
        std::fs::create_dir_all(root.join("ingest"))?;
        assert!(Partial::open(&root, DIGEST, MIN_PIECE_BYTES - 1).is_none());
        let mut first = Partial::open(&root, DIGEST, MIN_KEPT_BYTES).ok_or(io::ErrorKind::Other)?;
        first.append(b"one")?;
        assert!(
            Partial::open(&root, DIGEST, MIN_KEPT_BYTES).is_none(),
            "two fetches of the same blob opened the file of the blob at the same time"
        );
        drop(first);
        let again = Partial::open(&root, DIGEST, MIN_KEPT_BYTES).ok_or(io::ErrorKind::Other)?;
        assert_eq!(again.length(), 3);
        again.file.set_len(MIN_KEPT_BYTES + 1)?;
        drop(again);
        let again = Partial::open(&root, DIGEST, MIN_KEPT_BYTES).ok_or(io::ErrorKind::Other)?;
        assert_eq!(again.length(), 0);
        assert!(is_fresh(&path_of(&root, DIGEST, MIN_KEPT_BYTES)));
        sweep(&root);
        let long_ago = SystemTime::now() - PARTIAL_LIFETIME;
        again.file.set_modified(long_ago)?;
        sweep(&root);
        assert!(!path_of(&root, DIGEST, MIN_KEPT_BYTES).exists());
        std::fs::remove_dir_all(&root)
    }
}
