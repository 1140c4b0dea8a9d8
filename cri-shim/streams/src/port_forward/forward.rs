//! One forwarded connection: between a client's two channels and a port of the pod.

use std::io;
use std::os::fd::AsRawFd;
use std::time::Duration;

use rrun_kernel::errno::describe;
use tokio::io::{AsyncWriteExt, Interest};
use tokio::net::TcpStream;
use tokio::net::tcp::{OwnedReadHalf, OwnedWriteHalf};
use tokio::sync::watch;

use super::target::PodPorts;
use crate::backlog::QueueReceiver;
use crate::channels::Channels;
use crate::disconnect::is_disconnect;
use crate::pipe::Pipe;

/// One read from the pod's side takes at most this.
const READ_BYTES: usize = 128 << 10;

/// How often a program that does not read is checked for whether the kernel holds less for it.
const UNSENT_POLL_INTERVAL: Duration = Duration::from_secs(1);

/// How long a client that sends nothing is waited for when the program in the pod has ended its side:
/// as long as other CRI servers do. Clients that do not reset the streams then wait for us.
const LINGER_TIMEOUT: Duration = Duration::from_secs(1);

/// The two channels of a connection.
pub(super) struct ForwardChannels {
    pub channels: Channels,
    pub data: u32,
    pub error: u32,
}

impl ForwardChannels {
    /// Whether data is spliced to the client. Over a WebSocket it is not: a message is to be no
    /// longer than [`READ_BYTES`].
    fn splices(&self) -> bool {
        matches!(self.channels, Channels::Spdy(_)) && self.channels.splices()
    }

    async fn send(&self, data: &[u8]) -> io::Result<()> {
        self.channels.send(self.data, data).await
    }

    /// The program in the pod sends no more.
    async fn close(&self) -> io::Result<()> {
        self.channels.close(self.data).await
    }

    /// Sends the client a sentence, which makes it end all its connections.
    async fn fail(&self, sentence: &str) -> io::Result<()> {
        self.channels.send(self.error, sentence.as_bytes()).await
    }

    /// Ends the connection. The client waits for the end of the error stream, and then forgets both.
    async fn end(&self) {
        let _ = self.channels.close(self.error).await;
        self.channels.reset(self.data);
    }
}

/// Serves one connection.
pub(super) async fn forward(
    pod: &impl PodPorts,
    port: u16,
    input: QueueReceiver,
    client: &ForwardChannels,
) {
    let failure = match pod.connect(port).await {
        Ok(stream) => match copy(stream, input, client).await {
            Err(error) if !is_disconnect(&error) => Some(format!(
                "error forwarding port {port}: {}",
                describe(&error)
            )),
            _ => None,
        },
        Err(error) => Some(format!("error forwarding port {port} to the pod: {error}")),
    };
    if let Some(sentence) = failure {
        log::info!("pod {}: {sentence}", pod.id());
        let _ = client.fail(&sentence).await;
    }
    client.end().await;
}

/// Copies both ways. The directions close independently. After the pod closes, wait only
/// [`LINGER_TIMEOUT`]: some clients never close theirs before all is over.
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

/// Passes on what the client sends, to its end or until the program in the pod reads no more; or,
/// when that has `ended` its own side, until the client has sent nothing for the time in `ended`.
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
                // There is room for more only when the kernel holds much less; a program that
                // reads slowly shows earlier.
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

/// How many bytes the kernel holds that the other side has not taken (tcp(7), SIOCOUTQ).
fn unsent(socket: &TcpStream) -> io::Result<libc::c_int> {
    let mut count = 0;
    // SAFETY: the descriptor is open, and TIOCOUTQ (the same as SIOCOUTQ) writes one int.
    match unsafe { libc::ioctl(socket.as_raw_fd(), libc::TIOCOUTQ, &mut count) } {
        0 => Ok(count),
        _ => Err(io::Error::last_os_error()),
    }
}

/// Passes on what the program in the pod sends, to its end.
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

/// There is no buffer while there is nothing to read.
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
