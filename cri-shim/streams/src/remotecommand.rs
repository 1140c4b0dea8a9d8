//! What exec and attach have in common: five channels to a client, of either protocol family.
//!
//! Over SPDY each channel is a stream that the client opens, its header `streamType` telling which;
//! over WebSocket each is a number. Source: k8s.io/cri-streaming, whose clients these are.

use std::collections::VecDeque;
use std::io;
use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;
use rustix::termios::Winsize;
use serde::Deserialize;
use serde_json::json;

use super::descriptor::{self, Descriptor};
use super::pipe::Pipe;
use super::spdy::Event;
use super::transport::Watch;
use super::{connection, websocket};
use rrun_kernel::errno::describe;

/// How long a client may take to open its streams.
pub const OPENING: Duration = Duration::from_secs(30);

/// How long it may take to close the connection when everything has been said.
pub const GOODBYE: Duration = Duration::from_secs(10);

/// How much a client may send before it has opened all its streams.
const MAX_EARLY: usize = 64 << 10;

/// How much of what is typed is kept to look behind it for a new size of the terminal, while the
/// program does not read.
const MAX_BEHIND: usize = 1 << 20;

/// What a message costs beside its bytes: one may have none.
const PIECE: usize = 64;

/// The longest resize message.
const MAX_RESIZE: usize = 1 << 10;

/// Channels by their numbers on a WebSocket.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Channel {
    Stdin = 0,
    Stdout = 1,
    Stderr = 2,
    Error = 3,
    Resize = 4,
}

const CHANNELS: [Channel; 5] = [
    Channel::Stdin,
    Channel::Stdout,
    Channel::Stderr,
    Channel::Error,
    Channel::Resize,
];

impl Channel {
    fn of_stream(kind: &str) -> Option<Self> {
        Some(match kind {
            "stdin" => Channel::Stdin,
            "stdout" => Channel::Stdout,
            "stderr" => Channel::Stderr,
            "error" => Channel::Error,
            "resize" => Channel::Resize,
            _ => return None,
        })
    }
}

/// The version of the remotecommand subprotocol, of either family.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Version {
    V1,
    V2,
    V3,
    V4,
    V5,
}

/// What the caller of Exec or Attach asked for.
#[derive(Clone, Copy, Debug, Default)]
pub struct Wanted {
    pub stdin: bool,
    pub stdout: bool,
    pub stderr: bool,
    pub tty: bool,
}

/// What a client does.
#[derive(Debug)]
pub enum Input {
    Stdin(Bytes),
    StdinEnd,
    Resize(Winsize),
}

/// How a command ended, as the client is told.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Outcome {
    /// The exit status as a shell would give it.
    Exit(i32),
    /// Why there is none.
    Failed(String),
}

impl Outcome {
    /// The `Status` object of v4, as JSON.
    fn status(&self) -> String {
        match self {
            Outcome::Exit(0) => json!({ "metadata": {}, "status": "Success" }),
            Outcome::Exit(code) => json!({
                "metadata": {},
                "status": "Failure",
                "message": format!("command terminated with non-zero exit code: {code}"),
                "reason": "NonZeroExitCode",
                "details": { "causes": [{ "reason": "ExitCode", "message": code.to_string() }] },
            }),
            Outcome::Failed(why) => json!({
                "metadata": {},
                "status": "Failure",
                "message": format!("Internal error occurred: {why}"),
                "reason": "InternalError",
                "details": { "causes": [{ "message": why }] },
                "code": 500,
            }),
        }
        .to_string()
    }

    /// What older clients get: nothing after a success, else a sentence.
    fn sentence(&self) -> String {
        match self {
            Outcome::Exit(0) => String::new(),
            Outcome::Exit(code) => {
                format!("command terminated with non-zero exit code: {code}")
            }
            Outcome::Failed(why) => why.clone(),
        }
    }
}

