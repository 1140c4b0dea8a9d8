//! The receiving side of a client.

use std::collections::VecDeque;
use std::io;

use bytes::Bytes;
use rustix::termios::Winsize;

use super::channel::{Channel, ChannelIds};
use super::resize::{ResizeParser, resize};
use crate::channels::Channels;
use crate::descriptor::Descriptor;
use crate::spdy::Event;
use crate::spdy_connection::SpdyReader;
use crate::watch::Watch;
use crate::websocket::{ChannelMessage, WebSocketReader};

/// How much stdin may be queued while looking for a resize message behind it, when the program does
/// not read.
const MAX_QUEUED_BYTES: usize = 1 << 20;

/// What a message costs beside its bytes: one may have none.
const MESSAGE_OVERHEAD_BYTES: usize = 64;

/// What a client does.
#[derive(Debug)]
pub enum ClientInput {
    Stdin(Bytes),
    StdinEnd,
    Resize(Winsize),
}

/// What became of a piece of stdin.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum StdinWrite {
    Complete,
    /// The program reads no more.
    Closed,
    ClientGone,
}

/// Data on a channel; `None` is the channel's end.
pub(super) type Received = (Channel, Option<Bytes>);

/// What a client is read from.
pub(super) enum Source {
    Spdy(Box<SpdyReader>),
    WebSocket(Box<WebSocketReader>),
}

/// The receiving side of a client.
pub struct ClientReceiver {
    source: Source,
    channels: Channels,
    ids: ChannelIds,
    /// What has come and [`Self::next`] has not returned yet.
    queue: VecDeque<Received>,
    resizes: ResizeParser,
    /// Bytes of stdin that [`Self::next`] has returned and that have not been passed on yet.
    unconsumed: usize,
    /// Set when the client disconnects; queued input is still delivered first.
    gone: Option<io::Result<()>>,
}

impl ClientReceiver {
    pub(super) fn new(
        source: Source,
        channels: Channels,
        ids: ChannelIds,
        queue: VecDeque<Received>,
    ) -> Self {
        ClientReceiver {
            source,
            channels,
            ids,
            queue,
            resizes: ResizeParser::default(),
            unconsumed: 0,
            gone: None,
        }
    }

    /// What the client does next; `None` when it has gone. Cancel-safe. Data that it returned has
    /// been passed on when it is called again.
    pub async fn next(&mut self) -> io::Result<Option<ClientInput>> {
        if self.unconsumed > 0
            && let Some(stdin) = self.ids.get(Channel::Stdin)
        {
            self.channels.consumed(stdin, self.unconsumed);
        }
        self.unconsumed = 0;
        loop {
            let Some(received) = self.queue.pop_front() else {
                match self.gone.take() {
                    Some(gone) => return gone.map(|()| None),
                    None if self.receive().await? => continue,
                    None => return Ok(None),
                }
            };
            match received {
                (Channel::Stdin, Some(bytes)) if !bytes.is_empty() => {
                    self.unconsumed = bytes.len();
                    return Ok(Some(ClientInput::Stdin(bytes)));
                }
                (Channel::Stdin, None) => return Ok(Some(ClientInput::StdinEnd)),
                (Channel::Resize, Some(bytes)) => {
                    if let Some(size) = self.resizes.parse(&bytes) {
                        return Ok(Some(ClientInput::Resize(size)));
                    }
                }
                _ => {}
            }
        }
    }

    /// Writes what is meant for stdin, waiting while the program does not read. A new size of its
    /// terminal does not wait for that.
    pub async fn feed(
        &mut self,
        to: &Descriptor,
        bytes: &[u8],
        terminal: Option<&Descriptor>,
        watch: &Watch,
    ) -> StdinWrite {
        let written = to.write_all(bytes);
        tokio::pin!(written);
        loop {
            tokio::select! {
                // Check whether the client is still there only if the write blocks.
                biased;
                written = &mut written => return match written {
                    Ok(()) => StdinWrite::Complete,
                    Err(_) => StdinWrite::Closed,
                },
                () = watch.gone() => return StdinWrite::ClientGone,
                size = self.next_size(), if terminal.is_some() => {
                    if let Some(terminal) = terminal {
                        resize(terminal, size);
                    }
                }
            }
        }
    }

    /// The next size that the client sends. Whatever it sends before is queued. Cancel-safe.
    async fn next_size(&mut self) -> Winsize {
        let (mut searched, mut queued) = (0, 0);
        loop {
            while let Some((channel, bytes)) = self.queue.get(searched) {
                if *channel != Channel::Resize {
                    searched += 1;
                    queued += bytes.as_ref().map_or(0, Bytes::len) + MESSAGE_OVERHEAD_BYTES;
                    continue;
                }
                let bytes = bytes.clone().unwrap_or_default();
                self.queue.remove(searched);
                if let Some(size) = self.resizes.parse(&bytes) {
                    return size;
                }
            }
            if self.gone.is_some() || queued > MAX_QUEUED_BYTES {
                return std::future::pending().await;
            }
            match self.receive().await {
                Ok(true) => {}
                Ok(false) => self.gone = Some(Ok(())),
                Err(error) => self.gone = Some(Err(error)),
            }
        }
    }

