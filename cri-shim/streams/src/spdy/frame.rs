//! Parsing and serialization of frames (SPDY draft 3.1, sections 2.2 and 2.6).

use bytes::{Buf, Bytes, BytesMut};

use super::error::SpdyError;
use super::headers::{Deflater, Headers, Inflater};
use super::limits::{MAX_CONTROL_BYTES, MAX_PIECE_BYTES};

/// The maximum number of bytes of data that the server sends in one data frame.
pub(crate) const MAX_DATA_BYTES: usize = (1 << 24) - 1;

/// The length of a data frame's header in bytes.
pub(crate) const DATA_HEADER_BYTES: usize = 8;

const VERSION: u16 = 3;

const SYN_STREAM: u16 = 1;
const SYN_REPLY: u16 = 2;
const RST_STREAM: u16 = 3;
const SETTINGS: u16 = 4;
const PING: u16 = 6;
const GOAWAY: u16 = 7;
const HEADERS: u16 = 8;
const WINDOW_UPDATE: u16 = 9;

const FLAG_FIN: u8 = 1;
const FLAG_UNIDIRECTIONAL: u8 = 2;

const SETTINGS_INITIAL_WINDOW_SIZE: u32 = 7;

/// The status codes with which the server resets a stream (SPDY draft 3.1, section 2.6.3).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u32)]
pub(super) enum ResetStatus {
    InvalidStream = 2,
    RefusedStream = 3,
    Cancel = 5,
    FlowControlError = 7,
    StreamAlreadyClosed = 9,
}

/// A frame that the client sent.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Frame {
    SynStream {
        stream: u32,
        fin: bool,
        /// True if the server must not send data on the stream.
        unidirectional: bool,
        headers: Headers,
    },
    SynReply {
        stream: u32,
    },
    Reset {
        stream: u32,
        status: u32,
    },
    /// The client's settings. The server uses only the initial flow control window, in bytes. This
    /// window limits the data that the server sends on a stream. `initial_window` is `None` if the
    /// frame does not contain this window.
    Settings {
        initial_window: Option<u32>,
    },
    Ping {
        id: u32,
    },
    GoAway,
    Headers {
        stream: u32,
        fin: bool,
    },
    /// An increase of a stream's flow control window, or of the session's window if `stream` is 0.
    WindowUpdate {
        stream: u32,
        delta: u32,
    },
    /// A data frame or a part of a data frame. `fin` is true only in the last part.
    Data {
        stream: u32,
        fin: bool,
        bytes: Bytes,
    },
    /// A frame that the specification allows a server to ignore.
    Unknown,
}

/// A data frame of which [`Decoder::decode`] has not returned the last `left` bytes yet.
struct PartialData {
    stream: u32,
    fin: bool,
    left: usize,
}

/// The parser for the client's frames.
pub struct Decoder {
    inflater: Option<Inflater>,
    partial: Option<PartialData>,
}

impl Default for Decoder {
    fn default() -> Self {
        Decoder {
            inflater: Some(Inflater::default()),
            partial: None,
        }
    }
}

impl Decoder {
    /// Releases the memory of the decompressor. After this call, [`Decoder::decode`] returns an
    /// error for a frame with headers.
    pub fn expect_no_headers(&mut self) {
        self.inflater = None;
    }

    /// Removes the first frame from `input` and returns the frame. For a data frame, one call
    /// can return only a part of the frame. Returns `None` if more bytes must arrive first. To return
    /// the next frame, the decoder never needs more than [`MAX_CONTROL_BYTES`] plus eight bytes in
    /// `input`.
    pub fn decode(&mut self, input: &mut BytesMut) -> Result<Option<Frame>, SpdyError> {
        if self.partial.is_none() {
            let Some(&[a, b, c, d, flags, e, f, g]) = input.first_chunk::<8>() else {
                return Ok(None);
            };
            let length = u32::from_be_bytes([0, e, f, g]) as usize;
            if a & 0x80 != 0 {
                let version = u16::from_be_bytes([a & 0x7f, b]);
                let kind = u16::from_be_bytes([c, d]);
                return self.control(version, kind, flags, length, input);
            }
            input.advance(8);
            self.partial = Some(PartialData {
                stream: u32::from_be_bytes([a, b, c, d]),
                fin: flags & FLAG_FIN != 0,
                left: length,
            });
        }
        let Some(partial) = &mut self.partial else {
            return Ok(None);
        };
        if partial.left > 0 && input.is_empty() {
            return Ok(None);
        }
        let bytes = input
            .split_to(partial.left.min(input.len()).min(MAX_PIECE_BYTES))
            .freeze();
        partial.left -= bytes.len();
        let stream = partial.stream;
        let fin = partial.fin && partial.left == 0;
        if partial.left == 0 {
            self.partial = None;
        }
        Ok(Some(Frame::Data { stream, fin, bytes }))
    }

