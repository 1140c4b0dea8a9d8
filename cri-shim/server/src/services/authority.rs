//! Support for clients that send the path of the server's socket as `:authority`.
//!
//! gRPC in C++, Python and Java sends the socket's path as `:authority`. The path is unchanged, or
//! its slashes are encoded as `%2F`. gRPC in Go with a custom dialer does the same. A path is not a
//! valid authority in a URI. The crate h2 therefore refuses the request with PROTOCOL_ERROR before
//! the request reaches the service. The server does not use the authority, so this module replaces
//! each character of the authority with a letter. In a Huffman-coded authority, the codes of the
//! character and of its letter have the same length. The replacement therefore changes neither the
//! length of a frame nor the size of an entry in HPACK's table (RFC 7541, 4.1).

use std::io;
use std::pin::Pin;
use std::task::{Context, Poll, ready};

use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};

/// The length of the connection preface "PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n" (RFC 9113, 3.4).
const PREFACE: usize = 24;
const FRAME_HEADER: usize = 9;
/// The maximum length of a frame's payload. The server's settings do not allow larger frames (RFC
/// 9113, 4.2).
const MAX_FRAME: usize = 16 << 10;

/// The type and the flags of a HEADERS frame (RFC 9113, 6.2).
const HEADERS: u8 = 1;
const PADDED: u8 = 0x8;
const PRIORITY: u8 = 0x20;

/// The index of the name `:authority` in HPACK's static table. Clients can also send the name
/// itself, as plain text or Huffman-coded.
const AUTHORITY: usize = 1;
const NAME: &[u8] = b":authority";
const NAME_CODED: &[u8] = &[0xb8, 0x3b, 0x53, 0x39, 0xec, 0x32, 0x7d, 0x7f];

/// A client's connection. A reader of the connection receives each request with an authority that
/// is valid in a URI.
pub(crate) struct Connection<S> {
    stream: S,
    frames: Frames,
    /// Bytes that were read from the client and processed. The bytes from index `delivered` on have
    /// not been returned to the reader yet.
    ready: Vec<u8>,
    delivered: usize,
}

impl<S> Connection<S> {
    pub(crate) fn new(stream: S) -> Self {
        Connection {
            stream,
            frames: Frames::default(),
            ready: Vec::new(),
            delivered: 0,
        }
    }
}

impl<S: AsyncRead + Unpin> AsyncRead for Connection<S> {
    fn poll_read(
        self: Pin<&mut Self>,
        context: &mut Context<'_>,
        buffer: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        let this = self.get_mut();
        loop {
            let rest = this.ready.get(this.delivered..).unwrap_or_default();
            if !rest.is_empty() {
                let (now, _) = rest.split_at(rest.len().min(buffer.remaining()));
                buffer.put_slice(now);
                this.delivered += now.len();
                return Poll::Ready(Ok(()));
            }
            this.ready.clear();
            this.delivered = 0;
            let mut room = [0_u8; 4096];
            let mut read = ReadBuf::new(&mut room);
            ready!(Pin::new(&mut this.stream).poll_read(context, &mut read))?;
            match read.filled() {
                [] if this.frames.held.is_empty() => {
                    // After the end of the stream, the buffer `ready` is not needed.
                    this.ready = Vec::new();
                    return Poll::Ready(Ok(()));
                }
                [] => this.ready.append(&mut this.frames.held),
                bytes => this.frames.pass(bytes, &mut this.ready),
            }
        }
    }
}

impl<S: AsyncWrite + Unpin> AsyncWrite for Connection<S> {
    fn poll_write(
        mut self: Pin<&mut Self>,
        context: &mut Context<'_>,
        bytes: &[u8],
    ) -> Poll<io::Result<usize>> {
        Pin::new(&mut self.stream).poll_write(context, bytes)
    }

