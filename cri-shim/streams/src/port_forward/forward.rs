//! One forwarded connection between a client's two channels and a port of the pod.

use std::io;
use std::os::fd::AsRawFd;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::Duration;

use rrun_kernel::errno::describe;
use tokio::io::{AsyncWriteExt, Interest};
use tokio::net::TcpStream;
use tokio::net::tcp::{OwnedReadHalf, OwnedWriteHalf};
use tokio::sync::watch;

use super::session_log::SessionLog;
use super::target::PodPorts;
use crate::backlog::QueueReceiver;
use crate::buffers::StreamBuffers;
use crate::channels::Channels;
use crate::disconnect::is_disconnect;
use crate::pipe::Pipe;

/// The maximum number of bytes that one read from the pod's port returns.
const READ_BYTES: usize = 128 << 10;

/// The interval at which the server checks whether a slow program in the pod still reads data. The
/// program has read data if the number of bytes in the socket's send queue has changed.
const UNSENT_POLL_INTERVAL: Duration = Duration::from_secs(1);

/// The time for which the server waits for a silent client. The wait begins when the program in the
/// pod closes its side of the connection. Other CRI servers also wait for one second. If the client
/// does not reset the streams, the forwarded connection ends only after this time.
const LINGER_TIMEOUT: Duration = Duration::from_secs(1);

/// The number of forwarded connections of all clients.
static OPEN: AtomicUsize = AtomicUsize::new(0);

/// Returns the number of forwarded connections of all clients.
pub(super) fn count_open() -> usize {
    OPEN.load(Ordering::Relaxed)
}

/// A forwarded connection that [`count_open`] counts.
struct Counted;

impl Counted {
    fn new() -> Self {
        OPEN.fetch_add(1, Ordering::Relaxed);
        Counted
    }
}

impl Drop for Counted {
    fn drop(&mut self) {
        OPEN.fetch_sub(1, Ordering::Relaxed);
    }
}

/// The two channels of a forwarded connection.
pub(super) struct ForwardChannels {
    pub channels: Channels,
    pub log: Arc<SessionLog>,
    pub data: u32,
    pub error: u32,
}

impl ForwardChannels {
    /// Returns whether the server sends data to the client with splice(2). Over a WebSocket, the
    /// server does not use splice(2). With splice(2), one message could contain up to 1 MiB, but a
    /// message must not be longer than [`READ_BYTES`].
    fn splices(&self) -> bool {
        matches!(self.channels, Channels::Spdy(_)) && self.channels.splices()
    }

    async fn send(&self, data: &[u8]) -> io::Result<()> {
        self.channels.send(self.data, data).await
    }

    /// Closes the data channel after the program in the pod has sent all its data.
    async fn close(&self) -> io::Result<()> {
        self.channels.close(self.data).await
    }

    /// Sends the client an error text. The client then closes all its forwarded connections.
    async fn fail(&self, sentence: &str) -> io::Result<()> {
        self.channels.send(self.error, sentence.as_bytes()).await
    }

    /// Ends the forwarded connection. The client waits until the error stream is closed, and then
    /// forgets both streams.
    async fn end(&self) {
        let _ = self.channels.close(self.error).await;
        self.channels.reset(self.data);
    }
}

/// Serves one forwarded connection until it ends.
pub(super) async fn forward(
    pod: &impl PodPorts,
    port: u16,
    input: QueueReceiver,
    client: &ForwardChannels,
) {
    let _counted = Counted::new();
    let failure = match pod.connect(port).await {
        Ok(stream) => match serve(stream, input, client).await {
            Err(error) if !is_disconnect(&error) => Some(format!(
                "error forwarding port {port}: {}",
                describe(&error)
            )),
            _ => None,
        },
        Err(error) => Some(format!("error forwarding port {port} to the pod: {error}")),
    };
    if let Some(sentence) = failure {
        client.log.add(format_args!("{sentence}"));
        let _ = client.fail(&sentence).await;
    }
    client.end().await;
}

async fn serve(
    stream: TcpStream,
    input: QueueReceiver,
    client: &ForwardChannels,
) -> io::Result<()> {
    let buffers = StreamBuffers::of_forward();
    buffers.limit_socket(&stream)?;
    copy(stream, input, client).await
}

