//! WebSocket: channels, each message beginning with the number of its own, or a tunnel for SPDY.

use std::collections::VecDeque;
use std::io::{self, IoSlice};
use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Poll, ready};

use base64::Engine;
use base64::engine::general_purpose::STANDARD;
use bytes::{Buf, Bytes};
use futures_util::{Sink, Stream, StreamExt};
use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};
use tokio_tungstenite::WebSocketStream;
use tokio_tungstenite::tungstenite::error::ProtocolError;
use tokio_tungstenite::tungstenite::protocol::{Role, WebSocketConfig};
use tokio_tungstenite::tungstenite::{Error, Message};

use super::output::Output;
use super::pipe::{self, Pipe};
use super::transport::{ReadHalf, Transport, Watch};

/// The longest message that is taken: it is in memory as a whole. Kubernetes' clients send 32 KiB.
const MAX_MESSAGE: usize = 1 << 20;

/// What a client sends is read in pieces of this; it is part of every session's memory.
const READ: usize = 16 << 10;

/// The most bytes of a tunnel that go into one message.
const MAX_TUNNELLED: usize = 128 << 10;

/// The first byte of a frame that is a whole message, and its opcodes.
const FIN: u8 = 0x80;
const TEXT: u8 = 1;
const BINARY: u8 = 2;
const CLOSING: u8 = 8;

/// In v5: the other byte names a channel that the client closes.
const CLOSE: u8 = 255;

/// A WebSocket on `transport`, whose handshake is done and of which `read` has come already.
pub async fn serve<T: AsyncRead + AsyncWrite + Unpin>(
    transport: T,
    read: Bytes,
) -> WebSocketStream<T> {
    let config = WebSocketConfig::default()
        .read_buffer_size(READ)
        .write_buffer_size(0)
        .max_message_size(Some(MAX_MESSAGE))
        .max_frame_size(Some(MAX_MESSAGE));
    WebSocketStream::from_partially_read(transport, read.to_vec(), Role::Server, Some(config)).await
}

/// How channels are put into messages.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Codec {
    /// Binary messages; `close`: with v5's way to close a channel.
    Binary { close: bool },
    /// Text messages: the channel's digit, and base64.
    Base64,
}

/// What a client sends.
#[derive(Debug, PartialEq, Eq)]
pub enum Input {
    Data(u8, Bytes),
    Close(u8),
}

impl Codec {
    fn decode(self, message: Bytes) -> io::Result<Option<Input>> {
        let Some((&first, rest)) = message.split_first() else {
            return Ok(None);
        };
        match self {
            Codec::Binary { close: true } if first == CLOSE => match rest {
                [channel] => Ok(Some(Input::Close(*channel))),
                _ => Err(io::ErrorKind::InvalidData.into()),
            },
            Codec::Binary { .. } => Ok(Some(Input::Data(first, message.slice(1..)))),
            Codec::Base64 => {
                let bytes = STANDARD
                    .decode(rest)
                    .map_err(|_| io::Error::from(io::ErrorKind::InvalidData))?;
                Ok(Some(Input::Data(first.wrapping_sub(b'0'), bytes.into())))
            }
        }
    }

    fn of_server(self) -> u8 {
        match self {
            Codec::Binary { .. } => BINARY,
            Codec::Base64 => TEXT,
        }
    }
}

/// The beginning of a message: a frame that is a whole one, unmasked, and the channel (RFC 6455,
/// section 5.2). `length` is that of the data.
struct Header {
    bytes: [u8; 11],
    length: usize,
}

impl Header {
    fn new(opcode: u8, channel: u8, length: usize) -> Self {
        let mut header = Header {
            bytes: [0; 11],
            length: 0,
        };
        header.push(&[FIN | opcode]);
        let length = length as u64 + 1;
        match (u8::try_from(length), u16::try_from(length)) {
            (Ok(short), _) if short < 126 => header.push(&[short]),
            (_, Ok(medium)) => {
                header.push(&[126]);
                header.push(&medium.to_be_bytes());
            }
            _ => {
                header.push(&[127]);
                header.push(&length.to_be_bytes());
            }
        }
        header.push(&[channel]);
        header
    }

    fn push(&mut self, bytes: &[u8]) {
        for (place, byte) in self.bytes.iter_mut().skip(self.length).zip(bytes) {
            *place = *byte;
        }
        self.length += bytes.len();
    }

    fn bytes(&self) -> &[u8] {
        self.bytes.get(..self.length).unwrap_or(&self.bytes)
    }
}

/// The receiving side of channels.
pub struct Reader {
    stream: WebSocketStream<Incoming>,
    codec: Codec,
}