    fn poll_write_vectored(
        mut self: Pin<&mut Self>,
        context: &mut Context<'_>,
        slices: &[io::IoSlice<'_>],
    ) -> Poll<io::Result<usize>> {
        Pin::new(&mut self.stream).poll_write_vectored(context, slices)
    }

    fn is_write_vectored(&self) -> bool {
        self.stream.is_write_vectored()
    }

    fn poll_flush(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.stream).poll_flush(context)
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.stream).poll_shutdown(context)
    }
}

/// The parser that splits the client's byte stream into HTTP/2 frames. While a frame header or a
/// HEADERS frame is incomplete, `held` contains its bytes.
struct Frames {
    held: Vec<u8>,
    /// The number of remaining bytes of the connection preface or of the current frame.
    remaining: usize,
}

impl Default for Frames {
    fn default() -> Self {
        Frames {
            held: Vec::new(),
            remaining: PREFACE,
        }
    }
}

impl Frames {
    /// Processes bytes from the client, and appends bytes for h2 to `ready`.
    fn pass(&mut self, mut bytes: &[u8], ready: &mut Vec<u8>) {
        while !bytes.is_empty() {
            if self.held.is_empty() && self.remaining > 0 {
                let (now, rest) = bytes.split_at(self.remaining.min(bytes.len()));
                ready.extend_from_slice(now);
                self.remaining -= now.len();
                bytes = rest;
                continue;
            }
            let needed = match self.held.len() {
                ..FRAME_HEADER => FRAME_HEADER,
                _ => FRAME_HEADER + self.remaining,
            };
            let missing = needed - self.held.len();
            let (now, rest) = bytes.split_at(missing.min(bytes.len()));
            self.held.extend_from_slice(now);
            bytes = rest;
            if self.held.len() < needed {
                return;
            }
            if needed == FRAME_HEADER {
                self.remaining = payload(&self.held);
                let is_headers = self.held.get(3) == Some(&HEADERS);
                // A HEADERS frame longer than `MAX_FRAME` is passed on unchanged. h2 then reports
                // an error to the client.
                if is_headers && (1..=MAX_FRAME).contains(&self.remaining) {
                    continue;
                }
            } else {
                self.remaining = 0;
                let flags = self.held.get(4).copied().unwrap_or_default();
                if let Some(block) = self.held.get_mut(FRAME_HEADER..) {
                    // Malformed headers are passed on, because h2 reports them to the client.
                    let _ = replace_authority(block, flags);
                }
            }
            ready.append(&mut self.held);
        }
    }
}

/// Returns the payload length from a frame's header.
fn payload(header: &[u8]) -> usize {
    let length = header.iter().take(3);
    length.fold(0, |length, byte| length << 8 | usize::from(*byte))
}

/// Replaces the authority in the payload of a HEADERS frame with letters. Returns `None` if the
/// payload ends in the middle of a field. CONTINUATION frames are not searched, because
/// pseudo-headers precede all other fields.
fn replace_authority(payload: &mut [u8], flags: u8) -> Option<()> {
    let mut at = usize::from(flags & PADDED != 0);
    if flags & PRIORITY != 0 {
        at += 5;
    }
    while let Some(&first) = payload.get(at) {
        // The leading bits identify the representation of the field (RFC 7541, 6).
        let index_bits = match first {
            0x80.. => 7,
            0x40.. => 6,
            0x20.. => 5,
            _ => 4,
        };
        let index = integer(payload, &mut at, index_bits)?;
        if first >= 0x80 || (0x20..0x40).contains(&first) {
            continue;
        }
        let named = match index {
            0 => {
                let (coded, name) = string(payload, &mut at)?;
                *name == *if coded { NAME_CODED } else { NAME }
            }
            index => index == AUTHORITY,
        };
        let (coded, value) = string(payload, &mut at)?;
        if named && coded {
            letters_coded(value);
        } else if named {
            value.fill(b'a');
        }
    }
    Some(())
}

