//! The sending side of a client's channels, over SPDY or WebSocket.
//!
//! A channel is identified by the number of its SPDY stream, or by its number on the WebSocket.

use std::io;
use std::sync::Arc;
use std::time::Duration;

use crate::pipe::Pipe;
use crate::spdy_connection::SpdyWriter;
use crate::websocket::WebSocketWriter;

/// The time limit for a client to read the last data and to close the connection.
const CLOSE_TIMEOUT: Duration = Duration::from_secs(10);

/// The sending side of a client's channels, usable from any task.
#[derive(Clone)]
pub(crate) enum Channels {
    Spdy(Arc<SpdyWriter>),
    WebSocket(Arc<WebSocketWriter>),
}

impl Channels {
    /// Sends data, and waits while the client does not read.
    pub(crate) async fn send(&self, channel: u32, data: &[u8]) -> io::Result<()> {
        match self {
            Channels::Spdy(writer) => writer.send(channel, data).await,
            Channels::WebSocket(writer) => writer.send(byte(channel), data).await,
        }
    }

    /// Returns whether [`Self::splice`] can be used. Splicing requires a connection on which the
    /// bytes are sent unchanged.
    pub(crate) fn splices(&self) -> bool {
        match self {
            Channels::Spdy(writer) => writer.splices(),
            Channels::WebSocket(writer) => writer.splices(),
        }
    }

    /// Sends the bytes that `fill` moves into a pipe, without copying them into this process's
    /// memory. `fill` receives the pipe and the maximum number of bytes that `fill` may move.
    /// Returns the result of `fill`, which is the number of moved bytes, or 0 at the end of the
    /// data. If no data is available now, the result is an error of the kind `WouldBlock`.
    pub(crate) async fn splice(
        &self,
        channel: u32,
        fill: impl FnMut(&mut Pipe, usize) -> io::Result<usize>,
    ) -> io::Result<usize> {
        match self {
            Channels::Spdy(writer) => writer.splice(channel, fill).await,
            Channels::WebSocket(writer) => writer.splice(byte(channel), fill).await,
        }
    }

    /// Closes the server's half of a SPDY stream. The call has no effect on a WebSocket, because a
    /// server can't close a channel of a WebSocket.
    pub(crate) async fn close(&self, channel: u32) -> io::Result<()> {
        match self {
            Channels::Spdy(writer) => writer.close(channel).await,
            Channels::WebSocket(_) => Ok(()),
        }
    }

    /// Closes the server's half of a SPDY stream, without waiting. The call has no effect on a
    /// WebSocket.
    pub(crate) fn close_soon(&self, channel: u32) {
        if let Channels::Spdy(writer) = self {
            writer.close_soon(channel);
        }
    }

    /// Closes both halves of a SPDY stream, without waiting. The call has no effect on a WebSocket,
    /// because a server can't close a channel of a WebSocket.
    pub(crate) fn reset(&self, channel: u32) {
        if let Channels::Spdy(writer) = self {
            writer.reset(channel);
        }
    }

    /// Records that the server has processed `count` bytes of a channel's data. The client may then
    /// send `count` more bytes. The call has no effect on a WebSocket, because a WebSocket has no
    /// flow control.
    pub(crate) fn consumed(&self, channel: u32, count: usize) {
        if let Channels::Spdy(writer) = self {
            writer.consumed(channel, count);
        }
    }

    /// Closes the connection so that the client receives all data. `rest` reads the data that the
    /// client still sends. Without `rest`, the server could close the connection before it has read
    /// all data from the client. The kernel would then discard the server's data that the client
    /// has not read yet.
    pub(crate) async fn finish(&self, rest: impl Future<Output = ()>) -> io::Result<()> {
        if let Channels::WebSocket(writer) = self {
            writer.finish().await?;
        }
        let _ = tokio::time::timeout(CLOSE_TIMEOUT, rest).await;
        if let Channels::Spdy(writer) = self {
            writer.finish().await?;
        }
        Ok(())
    }
}

/// Returns a WebSocket channel's number, which is one byte.
fn byte(channel: u32) -> u8 {
    let [number, ..] = channel.to_le_bytes();
    number
}
