//! The receiving half and the sending half of a client's connection, which different tasks use.

use std::io::{self, IoSlice};
use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Poll, ready};

use rustix::net::SendFlags;
use tokio::io::{AsyncRead, AsyncWrite, Interest, ReadBuf};
use tokio::net::TcpStream;
use tokio::net::tcp::{OwnedReadHalf, OwnedWriteHalf};

use crate::pipe::Pipe;
use crate::watch::Watch;

/// A stream of bytes in both directions.
pub(crate) trait ByteStream: AsyncRead + AsyncWrite + Send + Unpin {}

impl<T: AsyncRead + AsyncWrite + Send + Unpin> ByteStream for T {}

/// The half that receives the client's data.
pub(crate) enum ReadHalf {
    Plain(OwnedReadHalf, Arc<Watch>),
    Locked(tokio::io::ReadHalf<Box<dyn ByteStream>>),
}

/// The half that sends data to the client.
pub(crate) enum WriteHalf {
    Plain(OwnedWriteHalf, Arc<Watch>),
    Locked(tokio::io::WriteHalf<Box<dyn ByteStream>>),
}

/// Splits a plain socket into two halves, which need no common lock.
pub(crate) fn of_socket(socket: TcpStream, watch: Arc<Watch>) -> (ReadHalf, WriteHalf) {
    let (read, write) = socket.into_split();
    (
        ReadHalf::Plain(read, Arc::clone(&watch)),
        WriteHalf::Plain(write, watch),
    )
}

/// Splits a stream that is not a plain socket into two halves, which share a lock.
pub(crate) fn of_stream(stream: impl ByteStream + 'static) -> (ReadHalf, WriteHalf) {
    let stream: Box<dyn ByteStream> = Box::new(stream);
    let (read, write) = tokio::io::split(stream);
    (ReadHalf::Locked(read), WriteHalf::Locked(write))
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
    /// Returns the socket if this half sends the data unchanged. Returns `None` if TLS or a tunnel
    /// changes the data.
    pub(crate) fn socket(&self) -> Option<&TcpStream> {
        match self {
            WriteHalf::Plain(half, _) => Some(half.as_ref()),
            WriteHalf::Locked(_) => None,
        }
    }

    /// Returns the capacity in bytes of a pipe from which this half sends data. Returns 0 if
    /// [`Self::socket`] returns `None`.
    pub(crate) fn pipe_bytes(&self) -> usize {
        match self {
            WriteHalf::Plain(_, watch) => watch.pipe_bytes(),
            WriteHalf::Locked(_) => 0,
        }
    }

    /// Sends the contents of a pipe. Fails if [`Self::socket`] returns `None`.
    pub(crate) fn poll_drain(
        &self,
        context: &mut Context<'_>,
        pipe: &mut Pipe,
    ) -> Poll<io::Result<()>> {
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

    /// Sends as much of a header as the socket accepts, and returns the number of sent bytes. The
    /// kernel sends the header together with the data that [`Self::poll_drain`] sends next, not in
    /// a separate packet.
    pub(crate) fn begin(&self, header: &[u8]) -> io::Result<usize> {
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

    fn half(&mut self) -> Pin<&mut (dyn AsyncWrite + Unpin)> {
        match self {
            WriteHalf::Plain(half, _) => Pin::new(half),
            WriteHalf::Locked(half) => Pin::new(half),
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
        let polled = self.half().poll_write_vectored(context, slices);
        if let (WriteHalf::Plain(_, watch), Poll::Ready(Ok(_))) = (&*self, &polled) {
            watch.touch();
        }
        polled
    }

    fn is_write_vectored(&self) -> bool {
        true
    }

    fn poll_flush(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<io::Result<()>> {
        self.half().poll_flush(context)
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<io::Result<()>> {
        self.half().poll_shutdown(context)
    }
}
