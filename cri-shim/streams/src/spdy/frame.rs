//! Frames: bytes to frames and back (draft 3.1, sections 2.2 and 2.6).

use bytes::{Buf, Bytes, BytesMut};

use super::SpdyError;
use super::headers::{Deflater, Headers, Inflater};

/// The most bytes of a control frame after its first eight.
pub const MAX_CONTROL: usize = 16 << 10;

/// Data frames are passed on in pieces of at most this, as they come: a frame may be 16 MiB long.
pub const MAX_PIECE: usize = 64 << 10;

/// The most bytes that we put into one data frame.
pub const MAX_DATA: usize = (1 << 24) - 1;

/// The length of a data frame's beginning.
pub const DATA_HEADER: usize = 8;

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

/// SETTINGS_INITIAL_WINDOW_SIZE.
const INITIAL_WINDOW: u32 = 7;

/// Why a stream is reset (section 2.6.3).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u32)]
pub enum ResetStatus {
    ProtocolError = 1,
    InvalidStream = 2,
    RefusedStream = 3,
    Cancel = 5,
    FlowControlError = 7,
    StreamAlreadyClosed = 9,
}

/// What came in.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Frame {
    SynStream {
        stream: u32,
        fin: bool,
        /// We may not send on it.
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
    /// The client's initial window for data that we send, if that was among its settings.
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
    /// Stream 0 is the session.
    WindowUpdate {
        stream: u32,
        delta: u32,
    },
    /// A data frame or a part of one; `fin` with the last part only.
    Data {
        stream: u32,
        fin: bool,
        bytes: Bytes,
    },
    /// One that the specification lets us pass over.
    Unknown,
}

/// A data frame that has come in part.
struct Partial {
    stream: u32,
    fin: bool,
    left: usize,
}

/// Takes frames out of what a client sends.
pub struct Decoder {
    inflater: Option<Inflater>,
    partial: Option<Partial>,
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
    /// Gives back the memory of the decompression: from now on headers are an error.
    pub fn expect_no_headers(&mut self) {
        self.inflater = None;
    }

    /// Takes the first frame, or a piece of a data frame, off `input`; `None` until there is one.
    /// Never needs more than [`MAX_CONTROL`] and eight bytes at once.
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
            self.partial = Some(Partial {
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
            .split_to(partial.left.min(input.len()).min(MAX_PIECE))
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
        if length > MAX_CONTROL {
            return Err(SpdyError::TooLong(length));
        }
        if input.len() < 8 + length {
            return Ok(None);
        }
        input.advance(8);
        let mut body = input.split_to(length).freeze();
        let fin = flags & FLAG_FIN != 0;
        let needs = |least: usize| match body.len() >= least {
            true => Ok(()),
            false => Err(SpdyError::Length(kind)),
        };
        let frame = match kind {
            SYN_STREAM => {
                needs(10)?;
                let stream = number(&mut body);
                // The associated stream, the priority and the slot mean nothing to us.
                body.advance(6);
                Frame::SynStream {
                    stream,
                    fin,
                    unidirectional: flags & FLAG_UNIDIRECTIONAL != 0,
                    headers: self.headers(&body)?,
                }
            }
            SYN_REPLY => {
                needs(4)?;
                let stream = number(&mut body);
                self.headers(&body)?;
                Frame::SynReply { stream }
            }
            RST_STREAM => {
                needs(8)?;
                let stream = number(&mut body);
                let status = body.get_u32();
                Frame::Reset { stream, status }
            }
            SETTINGS => {
                needs(4)?;
                let count = body.get_u32() as usize;
                if body.len() != count.saturating_mul(8) {
                    return Err(SpdyError::Length(kind));
                }
                let mut initial_window = None;
                while body.len() >= 8 {
                    let (id, value) = (body.get_u32() & 0x00ff_ffff, body.get_u32());
                    if id == INITIAL_WINDOW {
                        initial_window = Some(value);
                    }
                }
                Frame::Settings { initial_window }
            }
            PING => {
                needs(4)?;
                Frame::Ping { id: body.get_u32() }
            }
            GOAWAY => {
                needs(4)?;
                Frame::GoAway
            }
            HEADERS => {
                needs(4)?;
                let stream = number(&mut body);
                self.headers(&body)?;
                Frame::Headers { stream, fin }
            }
            WINDOW_UPDATE => {
                needs(8)?;
                let stream = number(&mut body);
                let delta = number(&mut body);
                Frame::WindowUpdate { stream, delta }
            }
            _ => Frame::Unknown,
        };
        Ok(Some(frame))
    }

    fn headers(&mut self, block: &[u8]) -> Result<Headers, SpdyError> {
        match &mut self.inflater {
            Some(inflater) => inflater.block(block),
            None => Err(SpdyError::HeadersTooLate),
        }
    }
}

/// 31 bits.
fn number(body: &mut Bytes) -> u32 {
    body.get_u32() & 0x7fff_ffff
}

/// The eight bytes before `length` bytes of data, which are at most [`MAX_DATA`].
pub fn data_header(stream: u32, length: usize, fin: bool) -> [u8; DATA_HEADER] {
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

/// Accepts a stream, with no headers.
pub fn syn_reply(output: &mut Vec<u8>, stream: u32, deflater: &mut Deflater) {
    let mut body = stream.to_be_bytes().to_vec();
    deflater.empty_block(&mut body);
    control(output, SYN_REPLY, &body);
}

pub fn reset(output: &mut Vec<u8>, stream: u32, status: ResetStatus) {
    two_numbers(output, RST_STREAM, stream, status as u32);
}

pub fn ping(output: &mut Vec<u8>, id: u32) {
    control(output, PING, &id.to_be_bytes());
}

/// No stream after `last` has been or will be looked at; the status is OK or PROTOCOL_ERROR.
pub fn go_away(output: &mut Vec<u8>, last: u32, is_error: bool) {
    two_numbers(output, GOAWAY, last, u32::from(is_error));
}

pub fn window_update(output: &mut Vec<u8>, stream: u32, delta: u32) {
    two_numbers(output, WINDOW_UPDATE, stream, delta);
}

#[cfg(test)]
mod tests {
    use super::super::headers::tests::Compressor;
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
    fn a_stream_is_opened_by_bytes_that_come_one_by_one() {
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
            panic!("no stream");
        };
        assert_eq!(headers.get("streamtype"), Some("error"));
    }

    #[test]
    fn data_comes_in_pieces_and_ends_with_the_last() {
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
    fn what_we_write_we_can_read() {
        let mut output = Vec::new();
        reset(&mut output, 3, ResetStatus::Cancel);
        ping(&mut output, 9);
        go_away(&mut output, 7, true);
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
                Frame::GoAway,
                Frame::WindowUpdate {
                    stream: 0,
                    delta: 65536
                },
                Frame::SynReply { stream: 11 },
            ]
        );
    }

    #[test]
    fn what_is_no_frame_of_spdy_3_is_refused() {
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
    fn headers_that_are_not_expected_are_refused() {
        let bytes = syn_stream(&mut Compressor::begin(), 1, &[]);
        let mut decoder = Decoder::default();
        decoder.expect_no_headers();
        let refused = decoder.decode(&mut BytesMut::from(&bytes[..]));
        assert_eq!(refused, Err(SpdyError::HeadersTooLate));
    }
}
