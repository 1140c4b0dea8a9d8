//! What a client is sent, by many tasks: whole frames, and short replies between them.

use std::io::{self, IoSlice};
use std::pin::Pin;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex};
use std::task::{Poll, ready};

use tokio::io::{AsyncWrite, AsyncWriteExt};

use crate::halves::WriteHalf;
use crate::pipe::Pipe;
use rrun_calls::lock::lock;

/// How many bytes of replies may wait for a client that does not read them.
const MAX_REPLY_BYTES: usize = 64 << 10;

/// The sending side of a connection. A frame that has been begun is sent whole, even if its sender
/// gives up waiting.
pub(crate) struct Output {
    /// Replies that the protocol demands, and that have not been sent yet.
    replies: Mutex<Vec<u8>>,
    /// No more replies are sent.
    finished: AtomicBool,
    splices: bool,
    writer: tokio::sync::Mutex<FrameWriter>,
}

struct FrameWriter {
    half: WriteHalf,
    /// What is left of the frames that were begun.
    rest: Vec<u8>,
    sent: usize,
    /// Its content is sent after `rest`.
    pipe: Option<Pipe>,
}

/// The exclusive right to send: all frames that others began have been sent.
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

    /// Whether a [`SendPermit`] can send what is in a pipe: nothing is done to the bytes on their way.
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

    /// Lets `write` append replies, and makes sure that they are sent: by whoever is sending now,
    /// else by a task, so that no reader waits for a client that does not read. False when more
    /// of them wait than a client may leave unread.
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

    /// Sends the replies that wait, and this; replies that come later are not sent.
    pub(crate) async fn finish(self: &Arc<Self>, frame: &[u8]) -> io::Result<()> {
        self.finished.store(true, Ordering::Relaxed);
        let mut writer = self.writer.lock().await;
        let replies = std::mem::take(&mut *lock(&self.replies));
        writer.rest.extend_from_slice(&replies);
        writer.rest.extend_from_slice(frame);
        writer.flush().await
    }

    /// Ends our half of the connection.
    pub(crate) async fn shut_down(&self) -> io::Result<()> {
        self.writer.lock().await.half.shutdown().await
    }
}

impl SendPermit<'_> {
    /// Sends a frame.
    pub(crate) async fn send(mut self, header: &[u8], data: &[u8]) -> io::Result<()> {
        match &mut self.writer {
            Some(writer) => writer.send(header, data).await,
            None => Ok(()),
        }
    }

    /// Lets `fill` put something into the pipe. Whatever it puts there must be sent by
    /// [`SendPermit::send_pipe`], with no await in between.
    pub(crate) fn fill(
        &mut self,
        fill: impl FnOnce(&mut Pipe) -> io::Result<usize>,
    ) -> io::Result<usize> {
        let Some(writer) = &mut self.writer else {
            return Ok(0);
        };
        let pipe = match writer.pipe.take() {
            Some(pipe) => pipe,
            None => Pipe::new()?,
        };
        fill(writer.pipe.insert(pipe))
    }

    /// Sends a frame whose data is in the pipe.
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
        // Replies whose senders found the writer taken.
        self.output.send_replies();
    }
}

impl FrameWriter {
    /// Sends what was begun.
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
        // Without it what is in the pipe is not to be sent either.
        if written.is_err() {
            self.pipe = None;
        }
        let left = header.get(written?..).unwrap_or_default();
        self.rest.extend_from_slice(left);
        self.flush().await
    }
}
