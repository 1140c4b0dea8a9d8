//! Port-forward: a client's connections to ports of a pod.
//!
//! Over SPDY a connection is a pair of streams, one for data and one that carries an error, with
//! the same `requestID`; over WebSocket a pair of channels for each port that was asked for. The
//! socket to the port is made inside the pod's network namespace and then belongs to it, whoever
//! uses it: nothing runs in the pod.

use std::collections::BTreeMap;
use std::io;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};
use std::os::fd::AsRawFd;
use std::sync::Arc;
use std::time::Duration;

use rrun_proto::v1::{NamespaceMode, PortForwardRequest};
use rustix::net::AddressFamily;
use tokio::io::{AsyncWriteExt, Interest};
use tokio::net::tcp::{OwnedReadHalf, OwnedWriteHalf};
use tokio::net::{TcpSocket, TcpStream};
use tokio::sync::watch;
use tokio::task::{AbortHandle, JoinSet};

use super::exec::is_gone;
use crate::node::Node;
use crate::sandbox::namespaces;
use rrun_calls::error::{Error, Result};
use rrun_kernel::errno::describe;
use rrun_streams::backlog::{self, Backlog};
use rrun_streams::pipe::Pipe;
use rrun_streams::remotecommand::GOODBYE;
use rrun_streams::spdy::{Event, Headers};
use rrun_streams::transport::Watch;
use rrun_streams::{connection, websocket};

/// One read from the pod's side takes at most this.
const CHUNK: usize = 128 << 10;

/// How long a client's connection waits for a program in the pod that does not read, when no more
/// of what comes for it can be kept. Then that one forwarded connection is closed, for the others.
const STUCK: Duration = Duration::from_secs(30);

/// How often it is looked at whether the kernel holds less for such a program.
const LOOK: Duration = Duration::from_secs(1);

/// How long a port may take to answer.
const CONNECTING: Duration = Duration::from_secs(30);

/// How long a client may leave one stream of a pair without the other.
const PAIRING: Duration = Duration::from_secs(30);

/// How long a client that sends nothing is waited for when the program in the pod has ended its side:
/// as long as other CRI servers do. Clients that do not reset the streams then wait for us.
const LINGER: Duration = Duration::from_secs(1);

/// The most ports of one WebSocket: its channels are numbered by a byte.
const MAX_PORTS: usize = 100;

/// The most connections at once through one client's.
const MAX_PAIRS: usize = 500;

/// Connects to a port of a pod, by its IPv4 loopback and then by its IPv6 one.
async fn connect(node: &Node, sandbox: &str, port: u16) -> Result<TcpStream> {
    let sandbox = node.sandbox(sandbox)?;
    if !sandbox.state().ready {
        return Err(Error::wrong_state("the pod is not ready"));
    }
    let is_host = namespaces::options(&sandbox.config).network() == NamespaceMode::Node;
    let netns = (!is_host).then(|| node.netns(&sandbox.id));
    let mut first = None;
    for address in [
        IpAddr::V4(Ipv4Addr::LOCALHOST),
        IpAddr::V6(Ipv6Addr::LOCALHOST),
    ] {
        let family = match address {
            IpAddr::V4(_) => AddressFamily::INET,
            IpAddr::V6(_) => AddressFamily::INET6,
        };
        let netns = netns.clone();
        let made = tokio::task::spawn_blocking(move || {
            rrun_network::namespace::socket(netns.as_deref(), family)
        });
        let socket = match made.await {
            Ok(made) => made?,
            Err(error) => return Err(Error::internal(format!("make a socket: {error}"))),
        };
        let socket = TcpSocket::from_std_stream(std::net::TcpStream::from(socket));
        let address = SocketAddr::new(address, port);
        let connecting = tokio::time::timeout(CONNECTING, socket.connect(address));
        let error = match connecting.await {
            Ok(Ok(stream)) => {
                let _ = stream.set_nodelay(true);
                return Ok(stream);
            }
            Ok(Err(error)) => describe(&error),
            Err(_) => format!("no answer within {} s", CONNECTING.as_secs()),
        };
        first.get_or_insert(format!("connect to {address} in the pod: {error}"));
    }
    Err(Error::internal(first.unwrap_or_default()))
}

