//! The sending side of a client's channels, in either protocol family.
//!
//! A channel is named by the number of its SPDY stream, or by its number on the WebSocket.

use std::io;
use std::sync::Arc;
use std::time::Duration;

use crate::pipe::Pipe;
use crate::spdy_connection::SpdyWriter;
use crate::websocket::WebSocketWriter;

/// How long a client may take to read what it was sent, and to close the connection.
const CLOSE_TIMEOUT: Duration = Duration::from_secs(10);

/// Sends on a client's channels, from any task.
#[derive(Clone)]
pub(crate) enum Channels {
    Spdy(Arc<SpdyWriter>),
    WebSocket(Arc<WebSocketWriter>),
}

impl Channels {
    /// Sends data, waiting while the client takes none.
    pub(crate) async fn send(&self, channel: u32, data: &[u8]) -> io::Result<()> {
        match self {
            Channels::Spdy(writer) => writer.send(channel, data).await,
            Channels::WebSocket(writer) => writer.send(byte(channel), data).await,
        }
    }

    /// Whether [`Self::splice`] can send: nothing is done to the bytes on their way.
    pub(crate) fn splices(&self) -> bool {
        match self {
            Channels::Spdy(writer) => writer.splices(),
            Channels::WebSocket(writer) => writer.splices(),
        }
    }

    /// Sends what `fill` puts into a pipe, at most as many bytes as it is passed, without copying
    /// them. Returns what `fill` returns: 0 at the end, an error of the kind `WouldBlock` if there is
    /// nothing now.
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

    /// Closes our half of a channel. On a WebSocket a server cannot.
    pub(crate) async fn close(&self, channel: u32) -> io::Result<()> {
        match self {
            Channels::Spdy(writer) => writer.close(channel).await,
            Channels::WebSocket(_) => Ok(()),
        }
    }

    /// Ends both halves of a channel, without waiting. On a WebSocket a server cannot.
    pub(crate) fn reset(&self, channel: u32) {
        if let Channels::Spdy(writer) = self {
            writer.reset(channel);
        }
    }

    /// `count` bytes of a channel have been passed on, so the client may send as many more. A
    /// WebSocket has no windows.
    pub(crate) fn consumed(&self, channel: u32, count: usize) {
        if let Channels::Spdy(writer) = self {
            writer.consumed(channel, count);
        }
    }

    /// Closes the connection in order. `rest` reads what the client still sends: if a connection is
    /// closed with unread data, the kernel discards what the client has not read yet.
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

/// A WebSocket's channels are numbered by a byte.
fn byte(channel: u32) -> u8 {
    let [number, ..] = channel.to_le_bytes();
    number
}