/// The receiving side of a client.
pub struct Receiver {
    source: Source,
    /// Come, and not asked for yet.
    early: VecDeque<Received>,
    resize: Vec<u8>,
    /// Of stdin, what has been given out and not yet passed on.
    unconsumed: usize,
    /// That the client has gone, and what comes before that is still to be asked for.
    gone: Option<io::Result<()>>,
}

/// What became of a piece of stdin.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Fed {
    All,
    /// The program reads no more.
    Unread,
    /// The client has gone.
    Gone,
}

enum Source {
    Spdy(Box<connection::Reader>, Arc<connection::Writer>, Streams),
    WebSocket(Box<websocket::Reader>),
}

/// The sending side of a client.
pub struct Sender {
    sink: Sink,
    version: Version,
    watch: Arc<Watch>,
}

enum Sink {
    Spdy(Arc<connection::Writer>, Streams),
    WebSocket(Arc<websocket::Writer>),
}

/// The stream of each channel, by the channel's number; 0 for none.
type Streams = [u32; CHANNELS.len()];

/// Something on a channel; nothing more on it, if there is no data.
type Received = (Channel, Option<Bytes>);

/// Waits until a SPDY client has opened the streams for what was wanted.
pub async fn over_spdy(
    mut reader: connection::Reader,
    writer: Arc<connection::Writer>,
    version: Version,
    wanted: Wanted,
    watch: Arc<Watch>,
) -> io::Result<(Receiver, Sender)> {
    let needed = [
        (Channel::Error, true),
        (Channel::Stdin, wanted.stdin),
        (Channel::Stdout, wanted.stdout),
        (Channel::Stderr, wanted.stderr),
        (Channel::Resize, wanted.tty && version >= Version::V3),
    ];
    let needed: Vec<Channel> = needed
        .into_iter()
        .filter_map(|(channel, needed)| needed.then_some(channel))
        .collect();
    let mut streams = Streams::default();
    let mut early = VecDeque::new();
    let mut length = 0;
    let opening = async {
        while !needed.iter().all(|channel| streams[*channel as usize] != 0) {
            let event = reader.next().await?;
            match event.ok_or(io::ErrorKind::UnexpectedEof)? {
                Event::Opened {
                    stream,
                    headers,
                    fin,
                } => {
                    let kind = headers.get("streamtype").unwrap_or_default();
                    let Some(channel) =
                        Channel::of_stream(kind).filter(|channel| streams[*channel as usize] == 0)
                    else {
                        let sentence = format!("a stream of type {kind:?} is not expected");
                        return Err(io::Error::new(io::ErrorKind::InvalidData, sentence));
                    };
                    streams[channel as usize] = stream;
                    early.extend(fin.then_some((channel, None)));
                }
                Event::GoAway => return Err(io::ErrorKind::UnexpectedEof.into()),
                event => {
                    length += take(&streams, event, &mut early);
                }
            }
            if length > MAX_EARLY {
                let sentence = "data before all streams are open";
                return Err(io::Error::new(io::ErrorKind::InvalidData, sentence));
            }
        }
        Ok(())
    };
    tokio::time::timeout(OPENING, opening)
        .await
        .map_err(|_| io::Error::new(io::ErrorKind::TimedOut, "the client opened no streams"))??;
    reader.expect_no_headers();
    if version == Version::V1 && wanted.stdin {
        // The first clients wait for that.
        writer.close(streams[Channel::Stdin as usize]).await?;
    }
    let receiver = Receiver::new(
        Source::Spdy(Box::new(reader), Arc::clone(&writer), streams),
        early,
    );
    let sink = Sink::Spdy(writer, streams);
    Ok((
        receiver,
        Sender {
            sink,
            version,
            watch,
        },
    ))
}

