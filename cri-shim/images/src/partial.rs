//! The beginning of a large blob, kept in a file while the rest arrives.
//!
//! A pull that failed, or that ended with rrun-cri, goes on from there when it is repeated. A fetch
//! that gave its slot away goes on from there in its next turn. Nothing trusts the file: its bytes
//! go through the same hash as those that follow. The file is removed when the blob is complete or
//! proves bad, or when no pull has come back for it within an hour.

use std::fs::{File, OpenOptions};
use std::io;
use std::os::unix::fs::{FileExt as _, OpenOptionsExt as _};
use std::path::{Path, PathBuf};
use std::time::{Duration, SystemTime};

use rustix::fs::{FlockOperation, flock};

/// Smaller blobs are not kept for a later pull: to fetch them again costs less.
pub(crate) const MIN_KEPT_BYTES: u64 = 4 << 20;

/// Smaller blobs are not kept even for the next turn of the same pull.
const MIN_PIECE_BYTES: u64 = 64 << 10;

/// How long after its last byte a partial blob is kept.
pub(crate) const PARTIAL_LIFETIME: Duration = Duration::from_secs(3600);

const SUFFIX: &str = ".partial";

/// The suffix for a blob that is kept neither for a later pull nor over a restart.
const PIECE_SUFFIX: &str = ".piece";

/// The beginning of one blob. Locked: two that fetch the same bytes don't write to one file.
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
    /// Opens what there is of the blob, or begins; `None` if it is not worth it or can't be done,
    /// and the blob is fetched as a whole. Blocks on the disk.
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
            .map_err(|error| log::warn!("keep a blob in {}: {error}", path.display()))
            .ok()?;
        flock(&file, FlockOperation::NonBlockingLockExclusive).ok()?;
        let mut length = file.metadata().ok()?.len();
        if length > size {
            file.set_len(0).ok()?;
            length = 0;
        }
        Some(Partial { file, path, length })
    }

    /// Bytes of the blob that are here.
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
        if let Err(error) = std::fs::remove_file(&self.path) {
            log::warn!("remove {}: {error}", self.path.display());
        }
    }
}

/// Forgets what there is of a blob.
pub(crate) fn discard(root: &Path, digest: &str, size: u64) {
    let _ = std::fs::remove_file(path_of(root, digest, size));
}

/// Removes, when it is dropped, the file of a blob that is not kept for a later pull.
pub(crate) struct DiscardOnDrop<'a> {
    root: &'a Path,
    digest: &'a str,
    size: u64,
}

impl<'a> DiscardOnDrop<'a> {
    pub(crate) fn of_small(root: &'a Path, digest: &'a str, size: u64) -> Option<Self> {
        // `then_some` would make the value in any case, and drop it: that removes the file.
        (size < MIN_KEPT_BYTES).then(|| DiscardOnDrop { root, digest, size })
    }
}

impl Drop for DiscardOnDrop<'_> {
    fn drop(&mut self) {
        discard(self.root, self.digest, self.size);
    }
}

/// Whether this is a partial blob that may still be of use.
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
    // One from the future is of a clock that was set: fresh.
    named && age.is_some_and(|age| age.map_or(true, |age| age < PARTIAL_LIFETIME))
}

/// Removes the partial blobs that nobody came back for. Blocks on the disk.
pub(crate) fn sweep(root: &Path) {
    let Ok(entries) = std::fs::read_dir(root.join("ingest")) else {
        return;
    };
    for path in entries.flatten().map(|entry| entry.path()) {
        if path.to_string_lossy().ends_with(SUFFIX) && !is_fresh(&path) {
            log::info!("remove {}, for which nobody came back", path.display());
            let _ = std::fs::remove_file(&path);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const DIGEST: &str = "sha256:0123";

    #[test]
    fn a_partial_blob_is_found_again_and_never_longer_than_the_blob() -> io::Result<()> {
        let root = std::env::temp_dir().join(format!("rrun-partial-{}", std::process::id()));
        std::fs::create_dir_all(root.join("ingest"))?;
        assert!(Partial::open(&root, DIGEST, MIN_PIECE_BYTES - 1).is_none());
        let mut first = Partial::open(&root, DIGEST, MIN_KEPT_BYTES).ok_or(io::ErrorKind::Other)?;
        first.append(b"one")?;
        assert!(
            Partial::open(&root, DIGEST, MIN_KEPT_BYTES).is_none(),
            "two write to one file"
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
