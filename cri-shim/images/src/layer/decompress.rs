//! Decompresses layers. The first bytes of a layer show whether it is compressed with gzip or zstd,
//! or not compressed.
//!
//! Media types are ignored, because registries and builders often set wrong media types.

use std::io::{self, BufRead, BufReader, Read};

const BUFFER_BYTES: usize = 64 << 10;

/// The base-2 logarithm of the maximum zstd window size in bytes. An untrusted image specifies the
/// window size, and the decoder allocates a buffer of this size. The window size is therefore
/// limited to 32 MiB. Without `--ultra` or `--long`, zstd's encoder uses windows of at most 8 MiB.
/// A limit of 32 MiB is therefore enough for usual layers.
const ZSTD_WINDOW_LOG: u32 = 25;

/// Wraps `compressed` in a decoder for the compression format that its first bytes indicate.
pub(crate) fn decoder<'a>(compressed: impl Read + 'a) -> io::Result<Box<dyn Read + 'a>> {
    let mut first = [0; 6];
    let mut compressed = compressed;
    let mut filled = 0;
    while filled < first.len() {
        match compressed.read(&mut first[filled..])? {
            0 => break,
            count => filled += count,
        }
    }
    let magic = first[..filled].to_vec();
    let whole = BufReader::with_capacity(
        BUFFER_BYTES,
        io::Cursor::new(magic.clone()).chain(compressed),
    );
    Ok(match Format::of(&magic)? {
        Format::Gzip => Box::new(flate2::bufread::MultiGzDecoder::new(whole)),
        Format::Zstd => Box::new(zstd(whole)?),
        Format::Plain => Box::new(whole),
    })
}

#[derive(PartialEq)]
enum Format {
    Gzip,
    Zstd,
    Plain,
}

impl Format {
    fn of(magic: &[u8]) -> io::Result<Self> {
        match magic {
            [0x1f, 0x8b, ..] => Ok(Format::Gzip),
            // A zstd stream begins with a normal frame or with a skippable frame.
            [0x28, 0xb5, 0x2f, 0xfd, ..] | [0x50..=0x5f, 0x2a, 0x4d, 0x18, ..] => Ok(Format::Zstd),
            [0xfd, b'7', b'z', b'X', b'Z', 0] => Err(unsupported("xz")),
            [b'B', b'Z', b'h', ..] => Err(unsupported("bzip2")),
            _ => Ok(Format::Plain),
        }
    }
}

/// Returns whether data that starts with the bytes `first` is not compressed. `first` contains the
/// first six bytes. If the data is shorter, `first` contains all bytes.
pub(crate) fn is_plain(first: &[u8]) -> io::Result<bool> {
    Ok(Format::of(first)? == Format::Plain)
}

fn zstd<'a>(whole: impl BufRead + 'a) -> io::Result<impl Read + 'a> {
    let mut decoder = zstd::stream::read::Decoder::with_buffer(whole)?;
    decoder.window_log_max(ZSTD_WINDOW_LOG)?;
    Ok(decoder)
}

fn unsupported(format: &str) -> io::Error {
    io::Error::new(
        io::ErrorKind::Unsupported,
        format!(
            "the data is compressed with {format}, but only gzip, zstd and uncompressed data are supported"
        ),
    )
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::io::Write;

    fn decoded(bytes: &[u8]) -> io::Result<Vec<u8>> {
        let mut out = Vec::new();
        decoder(bytes)?.read_to_end(&mut out)?;
        Ok(out)
    }

    #[test]
    fn the_first_bytes_determine_the_compression() -> io::Result<()> {
        let text = b"a layer, more or less".repeat(100);
        let mut gzip = flate2::write::GzEncoder::new(Vec::new(), flate2::Compression::fast());
        gzip.write_all(&text)?;
        assert_eq!(decoded(&gzip.finish()?)?, text);
        assert_eq!(decoded(&zstd::encode_all(&text[..], 3)?)?, text);
        assert_eq!(decoded(&text)?, text);
        assert_eq!(decoded(b"")?, b"");
        assert_eq!(decoded(b"ab")?, b"ab");
        Ok(())
    }

    #[test]
    fn a_gzip_stream_of_two_members_is_decompressed_completely() -> io::Result<()> {
        let mut both = Vec::new();
        for part in [b"one ", b"two "] {
            let mut gzip = flate2::write::GzEncoder::new(Vec::new(), flate2::Compression::fast());
            gzip.write_all(part)?;
            both.extend(gzip.finish()?);
        }
        assert_eq!(decoded(&both)?, b"one two ");
        Ok(())
    }

    #[test]
    fn a_zstd_stream_of_several_frames_is_decompressed_completely() -> io::Result<()> {
        // Parallel compressors write several frames, with skippable frames before and between them.
        let skipped = b"\x50\x2a\x4d\x18\x04\0\0\0skip";
        let mut all = skipped.to_vec();
        for part in [&b"one "[..], b"two "] {
            all.extend(zstd::encode_all(part, 3)?);
            all.extend(skipped);
        }
        assert_eq!(decoded(&all)?, b"one two ");
        Ok(())
    }

    #[test]
    fn an_xz_stream_is_refused_and_the_error_names_the_format() {
        let error = decoded(b"\xfd7zXZ\0rest");
        assert!(error.is_err_and(|e| e.to_string().contains("xz")));
    }
}
