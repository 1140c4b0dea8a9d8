//! Computes digests of streams.

use std::cell::Cell;
use std::fmt::Write as _;
use std::io::{self, Read};

use sha2::{Digest, Sha256};

use super::descriptor::LayerDescriptor;
use super::error::LayerError;

/// Reads and discards about `most` bytes, or all bytes if there are fewer. Returns whether the end
/// of `reader` was reached.
pub(super) fn drain(reader: &mut impl Read, most: u64) -> io::Result<bool> {
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

/// Returns the digest of all bytes that `reader` yields.
pub(crate) fn digest_of_all(reader: &mut impl Read) -> io::Result<String> {
    let exceeded = Cell::new(false);
    let mut hashing = HashingReader::new(reader, u64::MAX, &exceeded);
    drain(&mut hashing, u64::MAX)?;
    Ok(hashing.digest())
}

/// Returns the digest of `bytes` as `sha256:` and hexadecimal digits.
pub(crate) fn digest_of(bytes: &[u8]) -> String {
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

/// A reader that hashes and counts the bytes from another reader. If the other reader returns more
/// than `most` bytes, this reader sets `exceeded` and fails.
pub(super) struct HashingReader<'a, R> {
    reader: R,
    hash: Sha256,
    count: u64,
    most: u64,
    exceeded: &'a Cell<bool>,
}

impl<'a, R: Read> HashingReader<'a, R> {
    pub(super) fn new(reader: R, most: u64, exceeded: &'a Cell<bool>) -> Self {
        HashingReader {
            reader,
            hash: Sha256::new(),
            count: 0,
            most,
            exceeded,
        }
    }

    pub(super) fn digest(self) -> String {
        name_of(self.hash.finalize().as_slice())
    }

    /// Compares the received data with the size and digest in the descriptor. `drained` is the
    /// result of the [`drain`] call that read the rest of the data.
    pub(super) fn verify(
        self,
        descriptor: &LayerDescriptor,
        drained: io::Result<bool>,
    ) -> Result<(), LayerError> {
        if self.exceeded.get() {
            return Err(LayerError::Digest(format!(
                "the registry sent more than the {} bytes that the manifest specifies",
                descriptor.size
            )));
        }
        drained?;
        if self.count != descriptor.size {
            return Err(LayerError::Digest(format!(
                "the registry sent {} bytes instead of the {} bytes that the manifest specifies",
                self.count, descriptor.size
            )));
        }
        let digest = self.digest();
        if digest != descriptor.digest {
            return Err(LayerError::Digest(format!(
                "the received data has the wrong digest {digest}"
            )));
        }
        Ok(())
    }
}

impl<R: Read> Read for HashingReader<'_, R> {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        let count = self.reader.read(buffer)?;
        self.count += count as u64;
        if self.count > self.most {
            self.exceeded.set(true);
            return Err(io::Error::new(
                io::ErrorKind::FileTooLarge,
                "the data exceeds its maximum length",
            ));
        }
        self.hash.update(buffer.get(..count).unwrap_or_default());
        Ok(count)
    }
}
