//! A SPDY session on a client's connection: one task reads, many write.

use std::io;
use std::sync::{Arc, Mutex, MutexGuard};

use bytes::BytesMut;
use futures_util::FutureExt;
use tokio::io::AsyncReadExt;
use tokio::sync::Notify;

use super::output::{Output, Turn};
use super::pipe::{self, Pipe};
use super::spdy::frame::{self, MAX_DATA};
use super::spdy::session::Allowance;
use super::spdy::{Decoder, Event, Session, SpdyError};
use super::transport::{ReadHalf, Transport};
use rrun_calls::lock::lock;

/// One read takes at most about this.
const READ: usize = 64 << 10;

/// A read with less room than this makes a new buffer.
const LEAST_READ: usize = 4 << 10;

/// What is read while a session is silent; it is part of every session's memory.
const FIRST_READ: usize = 512;

/// Reads what the client sends.
pub struct Reader {
    half: ReadHalf,
    input: BytesMut,
    decoder: Decoder,
    writer: Arc<Writer>,
}

/// Sends, from any task.
pub struct Writer {
    session: Mutex<Session>,
    output: Arc<Output>,
    /// Windows have grown, or streams are gone.
    changed: Notify,
}

/// A session on `transport`, of which `read` has come already.
pub fn serve(transport: Transport, read: &[u8]) -> (Reader, Arc<Writer>) {
    let (half, write) = transport.split();
    let writer = Arc::new(Writer {
        session: Mutex::default(),
        output: Output::new(write),
        changed: Notify::new(),
    });
    let reader = Reader {
        half,
        input: BytesMut::from(read),
        decoder: Decoder::default(),
        writer: Arc::clone(&writer),
    };
    (reader, writer)
}

impl Reader {
    /// The next thing that happens; `None` when the client has closed the connection. Cancel-safe.
    pub async fn next(&mut self) -> io::Result<Option<Event>> {
        loop {
            while let Some(frame) = self.decoder.decode(&mut self.input).map_err(broken)? {
                let writer = &self.writer;
                let (event, fits) = writer
                    .output
                    .answer(|answers| writer.session().receive(frame, answers));
                if !fits {
                    return Err(broken(SpdyError::Flood));
                }
                let event = event.map_err(broken)?;
                self.writer.changed.notify_waiters();
                if event.is_some() {
                    return Ok(event);
                }
            }
            if self.input.capacity() - self.input.len() < LEAST_READ {
                self.input.reserve(READ);
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
        let mut first = [0; FIRST_READ];
        let count = self.half.read(&mut first).await?;
        let read = first.get(..count).unwrap_or_default();
        self.input.extend_from_slice(read);
        Ok(count)
    }

    /// All streams are open: see [`Decoder::expect_no_headers`].
    pub fn expect_no_headers(&mut self) {
        self.decoder.expect_no_headers();
    }
}

impl Writer {
    fn session(&self) -> MutexGuard<'_, Session> {
        lock(&self.session)
    }

    /// A turn to send on a stream, and how much of what is wanted may be sent in it; waits while the
    /// client takes none.
    async fn allowed(&self, stream: u32, wanted: usize) -> io::Result<(Turn<'_>, usize)> {
        loop {
            let changed = self.changed.notified();
            tokio::pin!(changed);
            changed.as_mut().enable();
            // Before the allowance is taken: that obliges to send.
            let turn = self.output.turn().await?;
            let allowance = self.session().take_allowance(stream, wanted);
            match allowance {
                Allowance::Bytes(count) => return Ok((turn, count)),
                Allowance::Wait => {
                    drop(turn);
                    changed.await;
                }
                Allowance::Closed => return Err(io::ErrorKind::BrokenPipe.into()),
            }
        }
    }

    /// Sends data, waiting while the client takes none.
    pub async fn send(&self, stream: u32, mut data: &[u8]) -> io::Result<()> {
        while !data.is_empty() {
            let (turn, count) = self.allowed(stream, data.len().min(MAX_DATA)).await?;
            let (now, later) = data.split_at_checked(count).unwrap_or((data, &[]));
            let header = frame::data_header(stream, now.len(), false);
            turn.send(&header, now).await?;
            data = later;
        }
        Ok(())
    }

    /// See [`Output::splices`].
    pub fn splices(&self) -> bool {
        self.output.splices()
    }

    /// Sends what `fill` puts into a pipe, at most as many bytes as it is told, without looking at
    /// them. Returns what `fill` does: 0 at the end, an error of the kind `WouldBlock` if there is
    /// nothing now.
    pub async fn splice(
        &self,
        stream: u32,
        mut fill: impl FnMut(&mut Pipe, usize) -> io::Result<usize>,
    ) -> io::Result<usize> {
        let (mut turn, allowed) = self.allowed(stream, pipe::ROOM).await?;
        let filled = turn.fill(|pipe| fill(pipe, allowed));
        let count = filled.as_ref().copied().unwrap_or(0);
        // Nobody has seen what was taken too much: that takes a turn.
        self.session().give_back(stream, allowed - count);
        if count > 0 {
            let header = frame::data_header(stream, count, false);
            turn.send_pipe(&header).await?;
        }
        filled
    }

    /// Closes our half of a stream.
    pub async fn close(&self, stream: u32) -> io::Result<()> {
        let turn = self.output.turn().await?;
        let closed = self.session().close(stream);
        match closed {
            true => turn.send(&frame::data_header(stream, 0, true), &[]).await,
            false => Ok(()),
        }
    }

    /// Resets a stream, without waiting.
    pub fn reset(&self, stream: u32) {
        self.output
            .answer(|answers| self.session().reset(stream, answers));
        self.changed.notify_waiters();
    }

    /// `count` bytes of a stream have been passed on.
    pub fn consumed(&self, stream: u32, count: usize) {
        self.output
            .answer(|answers| self.session().consumed(stream, count, answers));
    }

    /// Tells the client that we end, and ends our half of the connection.
    pub async fn finish(&self, error: bool) -> io::Result<()> {
        let mut goodbye = Vec::new();
        if error {
            frame::go_away(&mut goodbye, self.session().last_stream(), error);
        }
        self.output.last(&goodbye).await?;
        self.output.shut_down().await
    }
}

fn broken(error: SpdyError) -> io::Error {
    io::Error::new(io::ErrorKind::InvalidData, error)
}
