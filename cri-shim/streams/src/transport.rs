//! What a stream's bytes travel on: TCP, TLS over it, or a WebSocket that carries them.

use std::io::{self, IoSlice};
use std::os::fd::{AsFd, OwnedFd};
use std::pin::Pin;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::task::{Context, Poll, ready};
use std::time::Duration;

use rustix::event::{PollFd, PollFlags, Timespec};
use rustix::net::SendFlags;
use tokio::io::{AsyncRead, AsyncWrite, Interest, ReadBuf};
use tokio::net::TcpStream;
use tokio::net::tcp::{OwnedReadHalf, OwnedWriteHalf};
use tokio::time::Instant;
use tokio_rustls::server::TlsStream;

use super::pipe::Pipe;
use super::websocket::Tunnel;

/// How often a client that is not read from is looked at, whether it is still there.
const LOOK: Duration = Duration::from_secs(1);

/// A client's connection.
pub enum Transport {
    Plain(TcpStream, Arc<Watch>),
    Tls(Box<TlsStream<TcpStream>>, Arc<Watch>),
    Tunnel(Box<Tunnel>),
}

/// When a connection last moved, and a second descriptor of it.
pub struct Watch {
    begin: Instant,
    /// Seconds after `begin`.
    moved: AtomicU64,
    socket: OwnedFd,
}

impl Watch {
    pub fn new(socket: &TcpStream) -> io::Result<Arc<Self>> {
        Ok(Arc::new(Watch {
            begin: Instant::now(),
            moved: AtomicU64::new(0),
            socket: socket.as_fd().try_clone_to_owned()?,
        }))
    }

    fn touch(&self) {
        let now = self.begin.elapsed().as_secs();
        self.moved.store(now, Ordering::Relaxed);
    }

    /// Waits until nothing has moved for this long.
    pub async fn idle(&self, limit: Duration) {
        loop {
            let moved = Duration::from_secs(self.moved.load(Ordering::Relaxed));
            let at = self.begin + moved + limit;
            if Instant::now() >= at {
                return;
            }
            tokio::time::sleep_until(at).await;
        }
    }

    /// Waits until the client has closed the connection, or lost it, however much it sent before
    /// that has not been read.
    pub async fn gone(&self) {
        while !self.is_gone() {
            tokio::time::sleep(LOOK).await;
        }
    }

    fn is_gone(&self) -> bool {
        let mut fds = [PollFd::new(&self.socket, PollFlags::RDHUP)];
        let ready = rustix::event::poll(&mut fds, Some(&Timespec::default()));
        ready.is_ok_and(|count| count > 0)
    }

    /// Ends the connection for whoever holds a descriptor of it.
    pub fn shut_down(&self) {
        let _ = rustix::net::shutdown(&self.socket, rustix::net::Shutdown::Both);
    }
}

impl Transport {
    pub fn watch(&self) -> Arc<Watch> {
        match self {
            Transport::Plain(_, watch) | Transport::Tls(_, watch) => Arc::clone(watch),
            Transport::Tunnel(tunnel) => tunnel.watch(),
        }
    }

    fn touch(&self) {
        match self {
            Transport::Plain(_, watch) | Transport::Tls(_, watch) => watch.touch(),
            // What is below it does.
            Transport::Tunnel(_) => {}
        }
    }

    /// Its two halves, for two tasks. A plain socket's need no lock between them.
    pub fn split(self) -> (ReadHalf, WriteHalf) {
        match self {
            Transport::Plain(stream, watch) => {
                let (read, write) = stream.into_split();
                (
                    ReadHalf::Plain(read, Arc::clone(&watch)),
                    WriteHalf::Plain(write, watch),
                )
            }
            other => {
                let (read, write) = tokio::io::split(other);
                (ReadHalf::Locked(read), WriteHalf::Locked(write))
            }
        }
    }
}

/// What a client sends.
pub enum ReadHalf {
    Plain(OwnedReadHalf, Arc<Watch>),
    Locked(tokio::io::ReadHalf<Transport>),
}

/// What it is sent.
pub enum WriteHalf {
    Plain(OwnedWriteHalf, Arc<Watch>),
    Locked(tokio::io::WriteHalf<Transport>),
}

impl AsyncRead for ReadHalf {
    fn poll_read(
        mut self: Pin<&mut Self>,
        context: &mut Context<'_>,
        buffer: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        match &mut *self {
            ReadHalf::Plain(half, watch) => {
                let polled = Pin::new(half).poll_read(context, buffer);
                if matches!(polled, Poll::Ready(Ok(()))) {
                    watch.touch();
                }
                polled
            }
            ReadHalf::Locked(half) => Pin::new(half).poll_read(context, buffer),
        }
    }
}

