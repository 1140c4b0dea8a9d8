//! The client for monitors, which the CRI server uses.
//!
//! [`spawn()`] starts a pod's monitor. A [`MonitorClient`] sends requests to the monitor, and opens
//! a separate connection for each request.

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

use rrun_kernel::errno::describe;
use rrun_protocol::wire::{self, WireError};
use rrun_protocol::{Attach, Create, Event, Exec, Failure, Hello, Reply, Request};
use socket::connect;

/// The timeout of a request for which the monitor runs no runtime.
const REQUEST_TIMEOUT: Duration = Duration::from_secs(10);

/// The timeout of a request for which the monitor runs a runtime. The monitor has a timeout of two
/// minutes for each runtime command. After a failed command, the monitor runs a second command to
/// clean up, so a request can take four minutes.
const RUNTIME_REQUEST_TIMEOUT: Duration = Duration::from_secs(5 * 60);

/// The deadline for the reply to a request.
#[derive(Clone, Copy)]
struct Deadline {
    at: Instant,
    /// The request's timeout, which the error message contains.
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
    /// No monitor listens at the socket, or the monitor closed the connection before it sent the
    /// reply.
    #[error("the connection to the monitor at {socket} failed: {reason}")]
    Gone { socket: PathBuf, reason: String },
    /// A system call of this process failed, for example because the process has no descriptors
    /// left. The monitor may be alive.
    #[error("connect to the monitor at {socket}: {}", describe(.error))]
    Unreachable {
        socket: PathBuf,
        error: std::io::Error,
    },
    /// The monitor replied with an error.
    #[error("{}", .0.message)]
    Failed(Failure),
    #[error("the monitor at {socket} did not answer the request {request} within {seconds} s")]
    Deadline {
        socket: PathBuf,
        request: &'static str,
        seconds: u64,
    },
    #[error("the request {request} to the monitor at {socket} failed: {reason}")]
    Protocol {
        socket: PathBuf,
        request: &'static str,
        reason: String,
    },
}

/// A client for one pod's monitor. A client is cheap to create and to clone, because it keeps no
/// connection open.
#[derive(Clone, Debug)]
pub struct MonitorClient {
    socket: PathBuf,
}

impl MonitorClient {
    /// Creates a client for the monitor that listens at the path `socket`, such as
    /// `STATE/pods/POD/monitor.sock`. The path can have any length.
    pub fn new(socket: impl Into<PathBuf>) -> Self {
        MonitorClient {
            socket: socket.into(),
        }
    }

    /// Sends [`Request::Create`] and returns the pid of the container's first process. The request
    /// carries the descriptor `after`. After sending, `create` closes its own copy of this
    /// descriptor.
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

    /// Sends [`Request::Start`].
    pub async fn start(&self, id: &str) -> Result<(), MonitorError> {
        let request = Request::Start { id: id.to_owned() };
        self.request_done("start", &request, RUNTIME_REQUEST_TIMEOUT)
            .await
    }

    /// Sends [`Request::Kill`].
    pub async fn kill(&self, id: &str, signal: i32, all: bool) -> Result<(), MonitorError> {
        let request = Request::Kill {
            id: id.to_owned(),
            signal,
            all,
        };
        self.request_twice("kill", &request).await
    }

    /// Sends [`Request::Update`]. `resources` is a LinuxResources object of the OCI runtime
    /// specification, as JSON.
    pub async fn update(&self, id: &str, resources: String) -> Result<(), MonitorError> {
        let request = Request::Update {
            id: id.to_owned(),
            resources,
        };
        self.request_done("update", &request, RUNTIME_REQUEST_TIMEOUT)
            .await
    }

    /// Sends [`Request::Delete`].
    pub async fn delete(&self, id: &str) -> Result<(), MonitorError> {
        let request = Request::Delete { id: id.to_owned() };
        self.request_twice("delete", &request).await
    }

    /// Sends [`Request::ReopenLog`].
    pub async fn reopen_log(&self, id: &str) -> Result<(), MonitorError> {
        let request = Request::ReopenLog { id: id.to_owned() };
        self.request_done("reopen_log", &request, REQUEST_TIMEOUT)
            .await
    }

    /// Sends [`Request::Shutdown`].
    pub async fn shutdown(&self) -> Result<(), MonitorError> {
        self.request_twice("shutdown", &Request::Shutdown).await
    }

    /// Sends [`Request::Exec`]. `stdio` contains the descriptors for stdin, stdout and stderr, or the
    /// socket for the terminal's data if `exec.terminal` is true. After this call, the caller must close its own
    /// copies of these descriptors. As long as the copies are open, the reader of an output pipe
    /// does not get the end of file.
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

    /// Sends [`Request::Attach`]. `pipes` are the writing ends of the pipes for the container's
    /// output. The request carries the pipes. After sending, `attach` closes its own copies of the
    /// pipes.
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

    /// Sends [`Request::Resize`]. `exec` is the pid of an exec's first process; `None` means the
    /// container's first process.
    pub async fn resize(
        &self,
        id: &str,
        exec: Option<i32>,
        (columns, rows): (u16, u16),
    ) -> Result<(), MonitorError> {
        let request = Request::Resize {
            id: id.to_owned(),
            exec,
            columns,
            rows,
        };
        self.request_done("resize", &request, REQUEST_TIMEOUT).await
    }

