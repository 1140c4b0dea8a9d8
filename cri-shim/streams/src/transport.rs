//! A client's connection, which is plain TCP or TLS over TCP.

use std::io::{self, IoSlice};
use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Poll};

use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};
use tokio::net::TcpStream;
use tokio_rustls::TlsAcceptor;
use tokio_rustls::server::TlsStream;

use crate::halves::{self, ByteStream, ReadHalf, WriteHalf};
use crate::watch::Watch;

/// A client's connection, with a [`Watch`] that tracks all transfers on it.
pub struct Transport {
    stream: Stream,
    watch: Arc<Watch>,
}

enum Stream {
    Plain(TcpStream),
    Tls(Box<TlsStream<TcpStream>>),
}

impl Transport {
    /// Accepts a connection, with a TLS handshake if `tls` contains an acceptor.
    pub async fn accept(stream: TcpStream, tls: Option<TlsAcceptor>) -> io::Result<Self> {
        stream.set_nodelay(true)?;
        let watch = Watch::new(&stream)?;
        let stream = match tls {
            Some(tls) => Stream::Tls(Box::new(tls.accept(stream).await?)),
            None => Stream::Plain(stream),
        };
        Ok(Transport { stream, watch })
    }

    pub fn watch(&self) -> Arc<Watch> {
        Arc::clone(&self.watch)
    }

    /// Splits the connection into a receiving half and a sending half, for different tasks. The
    /// halves of a plain socket need no common lock.
    pub(crate) fn split(self) -> (ReadHalf, WriteHalf) {
        match self.stream {
            Stream::Plain(stream) => halves::of_socket(stream, self.watch),
            Stream::Tls(_) => halves::of_stream(self),
        }
    }

    fn stream(&mut self) -> Pin<&mut dyn ByteStream> {
        match &mut self.stream {
            Stream::Plain(stream) => Pin::new(stream),
            Stream::Tls(stream) => Pin::new(stream),
        }
    }
}

impl AsyncRead for Transport {
    fn poll_read(
        mut self: Pin<&mut Self>,
        context: &mut Context<'_>,
        buffer: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        let polled = self.stream().poll_read(context, buffer);
        if matches!(polled, Poll::Ready(Ok(()))) {
            self.watch.touch();
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
        let polled = self.stream().poll_write_vectored(context, slices);
        if matches!(polled, Poll::Ready(Ok(_))) {
            self.watch.touch();
        }
        polled
    }

    fn is_write_vectored(&self) -> bool {
        true
    }

    fn poll_flush(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<io::Result<()>> {
        self.stream().poll_flush(context)
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<io::Result<()>> {
        self.stream().poll_shutdown(context)
    }
}