/// A WebSocket client needs no preparation, but waits for a sign.
pub async fn over_websocket(
    reader: websocket::Reader,
    writer: Arc<websocket::Writer>,
    version: Version,
    wanted: Wanted,
    watch: Arc<Watch>,
) -> io::Result<(Receiver, Sender)> {
    let first = match wanted {
        Wanted { stdout: true, .. } => Channel::Stdout,
        Wanted { stderr: true, .. } => Channel::Stderr,
        _ => Channel::Error,
    };
    writer.send(first as u8, &[]).await?;
    let receiver = Receiver::new(Source::WebSocket(Box::new(reader)), VecDeque::new());
    let sink = Sink::WebSocket(writer);
    Ok((
        receiver,
        Sender {
            sink,
            version,
            watch,
        },
    ))
}

/// Takes what an event brings on our channels, and says about how much that was.
fn take(streams: &Streams, event: Event, into: &mut VecDeque<Received>) -> usize {
    let (stream, bytes, fin) = match event {
        Event::Data { stream, bytes, fin } => (stream, bytes, fin),
        Event::Reset { stream } => (stream, Bytes::new(), true),
        Event::Opened { .. } | Event::GoAway => return 0,
    };
    let mut channels = CHANNELS.into_iter();
    let Some(channel) = channels.find(|channel| streams[*channel as usize] == stream) else {
        return 0;
    };
    let length = bytes.len();
    if length > 0 {
        into.push_back((channel, Some(bytes)));
    }
    into.extend(fin.then_some((channel, None)));
    length + 1
}

impl Receiver {
    fn new(source: Source, early: VecDeque<Received>) -> Self {
        Receiver {
            source,
            early,
            resize: Vec::new(),
            unconsumed: 0,
            gone: None,
        }
    }

    /// What the client does next; `None` when it has gone. Cancel-safe. Data that it returned has
    /// been passed on when it is called again.
    pub async fn next(&mut self) -> io::Result<Option<Input>> {
        if self.unconsumed > 0
            && let Source::Spdy(_, writer, streams) = &self.source
        {
            writer.consumed(streams[Channel::Stdin as usize], self.unconsumed);
        }
        self.unconsumed = 0;
        loop {
            let Some(received) = self.early.pop_front() else {
                match self.gone.take() {
                    Some(gone) => return gone.map(|()| None),
                    None if self.receive().await? => continue,
                    None => return Ok(None),
                }
            };
            match received {
                (Channel::Stdin, Some(bytes)) if !bytes.is_empty() => {
                    self.unconsumed = bytes.len();
                    return Ok(Some(Input::Stdin(bytes)));
                }
                (Channel::Stdin, None) => return Ok(Some(Input::StdinEnd)),
                (Channel::Resize, Some(bytes)) => {
                    if let Some(size) = self.resized(&bytes) {
                        return Ok(Some(Input::Resize(size)));
                    }
                }
                _ => {}
            }
        }
    }

    /// Passes on what is meant for stdin, waiting while the program does not read; a new size of its
    /// terminal does not wait for that.
    pub async fn feed(
        &mut self,
        to: &Descriptor,
        bytes: &[u8],
        terminal: Option<&Descriptor>,
        watch: &Watch,
    ) -> Fed {
        let written = to.write_all(bytes);
        tokio::pin!(written);
        loop {
            tokio::select! {
                // Only when that has to wait it is looked whether somebody still waits for it.
                biased;
                written = &mut written => return match written {
                    Ok(()) => Fed::All,
                    Err(_) => Fed::Unread,
                },
                () = watch.gone() => return Fed::Gone,
                size = self.size_behind(), if terminal.is_some() => {
                    if let Some(terminal) = terminal {
                        resize(terminal, size);
                    }
                }
            }
        }
    }