/// Decodes the integer that begins in the last `bits` bits of the byte at index `at` (RFC 7541,
/// 5.1). Sets `at` to the index after the integer.
fn integer(bytes: &[u8], at: &mut usize, bits: u32) -> Option<usize> {
    let limit = (1_usize << bits) - 1;
    let mut value = usize::from(*bytes.get(*at)?) & limit;
    *at += 1;
    if value < limit {
        return Some(value);
    }
    for shift in [0, 7, 14] {
        let byte = usize::from(*bytes.get(*at)?);
        *at += 1;
        value += (byte & 0x7f) << shift;
        if byte < 0x80 {
            return Some(value);
        }
    }
    None
}

/// Returns the bytes of the string at index `at`, and whether they are Huffman-coded (RFC 7541,
/// 5.2). Sets `at` to the index after the string.
fn string<'a>(bytes: &'a mut [u8], at: &mut usize) -> Option<(bool, &'a mut [u8])> {
    let coded = *bytes.get(*at)? >= 0x80;
    let length = integer(bytes, at, 7)?;
    let begin = *at;
    *at += length;
    Some((coded, bytes.get_mut(begin..*at)?))
}

/// The Huffman codes of 5 to 8 bits (RFC 7541, appendix B). Each entry describes the codes of one
/// length: the length in bits, the greatest code, and the code of a letter. A longer code begins
/// with 8 bits that are greater than 0xfd. Longer codes are rare: invalid authorities are usually
/// paths, and of the common characters in paths, only `~` has a longer code.
const CODES: [(usize, u32, u32); 4] = [
    (5, 0x9, 0x3),   // a
    (6, 0x2d, 0x23), // b
    (7, 0x7b, 0x74), // j
    (8, 0xfd, 0xfc), // X
];

