//! Header blocks: names and values, compressed in one zlib stream for the whole session.

use flate2::{Decompress, FlushDecompress, Status};

use super::dictionary::{CHECKSUM, DICTIONARY};
use super::error::SpdyError;
use super::limits::{MAX_HEADER_BLOCK_BYTES, MAX_HEADERS};

/// The headers of a block, as pairs of a name in lower case and a value. If a name has several
/// values, they are separated by zero bytes.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Headers(pub(crate) Vec<(String, String)>);

impl Headers {
    /// Returns the value of a header. `name` must be in lower case.
    pub fn get(&self, name: &str) -> Option<&str> {
        let mut pairs = self.0.iter();
        pairs
            .find(|(key, _)| key == name)
            .map(|(_, value)| value.as_str())
    }
}

/// The decompressor for the client's zlib stream. A decompressor uses about 40 KiB of memory.
pub(super) struct Inflater(Decompress);

impl Default for Inflater {
    fn default() -> Self {
        Inflater(Decompress::new(true))
    }
}

impl Inflater {
    /// Decompresses and parses one header block.
    pub(super) fn block(&mut self, mut input: &[u8]) -> Result<Headers, SpdyError> {
        let mut block = Vec::with_capacity(512);
        loop {
            let (read, written) = (self.0.total_in(), self.0.total_out());
            let status = self
                .0
                .decompress_vec(input, &mut block, FlushDecompress::Sync);
            let used = usize::try_from(self.0.total_in() - read).unwrap_or(usize::MAX);
            input = input.get(used..).unwrap_or_default();
            let status = match status {
                Ok(status) => status,
                Err(error) => {
                    // Only the dictionary of the SPDY specification is accepted.
                    if error.needs_dictionary() != Some(CHECKSUM) {
                        return Err(SpdyError::Compression);
                    }
                    self.0
                        .set_dictionary(&DICTIONARY)
                        .map_err(|_| SpdyError::Compression)?;
                    continue;
                }
            };
            if block.len() > MAX_HEADER_BLOCK_BYTES {
                return Err(SpdyError::HeadersTooLong);
            }
            if status == Status::StreamEnd {
                // All header blocks share one zlib stream, so this zlib stream must not end when
                // one block ends.
                return Err(SpdyError::Compression);
            }
            if block.len() == block.capacity() {
                block.reserve(block.capacity());
                continue;
            }
            if input.is_empty() {
                return parse(&block);
            }
            if used == 0 && self.0.total_out() == written {
                return Err(SpdyError::Compression);
            }
        }
    }
}

fn parse(mut block: &[u8]) -> Result<Headers, SpdyError> {
    let count = number(&mut block)?;
    if count > MAX_HEADERS {
        return Err(SpdyError::Headers);
    }
    let mut headers = Vec::with_capacity(count);
    for _ in 0..count {
        let name = text(&mut block)?.to_ascii_lowercase();
        let value = text(&mut block)?;
        if name.is_empty() || headers.iter().any(|(known, _)| *known == name) {
            return Err(SpdyError::Headers);
        }
        headers.push((name, value));
    }
    if !block.is_empty() {
        return Err(SpdyError::Headers);
    }
    Ok(Headers(headers))
}

fn number(block: &mut &[u8]) -> Result<usize, SpdyError> {
    let (first, rest) = block.split_first_chunk::<4>().ok_or(SpdyError::Headers)?;
    *block = rest;
    usize::try_from(u32::from_be_bytes(*first)).map_err(|_| SpdyError::Headers)
}

fn text(block: &mut &[u8]) -> Result<String, SpdyError> {
    let length = number(block)?;
    let (text, rest) = block.split_at_checked(length).ok_or(SpdyError::Headers)?;
    *block = rest;
    String::from_utf8(text.to_vec()).map_err(|_| SpdyError::Headers)
}

/// The server's zlib stream, which contains only stored blocks, without compression. The server
/// sends no headers, so it does not need a compressor. A compressor would use a quarter of a
/// megabyte of memory.
#[derive(Default)]
pub(super) struct Deflater {
    begun: bool,
}

impl Deflater {
    /// Appends a header block without headers to `output`.
    pub(super) fn empty_block(&mut self, output: &mut Vec<u8>) {
        if !self.begun {
            self.begun = true;
            // Append the zlib header: deflate with a window of 32 KiB and a preset dictionary (RFC
            // 1950, section 2.2).
            output.extend_from_slice(&[0x78, 0x20]);
            output.extend_from_slice(&CHECKSUM.to_be_bytes());
        }
        // Append a stored block that is not the last block (RFC 1951, section 3.2.4). The block's
        // four bytes of data are the number of headers, which is 0.
        output.extend_from_slice(&[0, 4, 0, 0xfb, 0xff, 0, 0, 0, 0]);
        // Append an empty stored block, because Go's decompressor returns no data until it has read
        // an empty block.
        output.extend_from_slice(&[0, 0, 0, 0xff, 0xff]);
    }
}

#[cfg(test)]
mod tests {
    use super::super::compressor::Compressor;
    use super::*;

    #[test]
    fn blocks_of_one_session_share_one_zlib_stream() {
        let (mut ours, mut theirs) = (Inflater::default(), Compressor::begin());
        for id in ["1", "2", "3"] {
            let pairs = [("streamtype", "error"), ("port", "80"), ("requestid", id)];
            let headers = ours.block(&theirs.block(&pairs)).unwrap();
            assert_eq!(headers.get("requestid"), Some(id));
            assert_eq!(headers.get("port"), Some("80"));
            assert_eq!(headers.get("Port"), None);
        }
        assert_eq!(
            ours.block(&theirs.block(&[("StreamType", "stdin")]))
                .unwrap()
                .get("streamtype"),
            Some("stdin")
        );
    }

    #[test]
    fn blocks_that_the_server_writes_can_be_read() {
        let (mut reader, mut writer) = (Inflater::default(), Deflater::default());
        for _ in 0..3 {
            let mut bytes = Vec::new();
            writer.empty_block(&mut bytes);
            assert_eq!(reader.block(&bytes), Ok(Headers::default()));
        }
    }

    #[test]
    fn a_block_that_decompresses_beyond_the_limit_is_refused() {
        let mut theirs = Compressor::begin();
        let bomb = theirs.raw(&vec![0; 8 << 20]);
        assert!(bomb.len() < 16 << 10);
        let refused = Inflater::default().block(&bomb);
        assert_eq!(refused, Err(SpdyError::HeadersTooLong));
    }

    #[test]
    fn malformed_blocks_are_refused() {
        for plain in [
            &b""[..],
            &[0, 0, 0, 1],
            &[0, 0, 0, 1, 0, 0, 0, 1, b'a', 0, 0, 0, 9],
            &[0, 0, 0, 1, 0, 0, 0, 0, 0, 0, 0, 0],
            &[0, 0, 0, 0, 7],
            &[255, 255, 255, 255],
        ] {
            let block = Compressor::begin().raw(plain);
            assert_eq!(
                Inflater::default().block(&block),
                Err(SpdyError::Headers),
                "{plain:?}"
            );
        }
        let garbage = Inflater::default().block(b"garbage");
        assert_eq!(garbage, Err(SpdyError::Compression));
    }
}