/// Where the two streams of a connection go.
enum Line {
    Spdy(Arc<connection::Writer>, Pair),
    /// The number of the data channel; the error channel is the next.
    WebSocket(Arc<websocket::Writer>, u8),
}

impl Line {
    async fn send(&self, data: &[u8]) -> io::Result<()> {
        match self {
            Line::Spdy(writer, pair) => writer.send(pair.data, data).await,
            Line::WebSocket(writer, channel) => writer.send(*channel, data).await,
        }
    }

    /// The client's connection, if bytes can go there without our seeing them.
    fn splices(&self) -> Option<(&Arc<connection::Writer>, u32)> {
        match self {
            Line::Spdy(writer, pair) if writer.splices() => Some((writer, pair.data)),
            _ => None,
        }
    }

    /// The program in the pod sends no more.
    async fn close(&self) -> io::Result<()> {
        match self {
            Line::Spdy(writer, pair) => writer.close(pair.data).await,
            Line::WebSocket(..) => Ok(()),
        }
    }

    async fn fail(&self, sentence: &str) -> io::Result<()> {
        match self {
            Line::Spdy(writer, pair) => writer.send(pair.error, sentence.as_bytes()).await,
            Line::WebSocket(writer, channel) => writer.send(channel + 1, sentence.as_bytes()).await,
        }
    }

    fn consumed(&self, count: usize) {
        if let Line::Spdy(writer, pair) = self {
            writer.consumed(pair.data, count);
        }
    }

    /// The client waits for the end of the error stream, and then forgets the pair.
    async fn end(&self) {
        if let Line::Spdy(writer, pair) = self {
            let _ = writer.close(pair.error).await;
            writer.reset(pair.data);
        }
    }
}

/// A connection of the client, whose streams come one by one.
#[derive(Clone, Copy, Default)]
struct Pair {
    port: u16,
    data: u32,
    error: u32,
}

impl Pair {
    fn is_whole(&self) -> bool {
        self.data != 0 && self.error != 0
    }
}

/// A pair that is served.
struct Served {
    data: u32,
    error: u32,
    port: u16,
    input: backlog::Sender,
    task: AbortHandle,
}

