//! Opens the channels of exec and attach. A SPDY client opens a stream for each channel; on a
//! WebSocket, all channels exist from the start.

use std::collections::VecDeque;
use std::io;
use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;

use super::channel::{Channel, ChannelIds};
use super::receiver::{ClientReceiver, Received, Source, queue_event};
use super::sender::ClientSender;
use crate::channels::Channels;
use crate::spdy::Event;
use crate::spdy_connection::{self, SpdyReader, SpdyWriter};
use crate::transport::Transport;
use crate::upgrade::{CommandProtocol, Version};
use crate::watch::Watch;
use crate::websocket::{self, WebSocketReader, WebSocketWriter};

/// The time limit for a client to open its streams.
const STREAM_OPEN_TIMEOUT: Duration = Duration::from_secs(30);

/// The maximum number of bytes that a client can send before it has opened all its streams.
const MAX_EARLY_BYTES: usize = 64 << 10;

/// The streams that the CRI request Exec or Attach specifies.
#[derive(Clone, Copy, Debug, Default)]
pub struct StreamOptions {
    pub stdin: bool,
    pub stdout: bool,
    pub stderr: bool,
    pub tty: bool,
}

/// Waits until the client on `transport` has opened its channels. `read` is the data that has
/// already been read from the client.
pub async fn open(
    protocol: CommandProtocol,
    transport: Transport,
    read: Bytes,
    options: StreamOptions,
) -> io::Result<(ClientReceiver, ClientSender)> {
    let watch = transport.watch();
    match protocol {
        CommandProtocol::Spdy(version) => {
            let (reader, writer) = spdy_connection::open(transport.split(), &read);
            over_spdy(reader, writer, version, options, watch).await
        }
        CommandProtocol::WebSocket(version, codec) => {
            let (reader, writer) = websocket::open(transport, read, codec).await;
            over_websocket(reader, writer, version, options, watch).await
        }
    }
}

async fn over_spdy(
    mut reader: SpdyReader,
    writer: Arc<SpdyWriter>,
    version: Version,
    options: StreamOptions,
    watch: Arc<Watch>,
) -> io::Result<(ClientReceiver, ClientSender)> {
    let opened = wait_for_streams(&mut reader, needed(options, version));
    let (ids, early) = tokio::time::timeout(STREAM_OPEN_TIMEOUT, opened)
        .await
        .map_err(|_| {
            io::Error::new(
                io::ErrorKind::TimedOut,
                "the client did not open its streams in time",
            )
        })??;
    reader.expect_no_headers();
    let channels = Channels::Spdy(writer);
    if version == Version::V1
        && let Some(stdin) = ids.get(Channel::Stdin).filter(|_| options.stdin)
    {
        // Clients that use version 1 of the remotecommand protocol wait until the server closes its
        // half of the stdin stream.
        channels.close(stdin).await?;
    }
    let source = Source::Spdy(Box::new(reader));
    Ok((
        ClientReceiver::new(source, channels.clone(), ids, early),
        ClientSender::new(channels, ids, version, watch),
    ))
}

/// Returns the channels for which a client must open a stream.
fn needed(options: StreamOptions, version: Version) -> Vec<Channel> {
    let resizes = options.tty && version >= Version::V3;
    let channels = [
        (Channel::Error, true),
        (Channel::Stdin, options.stdin),
        (Channel::Stdout, options.stdout),
        (Channel::Stderr, options.stderr),
        (Channel::Resize, resizes),
    ];
    channels
        .into_iter()
        .filter_map(|(channel, needed)| needed.then_some(channel))
        .collect()
}

/// Waits until the client has opened a stream for each channel in `needed`. Returns the streams,
/// and the data that arrived on these streams during the wait.
async fn wait_for_streams(
    reader: &mut SpdyReader,
    needed: Vec<Channel>,
) -> io::Result<(ChannelIds, VecDeque<Received>)> {
    let invalid = |sentence: String| io::Error::new(io::ErrorKind::InvalidData, sentence);
    let (mut ids, mut early, mut length) = (ChannelIds::default(), VecDeque::new(), 0);
    while !needed.iter().all(|channel| ids.get(*channel).is_some()) {
        let event = reader.next().await?;
        match event.ok_or(io::ErrorKind::UnexpectedEof)? {
            Event::Opened {
                stream,
                headers,
                fin,
            } => {
                let kind = headers.get("streamtype").unwrap_or_default();
                let channel = Channel::of_stream(kind)
                    .filter(|channel| ids.get(*channel).is_none())
                    .ok_or_else(|| {
                        invalid(format!(
                            "the client opened an unexpected stream of type {kind:?}"
                        ))
                    })?;
                ids.set(channel, stream);
                early.extend(fin.then_some((channel, None)));
            }
            Event::GoAway => return Err(io::ErrorKind::UnexpectedEof.into()),
            event => length += queue_event(&ids, event, &mut early),
        }
        if length > MAX_EARLY_BYTES {
            return Err(invalid(
                "the client sent too much data before it opened all streams".to_owned(),
            ));
        }
    }
    Ok((ids, early))
}

/// Opens the channels of a WebSocket client. The channels exist from the start, but the client
/// waits for a first message from the server. For this reason, the server sends an empty message.
async fn over_websocket(
    reader: WebSocketReader,
    writer: Arc<WebSocketWriter>,
    version: Version,
    options: StreamOptions,
    watch: Arc<Watch>,
) -> io::Result<(ClientReceiver, ClientSender)> {
    let first = match options {
        StreamOptions { stdout: true, .. } => Channel::Stdout,
        StreamOptions { stderr: true, .. } => Channel::Stderr,
        _ => Channel::Error,
    };
    let channels = Channels::WebSocket(writer);
    let sender = ClientSender::new(channels.clone(), ChannelIds::of_websocket(), version, watch);
    sender.send(first, &[]).await?;
    let source = Source::WebSocket(Box::new(reader));
    let receiver = ClientReceiver::new(
        source,
        channels,
        ChannelIds::of_websocket(),
        VecDeque::new(),
    );
    Ok((receiver, sender))
}
