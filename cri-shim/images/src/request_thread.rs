//! Sends the requests to one registry in a separate thread.
//!
//! Before the head of an answer, a server can send any number of heads with a status of 1xx (RFC
//! 9110, section 15.2). While such heads arrive without a pause, hyper reads up to 128 × 400 KiB of
//! them before it returns to the runtime. reqwest has no limit for these heads. Until hyper returns,
//! the thread runs no other task and no timer, in some cases for seconds. If the server's runtime
//! sent the requests, two connections to a hostile registry would occupy both threads of the
//! runtime, and the server would answer no call.
//!
//! Each [`RequestThread`] therefore has a separate runtime for the requests of one pull to one
//! registry, including the hosts to which the registry leads. If the thread is busy, it delays only
//! these requests. The server's runtime limits the time of a request, because the timers of a busy
//! thread can be late.

use std::convert::Infallible;
use std::io;

use reqwest::{RequestBuilder, Response};
use tokio::runtime::{Builder, Handle, Runtime};
use tokio::sync::{OnceCell, oneshot};
use tokio::task::JoinSet;

use crate::error::{ImageError, Kind};
use rrun_kernel::errno::describe;
use rrun_kernel::heap::THREAD_STACK_BYTES;

/// The maximum number of further threads. Each of these threads resolves one host name at a time.
const MAX_RESOLVER_THREADS: usize = 8;

/// The thread for the requests to one registry. The thread starts when the first request is sent.
#[derive(Default)]
pub(crate) struct RequestThread {
    started: OnceCell<Started>,
}

struct Started {
    runtime: Handle,
    /// Dropping this sender ends the thread and all its connections.
    _end: oneshot::Sender<Infallible>,
}

impl RequestThread {
    /// Sends a request, and waits for the head of the answer. The body of the answer can be read in
    /// any runtime. If the returned future is dropped early, the request is cancelled.
    pub(crate) async fn send(
        &self,
        request: RequestBuilder,
    ) -> Result<reqwest::Result<Response>, ImageError> {
        let started = self.started.get_or_try_init(start).await;
        let started = started.map_err(|error| {
            let reason = describe(&error);
            failed(&format!("start a thread for the requests: {reason}"))
        })?;
        // reqwest creates a timer and hyper spawns the connection's task in the runtime in which the
        // request is first polled. Dropping the set aborts the task. hyper then closes the
        // connection before it reads more from it.
        let mut tasks = JoinSet::new();
        tasks.spawn_on(async move { request.send().await }, &started.runtime);
        match tasks.join_next().await {
            Some(Ok(sent)) => Ok(sent),
            Some(Err(error)) => Err(failed(&format!("the task failed: {error}"))),
            None => Err(failed("the task was not started")),
        }
    }
}

fn failed(why: &str) -> ImageError {
    ImageError::new(Kind::Internal, format!("send the request: {why}"))
}

/// Starts the thread. If the returned future is dropped early, the thread ends.
async fn start() -> io::Result<Started> {
    let (built, runtime) = oneshot::channel();
    let (end, ended) = oneshot::channel::<Infallible>();
    std::thread::Builder::new()
        .name("registry".to_owned())
        .stack_size(THREAD_STACK_BYTES)
        .spawn(move || match build() {
            Ok(runtime) => {
                let _ = built.send(Ok(runtime.handle().clone()));
                let _ = runtime.block_on(ended);
                // A thread can still be resolving a host name. The normal drop would wait for it.
                runtime.shutdown_background();
            }
            Err(error) => {
                let _ = built.send(Err(error));
            }
        })?;
    let runtime = runtime.await.map_err(io::Error::other)??;
    Ok(Started { runtime, _end: end })
}

/// Builds the runtime of the thread. After each poll of a task, the runtime checks its timers and the
/// end of its [`RequestThread`]. It also runs tasks that other threads have aborted, before its own
/// tasks. A busy connection therefore delays these by one poll only.
fn build() -> io::Result<Runtime> {
    Builder::new_current_thread()
        .event_interval(1)
        .global_queue_interval(1)
        .max_blocking_threads(MAX_RESOLVER_THREADS)
        .thread_name("registry")
        .thread_stack_size(THREAD_STACK_BYTES)
        .enable_all()
        .build()
}

#[cfg(test)]
mod tests {
    use std::io::{Read as _, Write as _};
    use std::net::TcpListener;

    use super::*;

    type Failure = Box<dyn std::error::Error>;

    /// Reads one request, answers it, and waits until the client closes the connection.
    fn serve_once(listener: &TcpListener) -> io::Result<usize> {
        let (mut connection, _) = listener.accept()?;
        let mut request = [0; 4096];
        let _ = connection.read(&mut request)?;
        connection.write_all(b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\nok")?;
        connection.read(&mut request)
    }

    #[tokio::test]
    async fn the_thread_starts_with_the_first_request_and_ends_with_its_owner()
    -> Result<(), Failure> {
        let _ = rustls::crypto::ring::default_provider().install_default();
        let listener = TcpListener::bind("127.0.0.1:0")?;
        let url = format!("http://{}/", listener.local_addr()?);
        let served = tokio::task::spawn_blocking(move || serve_once(&listener));
        let client = reqwest::Client::builder().tls_certs_only([]).build()?;
        let thread = RequestThread::default();
        assert!(!thread.started.initialized());
        let answer = thread.send(client.get(&url)).await??;
        assert_eq!(answer.text().await?, "ok");
        let started = thread.started.get().ok_or("no thread was started")?;
        let runtime = started.runtime.clone();
        // The client keeps the connection for its next request. The connection ends with the thread.
        drop(thread);
        assert_eq!(served.await??, 0);
        // A task on a runtime that was shut down ends immediately.
        assert!(runtime.spawn(std::future::pending::<()>()).await.is_err());
        drop(client);
        Ok(())
    }
}
