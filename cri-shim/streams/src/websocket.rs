//! Channels in a WebSocket: each message begins with the number of its channel.

use std::io;
use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Poll, ready};

use base64::Engine;
use base64::engine::general_purpose::STANDARD;
use bytes::Bytes;
use futures_util::StreamExt;
use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};
use tokio_tungstenite::WebSocketStream;
use tokio_tungstenite::tungstenite::error::ProtocolError;
use tokio_tungstenite::tungstenite::protocol::{Role, WebSocketConfig};
use tokio_tungstenite::tungstenite::{Error, Message};

use crate::buffers::IncompleteMessage;
use crate::halves::ReadHalf;
use crate::output::Output;
use crate::pipe::{self, Pipe};
use crate::transport::Transport;

/// The maximum size in bytes of a client's message, which is stored in memory as a whole.
/// Kubernetes' clients send messages of 32 KiB.
const MAX_MESSAGE_BYTES: usize = 1 << 20;

/// The size in bytes of the read buffer of a WebSocket session. The buffer is small, because every
/// session has its own buffer.
const READ_BYTES: usize = 16 << 10;

/// The length of the header of a client's control frame: two bytes, and the mask (RFC 6455,
/// section 5.2).
const CONTROL_HEADER_BYTES: usize = 6;

/// The flag in a frame's first byte that marks the last frame of a message. Each message that the
/// server sends is a single frame.
const FIN: u8 = 0x80;
const OPCODE_TEXT: u8 = 1;
const OPCODE_BINARY: u8 = 2;
const OPCODE_CLOSE: u8 = 8;

/// The first byte of a message that closes a channel in version 5 of the channel protocol. The
/// second byte is the channel's number.
const CLOSE_CHANNEL: u8 = 255;

/// Opens a WebSocket on `transport`, whose WebSocket handshake is complete. `read` is the data that
/// has already been read from the transport.
pub(crate) async fn serve<T: AsyncRead + AsyncWrite + Unpin>(
    transport: T,
    read: Bytes,
) -> WebSocketStream<CountedTransport<T>> {
    let transport = CountedTransport {
        transport,
        message: IncompleteMessage::default(),
    };
    let config = WebSocketConfig::default()
        .read_buffer_size(READ_BYTES)
        .write_buffer_size(0)
        .max_message_size(Some(MAX_MESSAGE_BYTES))
        .max_frame_size(Some(MAX_MESSAGE_BYTES));
    WebSocketStream::from_partially_read(transport, read.to_vec(), Role::Server, Some(config)).await
}

/// A transport that counts the bytes of the message that is not complete yet.
pub(crate) struct CountedTransport<T> {
    transport: T,
    message: IncompleteMessage,
}

impl<T> CountedTransport<T> {
    /// Records that the client's message `message` is complete.
    pub(crate) fn received(&mut self, message: &Message) {
        match message {
            // A control frame can arrive between the frames of a message.
            Message::Ping(data) | Message::Pong(data) => {
                self.message.subtract(CONTROL_HEADER_BYTES + data.len());
            }
            _ => self.message.complete(),
        }
    }
}

impl<T: AsyncRead + Unpin> AsyncRead for CountedTransport<T> {
    fn poll_read(
        mut self: Pin<&mut Self>,
        context: &mut Context<'_>,
        buffer: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        let before = buffer.filled().len();
        ready!(Pin::new(&mut self.transport).poll_read(context, buffer))?;
        let count = buffer.filled().len() - before;
        Poll::Ready(self.message.add(count))
    }
}

impl<T: AsyncWrite + Unpin> AsyncWrite for CountedTransport<T> {
    fn poll_write(
        mut self: Pin<&mut Self>,
        context: &mut Context<'_>,
        bytes: &[u8],
    ) -> Poll<io::Result<usize>> {
        Pin::new(&mut self.transport).poll_write(context, bytes)
    }

    fn poll_flush(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.transport).poll_flush(context)
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.transport).poll_shutdown(context)
    }
}

/// The encoding of a channel's number and data in a message.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Codec {
    /// Binary messages. `close` is true if the client can close a channel, as in version 5 of the
    /// channel protocol.
    Binary { close: bool },
    /// Text messages, which contain the channel as a digit and the data as base64.
    Base64,
}