/// The sending side of channels.
pub struct Writer {
    output: Arc<Output>,
    codec: Codec,
}

/// Channels on `transport`, whose handshake is done and of which `read` has come already.
pub async fn channels(transport: Transport, read: Bytes, codec: Codec) -> (Reader, Arc<Writer>) {
    let (half, write) = transport.split();
    let output = Output::new(write);
    let incoming = Incoming {
        half,
        output: Arc::clone(&output),
    };
    let stream = serve(incoming, read).await;
    (Reader { stream, codec }, Arc::new(Writer { output, codec }))
}

impl Reader {
    /// The next message; `None` when the client has closed. Cancel-safe.
    pub async fn next(&mut self) -> io::Result<Option<Input>> {
        while let Some(message) = self.stream.next().await {
            let bytes = match message.map_err(broken)? {
                Message::Binary(bytes) => bytes,
                Message::Text(text) => Bytes::from(text),
                Message::Close(_) => return Ok(None),
                _ => continue,
            };
            if let Some(input) = self.codec.decode(bytes)? {
                return Ok(Some(input));
            }
        }
        Ok(None)
    }
}

impl Writer {
    pub async fn send(&self, channel: u8, data: &[u8]) -> io::Result<()> {
        let encoded;
        let (channel, data) = match self.codec {
            Codec::Binary { .. } => (channel, data),
            Codec::Base64 => {
                encoded = STANDARD.encode(data);
                (b'0'.wrapping_add(channel), encoded.as_bytes())
            }
        };
        let header = Header::new(self.codec.of_server(), channel, data.len());
        let turn = self.output.turn().await?;
        turn.send(header.bytes(), data).await
    }

    /// See [`Output::splices`].
    pub fn splices(&self) -> bool {
        self.output.splices() && self.codec != Codec::Base64
    }

    /// Sends what `fill` puts into a pipe, at most as many bytes as it is told, without looking at
    /// them. Returns what `fill` does: 0 at the end, an error of the kind `WouldBlock` if there is
    /// nothing now.
    pub async fn splice(
        &self,
        channel: u8,
        mut fill: impl FnMut(&mut Pipe, usize) -> io::Result<usize>,
    ) -> io::Result<usize> {
        let mut turn = self.output.turn().await?;
        let count = turn.fill(|pipe| fill(pipe, pipe::ROOM))?;
        if count > 0 {
            let header = Header::new(BINARY, channel, count);
            turn.send_pipe(header.bytes()).await?;
        }
        Ok(count)
    }

    /// Says goodbye: a close frame, normal (RFC 6455, section 7.4.1).
    pub async fn finish(&self) -> io::Result<()> {
        let [high, low] = 1000_u16.to_be_bytes();
        self.output.last(&[FIN | CLOSING, 2, high, low]).await
    }
}

/// What tungstenite reads from; its answers go where all else goes.
struct Incoming {
    half: ReadHalf,
    output: Arc<Output>,
}

impl AsyncRead for Incoming {
    fn poll_read(
        mut self: Pin<&mut Self>,
        context: &mut Context<'_>,
        buffer: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        Pin::new(&mut self.half).poll_read(context, buffer)
    }
}

impl AsyncWrite for Incoming {
    fn poll_write(
        self: Pin<&mut Self>,
        _: &mut Context<'_>,
        bytes: &[u8],
    ) -> Poll<io::Result<usize>> {
        let append = |answers: &mut Vec<u8>| answers.extend_from_slice(bytes);
        match self.output.answer(append) {
            ((), true) => Poll::Ready(Ok(bytes.len())),
            ((), false) => Poll::Ready(Err(io::Error::new(
                io::ErrorKind::InvalidData,
                "more pings than the client reads answers to",
            ))),
        }
    }

    fn poll_flush(self: Pin<&mut Self>, _: &mut Context<'_>) -> Poll<io::Result<()>> {
        Poll::Ready(Ok(()))
    }

    fn poll_shutdown(self: Pin<&mut Self>, _: &mut Context<'_>) -> Poll<io::Result<()>> {
        Poll::Ready(Ok(()))
    }
}

fn broken(error: Error) -> io::Error {
    match error {
        Error::Io(error) => error,
        // A client that goes without saying goodbye is gone all the same.
        Error::ConnectionClosed
        | Error::AlreadyClosed
        | Error::Protocol(ProtocolError::ResetWithoutClosingHandshake) => {
            io::ErrorKind::ConnectionReset.into()
        }
        other => io::Error::new(io::ErrorKind::InvalidData, other),
    }
}

