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
mod disk_use;
mod error;
mod pax;
mod removal;
mod tree;
mod unpack;

use std::cell::Cell;
use std::io::{self, Read};
use std::os::fd::OwnedFd;
use std::path::Path;

use rustix::fs::{CWD, Mode, OFlags};

pub(crate) use decompress::{decoder, is_plain};
pub use descriptor::{Bounds, LayerDescriptor};
pub(crate) use digest::{digest_of, digest_of_all};
pub(crate) use directory_layer::{LowerLayer, make_directory_layer};
pub use disk_use::DiskUse;
pub(crate) use error::ArchiveError;
pub use error::LayerError;
pub use removal::remove_path;
pub(crate) use removal::remove_path_and;
pub use unpack::UnpackSummary;

use digest::{HashingReader, drain};

/// Reads a layer from `compressed`, unpacks it into the new directory `into`, and verifies the
/// layer's size and digests. Calls `go_on` after each piece of uncompressed data. An error from
/// `go_on` ends the unpacking. This call blocks on disk I/O. After an error, the content of `into`
/// is unusable.
pub fn unpack(
    compressed: impl Read,
    into: &Path,
    descriptor: &LayerDescriptor,
    bounds: &Bounds,
    go_on: &dyn Fn() -> io::Result<()>,
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
    match unpack_plain(&mut received, root, bounds, go_on) {
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
    go_on: &dyn Fn() -> io::Result<()>,
) -> Result<(UnpackSummary, String), LayerError> {
    let too_large = Cell::new(false);
    let plain = CheckedReader {
        reader: decompress::decoder(compressed)?,
        go_on,
    };
    let plain = HashingReader::new(plain, bounds.bytes, &too_large);
    let mut archive = archive::TarArchive::new(plain);
    let unpacked = unpack::unpack(&mut archive, root, bounds, go_on);
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

/// A reader that calls `go_on` after each read.
struct CheckedReader<'a, R> {
    reader: R,
    go_on: &'a dyn Fn() -> io::Result<()>,
}

impl<R: Read> Read for CheckedReader<'_, R> {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        let count = self.reader.read(buffer)?;
        (self.go_on)()?;
        Ok(count)
    }
}

/// The maximum number of bytes that [`unpack`] reads after an error in the archive. If the layer
/// ends within this number of bytes, its digest shows whether the layer was damaged during the
/// transfer.
const DRAIN_AFTER_FAILURE_BYTES: u64 = 64 << 20;

#[cfg(test)]
mod tests {
    use super::*;

    /// The largest length of a zstd block.
    const BLOCK: u32 = 128 << 10;

    /// Returns a zstd frame of `blocks` blocks. Each block has four bytes, and decompresses to
    /// [`BLOCK`] zeros (RFC 8878, section 3.1.1.2).
    fn bomb(blocks: usize) -> Vec<u8> {
        let header = |last: u32| (BLOCK << 3 | 1 << 1 | last).to_le_bytes();
        let block = |last| [&header(last)[..3], &[0]].concat();
        let mut frame = vec![0x28, 0xb5, 0x2f, 0xfd, 0, 0x38];
        frame.extend(block(0).repeat(blocks - 1));
        frame.extend(block(1));
        frame
    }

    /// Unpacks `blob` without a check of its digests.
    fn unpack_unchecked(
        name: &str,
        blob: &[u8],
        go_on: &dyn Fn() -> io::Result<()>,
    ) -> Result<(), LayerError> {
        let into = std::env::temp_dir().join(format!("rrun-layer-{name}-{}", std::process::id()));
        let descriptor = LayerDescriptor {
            digest: String::new(),
            size: u64::MAX,
            diff_id: String::new(),
        };
        let bounds = Bounds {
            bytes: 1 << 30,
            entries: 100_000,
        };
        let unpacked = unpack(blob, &into, &descriptor, &bounds, go_on);
        let removed = remove_path(&into);
        removed.map_err(|errno| LayerError::system("remove", b"", errno))?;
        unpacked.map(drop)
    }

    #[test]
    fn a_few_bytes_that_decompress_to_gigabytes_are_unpacked_in_small_pieces() {
        let (pieces, most) = (Cell::new(0), 1000);
        let go_on = || {
            pieces.set(pieces.get() + 1);
            if pieces.get() < most {
                Ok(())
            } else {
                Err(io::Error::other("the pull was abandoned"))
            }
        };
        let blob = bomb(8000);
        assert!(blob.len() < 64 << 10);
        let result = unpack_unchecked("bomb", &blob, &go_on);
        assert!(result.is_err());
        assert_eq!(pieces.get(), most);
    }

    #[test]
    fn the_removal_of_a_replaced_directory_can_be_ended() -> io::Result<()> {
        let mut archive = ::tar::Builder::new(Vec::new());
        for number in 0..1000 {
            let mut header = ::tar::Header::new_gnu();
            header.set_size(0);
            archive.append_data(&mut header, format!("a/{number}"), io::empty())?;
        }
        let mut header = ::tar::Header::new_gnu();
        header.set_size(0);
        archive.append_data(&mut header, "a", io::empty())?;
        let archive = archive.into_inner()?;
        let steps = |limit: usize| {
            let steps = Cell::new(0);
            let result = unpack_unchecked("replaced", &archive, &|| {
                steps.set(steps.get() + 1);
                if steps.get() < limit {
                    Ok(())
                } else {
                    Err(io::Error::other("the pull was abandoned"))
                }
            });
            (steps.get(), result)
        };
        let (all, _) = steps(usize::MAX);
        assert!(all >= 2000, "number of steps: {all}");
        let (ended, result) = steps(all - 500);
        assert_eq!(ended, all - 500, "{result:?}");
        Ok(())
    }
}