/// Serves a client's streams for as long as it is there.
pub(crate) async fn over_spdy(
    node: &Arc<Node>,
    request: &PortForwardRequest,
    mut reader: connection::Reader,
    writer: Arc<connection::Writer>,
    watch: &Watch,
) -> io::Result<()> {
    let mut halves: BTreeMap<String, (Pair, tokio::time::Instant)> = BTreeMap::new();
    let mut served: Vec<Served> = Vec::new();
    let backlog = Arc::new(Backlog::default());
    // Dropping it ends all that is in it.
    let mut tasks: JoinSet<()> = JoinSet::new();
    // Whether something came for which there was no room; only then it is looked for more.
    let mut full = false;
    loop {
        let pairing = halves.values().map(|(_, since)| *since + PAIRING).min();
        full = full && (backlog.is_full() || served.iter().any(|pair| pair.input.is_full()));
        let stuck = served.iter().max_by_key(|pair| pair.input.waiting());
        let stuck = stuck.filter(|_| full);
        if let Some(pair) = stuck.filter(|pair| pair.input.still() >= STUCK) {
            log::info!(
                "{}: a connection to port {} was closed: the program there has read nothing for {} s, \
                 and the client sends more",
                request.pod_sandbox_id,
                pair.port,
                STUCK.as_secs()
            );
            writer.reset(pair.data);
            abandon(pair, &writer);
            full = false;
            continue;
        }
        let patience = stuck.map(|pair| {
            let left = STUCK.saturating_sub(pair.input.still());
            tokio::time::Instant::now() + left
        });
        let event = tokio::select! {
            event = reader.next(), if !full => event?,
            () = backlog.less(), if full => continue,
            () = sleep_until(patience), if full => continue,
            () = watch.gone(), if full => return Ok(()),
            Some(_) = tasks.join_next(), if !tasks.is_empty() => {
                served.retain(|pair| !pair.task.is_finished());
                continue;
            }
            () = sleep_until(pairing) => {
                let now = tokio::time::Instant::now();
                halves.retain(|_, (pair, since)| {
                    let late = now >= *since + PAIRING;
                    if late {
                        writer.reset(pair.data.max(pair.error));
                    }
                    !late
                });
                continue;
            }
        };
        match event {
            None => return Ok(()),
            Some(Event::Opened {
                stream,
                headers,
                fin,
            }) => {
                let Some((id, is_data, port)) = described(stream, &headers) else {
                    log::info!(
                        "a port-forward stream was reset: its headers {headers:?} make no sense"
                    );
                    writer.reset(stream);
                    continue;
                };
                if halves.len() + tasks.len() >= MAX_PAIRS && !halves.contains_key(&id) {
                    writer.reset(stream);
                    continue;
                }
                let now = tokio::time::Instant::now();
                let (half, _) = halves
                    .entry(id.clone())
                    .or_insert_with(|| (Pair::default(), now));
                let place = if is_data {
                    &mut half.data
                } else {
                    &mut half.error
                };
                if *place != 0 {
                    writer.reset(stream);
                    continue;
                }
                *place = stream;
                half.port = port;
                if !half.is_whole() {
                    continue;
                }
                let Some((pair, _)) = halves.remove(&id) else {
                    continue;
                };
                let (input, output) = backlog.line();
                if fin && is_data {
                    input.close();
                }
                let (node, sandbox) = (Arc::clone(node), request.pod_sandbox_id.clone());
                let line = Line::Spdy(Arc::clone(&writer), pair);
                let task = tasks.spawn(async move {
                    forward(&node, &sandbox, pair.port, output, &line).await;
                });
                served.push(Served {
                    data: pair.data,
                    error: pair.error,
                    port: pair.port,
                    input,
                    task,
                });
            }
            Some(Event::Data { stream, bytes, fin }) => {
                let Some(pair) = served.iter_mut().find(|pair| pair.data == stream) else {
                    writer.consumed(stream, bytes.len());
                    continue;
                };
                if !bytes.is_empty() {
                    let length = bytes.len();
                    if !pair.input.push(bytes) {
                        // The program in the pod reads no more.
                        writer.consumed(stream, length);
                    }
                    full = pair.input.is_full() || backlog.is_full();
                }
                if fin {
                    pair.input.close();
                }
            }
            Some(Event::Reset { stream }) => {
                halves.retain(|_, (pair, _)| pair.data != stream && pair.error != stream);
                if let Some(pair) = served.iter().find(|pair| pair.data == stream) {
                    abandon(pair, &writer);
                }
            }
            // No new ones; those that are there go on.
            Some(Event::GoAway) => {}
        }
    }
}

/// Ends a connection whose data stream is gone, without a word: of an error's text clients make the
/// end of all their connections.
fn abandon(pair: &Served, writer: &Arc<connection::Writer>) {
    pair.task.abort();
    let (error, writer) = (pair.error, Arc::clone(writer));
    // The client waits for the end of the error stream.
    tokio::spawn(async move { writer.close(error).await });
}

async fn sleep_until(at: Option<tokio::time::Instant>) {
    match at {
        Some(at) => tokio::time::sleep_until(at).await,
        None => std::future::pending().await,
    }
}

/// What a stream's headers say: the pair it belongs to, whether it is the one for data, the port.
fn described(stream: u32, headers: &Headers) -> Option<(String, bool, u16)> {
    let port = headers.get("port")?.parse().ok().filter(|port| *port > 0)?;
    let is_data = match headers.get("streamtype")? {
        "data" => true,
        "error" => false,
        _ => return None,
    };
    // The first clients gave no id, but opened the streams of a pair one after the other.
    let id = match headers.get("requestid").filter(|id| !id.is_empty()) {
        Some(id) => id.to_owned(),
        None if is_data => format!("stream {}", stream.saturating_sub(2)),
        None => format!("stream {stream}"),
    };
    Some((id, is_data, port))
}

