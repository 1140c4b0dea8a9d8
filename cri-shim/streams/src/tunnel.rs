//! A tunnel for SPDY in a WebSocket: the contents of all binary messages form one stream of bytes.

use std::collections::VecDeque;
use std::io::{self, IoSlice};
use std::pin::Pin;
use std::task::{Context, Poll, ready};

use bytes::{Buf, Bytes};
use futures_util::{Sink, Stream};
use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};
use tokio_tungstenite::WebSocketStream;
use tokio_tungstenite::tungstenite::Message;

use crate::halves::{self, ReadHalf, WriteHalf};
use crate::transport::Transport;
use crate::websocket::{CountedTransport, broken, serve};

/// The maximum number of bytes in one message that the server sends.
const MAX_TUNNEL_MESSAGE_BYTES: usize = 128 << 10;

/// A WebSocket whose binary messages carry a stream of bytes.
pub(crate) struct Tunnel {
    socket: WebSocketStream<CountedTransport<Transport>>,
    /// The data that has arrived but has not been read yet.
    received: VecDeque<Bytes>,
    ended: bool,
}

impl Tunnel {
    /// Opens a tunnel on `transport`, whose WebSocket handshake is complete. `read` is the data
    /// that has already been read from the transport.
    pub(crate) async fn open(transport: Transport, read: Bytes) -> Self {
        Tunnel {
            socket: serve(transport, read).await,
            received: VecDeque::new(),
            ended: false,
        }
    }

    /// Splits the tunnel into a receiving half and a sending half, for different tasks.
    pub(crate) fn split(self) -> (ReadHalf, WriteHalf) {
        halves::of_stream(self)
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
            let message = ready!(Pin::new(&mut self.socket).poll_next(context));
            if let Some(Ok(message)) = &message {
                self.socket.get_mut().received(message);
            }
            match message {
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
            let room = MAX_TUNNEL_MESSAGE_BYTES - message.len();
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
