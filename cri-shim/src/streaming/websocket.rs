//! WebSocket: channels, each message beginning with the number of its own, or a tunnel for SPDY.

use std::collections::VecDeque;
use std::io::{self, IoSlice};
use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Poll, ready};

use base64::Engine;
use base64::engine::general_purpose::STANDARD;
use bytes::{Buf, Bytes};
use futures_util::stream::{SplitSink, SplitStream};
use futures_util::{Sink, SinkExt, Stream, StreamExt};
use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};
use tokio::sync::Mutex;
use tokio_tungstenite::WebSocketStream;
use tokio_tungstenite::tungstenite::error::ProtocolError;
use tokio_tungstenite::tungstenite::protocol::frame::coding::CloseCode;
use tokio_tungstenite::tungstenite::protocol::{CloseFrame, Role, WebSocketConfig};
use tokio_tungstenite::tungstenite::{Error, Message, Utf8Bytes};

use super::transport::{Transport, Watch};

/// The longest message that is taken: it is in memory as a whole. Kubernetes' clients send 32 KiB.
const MAX_MESSAGE: usize = 1 << 20;

/// What a client sends is read in pieces of this; it is part of every session's memory.
const READ: usize = 16 << 10;

/// The most bytes of a tunnel that go into one message.
const MAX_TUNNELLED: usize = 128 << 10;

/// In v5: the other byte names a channel that the client closes.
const CLOSE: u8 = 255;

/// A WebSocket on `transport`, whose handshake is done and of which `read` has come already.
pub async fn serve(transport: Transport, read: Bytes) -> WebSocketStream<Transport> {
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

    fn encode(self, channel: u8, data: &[u8]) -> Message {
        match self {
            Codec::Binary { .. } => {
                let mut message = Vec::with_capacity(data.len() + 1);
                message.push(channel);
                message.extend_from_slice(data);
                Message::Binary(message.into())
            }
            Codec::Base64 => {
                let mut text = String::with_capacity(data.len() / 3 * 4 + 5);
                text.push(char::from(b'0'.wrapping_add(channel)));
                STANDARD.encode_string(data, &mut text);
                Message::Text(text.into())
            }
        }
    }
}

/// The receiving side of channels.
pub struct Reader {
    stream: SplitStream<WebSocketStream<Transport>>,
    codec: Codec,
}

/// The sending side of channels.
pub struct Writer {
    sink: Mutex<SplitSink<WebSocketStream<Transport>, Message>>,
    codec: Codec,
}

pub fn channels(socket: WebSocketStream<Transport>, codec: Codec) -> (Reader, Arc<Writer>) {
    let (sink, stream) = socket.split();
    let writer = Writer {
        sink: Mutex::new(sink),
        codec,
    };
    (Reader { stream, codec }, Arc::new(writer))
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
        let message = self.codec.encode(channel, data);
        self.sink.lock().await.send(message).await.map_err(broken)
    }

    /// Says goodbye.
    pub async fn finish(&self) -> io::Result<()> {
        let mut sink = self.sink.lock().await;
        let normal = CloseFrame {
            code: CloseCode::Normal,
            reason: Utf8Bytes::default(),
        };
        sink.send(Message::Close(Some(normal)))
            .await
            .map_err(broken)
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
        assert_eq!(v4.encode(1, b"x"), Message::Binary(b"\x01x"[..].into()));
    }

    #[test]
    fn base64_messages_begin_with_a_digit() {
        let decoded = Codec::Base64
            .decode(Bytes::from_static(b"0Zm9vCg=="))
            .unwrap();
        assert_eq!(decoded, Some(Input::Data(0, Bytes::from_static(b"foo\n"))));
        assert!(Codec::Base64.decode(Bytes::from_static(b"0!")).is_err());
        assert_eq!(
            Codec::Base64.encode(1, b"\n"),
            Message::Text("1Cg==".into())
        );
    }
}