/// Copies data between the client and the program in the pod. The two directions of the connection
/// close independently of each other. When the program closes its side, the server waits until the
/// client also closes its side. If the client is silent, the server waits at most
/// [`LINGER_TIMEOUT`]. Some clients close their side only after the whole connection has ended.
async fn copy(stream: TcpStream, input: QueueReceiver, client: &ForwardChannels) -> io::Result<()> {
    let (read, write) = stream.into_split();
    let (end, ended) = watch::channel(None);
    let from_pod = async {
        let sent = from_pod(read, client).await;
        let linger = if sent.is_ok() {
            LINGER_TIMEOUT
        } else {
            Duration::ZERO
        };
        let _ = end.send(Some(linger));
        sent
    };
    let to_pod = to_pod(write, input, client, ended);
    let (received, sent) = tokio::join!(to_pod, from_pod);
    received.and(sent)
}

/// Passes on the client's data to the program in the pod. Returns when the client closes its side
/// or the program stops reading. When the program closes its side, `ended` receives a timeout. The
/// function then also returns if the client sends no data until the timeout expires.
async fn to_pod(
    mut to: OwnedWriteHalf,
    mut input: QueueReceiver,
    client: &ForwardChannels,
    mut ended: watch::Receiver<Option<Duration>>,
) -> io::Result<()> {
    loop {
        let silent = async {
            let linger = ended.wait_for(Option::is_some).await.map(|linger| *linger);
            tokio::time::sleep(linger.ok().flatten().unwrap_or(LINGER_TIMEOUT)).await;
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
            match tokio::time::timeout(UNSENT_POLL_INTERVAL, to.write(left)).await {
                Ok(written) => {
                    left = left.get(written?..).unwrap_or_default();
                    input.progressed();
                }
                // The program may be reading slowly. The kernel reports a full socket as writable
                // only after much of its data has been sent. The number of bytes in the socket's
                // send queue shows earlier that the program is reading.
                Err(_) => {
                    let now = Some(unsent(to.as_ref())?);
                    if unread.is_some() && now != unread {
                        input.progressed();
                    } else if unread.is_some() && ended.borrow().is_some() {
                        return Ok(());
                    }
                    unread = now;
                }
            }
        }
        input.passed(&bytes);
        client.channels.consumed(client.data, bytes.len());
    }
    to.shutdown().await
}

/// Returns the number of bytes in the socket's send queue that the peer has not acknowledged
/// (tcp(7), SIOCOUTQ).
fn unsent(socket: &TcpStream) -> io::Result<libc::c_int> {
    let mut count = 0;
    // SAFETY: the descriptor is open, and TIOCOUTQ (the same as SIOCOUTQ) writes one int.
    match unsafe { libc::ioctl(socket.as_raw_fd(), libc::TIOCOUTQ, &mut count) } {
        0 => Ok(count),
        _ => Err(io::Error::last_os_error()),
    }
}

/// Passes on data from the program in the pod to the client. Returns when the program closes its
/// side of the connection.
async fn from_pod(from: OwnedReadHalf, client: &ForwardChannels) -> io::Result<()> {
    if client.splices() {
        splice(from.as_ref(), client).await
    } else {
        read(from.as_ref(), client).await
    }
}

async fn splice(from: &TcpStream, client: &ForwardChannels) -> io::Result<()> {
    loop {
        from.readable().await?;
        let fill =
            |pipe: &mut Pipe, most| from.try_io(Interest::READABLE, || pipe.fill(from, most));
        match client.channels.splice(client.data, fill).await {
            Ok(0) => return client.close().await,
            Ok(_) => {}
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => {}
            Err(error) => {
                let _ = client.close().await;
                return Err(error);
            }
        }
    }
}

/// Copies data from the program in the pod to the client through a buffer. The buffer is allocated
/// only while data is available.
async fn read(from: &TcpStream, client: &ForwardChannels) -> io::Result<()> {
    let mut buffer = Vec::new();
    loop {
        from.readable().await?;
        if buffer.is_empty() {
            buffer.resize(READ_BYTES, 0);
        }
        match from.try_read(&mut buffer) {
            Ok(0) => return client.close().await,
            Ok(count) => client.send(buffer.get(..count).unwrap_or_default()).await?,
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => buffer = Vec::new(),
            Err(error) => {
                let _ = client.close().await;
                return Err(error);
            }
        }
    }
}