    fn control(
        &mut self,
        version: u16,
        kind: u16,
        flags: u8,
        length: usize,
        input: &mut BytesMut,
    ) -> Result<Option<Frame>, SpdyError> {
        if version != VERSION {
            return Err(SpdyError::Version(version));
        }
        if length > MAX_CONTROL_BYTES {
            return Err(SpdyError::TooLong(length));
        }
        if input.len() < 8 + length {
            return Ok(None);
        }
        input.advance(8);
        let body = input.split_to(length).freeze();
        self.parse(kind, flags, body).map(Some)
    }

    /// Parses the body of a control frame of the type `kind`.
    fn parse(&mut self, kind: u16, flags: u8, mut body: Bytes) -> Result<Frame, SpdyError> {
        let fin = flags & FLAG_FIN != 0;
        if body.len() < min_length(kind) {
            return Err(SpdyError::Length(kind));
        }
        Ok(match kind {
            SYN_STREAM => {
                let stream = number(&mut body);
                // Skip the fields for the associated stream, the priority and the credential slot,
                // which the server does not use.
                body.advance(6);
                Frame::SynStream {
                    stream,
                    fin,
                    unidirectional: flags & FLAG_UNIDIRECTIONAL != 0,
                    headers: self.headers(&body)?,
                }
            }
            SYN_REPLY => {
                let stream = number(&mut body);
                self.headers(&body)?;
                Frame::SynReply { stream }
            }
            RST_STREAM => Frame::Reset {
                stream: number(&mut body),
                status: body.get_u32(),
            },
            SETTINGS => Frame::Settings {
                initial_window: initial_window(body)?,
            },
            PING => Frame::Ping { id: body.get_u32() },
            GOAWAY => Frame::GoAway,
            HEADERS => {
                let stream = number(&mut body);
                self.headers(&body)?;
                Frame::Headers { stream, fin }
            }
            WINDOW_UPDATE => Frame::WindowUpdate {
                stream: number(&mut body),
                delta: number(&mut body),
            },
            _ => Frame::Unknown,
        })
    }

    fn headers(&mut self, block: &[u8]) -> Result<Headers, SpdyError> {
        match &mut self.inflater {
            Some(inflater) => inflater.block(block),
            None => Err(SpdyError::HeadersTooLate),
        }
    }
}

/// Returns the minimum length of the body of a control frame of the type `kind`.
fn min_length(kind: u16) -> usize {
    match kind {
        SYN_STREAM => 10,
        RST_STREAM | WINDOW_UPDATE => 8,
        SYN_REPLY | SETTINGS | PING | GOAWAY | HEADERS => 4,
        _ => 0,
    }
}

/// Returns the initial flow control window, or `None` if the settings do not contain it.
fn initial_window(mut settings: Bytes) -> Result<Option<u32>, SpdyError> {
    let count = settings.get_u32() as usize;
    if settings.len() != count.saturating_mul(8) {
        return Err(SpdyError::Length(SETTINGS));
    }
    let mut initial_window = None;
    while settings.len() >= 8 {
        let (id, value) = (settings.get_u32() & 0x00ff_ffff, settings.get_u32());
        if id == SETTINGS_INITIAL_WINDOW_SIZE {
            initial_window = Some(value);
        }
    }
    Ok(initial_window)
}

/// Reads a number of 31 bits, such as a stream's number, and ignores the highest bit.
fn number(body: &mut Bytes) -> u32 {
    body.get_u32() & 0x7fff_ffff
}

/// Returns the header of a data frame of `length` bytes, which must be at most [`MAX_DATA_BYTES`].
pub(crate) fn data_header(stream: u32, length: usize, fin: bool) -> [u8; DATA_HEADER_BYTES] {
    let [a, b, c, d] = stream.to_be_bytes();
    let [_, e, f, g] = u32::try_from(length).unwrap_or(0).to_be_bytes();
    [a, b, c, d, u8::from(fin), e, f, g]
}

fn control(output: &mut Vec<u8>, kind: u16, body: &[u8]) {
    output.extend_from_slice(&(0x8000 | VERSION).to_be_bytes());
    output.extend_from_slice(&kind.to_be_bytes());
    output.extend_from_slice(&u32::try_from(body.len()).unwrap_or(0).to_be_bytes());
    output.extend_from_slice(body);
}

fn two_numbers(output: &mut Vec<u8>, kind: u16, first: u32, second: u32) {
    let mut body = [0; 8];
    let (left, right) = body.split_at_mut(4);
    left.copy_from_slice(&first.to_be_bytes());
    right.copy_from_slice(&second.to_be_bytes());
    control(output, kind, &body);
}

/// Appends a SYN_REPLY frame without headers, which accepts a stream.
pub(super) fn syn_reply(output: &mut Vec<u8>, stream: u32, deflater: &mut Deflater) {
    let mut body = stream.to_be_bytes().to_vec();
    deflater.empty_block(&mut body);
    control(output, SYN_REPLY, &body);
}

pub(super) fn reset(output: &mut Vec<u8>, stream: u32, status: ResetStatus) {
    two_numbers(output, RST_STREAM, stream, status as u32);
}

pub(super) fn ping(output: &mut Vec<u8>, id: u32) {
    control(output, PING, &id.to_be_bytes());
}

