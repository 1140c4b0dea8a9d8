//! The sending side of a client's connection. Many tasks send frames on one connection. The server
//! sends each frame as a whole. Between frames, the server sends the short replies that the
//! protocol requires.

use std::io::{self, IoSlice};
use std::pin::Pin;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex};
use std::task::{Poll, ready};

use tokio::io::{AsyncWrite, AsyncWriteExt};

use crate::halves::WriteHalf;
use crate::pipe::Pipe;
use rrun_calls::lock::lock;

/// The maximum number of bytes of unsent replies. Replies remain unsent if the client does not
/// read.
const MAX_REPLY_BYTES: usize = 64 << 10;

/// The sending side of a client's connection. A task can be cancelled after it has sent a part of a
/// frame. The rest of the frame is then sent before any other data.
pub(crate) struct Output {
    /// The unsent replies that the protocol requires.
    replies: Mutex<Vec<u8>>,
    /// True once [`Output::finish`] has been called. After that call, new replies are dropped.
    finished: AtomicBool,
    splices: bool,
    writer: tokio::sync::Mutex<FrameWriter>,
}

struct FrameWriter {
    half: WriteHalf,
    /// The frames and replies that have not been sent completely.
    rest: Vec<u8>,
    /// The number of bytes of `rest` that have been sent.
    sent: usize,
    /// A pipe whose contents are sent after `rest`.
    pipe: Option<Pipe>,
}

/// The exclusive right to send on a connection. [`Output::acquire`] returns a permit only after all
/// earlier frames have been sent completely.
pub(crate) struct SendPermit<'a> {
    output: &'a Arc<Output>,
    writer: Option<tokio::sync::MutexGuard<'a, FrameWriter>>,
}

impl Output {
    pub(crate) fn new(half: WriteHalf) -> Arc<Self> {
        Arc::new(Output {
            replies: Mutex::default(),
            finished: AtomicBool::new(false),
            splices: half.socket().is_some(),
            writer: tokio::sync::Mutex::new(FrameWriter {
                half,
                rest: Vec::new(),
                sent: 0,
                pipe: None,
            }),
        })
    }

    /// Returns whether a [`SendPermit`] can send the contents of a pipe. Only a plain socket
    /// supports sending from a pipe, because TLS and a tunnel change the bytes that they send.
    pub(crate) fn splices(&self) -> bool {
        self.splices
    }

    pub(crate) async fn acquire(self: &Arc<Self>) -> io::Result<SendPermit<'_>> {
        let mut permit = SendPermit {
            output: self,
            writer: Some(self.writer.lock().await),
        };
        if let Some(writer) = &mut permit.writer {
            writer.flush().await?;
        }
        Ok(permit)
    }

    /// Calls `write`, which appends replies to the waiting replies, and starts sending the replies.
    /// If another task is sending, that task also sends the replies. If no task is sending, a new
    /// task sends the replies. `reply` itself does not wait for the client. The caller can
    /// therefore continue to read from a client that does not read the replies. Returns the result
    /// of `write`, and a bool. The bool is false if more than [`MAX_REPLY_BYTES`] bytes of replies
    /// are waiting.
    pub(crate) fn reply<T>(self: &Arc<Self>, write: impl FnOnce(&mut Vec<u8>) -> T) -> (T, bool) {
        let mut replies = lock(&self.replies);
        let result = write(&mut replies);
        if self.finished.load(Ordering::Relaxed) {
            replies.clear();
        }
        let fits = replies.len() <= MAX_REPLY_BYTES;
        drop(replies);
        self.send_replies();
        (result, fits)
    }

    fn send_replies(self: &Arc<Self>) {
        if lock(&self.replies).is_empty() || self.writer.try_lock().is_err() {
            return;
        }
        let output = Arc::clone(self);
        tokio::spawn(async move {
            while !lock(&output.replies).is_empty() {
                let mut writer = output.writer.lock().await;
                writer.rest.append(&mut lock(&output.replies));
                if writer.flush().await.is_err() {
                    return;
                }
            }
        });
    }

    /// Sends the waiting replies and then `frame`. Drops all replies that are added later.
    pub(crate) async fn finish(self: &Arc<Self>, frame: &[u8]) -> io::Result<()> {
        self.finished.store(true, Ordering::Relaxed);
        let mut writer = self.writer.lock().await;
        let replies = std::mem::take(&mut *lock(&self.replies));
        writer.rest.extend_from_slice(&replies);
        writer.rest.extend_from_slice(frame);
        writer.flush().await
    }

    /// Shuts down the server's half of the connection.
    pub(crate) async fn shut_down(&self) -> io::Result<()> {
        self.writer.lock().await.half.shutdown().await
    }
}