/// Serves one connection.
async fn forward(node: &Node, sandbox: &str, port: u16, input: backlog::Receiver, line: &Line) {
    match connect(node, sandbox, port).await {
        Ok(stream) => {
            let (read, write) = stream.into_split();
            // Each half ends by itself; but when the program's has ended, the client's is not waited
            // for for long, which may not end before it is told that all is over.
            let (tell, ended) = watch::channel(None);
            let from_pod = async {
                let sent = from_pod(read, line).await;
                let linger = if sent.is_ok() { LINGER } else { Duration::ZERO };
                let _ = tell.send(Some(linger));
                sent
            };
            let to_pod = to_pod(write, input, line, ended);
            let (received, sent) = tokio::join!(to_pod, from_pod);
            if let Err(error) = received.and(sent)
                && !is_gone(&error)
            {
                let sentence = format!("error forwarding port {port}: {}", describe(&error));
                log::info!("pod {sandbox}: {sentence}");
                let _ = line.fail(&sentence).await;
            }
        }
        Err(error) => {
            let sentence = format!("error forwarding port {port} to the pod: {error}");
            log::info!("pod {sandbox}: {sentence}");
            let _ = line.fail(&sentence).await;
        }
    }
    line.end().await;
}

/// Passes on what the client sends, to its end or until the program in the pod reads no more; or,
/// when that has `ended` its own side, until the client has sent nothing for the time that is told.
async fn to_pod(
    mut to: OwnedWriteHalf,
    mut input: backlog::Receiver,
    line: &Line,
    mut ended: watch::Receiver<Option<Duration>>,
) -> io::Result<()> {
    loop {
        let silent = async {
            let linger = ended.wait_for(Option::is_some).await.map(|linger| *linger);
            tokio::time::sleep(linger.ok().flatten().unwrap_or(LINGER)).await;
        };
        let received = tokio::select! {
            biased;
            received = input.recv() => received,
            () = silent => None,
        };
        let Some(bytes) = received else {
            break;
        };
        let mut left = bytes.as_ref();
        let mut unread = None;
        while !left.is_empty() {
            match tokio::time::timeout(LOOK, to.write(left)).await {
                Ok(written) => {
                    left = left.get(written?..).unwrap_or_default();
                    input.moved();
                }
                // There is room for more only when the kernel holds much less; a program that
                // reads slowly shows earlier.
                Err(_) => {
                    let now = Some(unsent(to.as_ref())?);
                    if unread.is_some() && now != unread {
                        input.moved();
                    } else if unread.is_some() && ended.borrow().is_some() {
                        return Ok(());
                    }
                    unread = now;
                }
            }
        }
        input.passed(&bytes);
        line.consumed(bytes.len());
    }
    to.shutdown().await
}

/// How many bytes the kernel holds that the other side has not taken (tcp(7), SIOCOUTQ).
fn unsent(socket: &TcpStream) -> io::Result<libc::c_int> {
    let mut count = 0;
    // SAFETY: the descriptor is open, and TIOCOUTQ (the same as SIOCOUTQ) writes one int.
    match unsafe { libc::ioctl(socket.as_raw_fd(), libc::TIOCOUTQ, &mut count) } {
        0 => Ok(count),
        _ => Err(io::Error::last_os_error()),
    }
}

