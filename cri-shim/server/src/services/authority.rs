//! Clients that call the server by the path of its socket.
//!
//! gRPC in C++, Python and Java, and Go's where a dialer of the caller's own is in use, send the
//! socket's path as `:authority`, with or without `%2F` for its slashes. No URI has such an
//! authority, so h2 refuses the stream with PROTOCOL_ERROR before anyone is asked. Nobody here
//! looks at the authority: on its way in it is replaced by letters, each as long in its code as
//! what was there, so that no length of a frame and no size in HPACK's table (RFC 7541, 4.1) changes.

use std::io;
use std::pin::Pin;
use std::task::{Context, Poll, ready};

use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};

/// "PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n", RFC 9113, 3.4.
const PREFACE: usize = 24;
const FRAME_HEADER: usize = 9;
/// The largest frame that a client may send unasked, RFC 9113, 4.2.
const MAX_FRAME: usize = 16 << 10;

/// RFC 9113, 6.2.
const HEADERS: u8 = 1;
const PADDED: u8 = 0x8;
const PRIORITY: u8 = 0x20;

/// The name's place in HPACK's static table, and the name as clients write it out, plain and in
/// Huffman's code.
const AUTHORITY: usize = 1;
const NAME: &[u8] = b":authority";
const NAME_CODED: &[u8] = &[0xb8, 0x3b, 0x53, 0x39, 0xec, 0x32, 0x7d, 0x7f];

/// A client's connection, with an authority that a URI can have.
pub(crate) struct Connection<S> {
    stream: S,
    frames: Frames,
    /// Read, and to be given on from `given`.
    ready: Vec<u8>,
    given: usize,
}

