//! What a client is sent, by many tasks: frames, each of them whole, and short answers in between.

use std::io::{self, IoSlice};
use std::pin::Pin;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex};
use std::task::{Poll, ready};

use tokio::io::{AsyncWrite, AsyncWriteExt};

use super::pipe::Pipe;
use super::transport::WriteHalf;
use rrun_calls::lock::lock;

/// How many bytes of answers may wait for a client that does not read them.
const MAX_ANSWERS: usize = 64 << 10;

/// The sending side of a connection. A frame that has been begun is sent whole, whoever gives up
/// waiting.
pub struct Output {
    /// What the protocol wants answered, on its way.
    answers: Mutex<Vec<u8>>,
    /// Nothing is answered any more.
    silent: AtomicBool,
    splices: bool,
    begun: tokio::sync::Mutex<Begun>,
}

struct Begun {
    half: WriteHalf,
    /// What is left of the frames that were begun.
    rest: Vec<u8>,
    sent: usize,
    /// What comes after that, if there is something in it.
    pipe: Option<Pipe>,
}

/// One's turn to send: all that others began has been sent.
pub struct Turn<'a> {
    output: &'a Arc<Output>,
    begun: Option<tokio::sync::MutexGuard<'a, Begun>>,
}

impl Output {
    pub fn new(half: WriteHalf) -> Arc<Self> {
        Arc::new(Output {
            answers: Mutex::default(),
            silent: AtomicBool::new(false),
            splices: half.socket().is_some(),
            begun: tokio::sync::Mutex::new(Begun {
                half,
                rest: Vec::new(),
                sent: 0,
                pipe: None,
            }),
        })
    }

    /// Whether a [`Turn`] can send what is in a pipe: nothing is done to the bytes on their way.
    pub fn splices(&self) -> bool {
        self.splices
    }

    pub async fn turn(self: &Arc<Self>) -> io::Result<Turn<'_>> {
        let mut turn = Turn {
            output: self,
            begun: Some(self.begun.lock().await),
        };
        if let Some(begun) = &mut turn.begun {
            begun.flush().await?;
        }
        Ok(turn)
    }

    /// Lets `write` append answers, and sees to it that they are sent: by whoever is sending now,
    /// else by a task, so that no reader waits for a client that does not read. False when more
    /// of them wait than a client may leave unread.
    pub fn answer<T>(self: &Arc<Self>, write: impl FnOnce(&mut Vec<u8>) -> T) -> (T, bool) {
        let mut answers = lock(&self.answers);
        let result = write(&mut answers);
        if self.silent.load(Ordering::Relaxed) {
            answers.clear();
        }
        let fits = answers.len() <= MAX_ANSWERS;
        drop(answers);
        self.send_answers();
        (result, fits)
    }

    fn send_answers(self: &Arc<Self>) {
        if lock(&self.answers).is_empty() || self.begun.try_lock().is_err() {
            return;
        }
        let output = Arc::clone(self);
        tokio::spawn(async move {
            while !lock(&output.answers).is_empty() {
                let mut begun = output.begun.lock().await;
                begun.rest.append(&mut lock(&output.answers));
                if begun.flush().await.is_err() {
                    return;
                }
            }
        });
    }

    /// Sends the answers that wait, and this; answers that come later are not sent.
    pub async fn last(self: &Arc<Self>, frame: &[u8]) -> io::Result<()> {
        self.silent.store(true, Ordering::Relaxed);
        let mut begun = self.begun.lock().await;
        let answers = std::mem::take(&mut *lock(&self.answers));
        begun.rest.extend_from_slice(&answers);
        begun.rest.extend_from_slice(frame);
        begun.flush().await
    }

    /// Ends our half of the connection.
    pub async fn shut_down(&self) -> io::Result<()> {
        self.begun.lock().await.half.shutdown().await
    }
}

impl Turn<'_> {
    /// Sends a frame.
    pub async fn send(mut self, header: &[u8], data: &[u8]) -> io::Result<()> {
        match &mut self.begun {
            Some(begun) => begun.send(header, data).await,
            None => Ok(()),
        }
    }

    /// Lets `fill` put something into the pipe. Whatever it puts there must be sent by
    /// [`Turn::send_pipe`], with no await in between.
    pub fn fill(&mut self, fill: impl FnOnce(&mut Pipe) -> io::Result<usize>) -> io::Result<usize> {
        let Some(begun) = &mut self.begun else {
            return Ok(0);
        };
        let pipe = match begun.pipe.take() {
            Some(pipe) => pipe,
            None => Pipe::new()?,
        };
        fill(begun.pipe.insert(pipe))
    }

    /// Sends a frame whose data is in the pipe.
    pub async fn send_pipe(mut self, header: &[u8]) -> io::Result<()> {
        match &mut self.begun {
            Some(begun) => begun.send_pipe(header).await,
            None => Ok(()),
        }
    }
}

impl Drop for Turn<'_> {
    fn drop(&mut self) {
        self.begun = None;
        // What others found it taken for.
        self.output.send_answers();
    }
}

impl Begun {
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
