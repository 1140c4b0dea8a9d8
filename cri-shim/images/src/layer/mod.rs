//! Layers: from a stream to an overlay lower directory.
//!
//! One pass does it all: what arrives is hashed, decompressed, hashed again and unpacked, and
//! nothing counts before both digests are right.

pub(crate) mod archive;
mod decompress;
mod looks;
mod removal;
mod tree;
mod unpack;

use std::cell::Cell;
use std::fmt::Write as _;
use std::io::{self, Read};
use std::os::fd::OwnedFd;
use std::path::Path;

use rustix::fs::{CWD, Mode, OFlags};
use rustix::io::Errno;
use sha2::{Digest, Sha256};

pub(crate) use decompress::{decoder, is_plain};
pub use looks::{Stacked, looks};
pub use removal::remove_path;
pub use unpack::Unpacked;

/// What a layer may grow to.
#[derive(Clone, Copy, Debug)]
pub struct Bounds {
    /// Bytes of the uncompressed archive.
    pub bytes: u64,
    /// Files and directories.
    pub entries: u64,
}

/// What the manifest and the configuration promise of a layer.
#[derive(Clone, Debug)]
pub struct Promise {
    /// `sha256:…` of what the registry sends.
    pub digest: String,
    /// How many bytes it sends.
    pub size: u64,
    /// `sha256:…` of the uncompressed archive.
    pub diff_id: String,
}

#[derive(Debug, thiserror::Error)]
pub enum LayerError {
    /// The stream broke off, or can't be decompressed.
    #[error("{0}")]
    Stream(io::Error),
    /// The archive is broken, or would write where it must not.
    #[error("{0}")]
    Malformed(String),
    /// Not what was promised.
    #[error("{0}")]
    Digest(String),
    #[error("{0}")]
    Bound(String),
    #[error("{what}: {}", explain(.errno))]
    System { what: String, errno: Errno },
}

fn explain(errno: &Errno) -> String {
    io::Error::from(*errno).to_string()
}

impl LayerError {
    fn malformed(path: &[u8], why: &str) -> Self {
        LayerError::Malformed(format!("the entry {}: {why}", printable(path)))
    }

    fn system(what: &str, path: &[u8], errno: Errno) -> Self {
        LayerError::System {
            what: format!("{what} {}", printable(path)),
            errno,
        }
    }
}

/// A stranger's file name for a message: short and without control characters.
fn printable(path: &[u8]) -> String {
    let mut text: String = String::from_utf8_lossy(path)
        .chars()
        .take(200)
        .map(|c| if c.is_control() { '?' } else { c })
        .collect();
    if text.is_empty() {
        text.push('/');
    }
    text
}

/// Unpacks the layer that `compressed` yields into the new directory `into`, and verifies it.
/// Blocks; on an error what is in `into` is of no use.
pub fn unpack(
    compressed: impl Read,
    into: &Path,
    promise: &Promise,
    bounds: &Bounds,
) -> Result<Unpacked, LayerError> {
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
    let mut received = Hashing::new(compressed, promise.size, &too_long);
    match unpack_plain(&mut received, root, bounds) {
        Ok((unpacked, diff_id)) => {
            let drained = drain(&mut received, u64::MAX);
            received.verify(promise, drained)?;
            if diff_id != promise.diff_id {
                return Err(LayerError::Digest(format!(
                    "its archive has the digest {diff_id} where the image's configuration promises {}",
                    promise.diff_id
                )));
            }
            Ok(unpacked)
        }
        // Damage on the way looks like a broken archive: the digest tells the two apart.
        Err(error @ (LayerError::Malformed(_) | LayerError::Stream(_))) => {
            match drain(&mut received, DRAIN_AFTER_FAILURE) {
                Ok(true) => received.verify(promise, Ok(true))?,
                Err(_) if too_long.get() => received.verify(promise, Ok(true))?,
                _ => {}
            }
            Err(error)
        }
        Err(error) => Err(error),
    }
}

/// Writes everything on the file system that holds `path` to the disk: one wait for all layers of
/// an image, where fsync(2) would be one for each file.
pub fn sync(path: &Path) -> Result<(), LayerError> {
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
) -> Result<(Unpacked, String), LayerError> {
    let too_large = Cell::new(false);
    let plain = Hashing::new(decompress::decoder(compressed)?, bounds.bytes, &too_large);
    let mut archive = archive::Archive::new(plain);
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
const DRAIN_AFTER_FAILURE: u64 = 64 << 20;

/// Reads to the end, but no more than about `most` bytes; whether the end was reached.
fn drain(reader: &mut impl Read, most: u64) -> io::Result<bool> {
    let mut buffer = [0; 16 << 10];
    let mut sum = 0;
    while sum < most {
        match reader.read(&mut buffer)? {
            0 => return Ok(true),
            count => sum += count as u64,
        }
    }
    Ok(false)
}

/// The digest of all that `reader` yields.
pub(crate) fn digest_of_all(reader: &mut impl Read) -> io::Result<String> {
    let exceeded = Cell::new(false);
    let mut hashing = Hashing::new(reader, u64::MAX, &exceeded);
    drain(&mut hashing, u64::MAX)?;
    Ok(hashing.digest())
}

/// `sha256:` and the hexadecimal digest of `bytes`.
pub fn digest_of(bytes: &[u8]) -> String {
    name_of(Sha256::digest(bytes).as_slice())
}

fn name_of(hash: &[u8]) -> String {
    let mut name = String::from("sha256:");
    for byte in hash {
        // Writing to a String does not fail.
        let _ = write!(name, "{byte:02x}");
    }
    name
}

/// Hashes and counts what is read through it, and stops beyond a bound.
struct Hashing<'a, R> {
    reader: R,
    hash: Sha256,
    count: u64,
    most: u64,
    exceeded: &'a Cell<bool>,
}

impl<'a, R: Read> Hashing<'a, R> {
    fn new(reader: R, most: u64, exceeded: &'a Cell<bool>) -> Self {
        Hashing {
            reader,
            hash: Sha256::new(),
            count: 0,
            most,
            exceeded,
        }
    }

    fn digest(self) -> String {
        name_of(self.hash.finalize().as_slice())
    }

    /// Holds what arrived against what was promised.
    fn verify(self, promise: &Promise, drained: io::Result<bool>) -> Result<(), LayerError> {
        if self.exceeded.get() {
            return Err(LayerError::Digest(format!(
                "more than the {} bytes arrived that the manifest promises",
                promise.size
            )));
        }
        drained?;
        if self.count != promise.size {
            return Err(LayerError::Digest(format!(
                "{} bytes arrived where the manifest promises {}",
                self.count, promise.size
            )));
        }
        let digest = self.digest();
        if digest != promise.digest {
            return Err(LayerError::Digest(format!(
                "what arrived has the digest {digest}"
            )));
        }
        Ok(())
    }
}

impl<R: Read> Read for Hashing<'_, R> {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        let count = self.reader.read(buffer)?;
        self.count += count as u64;
        if self.count > self.most {
            self.exceeded.set(true);
            return Err(io::Error::new(
                io::ErrorKind::FileTooLarge,
                "more bytes than allowed",
            ));
        }
        self.hash.update(buffer.get(..count).unwrap_or_default());
        Ok(count)
    }
}