impl<S> Connection<S> {
    pub(crate) fn new(stream: S) -> Self {
        Connection {
            stream,
            frames: Frames::default(),
            ready: Vec::new(),
            given: 0,
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
            let rest = this.ready.get(this.given..).unwrap_or_default();
            if !rest.is_empty() {
                let (now, _) = rest.split_at(rest.len().min(buffer.remaining()));
                buffer.put_slice(now);
                this.given += now.len();
                return Poll::Ready(Ok(()));
            }
            this.ready.clear();
            this.given = 0;
            let mut room = [0_u8; 4096];
            let mut read = ReadBuf::new(&mut room);
            ready!(Pin::new(&mut this.stream).poll_read(context, &mut read))?;
            match read.filled() {
                [] if this.frames.held.is_empty() => {
                    // An idle connection needs no memory.
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

/// What a client sends, cut into frames. Bytes are held back while they are the beginning of a
/// frame's header, or a frame of HEADERS that is not whole.
struct Frames {
    held: Vec<u8>,
    /// How much comes until the next frame begins.
    until: usize,
}

impl Default for Frames {
    fn default() -> Self {
        Frames {
            held: Vec::new(),
            until: PREFACE,
        }
    }
}

impl Frames {
    /// Takes what was read, and adds to `ready` what may be given on.
    fn pass(&mut self, mut bytes: &[u8], ready: &mut Vec<u8>) {
        while !bytes.is_empty() {
            if self.held.is_empty() && self.until > 0 {
                let (now, rest) = bytes.split_at(self.until.min(bytes.len()));
                ready.extend_from_slice(now);
                self.until -= now.len();
                bytes = rest;
                continue;
            }
            let wanted = match self.held.len() {
                ..FRAME_HEADER => FRAME_HEADER,
                _ => FRAME_HEADER + self.until,
            };
            let missing = wanted - self.held.len();
            let (now, rest) = bytes.split_at(missing.min(bytes.len()));
            self.held.extend_from_slice(now);
            bytes = rest;
            if self.held.len() < wanted {
                return;
            }
            if wanted == FRAME_HEADER {
                self.until = payload(&self.held);
                let is_headers = self.held.get(3) == Some(&HEADERS);
                // A longer one is an error, which h2 tells the client of.
                if is_headers && (1..=MAX_FRAME).contains(&self.until) {
                    continue;
                }
            } else {
                self.until = 0;
                let flags = self.held.get(4).copied().unwrap_or_default();
                if let Some(block) = self.held.get_mut(FRAME_HEADER..) {
                    // Anything that makes no sense is h2's to complain about.
                    let _ = rename(block, flags);
                }
            }
            ready.append(&mut self.held);
        }
    }
}

/// A frame's length by its header.
fn payload(header: &[u8]) -> usize {
    let length = header.iter().take(3);
    length.fold(0, |length, byte| length << 8 | usize::from(*byte))
}

/// Puts letters in the place of the authority in the payload of a frame of HEADERS. `None` if that
/// ends in the middle of something: pseudo-headers come first, none is beyond it.
fn rename(payload: &mut [u8], flags: u8) -> Option<()> {
    let mut at = usize::from(flags & PADDED != 0);
    if flags & PRIORITY != 0 {
        at += 5;
    }
    while let Some(&first) = payload.get(at) {
        // The representations of RFC 7541, 6, by their first bits.
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

/// RFC 7541, 5.1: an integer that begins in the last `bits` of a byte.
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

/// RFC 7541, 5.2: a string, and whether it is in Huffman's code.
fn string<'a>(bytes: &'a mut [u8], at: &mut usize) -> Option<(bool, &'a mut [u8])> {
    let coded = *bytes.get(*at)? >= 0x80;
    let length = integer(bytes, at, 7)?;
    let begin = *at;
    *at += length;
    Some((coded, bytes.get_mut(begin..*at)?))
}

/// The codes of up to 8 bits (RFC 7541, appendix B): their length, the last code of that length, and
/// the code of a letter. Longer ones begin with ones, and nothing of a path is among them but `~`.
const CODES: [(usize, u32, u32); 4] = [
    (5, 0x9, 0x3),   // a
    (6, 0x2d, 0x23), // b
    (7, 0x7b, 0x74), // j
    (8, 0xfd, 0xfc), // X
];

/// Replaces each symbol of a coded string by a letter with a code of the same length. What has
/// longer codes stays as it is.
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
            // The end is filled with ones, less than a byte of them.
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

    /// The preface, a SETTINGS frame, HEADERS with this block, a DATA frame.
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

    /// What comes out of what goes in, in pieces of `piece` bytes.
    fn passed(bytes: &[u8], piece: usize) -> Vec<u8> {
        let (mut frames, mut ready) = (Frames::default(), Vec::new());
        for piece in bytes.chunks(piece) {
            frames.pass(piece, &mut ready);
        }
        assert!(frames.held.is_empty());
        ready
    }

    /// `:method: POST`, then the authority as `field` has it, then `te: x`.
    fn block(field: &[u8]) -> Vec<u8> {
        [&[0x83], field, &[0x40, 2, b't', b'e', 1, b'x']].concat()
    }

    #[test]
    fn letters_take_the_place_of_a_path_wherever_a_read_ends() {
        let plain = block(b"\x41\x0b/run/a.sock");
        let letters = block(b"\x41\x0baaaaaaaaaaa");
        for piece in 1..40 {
            let out = passed(&stream(0, &plain), piece);
            assert_eq!(out, stream(0, &letters), "in pieces of {piece}");
        }
    }

    #[test]
    fn the_name_may_be_written_out_and_the_frame_padded() {
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
    fn a_coded_string_keeps_the_length_of_its_codes() {
        // "%2Frun%2Fa.sock" and "aX", with the ones that fill the last byte.
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
        // '%', '2', 'F', 'r', '&', '/'
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
        // '~' has 13 bits: nothing to put there.
        let mut tilde = codes(&[(0x3, 5), (0x1ffd, 13)]);
        let before = tilde.clone();
        letters_coded(&mut tilde);
        assert_eq!(tilde, before);
    }

    #[test]
    fn what_makes_no_sense_is_passed_on() {
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