    /// Waits for more; false when the client has gone. Cancel-safe.
    async fn receive(&mut self) -> io::Result<bool> {
        match &mut self.source {
            Source::Spdy(reader) => match reader.next().await? {
                None | Some(Event::GoAway) => return Ok(false),
                Some(Event::Opened { stream, .. }) => self.channels.reset(stream),
                Some(event) => {
                    queue_event(&self.ids, event, &mut self.queue);
                }
            },
            Source::WebSocket(reader) => {
                let (number, bytes) = match reader.next().await? {
                    None => return Ok(false),
                    Some(ChannelMessage::Data(number, bytes)) => (number, Some(bytes)),
                    Some(ChannelMessage::Close(number)) => (number, None),
                };
                if let Some(channel) = self.ids.find(number.into()) {
                    self.queue.push_back((channel, bytes));
                }
            }
        }
        Ok(true)
    }
}

/// Queues what an event brings on a channel. Returns about how much that was.
pub(super) fn queue_event(ids: &ChannelIds, event: Event, queue: &mut VecDeque<Received>) -> usize {
    let (stream, bytes, fin) = match event {
        Event::Data { stream, bytes, fin } => (stream, bytes, fin),
        Event::Reset { stream } => (stream, Bytes::new(), true),
        Event::Opened { .. } | Event::GoAway => return 0,
    };
    let Some(channel) = ids.find(stream) else {
        return 0;
    };
    let length = bytes.len();
    if length > 0 {
        queue.push_back((channel, Some(bytes)));
    }
    queue.extend(fin.then_some((channel, None)));
    length + 1
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use tokio::io::AsyncWriteExt;
    use tokio::net::{TcpListener, TcpStream};

    use super::*;
    use crate::transport::Transport;
    use crate::websocket::{self, Codec};

    /// A receiver, and its client's end of a WebSocket.
    async fn received() -> io::Result<(ClientReceiver, TcpStream)> {
        let listener = TcpListener::bind(("127.0.0.1", 0)).await?;
        let client = TcpStream::connect(listener.local_addr()?).await?;
        let (server, _) = listener.accept().await?;
        let transport = Transport::accept(server, None).await?;
        let codec = Codec::Binary { close: true };
        let (reader, writer) = websocket::open(transport, Bytes::new(), codec).await;
        let source = Source::WebSocket(Box::new(reader));
        let (channels, ids) = (Channels::WebSocket(writer), ChannelIds::of_websocket());
        let receiver = ClientReceiver::new(source, channels, ids, VecDeque::new());
        Ok((receiver, client))
    }

    /// A client's message, masked with zeros.
    fn message(channel: Channel, data: &str) -> Vec<u8> {
        let length = u8::try_from(data.len() + 1).unwrap_or(0);
        let mut message = vec![0x82, 0x80 | length, 0, 0, 0, 0, channel as u8];
        message.extend_from_slice(data.as_bytes());
        message
    }

    #[tokio::test]
    async fn a_size_is_found_behind_what_is_typed() -> io::Result<()> {
        let (mut receiver, mut client) = received().await?;
        client.write_all(&message(Channel::Stdin, "typed")).await?;
        let size = message(Channel::Resize, r#"{"Width":101,"Height":31}"#);
        client.write_all(&size).await?;
        let size = receiver.next_size().await;
        assert_eq!((size.ws_col, size.ws_row), (101, 31));
        let kept = receiver.next().await?;
        assert!(matches!(kept, Some(ClientInput::Stdin(bytes)) if bytes == "typed"));
        Ok(())
    }

    #[tokio::test]
    async fn messages_without_bytes_are_not_kept_without_end() -> io::Result<()> {
        let (mut receiver, mut client) = received().await?;
        let sending = tokio::spawn(async move {
            let empty =
                message(Channel::Stdin, "").repeat(MAX_QUEUED_BYTES / MESSAGE_OVERHEAD_BYTES + 2);
            let size = message(Channel::Resize, r#"{"Width":101,"Height":31}"#);
            client.write_all(&empty).await?;
            client.write_all(&size).await?;
            Ok::<_, io::Error>(client)
        });
        // What is behind all that is not looked at.
        let found = tokio::time::timeout(Duration::from_secs(2), receiver.next_size()).await;
        assert!(found.is_err());
        assert!(receiver.queue.len() <= MAX_QUEUED_BYTES / MESSAGE_OVERHEAD_BYTES + 1);
        sending.abort();
        Ok(())
    }
}
