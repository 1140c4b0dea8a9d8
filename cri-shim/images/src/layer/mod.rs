//! Layers: from a stream to an overlay lower directory.
//!
//! One pass does it all: what arrives is hashed, decompressed, hashed again and unpacked, and
//! nothing counts before both digests are right.

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

/// Unpacks the layer that `compressed` yields into the new directory `into`, and verifies it.
/// Blocks; on an error what is in `into` is of no use.
pub fn unpack(
    compressed: impl Read,
    into: &Path,
    descriptor: &LayerDescriptor,
    bounds: &Bounds,
) -> Result<UnpackSummary, LayerError> {
    let path = into.as_os_str().as_encoded_bytes();
    let make = |errno| LayerError::system("make the directory", path, errno);
    rustix::fs::mkdir(into, Mode::from_raw_mode(0o755)).map_err(make)?;
    let root = rustix::fs::openat(
        CWD,
        into,
        OFlags::RDONLY | OFlags::DIRECTORY | OFlags::NOFOLLOW | OFlags::CLOEXEC,
        Mode::empty(),
    )
    .map_err(make)?;
    // mkdir's mode is subject to the umask.
    rustix::fs::fchmod(&root, Mode::from_raw_mode(0o755)).map_err(make)?;

    let too_long = Cell::new(false);
    let mut received = HashingReader::new(compressed, descriptor.size, &too_long);
    match unpack_plain(&mut received, root, bounds) {
        Ok((unpacked, diff_id)) => {
            let drained = drain(&mut received, u64::MAX);
            received.verify(descriptor, drained)?;
            if diff_id != descriptor.diff_id {
                return Err(LayerError::Digest(format!(
                    "its archive has the digest {diff_id} where the image's configuration promises {}",
                    descriptor.diff_id
                )));
            }
            Ok(unpacked)
        }
        // Damage on the way looks like a broken archive: the digest tells the two apart.
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

/// Writes everything on the file system that holds `path` to the disk: one wait for all layers of
/// an image, where fsync(2) would be one for each file.
pub(crate) fn sync(path: &Path) -> Result<(), LayerError> {
    let fail = |e| LayerError::system("write to the disk", path.as_os_str().as_encoded_bytes(), e);
    let flags = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::CLOEXEC;
    let directory = rustix::fs::openat(CWD, path, flags, Mode::empty()).map_err(fail)?;
    rustix::fs::syncfs(directory).map_err(fail)
}

/// Decompresses and unpacks; returns the digest of the archive too.
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
    // What stands behind the archive's end counts for the digest.
    let unpacked = unpacked.and_then(|unpacked| {
        drain(&mut plain, u64::MAX)?;
        Ok(unpacked)
    });
    if too_large.get() {
        return Err(LayerError::Bound(format!(
            "it unpacks to more than {} bytes, which is the bound",
            bounds.bytes
        )));
    }
    Ok((unpacked?, plain.digest()))
}

/// How much more is read of a layer that has failed, to learn whether it was damaged on the way.
const DRAIN_AFTER_FAILURE_BYTES: u64 = 64 << 20;
