//! The receiving side of exec and attach, which returns the client's input.

use std::collections::VecDeque;
use std::io;

use bytes::Bytes;
use rustix::termios::Winsize;

use super::channel::{Channel, ChannelIds};
use super::resize::{Resizable, ResizeParser};
use crate::channels::Channels;
use crate::descriptor::Descriptor;
use crate::spdy::Event;
use crate::spdy_connection::SpdyReader;
use crate::watch::Watch;
use crate::websocket::{ChannelMessage, WebSocketReader};

/// The maximum number of queued bytes of stdin. While the program does not read its stdin, the
/// server still reads from the client, because the client can send resize messages. The server
/// queues the data for stdin that arrives during this time.
const MAX_QUEUED_BYTES: usize = 1 << 20;

/// The number of bytes that each queued message counts towards [`MAX_QUEUED_BYTES`], in addition to
/// its length. Without these bytes, an empty message would count as 0 bytes. A client could then
/// make the server queue any number of empty messages.
const MESSAGE_OVERHEAD_BYTES: usize = 64;

/// An input from the client: data for stdin, the end of stdin, or a new terminal size.
#[derive(Debug)]
pub enum ClientInput {
    Stdin(Bytes),
    StdinEnd,
    Resize(Winsize),
}

/// The result of writing data to the program's stdin.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum StdinWrite {
    Complete,
    /// The program has closed its stdin.
    Closed,
    ClientGone,
}

/// A channel with a piece of its data. `None` marks the end of the channel's data.
pub(super) type Received = (Channel, Option<Bytes>);

/// The reader of the client's data, over SPDY or WebSocket.
pub(super) enum Source {
    Spdy(Box<SpdyReader>),
    WebSocket(Box<WebSocketReader>),
}

/// The receiver of the client's input for one exec or attach.
pub struct ClientReceiver {
    source: Source,
    channels: Channels,
    ids: ChannelIds,
    /// The data that has arrived but that [`Self::next`] has not returned yet.
    queue: VecDeque<Received>,
    resizes: ResizeParser,
    /// The number of bytes of stdin that [`Self::next`] has returned but that the program has not
    /// read yet.
    unconsumed: usize,
    /// The reason why the connection ended: `Ok` if the client disconnected, or the error of the
    /// last read. `None` while the client is connected. [`Self::next`] returns the queued input
    /// before this result.
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

    /// Returns the client's next input, or `None` if the client has disconnected. The call is
    /// cancel-safe. Before the caller calls this function again, it must write the returned data to
    /// the program. The next call counts this data as consumed, and allows the client to send more.
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

    /// Writes data to the program's stdin, and waits while the program does not read. If the client
    /// sends a new terminal size during this wait, this function resizes the terminal immediately.
    pub async fn feed(
        &mut self,
        to: &Descriptor,
        bytes: &[u8],
        terminal: Option<&impl Resizable>,
        watch: &Watch,
    ) -> StdinWrite {
        let written = to.write_all(bytes);
        tokio::pin!(written);
        loop {
            tokio::select! {
                // With `biased`, `select!` first polls the write, and checks whether the client is
                // still connected only if the write blocks.
                biased;
                written = &mut written => return match written {
                    Ok(()) => StdinWrite::Complete,
                    Err(_) => StdinWrite::Closed,
                },
                () = watch.gone() => return StdinWrite::ClientGone,
                size = self.next_size(), if terminal.is_some() => {
                    if let Some(terminal) = terminal {
                        terminal.resize(size).await;
                    }
                }
            }
        }
    }

    /// Returns the client's next terminal size, and queues all input that arrives before this size.
    /// Waits for ever if the client has disconnected, or if more than [`MAX_QUEUED_BYTES`] bytes
    /// are queued. The call is cancel-safe.
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

    /// Waits for more data from the client. Returns false if the client has disconnected. The call
    /// is cancel-safe.
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

/// Queues the data of an event. Returns the approximate length of the data.
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

    /// Returns a receiver, and the client's end of the WebSocket from which the receiver reads.
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

    /// Returns a WebSocket message as a client sends it. The message's mask consists of zeros, so
    /// that masking does not change the data.
    fn message(channel: Channel, data: &str) -> Vec<u8> {
        let length = u8::try_from(data.len() + 1).unwrap_or(0);
        let mut message = vec![0x82, 0x80 | length, 0, 0, 0, 0, channel as u8];
        message.extend_from_slice(data.as_bytes());
        message
    }

    #[tokio::test]
    async fn a_resize_message_behind_unread_input_is_found() -> io::Result<()> {
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
    async fn the_number_of_queued_empty_messages_is_limited() -> io::Result<()> {
        let (mut receiver, mut client) = received().await?;
        let sending = tokio::spawn(async move {
            let empty =
                message(Channel::Stdin, "").repeat(MAX_QUEUED_BYTES / MESSAGE_OVERHEAD_BYTES + 2);
            let size = message(Channel::Resize, r#"{"Width":101,"Height":31}"#);
            client.write_all(&empty).await?;
            client.write_all(&size).await?;
            Ok::<_, io::Error>(client)
        });
        // The client sends more input than the receiver can queue, and then the resize message. The
        // receiver therefore does not find the resize message.
        let found = tokio::time::timeout(Duration::from_secs(2), receiver.next_size()).await;
        assert!(found.is_err());
        assert!(receiver.queue.len() <= MAX_QUEUED_BYTES / MESSAGE_OVERHEAD_BYTES + 1);
        sending.abort();
        Ok(())
    }
}