/// A WebSocket whose binary messages carry a stream of bytes.
pub struct Tunnel {
    socket: WebSocketStream<Transport>,
    /// Of a message, what has not been read.
    received: VecDeque<Bytes>,
    ended: bool,
}

impl Tunnel {
    pub fn new(socket: WebSocketStream<Transport>) -> Self {
        Tunnel {
            socket,
            received: VecDeque::new(),
            ended: false,
        }
    }

    pub fn watch(&self) -> Arc<Watch> {
        self.socket.get_ref().watch()
    }
}

impl AsyncRead for Tunnel {
    fn poll_read(
        mut self: Pin<&mut Self>,
        context: &mut Context<'_>,
        buffer: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        loop {
            if let Some(first) = self.received.front_mut() {
                let count = first.len().min(buffer.remaining());
                buffer.put_slice(first.get(..count).unwrap_or_default());
                first.advance(count);
                if first.is_empty() {
                    self.received.pop_front();
                }
                if count > 0 {
                    return Poll::Ready(Ok(()));
                }
                continue;
            }
            if self.ended {
                return Poll::Ready(Ok(()));
            }
            match ready!(Pin::new(&mut self.socket).poll_next(context)) {
                Some(Ok(Message::Binary(bytes))) if !bytes.is_empty() => {
                    self.received.push_back(bytes);
                }
                Some(Ok(Message::Close(_))) | None => self.ended = true,
                Some(Ok(_)) => {}
                Some(Err(error)) => return Poll::Ready(Err(broken(error))),
            }
        }
    }
}

impl AsyncWrite for Tunnel {
    fn poll_write(
        self: Pin<&mut Self>,
        context: &mut Context<'_>,
        bytes: &[u8],
    ) -> Poll<io::Result<usize>> {
        self.poll_write_vectored(context, &[IoSlice::new(bytes)])
    }

    fn poll_write_vectored(
        mut self: Pin<&mut Self>,
        context: &mut Context<'_>,
        slices: &[IoSlice<'_>],
    ) -> Poll<io::Result<usize>> {
        ready!(Pin::new(&mut self.socket).poll_ready(context)).map_err(broken)?;
        let mut message = Vec::new();
        for slice in slices {
            let room = MAX_TUNNELLED - message.len();
            let taken = slice.get(..room.min(slice.len())).unwrap_or_default();
            message.extend_from_slice(taken);
        }
        let count = message.len();
        let sent = Pin::new(&mut self.socket).start_send(Message::Binary(message.into()));
        sent.map_err(broken)?;
        match Pin::new(&mut self.socket).poll_flush(context) {
            Poll::Ready(Err(error)) => Poll::Ready(Err(broken(error))),
            _ => Poll::Ready(Ok(count)),
        }
    }

    fn is_write_vectored(&self) -> bool {
        true
    }

    fn poll_flush(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.socket)
            .poll_flush(context)
            .map_err(broken)
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.socket)
            .poll_close(context)
            .map_err(broken)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_message_begins_with_its_channel() {
        let codec = Codec::Binary { close: true };
        let decoded = codec.decode(Bytes::from_static(b"\x00hello")).unwrap();
        assert_eq!(decoded, Some(Input::Data(0, Bytes::from_static(b"hello"))));
        assert_eq!(
            codec.decode(Bytes::from_static(&[255, 0])).unwrap(),
            Some(Input::Close(0))
        );
        assert!(codec.decode(Bytes::from_static(&[255])).is_err());
        assert_eq!(codec.decode(Bytes::new()).unwrap(), None);
        let v4 = Codec::Binary { close: false };
        assert_eq!(
            v4.decode(Bytes::from_static(&[255, 0])).unwrap(),
            Some(Input::Data(255, Bytes::from_static(&[0])))
        );
    }

    #[test]
    fn base64_messages_begin_with_a_digit() {
        let decoded = Codec::Base64
            .decode(Bytes::from_static(b"0Zm9vCg=="))
            .unwrap();
        assert_eq!(decoded, Some(Input::Data(0, Bytes::from_static(b"foo\n"))));
        assert!(Codec::Base64.decode(Bytes::from_static(b"0!")).is_err());
    }

    #[test]
    fn a_header_is_as_long_as_its_length_wants() {
        let header = |length| Header::new(BINARY, 1, length).bytes().to_vec();
        assert_eq!(header(0), [0x82, 1, 1]);
        assert_eq!(header(124), [0x82, 125, 1]);
        assert_eq!(header(125), [0x82, 126, 0, 126, 1]);
        assert_eq!(header(0xfffe), [0x82, 126, 0xff, 0xff, 1]);
        assert_eq!(header(0xffff), [0x82, 127, 0, 0, 0, 0, 0, 1, 0, 0, 1]);
    }
}