    /// The next size that the client tells, whatever it sends before it, which is kept. Cancel-safe.
    async fn size_behind(&mut self) -> Winsize {
        let (mut behind, mut kept) = (0, 0);
        loop {
            while let Some((channel, bytes)) = self.early.get(behind) {
                if *channel != Channel::Resize {
                    behind += 1;
                    kept += bytes.as_ref().map_or(0, Bytes::len) + PIECE;
                    continue;
                }
                let bytes = bytes.clone().unwrap_or_default();
                self.early.remove(behind);
                if let Some(size) = self.resized(&bytes) {
                    return size;
                }
            }
            if self.gone.is_some() || kept > MAX_BEHIND {
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
            Source::Spdy(reader, writer, streams) => match reader.next().await? {
                None | Some(Event::GoAway) => return Ok(false),
                Some(Event::Opened { stream, .. }) => writer.reset(stream),
                Some(event) => {
                    take(streams, event, &mut self.early);
                }
            },
            Source::WebSocket(reader) => {
                let (number, bytes) = match reader.next().await? {
                    None => return Ok(false),
                    Some(websocket::Input::Data(number, bytes)) => (number, Some(bytes)),
                    Some(websocket::Input::Close(number)) => (number, None),
                };
                if let Some(channel) = CHANNELS.get(usize::from(number)) {
                    self.early.push_back((*channel, bytes));
                }
            }
        }
        Ok(true)
    }

    /// The size that a message tells: JSON objects, one after the other; the last one counts.
    fn resized(&mut self, bytes: &[u8]) -> Option<Winsize> {
        #[derive(Deserialize)]
        #[serde(rename_all = "PascalCase")]
        struct Size {
            width: u16,
            height: u16,
        }
        self.resize.extend_from_slice(bytes);
        let mut sizes = serde_json::Deserializer::from_slice(&self.resize).into_iter::<Size>();
        let mut last = None;
        let mut whole = 0;
        while let Some(size) = sizes.next() {
            match size {
                Ok(size) => (last, whole) = (Some(size), sizes.byte_offset()),
                Err(error) if error.is_eof() => break,
                // Not understood: forgotten.
                Err(_) => whole = bytes.len().max(MAX_RESIZE),
            }
        }
        self.resize.drain(..whole.min(self.resize.len()));
        if self.resize.len() > MAX_RESIZE {
            self.resize.clear();
        }
        last.map(|Size { width, height }| Winsize {
            ws_col: width,
            ws_row: height,
            ws_xpixel: 0,
            ws_ypixel: 0,
        })
    }
}

/// Tells a terminal its size, and with that the processes on it.
pub fn resize(terminal: &Descriptor, size: Winsize) {
    if let Err(errno) = rustix::termios::tcsetwinsize(terminal, size) {
        log::debug!("resize a terminal: {}", describe(&errno.into()));
    }
}

impl Sender {
    pub fn watch(&self) -> &Watch {
        &self.watch
    }

    /// Sends, waiting while the client takes nothing.
    pub async fn send(&self, channel: Channel, data: &[u8]) -> io::Result<()> {
        match &self.sink {
            Sink::Spdy(writer, streams) => match streams[channel as usize] {
                0 => Ok(()),
                stream => writer.send(stream, data).await,
            },
            Sink::WebSocket(writer) => writer.send(channel as u8, data).await,
        }
    }

    /// Sends what can be read now, at most `most` bytes of it: `Some(0)` at the end, `None` if there
    /// is nothing. `buffer` has memory only while there is something to put in it.
    pub async fn pass(
        &self,
        channel: Channel,
        from: &Descriptor,
        buffer: &mut Vec<u8>,
        most: usize,
    ) -> io::Result<Option<usize>> {
        let fill = |pipe: &mut Pipe, room: usize| from.splice(pipe, room.min(most));
        let spliced = match &self.sink {
            Sink::Spdy(writer, streams) if writer.splices() && !from.is_terminal() => {
                writer.splice(streams[channel as usize], fill).await
            }
            Sink::WebSocket(writer) if writer.splices() && !from.is_terminal() => {
                writer.splice(channel as u8, fill).await
            }
            _ => {
                if buffer.is_empty() {
                    buffer.resize(descriptor::CHUNK, 0);
                }
                let room = most.min(buffer.len());
                let count = from.try_read(buffer.get_mut(..room).unwrap_or_default())?;
                match count {
                    None => *buffer = Vec::new(),
                    Some(count) => {
                        let data = buffer.get(..count).unwrap_or_default();
                        if !data.is_empty() {
                            self.send(channel, data).await?;
                        }
                    }
                }
                return Ok(count);
            }
        };
        match spliced {
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => Ok(None),
            spliced => spliced.map(Some),
        }
    }