/// Replaces each symbol of a Huffman-coded string with a letter whose code has the same length. A
/// string that contains a code of more than 8 bits is not changed.
fn letters_coded(string: &mut [u8]) {
    let bits = string.len() * 8;
    let bit = |string: &[u8], at: usize| {
        let byte = string.get(at / 8).copied().unwrap_or(0xff);
        u32::from(byte >> (7 - at % 8) & 1)
    };
    let mut letters = string.to_vec();
    let mut at = 0;
    while at < bits {
        let code =
            |length: usize| (at..at + length).fold(0, |code, at| code << 1 | bit(string, at));
        let Some((length, _, letter)) = CODES
            .into_iter()
            .find(|(length, last, _)| code(*length) <= *last)
        else {
            // Fewer than eight remaining bits are padding: the encoder fills the string's last byte
            // with 1 bits.
            if bits - at < 8 {
                break;
            }
            return;
        };
        for number in 0..length {
            let place = at + number;
            let set = letter >> (length - 1 - number) & 1 == 1;
            if let Some(byte) = letters.get_mut(place / 8) {
                let mask = 0x80 >> (place % 8);
                *byte = if set { *byte | mask } else { *byte & !mask };
            }
        }
        at += length;
    }
    string.copy_from_slice(&letters);
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Returns a byte stream of four parts: the preface, a SETTINGS frame, a HEADERS frame with
    /// `flags` and `block`, and a DATA frame.
    fn stream(flags: u8, block: &[u8]) -> Vec<u8> {
        let mut bytes = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n".to_vec();
        bytes.extend([0, 0, 0, 4, 0, 0, 0, 0, 0]);
        let length = u8::try_from(block.len()).unwrap_or(u8::MAX);
        bytes.extend([0, 0, length, HEADERS, 4 | flags, 0, 0, 0, 1]);
        bytes.extend(block);
        bytes.extend([0, 0, 5, 0, 1, 0, 0, 0, 1]);
        bytes.extend([0, 0, 0, 0, 0]);
        bytes
    }

    /// Passes `bytes` through [`Frames`] in pieces of `piece` bytes and returns the output.
    fn passed(bytes: &[u8], piece: usize) -> Vec<u8> {
        let (mut frames, mut ready) = (Frames::default(), Vec::new());
        for piece in bytes.chunks(piece) {
            frames.pass(piece, &mut ready);
        }
        assert!(frames.held.is_empty());
        ready
    }

    /// Returns a header block of three parts: the method POST, the authority as encoded in `field`,
    /// and the field `te`.
    fn block(field: &[u8]) -> Vec<u8> {
        [&[0x83], field, &[0x40, 2, b't', b'e', 1, b'x']].concat()
    }

    #[test]
    fn letters_replace_a_path_for_every_read_size() {
        let plain = block(b"\x41\x0b/run/a.sock");
        let letters = block(b"\x41\x0baaaaaaaaaaa");
        for piece in 1..40 {
            let out = passed(&stream(0, &plain), piece);
            assert_eq!(
                out,
                stream(0, &letters),
                "the stream after the replacement of the path, if each read returns {piece} bytes"
            );
        }
    }

    #[test]
    fn the_authority_is_replaced_if_its_name_is_literal_or_the_frame_is_padded() {
        let written = block(b"\x40\x0a:authority\x02/a");
        let letters = block(b"\x40\x0a:authority\x02aa");
        assert_eq!(passed(&stream(0, &written), 7), stream(0, &letters));
        let coded = block(&[&[0x00, 0x88], NAME_CODED, b"\x02/a"].concat());
        let letters = block(&[&[0x00, 0x88], NAME_CODED, b"\x02aa"].concat());
        assert_eq!(passed(&stream(0, &coded), 7), stream(0, &letters));

        let padded = [&[3, 0, 0, 0, 0, 9], &*block(b"\x11\x02/a"), &[0, 0, 0]].concat();
        let letters = [&[3, 0, 0, 0, 0, 9], &*block(b"\x11\x02aa"), &[0, 0, 0]].concat();
        let flags = PADDED | PRIORITY;
        assert_eq!(passed(&stream(flags, &padded), 9), stream(flags, &letters));
    }

    #[test]
    fn each_symbol_of_a_coded_string_is_replaced_with_a_code_of_the_same_length() {
        // Concatenates codes, given as pairs of code and length, and fills the last byte with bits
        // that are 1.
        let codes = |symbols: &[(u32, usize)]| {
            let bits: Vec<u32> = symbols
                .iter()
                .flat_map(|(code, length)| (0..*length).rev().map(move |at| code >> at & 1))
                .collect();
            bits.chunks(8)
                .map(|bits| {
                    (0..8).fold(0_u8, |byte, at| {
                        byte << 1 | bits.get(at).map_or(1, |bit| u8::from(*bit == 1))
                    })
                })
                .collect::<Vec<u8>>()
        };
        // The Huffman codes of '%', '2', 'F', 'r', '&' and '/'.
        let mut path = codes(&[
            (0x15, 6),
            (0x2, 5),
            (0x61, 7),
            (0x2c, 6),
            (0xf8, 8),
            (0x18, 6),
        ]);
        letters_coded(&mut path);
        let same = codes(&[
            (0x23, 6),
            (0x3, 5),
            (0x74, 7),
            (0x23, 6),
            (0xfc, 8),
            (0x23, 6),
        ]);
        assert_eq!(path, same);
        // The Huffman code of '~' has 13 bits, and `CODES` contains no letter with a code of this
        // length.
        let mut tilde = codes(&[(0x3, 5), (0x1ffd, 13)]);
        let before = tilde.clone();
        letters_coded(&mut tilde);
        assert_eq!(tilde, before);
    }

    #[test]
    fn malformed_headers_are_passed_on_unchanged() {
        for block in [
            &b"\x41"[..],
            b"\x41\x7f\xff\xff\xff\xff",
            b"\x41\x20/run",
            b"\x7f\xff\xff\xff\xff\x0f",
            b"",
        ] {
            let bytes = stream(0, block);
            assert_eq!(passed(&bytes, 5), bytes);
        }
        let other = block(b"\x42\x02/a");
        assert_eq!(passed(&stream(0, &other), 5), stream(0, &other));
    }
}
