//! Unpacks layers from a stream into an overlay lower directory.
//!
//! Unpacking takes one pass: the received bytes are hashed, decompressed, hashed again and
//! unpacked. The digest of the received bytes must match the image's manifest. The digest of the
//! decompressed bytes must match the image's configuration. If a digest does not match, the
//! unpacked layer is not used.

pub(crate) mod archive;
mod decompress;
mod descriptor;
mod digest;
mod directory_layer;
mod error;
mod pax;
mod removal;
mod tree;
mod unpack;

use std::cell::Cell;
use std::io::Read;
use std::os::fd::OwnedFd;
use std::path::Path;

use rustix::fs::{CWD, Mode, OFlags};

pub(crate) use decompress::{decoder, is_plain};
pub use descriptor::{Bounds, LayerDescriptor};
pub(crate) use digest::{digest_of, digest_of_all};
pub(crate) use directory_layer::{LowerLayer, make_directory_layer};
pub(crate) use error::ArchiveError;
pub use error::LayerError;
pub use removal::remove_path;
pub use unpack::UnpackSummary;

use digest::{HashingReader, drain};

/// Reads a layer from `compressed`, unpacks it into the new directory `into`, and verifies the
/// layer's size and digests. This call blocks on disk I/O. After an error, the content of `into` is
/// unusable.
pub fn unpack(
    compressed: impl Read,
    into: &Path,
    descriptor: &LayerDescriptor,
    bounds: &Bounds,
) -> Result<UnpackSummary, LayerError> {
    let path = into.as_os_str().as_encoded_bytes();
    let make = |errno| LayerError::system("create the directory", path, errno);
    rustix::fs::mkdir(into, Mode::from_raw_mode(0o755)).map_err(make)?;
    let root = rustix::fs::openat(
        CWD,
        into,
        OFlags::RDONLY | OFlags::DIRECTORY | OFlags::NOFOLLOW | OFlags::CLOEXEC,
        Mode::empty(),
    )
    .map_err(make)?;
    // mkdir(2) removes the bits of the umask from the mode, so the mode is set explicitly.
    rustix::fs::fchmod(&root, Mode::from_raw_mode(0o755)).map_err(make)?;

    let too_long = Cell::new(false);
    let mut received = HashingReader::new(compressed, descriptor.size, &too_long);
    match unpack_plain(&mut received, root, bounds) {
        Ok((unpacked, diff_id)) => {
            let drained = drain(&mut received, u64::MAX);
            received.verify(descriptor, drained)?;
            if diff_id != descriptor.diff_id {
                return Err(LayerError::Digest(format!(
                    "the uncompressed archive has the digest {diff_id}, but the image's configuration specifies {}",
                    descriptor.diff_id
                )));
            }
            Ok(unpacked)
        }
        // An archive that was damaged during the transfer looks like a malformed archive. If the
        // digest of the received data is wrong, `verify` therefore reports the damage instead of
        // the malformed archive.
        Err(error @ (LayerError::Malformed(_) | LayerError::Stream(_))) => {
            match drain(&mut received, DRAIN_AFTER_FAILURE_BYTES) {
                Ok(true) => received.verify(descriptor, Ok(true))?,
                Err(_) if too_long.get() => received.verify(descriptor, Ok(true))?,
                _ => {}
            }
            Err(error)
        }
        Err(error) => Err(error),
    }
}

/// Writes all data of the file system that contains `path` to the disk. One call of syncfs(2) is
/// enough for all layers of an image. fsync(2) would be necessary for each file.
pub(crate) fn sync(path: &Path) -> Result<(), LayerError> {
    let fail = |e| {
        LayerError::system(
            "sync the file system that contains",
            path.as_os_str().as_encoded_bytes(),
            e,
        )
    };
    let flags = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::CLOEXEC;
    let directory = rustix::fs::openat(CWD, path, flags, Mode::empty()).map_err(fail)?;
    rustix::fs::syncfs(directory).map_err(fail)
}

/// Decompresses and unpacks a layer. Returns the summary and the digest of the uncompressed
/// archive.
fn unpack_plain(
    compressed: impl Read,
    root: OwnedFd,
    bounds: &Bounds,
) -> Result<(UnpackSummary, String), LayerError> {
    let too_large = Cell::new(false);
    let plain = HashingReader::new(decompress::decoder(compressed)?, bounds.bytes, &too_large);
    let mut archive = archive::TarArchive::new(plain);
    let unpacked = unpack::unpack(&mut archive, root, bounds);
    let mut plain = archive.into_inner();
    // Read the bytes after the end of the archive, because the digest also covers these bytes.
    let unpacked = unpacked.and_then(|unpacked| {
        drain(&mut plain, u64::MAX)?;
        Ok(unpacked)
    });
    if too_large.get() {
        return Err(LayerError::too_large(bounds.bytes));
    }
    Ok((unpacked?, plain.digest()))
}

/// The maximum number of bytes that [`unpack`] reads after an error in the archive. If the layer
/// ends within this number of bytes, its digest shows whether the layer was damaged during the
/// transfer.
const DRAIN_AFTER_FAILURE_BYTES: u64 = 64 << 20;