    /// Tells how it ended and says goodbye, then waits a while for the client to have read it.
    pub async fn finish(&self, outcome: &Outcome, receiver: &mut Receiver) -> io::Result<()> {
        let text = match self.version >= Version::V4 {
            true => outcome.status(),
            false => outcome.sentence(),
        };
        if !text.is_empty() {
            // A client that has reset its error stream does not want to know.
            let _ = self.send(Channel::Error, text.as_bytes()).await;
        }
        match &self.sink {
            Sink::Spdy(writer, streams) => {
                for stream in streams.iter().filter(|stream| **stream != 0) {
                    writer.close(*stream).await?;
                }
            }
            Sink::WebSocket(writer) => writer.finish().await?,
        }
        let reading = async { while let Ok(Some(_)) = receiver.next().await {} };
        let _ = tokio::time::timeout(GOODBYE, reading).await;
        if let Sink::Spdy(writer, _) = &self.sink {
            writer.finish().await?;
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use tokio::io::AsyncWriteExt;
    use tokio::net::{TcpListener, TcpStream};

    use super::*;
    use crate::transport::Transport;
    use crate::websocket::{Codec, channels};

    /// A receiver, and its client's end of a WebSocket.
    async fn received() -> io::Result<(Receiver, TcpStream)> {
        let listener = TcpListener::bind(("127.0.0.1", 0)).await?;
        let client = TcpStream::connect(listener.local_addr()?).await?;
        let (server, _) = listener.accept().await?;
        let watch = Watch::new(&server)?;
        let transport = Transport::Plain(server, watch);
        let codec = Codec::Binary { close: true };
        let (reader, _) = channels(transport, Bytes::new(), codec).await;
        let source = Source::WebSocket(Box::new(reader));
        Ok((Receiver::new(source, VecDeque::new()), client))
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
        let size = receiver.size_behind().await;
        assert_eq!((size.ws_col, size.ws_row), (101, 31));
        let kept = receiver.next().await?;
        assert!(matches!(kept, Some(Input::Stdin(bytes)) if bytes == "typed"));
        Ok(())
    }

    #[tokio::test]
    async fn messages_without_bytes_are_not_kept_without_end() -> io::Result<()> {
        let (mut receiver, mut client) = received().await?;
        let sending = tokio::spawn(async move {
            let empty = message(Channel::Stdin, "").repeat(MAX_BEHIND / PIECE + 2);
            let size = message(Channel::Resize, r#"{"Width":101,"Height":31}"#);
            client.write_all(&empty).await?;
            client.write_all(&size).await?;
            Ok::<_, io::Error>(client)
        });
        // What is behind all that is not looked at.
        let found = tokio::time::timeout(Duration::from_secs(2), receiver.size_behind()).await;
        assert!(found.is_err());
        assert!(receiver.early.len() <= MAX_BEHIND / PIECE + 1);
        sending.abort();
        Ok(())
    }

    #[test]
    fn an_outcome_is_told_as_kubernetes_clients_read_it() {
        assert_eq!(
            Outcome::Exit(0).status(),
            r#"{"metadata":{},"status":"Success"}"#
        );
        let failure: serde_json::Value =
            serde_json::from_str(&Outcome::Exit(3).status()).unwrap_or_default();
        assert_eq!(failure["reason"], "NonZeroExitCode");
        assert_eq!(failure["details"]["causes"][0]["reason"], "ExitCode");
        assert_eq!(failure["details"]["causes"][0]["message"], "3");
        assert_eq!(Outcome::Exit(0).sentence(), "");
        assert!(
            Outcome::Failed("no".into())
                .status()
                .contains("InternalError")
        );
    }
}