impl SendPermit<'_> {
    /// Sends a frame that consists of `header` and `data`.
    pub(crate) async fn send(mut self, header: &[u8], data: &[u8]) -> io::Result<()> {
        match &mut self.writer {
            Some(writer) => writer.send(header, data).await,
            None => Ok(()),
        }
    }

    /// Calls `fill`, which moves data into the pipe. The caller must then send the data with
    /// [`SendPermit::send_pipe`], without an await between `fill` and `send_pipe`. If the task were
    /// cancelled at such an await, the data would later be sent without its header.
    pub(crate) fn fill(
        &mut self,
        fill: impl FnOnce(&mut Pipe) -> io::Result<usize>,
    ) -> io::Result<usize> {
        let Some(writer) = &mut self.writer else {
            return Ok(0);
        };
        let pipe = match writer.pipe.take() {
            Some(pipe) => pipe,
            None => Pipe::new(writer.half.pipe_bytes())?,
        };
        fill(writer.pipe.insert(pipe))
    }

    /// Sends a frame that consists of `header` and the data in the pipe.
    pub(crate) async fn send_pipe(mut self, header: &[u8]) -> io::Result<()> {
        match &mut self.writer {
            Some(writer) => writer.send_pipe(header).await,
            None => Ok(()),
        }
    }
}

impl Drop for SendPermit<'_> {
    fn drop(&mut self) {
        self.writer = None;
        // Send the replies that other tasks added while this permit locked the writer.
        self.output.send_replies();
    }
}

impl FrameWriter {
    /// Sends the unsent bytes of `rest`, and then the contents of the pipe.
    async fn flush(&mut self) -> io::Result<()> {
        std::future::poll_fn(|context| {
            while let Some(rest) = self.rest.get(self.sent..).filter(|rest| !rest.is_empty()) {
                match ready!(Pin::new(&mut self.half).poll_write(context, rest))? {
                    0 => return Poll::Ready(Err(io::ErrorKind::WriteZero.into())),
                    count => self.sent += count,
                }
            }
            if self.sent > 0 {
                self.rest = Vec::new();
                self.sent = 0;
            }
            if let Some(pipe) = self.pipe.as_mut().filter(|pipe| pipe.held() > 0) {
                ready!(self.half.poll_drain(context, pipe))?;
            }
            Pin::new(&mut self.half).poll_flush(context)
        })
        .await
    }

    async fn send(&mut self, header: &[u8], data: &[u8]) -> io::Result<()> {
        let half = &mut self.half;
        let first = std::future::poll_fn(|context| {
            let slices = [IoSlice::new(header), IoSlice::new(data)];
            Poll::Ready(Pin::new(&mut *half).poll_write_vectored(context, &slices))
        });
        let written = match first.await {
            Poll::Ready(written) => written?,
            Poll::Pending => 0,
        };
        if written < header.len() + data.len() {
            let skipped = written.saturating_sub(header.len());
            let header = header.get(written..).unwrap_or_default();
            self.rest.extend_from_slice(header);
            self.rest
                .extend_from_slice(data.get(skipped..).unwrap_or_default());
        }
        self.flush().await
    }

    async fn send_pipe(&mut self, header: &[u8]) -> io::Result<()> {
        let written = self.half.begin(header);
        // If the frame's header could not be sent, the contents of the pipe must not be sent
        // either.
        if written.is_err() {
            self.pipe = None;
        }
        let left = header.get(written?..).unwrap_or_default();
        self.rest.extend_from_slice(left);
        self.flush().await
    }
}
