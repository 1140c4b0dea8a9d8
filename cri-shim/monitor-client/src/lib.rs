//! The CRI server's side of the protocol with the monitors.
//!
//! [`spawn()`] starts a pod's monitor; a [`MonitorClient`] sends it requests, one connection each.

mod code;
mod socket;
mod spawn;

use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::path::PathBuf;
use std::time::Duration;

use tokio::io::Interest;
use tokio::net::UnixStream;
use tokio::time::{Instant, timeout_at};

pub use spawn::{SpawnError, spawn};

use rrun_protocol::wire::{self, WireError};
use rrun_protocol::{Attach, Create, Event, Exec, Failure, Hello, Reply, Request};
use socket::connect;

/// How long a request may take that waits for no runtime.
const REQUEST_TIMEOUT: Duration = Duration::from_secs(10);

/// How long a request may take that waits for a runtime: the monitor gives each runtime call two
/// minutes, and cleans up with a second one after a failed first.
const RUNTIME_REQUEST_TIMEOUT: Duration = Duration::from_secs(5 * 60);

/// When the answer to a request must be there.
#[derive(Clone, Copy)]
struct Deadline {
    at: Instant,
    /// From the beginning of the request, for the error.
    timeout: Duration,
}

impl Deadline {
    fn after(timeout: Duration) -> Self {
        let at = Instant::now() + timeout;
        Deadline { at, timeout }
    }
}

#[derive(Debug, thiserror::Error)]
pub enum MonitorError {
    /// There is no monitor, or it went away before it answered.
    #[error("the monitor at {socket} is gone: {reason}")]
    Gone { socket: PathBuf, reason: String },
    /// The monitor's own answer.
    #[error("{}", .0.message)]
    Failed(Failure),
    #[error("the monitor at {socket} did not answer to {request} within {seconds} s")]
    Deadline {
        socket: PathBuf,
        request: &'static str,
        seconds: u64,
    },
    #[error("the monitor at {socket} answered {request} with {answer}")]
    Protocol {
        socket: PathBuf,
        request: &'static str,
        answer: String,
    },
}

/// Asks one pod's monitor. Cheap to make and to clone; holds no connection.
#[derive(Clone, Debug)]
pub struct MonitorClient {
    socket: PathBuf,
}

impl MonitorClient {
    /// `socket` is `STATE/pods/POD/monitor.sock`; its length does not matter.
    pub fn new(socket: impl Into<PathBuf>) -> Self {
        MonitorClient {
            socket: socket.into(),
        }
    }

    /// [`Request::Create`]; the pid of the container's first process. `after` is closed here once
    /// passed.
    pub async fn create(
        &self,
        create: Create,
        after: Option<OwnedFd>,
    ) -> Result<i32, MonitorError> {
        let deadline = Deadline::after(RUNTIME_REQUEST_TIMEOUT);
        let fds: Vec<_> = after.iter().map(AsFd::as_fd).collect();
        let request = Request::Create(create);
        let mut connection = self.send("create", &request, &fds, deadline).await?;
        drop(fds);
        drop(after);
        match self
            .receive("create", &mut connection, Some(deadline))
            .await?
        {
            Reply::Created { pid } => Ok(pid),
            other => Err(self.unexpected("create", &other)),
        }
    }

    /// [`Request::Start`].
    pub async fn start(&self, id: &str) -> Result<(), MonitorError> {
        let request = Request::Start { id: id.to_owned() };
        self.request_done("start", &request, RUNTIME_REQUEST_TIMEOUT)
            .await
    }

    /// [`Request::Kill`].
    pub async fn kill(&self, id: &str, signal: i32, all: bool) -> Result<(), MonitorError> {
        let request = Request::Kill {
            id: id.to_owned(),
            signal,
            all,
        };
        self.request_done("kill", &request, RUNTIME_REQUEST_TIMEOUT)
            .await
    }

    /// [`Request::Update`]; `resources` is the runtime specification's LinuxResources as JSON.
    pub async fn update(&self, id: &str, resources: String) -> Result<(), MonitorError> {
        let request = Request::Update {
            id: id.to_owned(),
            resources,
        };
        self.request_done("update", &request, RUNTIME_REQUEST_TIMEOUT)
            .await
    }

    /// [`Request::Delete`].
    pub async fn delete(&self, id: &str) -> Result<(), MonitorError> {
        let request = Request::Delete { id: id.to_owned() };
        self.request_done("delete", &request, RUNTIME_REQUEST_TIMEOUT)
            .await
    }

    /// [`Request::ReopenLog`].
    pub async fn reopen_log(&self, id: &str) -> Result<(), MonitorError> {
        let request = Request::ReopenLog { id: id.to_owned() };
        self.request_done("reopen_log", &request, REQUEST_TIMEOUT)
            .await
    }