    /// Sends [`Request::CloseStdin`].
    pub async fn close_stdin(&self, id: &str) -> Result<(), MonitorError> {
        let request = Request::CloseStdin { id: id.to_owned() };
        self.request_done("close_stdin", &request, REQUEST_TIMEOUT)
            .await
    }

    /// Sends [`Request::Subscribe`]. Returns the monitor's current state, and a handle for the
    /// later events.
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

    /// Sends a request that has no further effect if it is repeated. If the connection fails, sends
    /// the request again. A monitor that lives but lacks a resource can close one connection. The
    /// caller would otherwise assume that the monitor is dead.
    async fn request_twice(
        &self,
        name: &'static str,
        request: &Request,
    ) -> Result<(), MonitorError> {
        match self
            .request_done(name, request, RUNTIME_REQUEST_TIMEOUT)
            .await
        {
            Err(MonitorError::Gone { .. }) => {
                self.request_done(name, request, RUNTIME_REQUEST_TIMEOUT)
                    .await
            }
            result => result,
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
            .map_err(|error| self.failed(error))?;
        Ok(Connection {
            stream,
            received: Vec::new(),
            fds: Vec::new(),
        })
    }

    /// Receives the next reply. A reply that carries an error is returned as
    /// [`MonitorError::Failed`].
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
            Ok(None) => Err(self.gone("the monitor closed the connection")),
            Err(ReceiveError::Io(error)) => Err(self.failed(error)),
            Err(ReceiveError::Wire(error)) => Err(self.unreadable(name, &error)),
        }
    }

    fn gone(&self, reason: impl Into<String>) -> MonitorError {
        MonitorError::Gone {
            socket: self.socket.clone(),
            reason: reason.into(),
        }
    }

    /// Returns [`MonitorError::Gone`] if the monitor caused the error, and otherwise
    /// [`MonitorError::Unreachable`].
    fn failed(&self, error: std::io::Error) -> MonitorError {
        use std::io::ErrorKind::{BrokenPipe, ConnectionRefused, ConnectionReset, NotFound};
        match error.kind() {
            BrokenPipe | ConnectionRefused | ConnectionReset | NotFound => {
                self.gone(describe(&error))
            }
            _ => MonitorError::Unreachable {
                socket: self.socket.clone(),
                error,
            },
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
            reason: error.to_string(),
        }
    }

    fn unexpected(&self, request: &'static str, reply: &Reply) -> MonitorError {
        MonitorError::Protocol {
            socket: self.socket.clone(),
            request,
            reason: format!("the monitor sent the unexpected reply {reply:?}"),
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
    /// Receives the next reply. Returns `None` at the end of the stream. `next` is cancel-safe,
    /// because `self` keeps the received data.
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

/// A handle for the process that [`Request::Exec`] started in a container. Dropping this handle
/// kills the process and all processes that it has started.
pub struct ExecHandle {
    /// The process id in the node's PID namespace.
    pub pid: i32,
    /// The terminal's master, if the monitor is of an earlier version, which does not transfer the
    /// data of terminals. The caller can move the descriptor out of the handle.
    pub terminal: Option<OwnedFd>,
    client: MonitorClient,
    connection: Connection,
}

impl ExecHandle {
    /// Waits for the process to exit and returns its exit status as a shell reports it. `wait` has
    /// no timeout, because the caller sets its own timeout. `wait` is cancel-safe.
    pub async fn wait(&mut self) -> Result<i32, MonitorError> {
        let client = &self.client;
        match client.receive("exec", &mut self.connection, None).await? {
            Reply::Exited { code } => Ok(code),
            other => Err(client.unexpected("exec", &other)),
        }
    }
}

/// A handle for a client that is attached to a container's stdio. Dropping this handle detaches the
/// client.
pub struct AttachHandle {
    /// A socket that leads to the container's stdin or terminal. A monitor of an earlier version sends
    /// the stdin pipe or the terminal's master. `None` if the monitor sent no descriptor.
    /// The caller can move the descriptor out of the handle.
    pub stdin: Option<OwnedFd>,
    connection: Connection,
}

impl AttachHandle {
    /// Waits until the container or the monitor exits. Returns how many bytes the monitor omitted
    /// at the end of stdout and at the end of stderr. The monitor omits output if the stream's pipe
    /// is full. `ended` is cancel-safe.
    pub async fn ended(&mut self) -> (u64, u64) {
        match self.connection.next().await {
            Ok(Some(Reply::Ended { stdout, stderr })) => (stdout, stderr),
            _ => (0, 0),
        }
    }
}

/// A handle that returns the events of a pod's containers, oldest first.
pub struct Events {
    client: MonitorClient,
    connection: Connection,
}

impl Events {
    /// Waits for the next event without a timeout. `next` is cancel-safe. An error has one of two
    /// causes: the monitor died, or the monitor disconnected this client. The monitor disconnects a
    /// client that reads too slowly. After an error, the caller can subscribe again. If the monitor
    /// died, the new subscription fails.
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