pub(super) fn window_update(output: &mut Vec<u8>, stream: u32, delta: u32) {
    two_numbers(output, WINDOW_UPDATE, stream, delta);
}

#[cfg(test)]
mod tests {
    use super::super::compressor::Compressor;
    use super::*;

    fn frames(input: &[u8]) -> Result<Vec<Frame>, SpdyError> {
        let (mut decoder, mut buffer) = (Decoder::default(), BytesMut::from(input));
        let mut frames = Vec::new();
        while let Some(frame) = decoder.decode(&mut buffer)? {
            frames.push(frame);
        }
        Ok(frames)
    }

    pub(super) fn syn_stream(theirs: &mut Compressor, id: u32, pairs: &[(&str, &str)]) -> Vec<u8> {
        let mut body = id.to_be_bytes().to_vec();
        body.extend_from_slice(&[0; 6]);
        body.extend_from_slice(&theirs.block(pairs));
        let mut output = Vec::new();
        control(&mut output, SYN_STREAM, &body);
        output
    }

    #[test]
    fn a_frame_that_arrives_byte_by_byte_opens_a_stream() {
        let bytes = syn_stream(&mut Compressor::begin(), 1, &[("streamtype", "error")]);
        let (mut decoder, mut buffer) = (Decoder::default(), BytesMut::new());
        for byte in &bytes[..bytes.len() - 1] {
            buffer.extend_from_slice(&[*byte]);
            assert_eq!(decoder.decode(&mut buffer), Ok(None));
        }
        buffer.extend_from_slice(&bytes[bytes.len() - 1..]);
        let Ok(Some(Frame::SynStream {
            stream: 1,
            fin: false,
            unidirectional: false,
            headers,
        })) = decoder.decode(&mut buffer)
        else {
            panic!(
                "the decoder did not return a SYN_STREAM frame for stream 1 from the complete frame"
            );
        };
        assert_eq!(headers.get("streamtype"), Some("error"));
    }

    #[test]
    fn a_data_frame_is_returned_in_parts_and_the_last_part_has_fin() {
        let mut bytes = data_header(5, 6, true).to_vec();
        bytes.extend_from_slice(b"abc");
        let (mut decoder, mut buffer) = (Decoder::default(), BytesMut::from(&bytes[..]));
        let data = |fin, bytes: &'static [u8]| {
            Ok(Some(Frame::Data {
                stream: 5,
                fin,
                bytes: Bytes::from_static(bytes),
            }))
        };
        assert_eq!(decoder.decode(&mut buffer), data(false, b"abc"));
        assert_eq!(decoder.decode(&mut buffer), Ok(None));
        buffer.extend_from_slice(b"def");
        assert_eq!(decoder.decode(&mut buffer), data(true, b"def"));
        buffer.extend_from_slice(&data_header(7, 0, true));
        assert!(
            matches!(decoder.decode(&mut buffer), Ok(Some(Frame::Data { stream: 7, fin: true, bytes })) if bytes.is_empty())
        );
    }

    #[test]
    fn frames_that_the_server_writes_can_be_parsed() {
        let mut output = Vec::new();
        reset(&mut output, 3, ResetStatus::Cancel);
        ping(&mut output, 9);
        window_update(&mut output, 0, 65536);
        syn_reply(&mut output, 11, &mut Deflater::default());
        assert_eq!(
            frames(&output).unwrap(),
            [
                Frame::Reset {
                    stream: 3,
                    status: 5
                },
                Frame::Ping { id: 9 },
                Frame::WindowUpdate {
                    stream: 0,
                    delta: 65536
                },
                Frame::SynReply { stream: 11 },
            ]
        );
    }

    #[test]
    fn a_control_frame_with_a_wrong_version_or_length_is_refused() {
        assert_eq!(
            frames(&[0x80, 2, 0, 1, 0, 0, 0, 0]),
            Err(SpdyError::Version(2))
        );
        let long = [0x80, 3, 0, 1, 0, 1, 0, 0];
        assert_eq!(frames(&long), Err(SpdyError::TooLong(1 << 16)));
        let short = [0x80, 3, 0, 3, 0, 0, 0, 4, 0, 0, 0, 1];
        assert_eq!(frames(&short), Err(SpdyError::Length(3)));
        let lying = [0x80, 3, 0, 4, 0, 0, 0, 4, 0xff, 0xff, 0xff, 0xff];
        assert_eq!(frames(&lying), Err(SpdyError::Length(4)));
        assert_eq!(
            frames(&[0x80, 3, 0, 99, 0, 0, 0, 0]),
            Ok(vec![Frame::Unknown])
        );
    }

    #[test]
    fn unexpected_headers_are_refused() {
        let bytes = syn_stream(&mut Compressor::begin(), 1, &[]);
        let mut decoder = Decoder::default();
        decoder.expect_no_headers();
        let refused = decoder.decode(&mut BytesMut::from(&bytes[..]));
        assert_eq!(refused, Err(SpdyError::HeadersTooLate));
    }
}