/// A message from a client.
#[derive(Debug, PartialEq, Eq)]
pub(crate) enum ChannelMessage {
    Data(u8, Bytes),
    Close(u8),
}

impl Codec {
    pub(crate) fn decode(self, message: Bytes) -> io::Result<Option<ChannelMessage>> {
        let Some((&first, rest)) = message.split_first() else {
            return Ok(None);
        };
        match self {
            Codec::Binary { close: true } if first == CLOSE_CHANNEL => match rest {
                [channel] => Ok(Some(ChannelMessage::Close(*channel))),
                _ => Err(io::ErrorKind::InvalidData.into()),
            },
            Codec::Binary { .. } => Ok(Some(ChannelMessage::Data(first, message.slice(1..)))),
            Codec::Base64 => {
                let bytes = STANDARD
                    .decode(rest)
                    .map_err(|_| io::Error::from(io::ErrorKind::InvalidData))?;
                Ok(Some(ChannelMessage::Data(
                    first.wrapping_sub(b'0'),
                    bytes.into(),
                )))
            }
        }
    }

    fn opcode(self) -> u8 {
        match self {
            Codec::Binary { .. } => OPCODE_BINARY,
            Codec::Base64 => OPCODE_TEXT,
        }
    }
}

/// The header of a message that the server sends. This header consists of the header of a WebSocket
/// frame (RFC 6455, section 5.2) and the channel's number. The frame is unmasked and contains the
/// complete message.
struct MessageHeader {
    bytes: [u8; 11],
    /// The length of the header in bytes.
    length: usize,
}