/// Passes on what the program in the pod sends, to its end. No buffer while there is nothing.
async fn from_pod(from: OwnedReadHalf, line: &Line) -> io::Result<()> {
    let socket: &TcpStream = from.as_ref();
    if let Some((writer, stream)) = line.splices() {
        loop {
            socket.readable().await?;
            let fill = |pipe: &mut Pipe, most| {
                socket.try_io(Interest::READABLE, || pipe.fill(socket, most))
            };
            match writer.splice(stream, fill).await {
                Ok(0) => return line.close().await,
                Ok(_) => {}
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => {}
                Err(error) => {
                    let _ = line.close().await;
                    return Err(error);
                }
            }
        }
    }
    let mut buffer = Vec::new();
    loop {
        socket.readable().await?;
        if buffer.is_empty() {
            buffer.resize(CHUNK, 0);
        }
        match socket.try_read(&mut buffer) {
            Ok(0) => return line.close().await,
            Ok(count) => line.send(buffer.get(..count).unwrap_or_default()).await?,
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => buffer = Vec::new(),
            Err(error) => {
                let _ = line.close().await;
                return Err(error);
            }
        }
    }
}

/// Serves a pair of channels for each port that was asked for.
pub(crate) async fn over_websocket(
    node: &Arc<Node>,
    request: &PortForwardRequest,
    mut reader: websocket::Reader,
    writer: Arc<websocket::Writer>,
    watch: &Watch,
) -> io::Result<()> {
    let mut inputs = Vec::new();
    let backlog = Arc::new(Backlog::default());
    let mut tasks: JoinSet<()> = JoinSet::new();
    for (channel, port) in (0_u8..).step_by(2).zip(&request.port).take(MAX_PORTS) {
        let port = u16::try_from(*port).unwrap_or(0);
        for channel in [channel, channel + 1] {
            writer.send(channel, &port.to_le_bytes()).await?;
        }
        let (input, output) = backlog.line();
        inputs.push(input);
        let (node, sandbox) = (Arc::clone(node), request.pod_sandbox_id.clone());
        let line = Line::WebSocket(Arc::clone(&writer), channel);
        tasks.spawn(async move { forward(&node, &sandbox, port, output, &line).await });
    }
    loop {
        let input = tokio::select! {
            input = reader.next() => input?,
            ended = tasks.join_next() => match ended {
                Some(_) => continue,
                // All ports have had their connection.
                None => {
                    writer.finish().await?;
                    // A connection that is closed with something unread in it takes along what the
                    // client has not read yet.
                    let reading = async { while let Ok(Some(_)) = reader.next().await {} };
                    let _ = tokio::time::timeout(GOODBYE, reading).await;
                    return Ok(());
                }
            },
        };
        match input {
            None => return Ok(()),
            Some(websocket::Input::Data(channel, bytes)) if channel % 2 == 0 => {
                let Some(input) = inputs.get(usize::from(channel / 2)) else {
                    continue;
                };
                let _ = input.push(bytes);
                // Nothing here could close just the one.
                while input.is_full() || backlog.is_full() {
                    tokio::select! {
                        () = backlog.less() => {}
                        () = watch.gone() => return Ok(()),
                    }
                }
            }
            Some(_) => {}
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_stream_tells_its_pair_or_follows_it() {
        let headers = |pairs: &[(&str, &str)]| {
            let owned = |(name, value): &(&str, &str)| ((*name).to_owned(), (*value).to_owned());
            Headers(pairs.iter().map(owned).collect())
        };
        let with_id = headers(&[("port", "80"), ("streamtype", "data"), ("requestid", "7")]);
        assert_eq!(described(3, &with_id), Some(("7".to_owned(), true, 80)));
        let error = headers(&[("port", "80"), ("streamtype", "error")]);
        let data = headers(&[("port", "80"), ("streamtype", "data")]);
        let (first, second) = (described(1, &error), described(3, &data));
        assert_eq!(first.map(|first| first.0), second.map(|second| second.0));
        for wrong in [
            headers(&[("port", "0"), ("streamtype", "data")]),
            headers(&[("port", "65536"), ("streamtype", "data")]),
            headers(&[("port", "80"), ("streamtype", "stdin")]),
            headers(&[("port", "80")]),
        ] {
            assert_eq!(described(1, &wrong), None);
        }
    }
}
