//! A SPDY session on a client's connection: one task reads, and many tasks write.

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

/// The approximate maximum number of bytes that one read returns.
const READ_BYTES: usize = 64 << 10;

/// The minimum free space in bytes that the buffer must have for a read. If less space is free, the
/// reader allocates a new buffer.
const MIN_READ_ROOM_BYTES: usize = 4 << 10;

/// The size in bytes of the read buffer while the client sends no data. The buffer is small,
/// because every session has its own buffer.
const IDLE_READ_BYTES: usize = 512;

/// The receiving side of a SPDY session.
pub(crate) struct SpdyReader {
    half: ReadHalf,
    input: BytesMut,
    decoder: Decoder,
    writer: Arc<SpdyWriter>,
}

/// The sending side of a SPDY session, usable from any task.
pub(crate) struct SpdyWriter {
    session: Mutex<Session>,
    output: Arc<Output>,
    /// Wakes the tasks that wait to send data. The tasks wake up when a flow control window has
    /// grown or a stream has been closed.
    changed: Notify,
}

/// Opens a SPDY session on the two halves of a client's connection. `read` is the data that has
/// already been read from the client.
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
    /// Returns the next event, or `None` if the client has closed the connection. The call is
    /// cancel-safe.
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

    /// Waits for the client's next data with only a small buffer on the stack. A large buffer for
    /// each connection would waste memory, because most clients send no data most of the time.
    async fn first_read(&mut self) -> io::Result<usize> {
        self.input = BytesMut::new();
        let mut first = [0; IDLE_READ_BYTES];
        let count = self.half.read(&mut first).await?;
        let read = first.get(..count).unwrap_or_default();
        self.input.extend_from_slice(read);
        Ok(count)
    }

    /// Records that the client has opened all its streams, see [`Decoder::expect_no_headers`].
    pub(crate) fn expect_no_headers(&mut self) {
        self.decoder.expect_no_headers();
    }
}

impl SpdyWriter {
    fn session(&self) -> MutexGuard<'_, Session> {
        lock(&self.session)
    }

    /// Waits until the flow control windows allow more data and all earlier frames have been sent.
    /// Returns a permit to send on the connection, and a number of bytes. The caller may send this
    /// number of bytes on the stream. The number is at most `wanted`.
    async fn allowed(&self, stream: u32, wanted: usize) -> io::Result<(SendPermit<'_>, usize)> {
        loop {
            let changed = self.changed.notified();
            tokio::pin!(changed);
            changed.as_mut().enable();
            // An allowance is a number of bytes. A task that has taken an allowance must send that
            // many bytes. For this reason, the task first acquires the permit to send.
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

    /// Sends data, and waits while the client does not read.
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

    /// Returns whether [`Self::splice`] can be used, see [`Output::splices`].
    pub(crate) fn splices(&self) -> bool {
        self.output.splices()
    }

    /// Sends the bytes that `fill` moves into a pipe, without copying them into this process's
    /// memory. `fill` receives the pipe and the maximum number of bytes that `fill` may move.
    /// Returns the result of `fill`, which is the number of moved bytes, or 0 at the end of the
    /// data. If no data is available now, the result is an error of the kind `WouldBlock`.
    pub(crate) async fn splice(
        &self,
        stream: u32,
        mut fill: impl FnMut(&mut Pipe, usize) -> io::Result<usize>,
    ) -> io::Result<usize> {
        let (mut permit, allowed) = self.allowed(stream, pipe::PIPE_BYTES).await?;
        let filled = permit.fill(|pipe| fill(pipe, allowed));
        let count = filled.as_ref().copied().unwrap_or(0);
        // A task reads the flow control windows only while it owns the permit. No other task has
        // seen the reduced windows, so this task can give back the unused bytes.
        self.session().give_back(stream, allowed - count);
        if count > 0 {
            let header = frame::data_header(stream, count, false);
            permit.send_pipe(&header).await?;
        }
        filled
    }

    /// Closes the server's half of a stream.
    pub(crate) async fn close(&self, stream: u32) -> io::Result<()> {
        let permit = self.output.acquire().await?;
        let closed = self.session().close(stream);
        if closed {
            let header = frame::data_header(stream, 0, true);
            permit.send(&header, &[]).await?;
        }
        Ok(())
    }

    /// Closes the server's half of a stream, without waiting.
    pub(crate) fn close_soon(&self, stream: u32) {
        self.output.reply(|replies| {
            if self.session().close(stream) {
                replies.extend_from_slice(&frame::data_header(stream, 0, true));
            }
        });
    }

    /// Resets a stream, without waiting.
    pub(crate) fn reset(&self, stream: u32) {
        self.output
            .reply(|replies| self.session().reset(stream, replies));
        self.changed.notify_waiters();
    }

    /// Records that the server has processed `count` bytes of a stream's data, see
    /// [`Session::consumed`].
    pub(crate) fn consumed(&self, stream: u32, count: usize) {
        self.output
            .reply(|replies| self.session().consumed(stream, count, replies));
    }

    /// Sends the waiting replies, and shuts down the server's half of the connection.
    pub(crate) async fn finish(&self) -> io::Result<()> {
        self.output.finish(&[]).await?;
        self.output.shut_down().await
    }
}

fn broken(error: SpdyError) -> io::Error {
    io::Error::new(io::ErrorKind::InvalidData, error)
}