impl WriteHalf {
    /// The socket, if what is written goes there as it is.
    pub fn socket(&self) -> Option<&TcpStream> {
        match self {
            WriteHalf::Plain(half, _) => Some(half.as_ref()),
            WriteHalf::Locked(_) => None,
        }
    }

    /// Passes on what is in a pipe, to its last byte. Only for one that has a [`Self::socket`].
    pub fn poll_drain(&self, context: &mut Context<'_>, pipe: &mut Pipe) -> Poll<io::Result<()>> {
        let WriteHalf::Plain(half, watch) = self else {
            return Poll::Ready(Err(io::ErrorKind::Unsupported.into()));
        };
        let socket: &TcpStream = half.as_ref();
        while pipe.held() > 0 {
            ready!(socket.poll_write_ready(context))?;
            match socket.try_io(Interest::WRITABLE, || pipe.drain(socket)) {
                Ok(_) => watch.touch(),
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => {}
                Err(error) => return Poll::Ready(Err(error)),
            }
        }
        Poll::Ready(Ok(()))
    }

    /// Sends the beginning of what comes by [`Self::poll_drain`], as much of it as there is room
    /// for, without a packet of its own.
    pub fn begin(&self, header: &[u8]) -> io::Result<usize> {
        let Some(socket) = self.socket() else {
            return Ok(0);
        };
        let flags = SendFlags::MORE | SendFlags::NOSIGNAL | SendFlags::DONTWAIT;
        let sent = socket.try_io(Interest::WRITABLE, || {
            Ok(rustix::net::send(socket, header, flags)?)
        });
        match sent {
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => Ok(0),
            sent => sent,
        }
    }
}

impl AsyncWrite for WriteHalf {
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
        match &mut *self {
            WriteHalf::Plain(half, watch) => {
                let polled = Pin::new(half).poll_write_vectored(context, slices);
                if matches!(polled, Poll::Ready(Ok(_))) {
                    watch.touch();
                }
                polled
            }
            WriteHalf::Locked(half) => Pin::new(half).poll_write_vectored(context, slices),
        }
    }

    fn is_write_vectored(&self) -> bool {
        true
    }

    fn poll_flush(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<io::Result<()>> {
        match &mut *self {
            WriteHalf::Plain(half, _) => Pin::new(half).poll_flush(context),
            WriteHalf::Locked(half) => Pin::new(half).poll_flush(context),
        }
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<io::Result<()>> {
        match &mut *self {
            WriteHalf::Plain(half, _) => Pin::new(half).poll_shutdown(context),
            WriteHalf::Locked(half) => Pin::new(half).poll_shutdown(context),
        }
    }
}

impl AsyncRead for Transport {
    fn poll_read(
        mut self: Pin<&mut Self>,
        context: &mut Context<'_>,
        buffer: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        let polled = match &mut *self {
            Transport::Plain(stream, _) => Pin::new(stream).poll_read(context, buffer),
            Transport::Tls(stream, _) => Pin::new(stream).poll_read(context, buffer),
            Transport::Tunnel(stream) => Pin::new(stream).poll_read(context, buffer),
        };
        if matches!(polled, Poll::Ready(Ok(()))) {
            self.touch();
        }
        polled
    }
}

impl AsyncWrite for Transport {
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
        let polled = match &mut *self {
            Transport::Plain(stream, _) => Pin::new(stream).poll_write_vectored(context, slices),
            Transport::Tls(stream, _) => Pin::new(stream).poll_write_vectored(context, slices),
            Transport::Tunnel(stream) => Pin::new(stream).poll_write_vectored(context, slices),
        };
        if matches!(polled, Poll::Ready(Ok(_))) {
            self.touch();
        }
        polled
    }

    fn is_write_vectored(&self) -> bool {
        true
    }

    fn poll_flush(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<io::Result<()>> {
        match &mut *self {
            Transport::Plain(stream, _) => Pin::new(stream).poll_flush(context),
            Transport::Tls(stream, _) => Pin::new(stream).poll_flush(context),
            Transport::Tunnel(stream) => Pin::new(stream).poll_flush(context),
        }
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<io::Result<()>> {
        match &mut *self {
            Transport::Plain(stream, _) => Pin::new(stream).poll_shutdown(context),
            Transport::Tls(stream, _) => Pin::new(stream).poll_shutdown(context),
            Transport::Tunnel(stream) => Pin::new(stream).poll_shutdown(context),
        }
    }
}
