//! A SPDY session on a client's connection: one task reads, many write.

use std::io::{self, IoSlice};
use std::pin::Pin;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use bytes::BytesMut;
use futures_util::FutureExt;
use tokio::io::{AsyncReadExt, AsyncWrite, AsyncWriteExt, ReadHalf, WriteHalf};
use tokio::sync::Notify;

use super::spdy::frame::{self, DATA_HEADER, MAX_DATA};
use super::spdy::session::Allowance;
use super::spdy::{Decoder, Event, Session, SpdyError};
use super::transport::Transport;

/// One read takes at most about this.
const READ: usize = 64 << 10;

/// A read with less room than this makes a new buffer.
const LEAST_READ: usize = 4 << 10;

/// What is read while a session is silent; it is part of every session's memory.
const FIRST_READ: usize = 512;

/// How many bytes of answers may wait for a client that does not read them.
const MAX_ANSWERS: usize = 64 << 10;

/// Reads what the client sends.
pub struct Reader {
    half: ReadHalf<Transport>,
    input: BytesMut,
    decoder: Decoder,
    writer: Arc<Writer>,
}

/// Sends, from any task. A frame that has been begun is sent whole, whoever gives up waiting.
pub struct Writer {
    session: Mutex<Session>,
    /// Control frames on their way: the session's answers.
    answers: Mutex<Vec<u8>>,
    output: tokio::sync::Mutex<Output>,
    /// Windows have grown, or streams are gone.
    changed: Notify,
}

struct Output {
    half: WriteHalf<Transport>,
    /// What is left of the frames that were begun.
    rest: Vec<u8>,
    sent: usize,
}

/// A session on `transport`, of which `read` has come already.
pub fn serve(transport: Transport, read: &[u8]) -> (Reader, Arc<Writer>) {
    let (half, write) = tokio::io::split(transport);
    let writer = Arc::new(Writer {
        session: Mutex::default(),
        answers: Mutex::default(),
        output: tokio::sync::Mutex::new(Output {
            half: write,
            rest: Vec::new(),
            sent: 0,
        }),
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
                let event = {
                    let mut answers = locked(&self.writer.answers);
                    let event = self.writer.session().receive(frame, &mut answers);
                    if answers.len() > MAX_ANSWERS {
                        return Err(broken(SpdyError::Flood));
                    }
                    event.map_err(broken)?
                };
                self.writer.answer();
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
        locked(&self.session)
    }

    /// Sends data, waiting while the client takes none.
    pub async fn send(self: &Arc<Self>, stream: u32, mut data: &[u8]) -> io::Result<()> {
        while !data.is_empty() {
            let changed = self.changed.notified();
            tokio::pin!(changed);
            changed.as_mut().enable();
            // Before the allowance is taken: that obliges to send.
            let mut output = self.output.lock().await;
            output.flush().await?;
            let allowance = self
                .session()
                .take_allowance(stream, data.len().min(MAX_DATA));
            let count = match allowance {
                Allowance::Bytes(count) => count,
                Allowance::Wait => {
                    drop(output);
                    changed.await;
                    continue;
                }
                Allowance::Closed => return Err(io::ErrorKind::BrokenPipe.into()),
            };
            let (now, later) = data.split_at_checked(count).unwrap_or((data, &[]));
            let header = frame::data_header(stream, now.len(), false);
            let sent = output.send(header, now).await;
            self.unlock(output);
            sent?;
            data = later;
        }
        Ok(())
    }

    /// Closes our half of a stream.
    pub async fn close(self: &Arc<Self>, stream: u32) -> io::Result<()> {
        let mut output = self.output.lock().await;
        output.flush().await?;
        let closed = self.session().close(stream);
        let sent = match closed {
            true => output.send(frame::data_header(stream, 0, true), &[]).await,
            false => Ok(()),
        };
        self.unlock(output);
        sent
    }

    /// Resets a stream, without waiting.
    pub fn reset(self: &Arc<Self>, stream: u32) {
        self.session().reset(stream, &mut locked(&self.answers));
        self.changed.notify_waiters();
        self.answer();
    }

    /// `count` bytes of a stream have been passed on.
    pub fn consumed(self: &Arc<Self>, stream: u32, count: usize) {
        let told = {
            let mut answers = locked(&self.answers);
            self.session().consumed(stream, count, &mut answers);
            !answers.is_empty()
        };
        if told {
            self.answer();
        }
    }

    /// Tells the client that we end, and ends our half of the connection.
    pub async fn finish(&self, error: bool) -> io::Result<()> {
        let mut output = self.output.lock().await;
        let answers = std::mem::take(&mut *locked(&self.answers));
        output.rest.extend_from_slice(&answers);
        if error {
            let last = self.session().last_stream();
            frame::go_away(&mut output.rest, last, error);
        }
        output.flush().await?;
        output.half.shutdown().await
    }

    /// Sees to it that answers which wait are sent: by whoever is sending now, else by a task, so
    /// that no reader waits for a client that does not read.
    fn answer(self: &Arc<Self>) {
        if locked(&self.answers).is_empty() || self.output.try_lock().is_err() {
            return;
        }
        let writer = Arc::clone(self);
        tokio::spawn(async move {
            while !locked(&writer.answers).is_empty() {
                let mut output = writer.output.lock().await;
                output.rest.append(&mut locked(&writer.answers));
                if output.flush().await.is_err() {
                    return;
                }
            }
        });
    }

    /// Gives up the output, and sends what others found it taken for.
    fn unlock(self: &Arc<Self>, output: tokio::sync::MutexGuard<'_, Output>) {
        drop(output);
        self.answer();
    }
}

impl Output {
    /// Sends what was begun.
    async fn flush(&mut self) -> io::Result<()> {
        std::future::poll_fn(|context| {
            while let Some(rest) = self.rest.get(self.sent..).filter(|rest| !rest.is_empty()) {
                let half = Pin::new(&mut self.half);
                match half.poll_write(context, rest) {
                    std::task::Poll::Ready(Ok(0)) => {
                        return std::task::Poll::Ready(Err(io::ErrorKind::WriteZero.into()));
                    }
                    std::task::Poll::Ready(Ok(count)) => self.sent += count,
                    std::task::Poll::Ready(Err(error)) => {
                        return std::task::Poll::Ready(Err(error));
                    }
                    std::task::Poll::Pending => return std::task::Poll::Pending,
                }
            }
            self.rest = Vec::new();
            self.sent = 0;
            Pin::new(&mut self.half).poll_flush(context)
        })
        .await
    }

    async fn send(&mut self, header: [u8; DATA_HEADER], data: &[u8]) -> io::Result<()> {
        let half = &mut self.half;
        let first = std::future::poll_fn(|context| {
            let slices = [IoSlice::new(&header), IoSlice::new(data)];
            std::task::Poll::Ready(Pin::new(&mut *half).poll_write_vectored(context, &slices))
        });
        let written = match first.await {
            std::task::Poll::Ready(written) => written?,
            std::task::Poll::Pending => 0,
        };
        if written < DATA_HEADER + data.len() {
            let header = header.get(written..).unwrap_or_default();
            self.rest.extend_from_slice(header);
            let skipped = written.saturating_sub(DATA_HEADER);
            self.rest
                .extend_from_slice(data.get(skipped..).unwrap_or_default());
        }
        self.flush().await
    }
}

fn locked<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

fn broken(error: SpdyError) -> io::Error {
    io::Error::new(io::ErrorKind::InvalidData, error)
}
