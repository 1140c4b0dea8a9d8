//! From what a registry sends to a tar archive: gzip, zstd or nothing, told by the first bytes.
//!
//! Media types are not asked: registries and builders have them wrong often enough.

use std::io::{self, BufRead, BufReader, Read};

const BUFFER_BYTES: usize = 64 << 10;

/// The largest zstd window, as a power of two. Encoders use up to 8 MiB below `--ultra`; a window
/// is memory that a stranger makes this process take.
const ZSTD_WINDOW_LOG: u32 = 25;

/// Wraps `compressed` into the decoder that its first bytes call for.
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
            // A frame, or a skippable frame before the first.
            [0x28, 0xb5, 0x2f, 0xfd, ..] | [0x50..=0x5f, 0x2a, 0x4d, 0x18, ..] => Ok(Format::Zstd),
            [0xfd, b'7', b'z', b'X', b'Z', 0] => Err(unsupported("xz")),
            [b'B', b'Z', b'h', ..] => Err(unsupported("bzip2")),
            _ => Ok(Format::Plain),
        }
    }
}

/// Whether what begins with these bytes, six or all, is not compressed.
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
            "it is compressed with {format}; gzip, zstd and what is not compressed can be used"
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
    fn what_is_compressed_how_shows_in_the_first_bytes() -> io::Result<()> {
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
    fn a_gzip_stream_of_two_members_is_one() -> io::Result<()> {
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
    fn a_zstd_stream_of_several_frames_is_one() -> io::Result<()> {
        // As parallel compressors write it, with something to skip before and between.
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
    fn xz_is_refused_by_its_name() {
        let error = decoded(b"\xfd7zXZ\0rest");
        assert!(error.is_err_and(|e| e.to_string().contains("xz")));
    }
}