    /// [`Request::Shutdown`].
    pub async fn shutdown(&self) -> Result<(), MonitorError> {
        self.request_done("shutdown", &Request::Shutdown, RUNTIME_REQUEST_TIMEOUT)
            .await
    }

    /// [`Request::Exec`]. `stdio` is stdin, stdout and stderr, and none with `exec.terminal`. The
    /// caller closes its own copies of them: an end of file comes only when all are closed.
    pub async fn exec(
        &self,
        exec: Exec,
        stdio: &[BorrowedFd<'_>],
    ) -> Result<ExecHandle, MonitorError> {
        let deadline = Deadline::after(RUNTIME_REQUEST_TIMEOUT);
        let mut connection = self
            .send("exec", &Request::Exec(exec), stdio, deadline)
            .await?;
        match self
            .receive("exec", &mut connection, Some(deadline))
            .await?
        {
            Reply::Started { pid } => Ok(ExecHandle {
                pid,
                terminal: connection.fds.pop(),
                client: self.clone(),
                connection,
            }),
            other => Err(self.unexpected("exec", &other)),
        }
    }

    /// [`Request::Attach`]; `pipes` are the writing ends, which are closed here once passed.
    pub async fn attach(
        &self,
        attach: Attach,
        pipes: Vec<OwnedFd>,
    ) -> Result<AttachHandle, MonitorError> {
        let deadline = Deadline::after(REQUEST_TIMEOUT);
        let fds: Vec<_> = pipes.iter().map(AsFd::as_fd).collect();
        let request = Request::Attach(attach);
        let mut connection = self.send("attach", &request, &fds, deadline).await?;
        match self
            .receive("attach", &mut connection, Some(deadline))
            .await?
        {
            Reply::Attached => Ok(AttachHandle {
                stdin: connection.fds.pop(),
                connection,
            }),
            other => Err(self.unexpected("attach", &other)),
        }
    }

    /// [`Request::CloseStdin`].
    pub async fn close_stdin(&self, id: &str) -> Result<(), MonitorError> {
        let request = Request::CloseStdin { id: id.to_owned() };
        self.request_done("close_stdin", &request, REQUEST_TIMEOUT)
            .await
    }

    /// [`Request::Subscribe`]: what there is now, and then whatever happens.
    pub async fn subscribe(&self) -> Result<(Hello, Events), MonitorError> {
        let deadline = Deadline::after(REQUEST_TIMEOUT);
        let mut connection = self
            .send("subscribe", &Request::Subscribe, &[], deadline)
            .await?;
        match self
            .receive("subscribe", &mut connection, Some(deadline))
            .await?
        {
            Reply::Hello(hello) => Ok((
                hello,
                Events {
                    client: self.clone(),
                    connection,
                },
            )),
            other => Err(self.unexpected("subscribe", &other)),
        }
    }

    async fn request_done(
        &self,
        name: &'static str,
        request: &Request,
        timeout: Duration,
    ) -> Result<(), MonitorError> {
        match self.request(name, request, timeout).await? {
            Reply::Done => Ok(()),
            other => Err(self.unexpected(name, &other)),
        }
    }

    async fn request(
        &self,
        name: &'static str,
        request: &Request,
        timeout: Duration,
    ) -> Result<Reply, MonitorError> {
        let deadline = Deadline::after(timeout);
        let mut connection = self.send(name, request, &[], deadline).await?;
        self.receive(name, &mut connection, Some(deadline)).await
    }

    async fn send(
        &self,
        name: &'static str,
        request: &Request,
        fds: &[BorrowedFd<'_>],
        deadline: Deadline,
    ) -> Result<Connection, MonitorError> {
        let bytes = wire::encode(request).map_err(|error| self.unreadable(name, &error))?;
        let sending = async {
            let socket = connect(&self.socket).await?;
            let mut sent = match wire::send(&socket, &bytes, fds) {
                Err(rustix::io::Errno::AGAIN | rustix::io::Errno::INTR) => 0,
                sent => sent?,
            };
            let stream = UnixStream::from_std(socket.into())?;
            while let Some(rest) = bytes.get(sent..).filter(|rest| !rest.is_empty()) {
                let with = if sent == 0 { fds } else { &[] };
                sent += stream
                    .async_io(Interest::WRITABLE, || Ok(wire::send(&stream, rest, with)?))
                    .await?;
            }
            Ok::<_, std::io::Error>(stream)
        };
        let stream = timeout_at(deadline.at, sending)
            .await
            .map_err(|_| self.timed_out(name, deadline))?
            .map_err(|error| self.gone(&error))?;
        Ok(Connection {
            stream,
            received: Vec::new(),
            fds: Vec::new(),
        })
    }

    /// The next reply; an error that it carries becomes ours.
    async fn receive(
        &self,
        name: &'static str,
        connection: &mut Connection,
        deadline: Option<Deadline>,
    ) -> Result<Reply, MonitorError> {
        let reply = match deadline {
            Some(deadline) => timeout_at(deadline.at, connection.next())
                .await
                .map_err(|_| self.timed_out(name, deadline))?,
            None => connection.next().await,
        };
        match reply {
            Ok(Some(Reply::Error(failure))) => Err(MonitorError::Failed(failure)),
            Ok(Some(reply)) => Ok(reply),
            Ok(None) => Err(self.gone(&"it closed the connection")),
            Err(ReceiveError::Io(error)) => Err(self.gone(&error)),
            Err(ReceiveError::Wire(error)) => Err(self.unreadable(name, &error)),
        }
    }

    fn gone(&self, reason: &dyn std::fmt::Display) -> MonitorError {
        MonitorError::Gone {
            socket: self.socket.clone(),
            reason: reason.to_string(),
        }
    }

    fn timed_out(&self, request: &'static str, deadline: Deadline) -> MonitorError {
        MonitorError::Deadline {
            socket: self.socket.clone(),
            request,
            seconds: deadline.timeout.as_secs(),
        }
    }

    fn unreadable(&self, request: &'static str, error: &WireError) -> MonitorError {
        MonitorError::Protocol {
            socket: self.socket.clone(),
            request,
            answer: error.to_string(),
        }
    }

    fn unexpected(&self, request: &'static str, reply: &Reply) -> MonitorError {
        MonitorError::Protocol {
            socket: self.socket.clone(),
            request,
            answer: format!("{reply:?}"),
        }
    }
}

struct Connection {
    stream: UnixStream,
    received: Vec<u8>,
    fds: Vec<OwnedFd>,
}

enum ReceiveError {
    Io(std::io::Error),
    Wire(WireError),
}

impl Connection {
    /// `None` at the end of the stream. Loses nothing when it is dropped half-way.
    async fn next(&mut self) -> Result<Option<Reply>, ReceiveError> {
        loop {
            if let Some(reply) = wire::decode(&mut self.received).map_err(ReceiveError::Wire)? {
                return Ok(Some(reply));
            }
            let (stream, received, fds) = (&self.stream, &mut self.received, &mut self.fds);
            let count = stream
                .async_io(Interest::READABLE, || {
                    Ok(wire::receive(stream, received, fds)?)
                })
                .await
                .map_err(ReceiveError::Io)?;
            if count == 0 {
                return Ok(None);
            }
        }
    }
}

/// A process in a container. Dropping it kills the process and what is left of its session.
pub struct ExecHandle {
    /// The process's id on the node.
    pub pid: i32,
    /// The pty's master, if a terminal was asked for; take it.
    pub terminal: Option<OwnedFd>,
    client: MonitorClient,
    connection: Connection,
}

impl ExecHandle {
    /// The process's exit status as a shell would give it. No deadline: the caller has the one
    /// that matters. Cancel-safe.
    pub async fn wait(&mut self) -> Result<i32, MonitorError> {
        let client = &self.client;
        match client.receive("exec", &mut self.connection, None).await? {
            Reply::Exited { code } => Ok(code),
            other => Err(client.unexpected("exec", &other)),
        }
    }
}

/// A client's place at a container's stdio. Dropping it detaches.
pub struct AttachHandle {
    /// The container's stdin, or its pty's master, if it has one; take it.
    pub stdin: Option<OwnedFd>,
    connection: Connection,
}

impl AttachHandle {
    /// Waits for the container's end, or the monitor's. Returns how many bytes of its stdout and
    /// stderr did not fit into the pipes at the end. Cancel-safe.
    pub async fn ended(&mut self) -> (u64, u64) {
        match self.connection.next().await {
            Ok(Some(Reply::Ended { stdout, stderr })) => (stdout, stderr),
            _ => (0, 0),
        }
    }
}

/// What happens to a pod's containers, in order.
pub struct Events {
    client: MonitorClient,
    connection: Connection,
}

impl Events {
    /// Waits for the next event, however long that takes. Cancel-safe. After an error (the
    /// monitor died, or dropped a subscriber that did not keep up) subscribe again, or find that
    /// there is no monitor any more.
    pub async fn next(&mut self) -> Result<Event, MonitorError> {
        let client = &self.client;
        match client
            .receive("subscribe", &mut self.connection, None)
            .await?
        {
            Reply::Event(event) => Ok(event),
            other => Err(client.unexpected("subscribe", &other)),
        }
    }
}