impl MessageHeader {
    fn new(opcode: u8, channel: u8, length: usize) -> Self {
        let mut header = MessageHeader {
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

/// The receiving side of a WebSocket's channels.
pub(crate) struct WebSocketReader {
    stream: WebSocketStream<CountedTransport<WebSocketIo>>,
    codec: Codec,
}

/// The sending side of a WebSocket's channels.
pub(crate) struct WebSocketWriter {
    output: Arc<Output>,
    codec: Codec,
}

/// Opens channels on `transport`, whose WebSocket handshake is complete. `read` is the data that
/// has already been read from the transport.
pub(crate) async fn open(
    transport: Transport,
    read: Bytes,
    codec: Codec,
) -> (WebSocketReader, Arc<WebSocketWriter>) {
    let (half, write) = transport.split();
    let output = Output::new(write);
    let incoming = WebSocketIo {
        half,
        output: Arc::clone(&output),
    };
    let stream = serve(incoming, read).await;
    (
        WebSocketReader { stream, codec },
        Arc::new(WebSocketWriter { output, codec }),
    )
}

impl WebSocketReader {
    /// Returns the next message, or `None` if the client has closed the connection. The call is
    /// cancel-safe.
    pub(crate) async fn next(&mut self) -> io::Result<Option<ChannelMessage>> {
        while let Some(message) = self.stream.next().await {
            let message = message.map_err(broken)?;
            self.stream.get_mut().received(&message);
            let bytes = match message {
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

impl WebSocketWriter {
    pub(crate) async fn send(&self, channel: u8, data: &[u8]) -> io::Result<()> {
        let encoded;
        let (channel, data) = match self.codec {
            Codec::Binary { .. } => (channel, data),
            Codec::Base64 => {
                encoded = STANDARD.encode(data);
                (b'0'.wrapping_add(channel), encoded.as_bytes())
            }
        };
        let header = MessageHeader::new(self.codec.opcode(), channel, data.len());
        let permit = self.output.acquire().await?;
        permit.send(header.bytes(), data).await
    }

    /// Returns whether [`Self::splice`] can be used. The output must support splicing
    /// ([`Output::splices`]), and the data must not be encoded as base64.
    pub(crate) fn splices(&self) -> bool {
        self.output.splices() && self.codec != Codec::Base64
    }

    /// Sends the bytes that `fill` moves into a pipe, without copying them into this process's
    /// memory. `fill` receives the pipe and the maximum number of bytes that `fill` may move.
    /// Returns the result of `fill`, which is the number of moved bytes, or 0 at the end of the
    /// data. If no data is available now, the result is an error of the kind `WouldBlock`.
    pub(crate) async fn splice(
        &self,
        channel: u8,
        mut fill: impl FnMut(&mut Pipe, usize) -> io::Result<usize>,
    ) -> io::Result<usize> {
        let mut permit = self.output.acquire().await?;
        let count = permit.fill(|pipe| fill(pipe, pipe::PIPE_BYTES))?;
        if count > 0 {
            let header = MessageHeader::new(OPCODE_BINARY, channel, count);
            permit.send_pipe(header.bytes()).await?;
        }
        Ok(count)
    }

    /// Sends a close frame with the status "normal closure" (RFC 6455, section 7.4.1).
    pub(crate) async fn finish(&self) -> io::Result<()> {
        let [high, low] = 1000_u16.to_be_bytes();
        self.output
            .finish(&[FIN | OPCODE_CLOSE, 2, high, low])
            .await
    }
}

/// The stream from which tungstenite reads and to which it writes. The library tungstenite writes
/// only pongs and close frames. The server sends these frames through the same [`Output`] as all
/// other data.
struct WebSocketIo {
    half: ReadHalf,
    output: Arc<Output>,
}

impl AsyncRead for WebSocketIo {
    fn poll_read(
        mut self: Pin<&mut Self>,
        context: &mut Context<'_>,
        buffer: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        Pin::new(&mut self.half).poll_read(context, buffer)
    }
}

impl AsyncWrite for WebSocketIo {
    fn poll_write(
        self: Pin<&mut Self>,
        _: &mut Context<'_>,
        bytes: &[u8],
    ) -> Poll<io::Result<usize>> {
        let append = |replies: &mut Vec<u8>| replies.extend_from_slice(bytes);
        match self.output.reply(append) {
            ((), true) => Poll::Ready(Ok(bytes.len())),
            ((), false) => Poll::Ready(Err(io::Error::new(
                io::ErrorKind::InvalidData,
                "the client sends pings without reading the answers",
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

/// Converts an error of the WebSocket to an I/O error of the connection.
pub(crate) fn broken(error: Error) -> io::Error {
    match error {
        Error::Io(error) => error,
        // A client is allowed to disconnect without a close frame, so such a disconnect is not a
        // protocol error.
        Error::ConnectionClosed
        | Error::AlreadyClosed
        | Error::Protocol(ProtocolError::ResetWithoutClosingHandshake) => {
            io::ErrorKind::ConnectionReset.into()
        }
        other => io::Error::new(io::ErrorKind::InvalidData, other),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_message_begins_with_its_channel() {
        let codec = Codec::Binary { close: true };
        let decoded = codec.decode(Bytes::from_static(b"\x00hello")).unwrap();
        assert_eq!(
            decoded,
            Some(ChannelMessage::Data(0, Bytes::from_static(b"hello")))
        );
        assert_eq!(
            codec.decode(Bytes::from_static(&[255, 0])).unwrap(),
            Some(ChannelMessage::Close(0))
        );
        assert!(codec.decode(Bytes::from_static(&[255])).is_err());
        assert_eq!(codec.decode(Bytes::new()).unwrap(), None);
        let v4 = Codec::Binary { close: false };
        assert_eq!(
            v4.decode(Bytes::from_static(&[255, 0])).unwrap(),
            Some(ChannelMessage::Data(255, Bytes::from_static(&[0])))
        );
    }

    #[test]
    fn base64_messages_begin_with_a_digit() {
        let decoded = Codec::Base64
            .decode(Bytes::from_static(b"0Zm9vCg=="))
            .unwrap();
        assert_eq!(
            decoded,
            Some(ChannelMessage::Data(0, Bytes::from_static(b"foo\n")))
        );
        assert!(Codec::Base64.decode(Bytes::from_static(b"0!")).is_err());
    }

    #[test]
    fn a_longer_message_needs_a_longer_header() {
        let header = |length| {
            MessageHeader::new(OPCODE_BINARY, 1, length)
                .bytes()
                .to_vec()
        };
        assert_eq!(header(0), [0x82, 1, 1]);
        assert_eq!(header(124), [0x82, 125, 1]);
        assert_eq!(header(125), [0x82, 126, 0, 126, 1]);
        assert_eq!(header(0xfffe), [0x82, 126, 0xff, 0xff, 1]);
        assert_eq!(header(0xffff), [0x82, 127, 0, 0, 0, 0, 0, 1, 0, 0, 1]);
    }
}
