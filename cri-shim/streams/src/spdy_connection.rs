//! A SPDY session on a client's connection: one task reads, many write.

use std::io;
use std::sync::{Arc, Mutex, MutexGuard};

use bytes::BytesMut;
use futures_util::FutureExt;
use tokio::io::AsyncReadExt;
use tokio::sync::Notify;

use crate::halves::{ReadHalf, WriteHalf};
use crate::output::{Output, SendPermit};
use crate::pipe::{self, Pipe};
use crate::spdy::frame::{self, MAX_DATA_BYTES};
use crate::spdy::{Allowance, Decoder, Event, Session, SpdyError};
use rrun_calls::lock::lock;

/// One read takes at most about this.
const READ_BYTES: usize = 64 << 10;

/// A read with less room than this makes a new buffer.
const MIN_READ_ROOM_BYTES: usize = 4 << 10;

/// What is read while a session is silent; it is part of every session's memory.
const IDLE_READ_BYTES: usize = 512;

/// Reads what the client sends.
pub(crate) struct SpdyReader {
    half: ReadHalf,
    input: BytesMut,
    decoder: Decoder,
    writer: Arc<SpdyWriter>,
}

/// Sends, from any task.
pub(crate) struct SpdyWriter {
    session: Mutex<Session>,
    output: Arc<Output>,
    /// Windows have grown, or streams are gone.
    changed: Notify,
}

/// A session on these halves, of which `read` has come already.
pub(crate) fn open(
    (half, write): (ReadHalf, WriteHalf),
    read: &[u8],
) -> (SpdyReader, Arc<SpdyWriter>) {
    let writer = Arc::new(SpdyWriter {
        session: Mutex::default(),
        output: Output::new(write),
        changed: Notify::new(),
    });
    let reader = SpdyReader {
        half,
        input: BytesMut::from(read),
        decoder: Decoder::default(),
        writer: Arc::clone(&writer),
    };
    (reader, writer)
}

impl SpdyReader {
    /// The next event; `None` when the client has closed the connection. Cancel-safe.
    pub(crate) async fn next(&mut self) -> io::Result<Option<Event>> {
        loop {
            while let Some(frame) = self.decoder.decode(&mut self.input).map_err(broken)? {
                let writer = &self.writer;
                let (event, fits) = writer
                    .output
                    .reply(|replies| writer.session().receive(frame, replies));
                if !fits {
                    return Err(broken(SpdyError::Flood));
                }
                let event = event.map_err(broken)?;
                self.writer.changed.notify_waiters();
                if event.is_some() {
                    return Ok(event);
                }
            }
            if self.input.capacity() - self.input.len() < MIN_READ_ROOM_BYTES {
                self.input.reserve(READ_BYTES);
            }
            let was_empty = self.input.is_empty();
            let reading = self.half.read_buf(&mut self.input);
            let count = if was_empty {
                match reading.now_or_never() {
                    Some(count) => count?,
                    None => self.first_read().await?,
                }
            } else {
                reading.await?
            };
            if count == 0 {
                return Ok(None);
            }
        }
    }

    /// Waits without a buffer: most sessions are silent most of the time.
    async fn first_read(&mut self) -> io::Result<usize> {
        self.input = BytesMut::new();
        let mut first = [0; IDLE_READ_BYTES];
        let count = self.half.read(&mut first).await?;
        let read = first.get(..count).unwrap_or_default();
        self.input.extend_from_slice(read);
        Ok(count)
    }

    /// All streams are open: see [`Decoder::expect_no_headers`].
    pub(crate) fn expect_no_headers(&mut self) {
        self.decoder.expect_no_headers();
    }
}

impl SpdyWriter {
    fn session(&self) -> MutexGuard<'_, Session> {
        lock(&self.session)
    }

    /// A permit to send on a stream, and how much of what is wanted may be sent with it. Waits while
    /// the client takes nothing.
    async fn allowed(&self, stream: u32, wanted: usize) -> io::Result<(SendPermit<'_>, usize)> {
        loop {
            let changed = self.changed.notified();
            tokio::pin!(changed);
            changed.as_mut().enable();
            // Before the allowance is taken: that obliges to send.
            let permit = self.output.acquire().await?;
            let allowance = self.session().take_allowance(stream, wanted);
            match allowance {
                Allowance::Bytes(count) => return Ok((permit, count)),
                Allowance::Wait => {
                    drop(permit);
                    changed.await;
                }
                Allowance::Closed => return Err(io::ErrorKind::BrokenPipe.into()),
            }
        }
    }

    /// Sends data, waiting while the client takes none.
    pub(crate) async fn send(&self, stream: u32, mut data: &[u8]) -> io::Result<()> {
        while !data.is_empty() {
            let (permit, count) = self.allowed(stream, data.len().min(MAX_DATA_BYTES)).await?;
            let (now, later) = data.split_at_checked(count).unwrap_or((data, &[]));
            let header = frame::data_header(stream, now.len(), false);
            permit.send(&header, now).await?;
            data = later;
        }
        Ok(())
    }

    /// See [`Output::splices`].
    pub(crate) fn splices(&self) -> bool {
        self.output.splices()
    }

    /// Sends what `fill` puts into a pipe, at most as many bytes as it is told, without looking at
    /// them. Returns what `fill` does: 0 at the end, an error of the kind `WouldBlock` if there is
    /// nothing now.
    pub(crate) async fn splice(
        &self,
        stream: u32,
        mut fill: impl FnMut(&mut Pipe, usize) -> io::Result<usize>,
    ) -> io::Result<usize> {
        let (mut permit, allowed) = self.allowed(stream, pipe::PIPE_BYTES).await?;
        let filled = permit.fill(|pipe| fill(pipe, allowed));
        let count = filled.as_ref().copied().unwrap_or(0);
        // No other task has seen that too much was taken: that takes a permit.
        self.session().give_back(stream, allowed - count);
        if count > 0 {
            let header = frame::data_header(stream, count, false);
            permit.send_pipe(&header).await?;
        }
        filled
    }

    /// Closes our half of a stream.
    pub(crate) async fn close(&self, stream: u32) -> io::Result<()> {
        let permit = self.output.acquire().await?;
        let closed = self.session().close(stream);
        if closed {
            let header = frame::data_header(stream, 0, true);
            permit.send(&header, &[]).await?;
        }
        Ok(())
    }

    /// Resets a stream, without waiting.
    pub(crate) fn reset(&self, stream: u32) {
        self.output
            .reply(|replies| self.session().reset(stream, replies));
        self.changed.notify_waiters();
    }

    /// `count` bytes of a stream have been passed on.
    pub(crate) fn consumed(&self, stream: u32, count: usize) {
        self.output
            .reply(|replies| self.session().consumed(stream, count, replies));
    }

    /// Sends the replies that wait, and ends our half of the connection.
    pub(crate) async fn finish(&self) -> io::Result<()> {
        self.output.finish(&[]).await?;
        self.output.shut_down().await
    }
}

fn broken(error: SpdyError) -> io::Error {
    io::Error::new(io::ErrorKind::InvalidData, error)
}
