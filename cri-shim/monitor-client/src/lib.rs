//! The CRI server's side of the protocol with the monitors.
//!
//! [`spawn`] starts a pod's monitor; a [`MonitorClient`] asks it things, one connection each.

mod code;

use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};
use std::path::{Path, PathBuf};
use std::time::Duration;

use nix::spawn::{PosixSpawnAttr, PosixSpawnFileActions, PosixSpawnFlags, posix_spawn};
use rustix::fs::{Mode, OFlags};
use rustix::net::{AddressFamily, SocketAddrUnix, SocketFlags, SocketType};
use rustix::process::{Pid, PidfdFlags, WaitId, WaitIdOptions};
use tokio::io::Interest;
use tokio::io::unix::AsyncFd;
use tokio::net::UnixStream;
use tokio::time::{Instant, timeout_at};

use rrun_protocol::wire::{self, WireError};
use rrun_protocol::{Attach, Create, Event, Exec, Failure, Hello, LISTEN_FD, Pod, Reply, Request};

/// The file names in a pod's directory.
pub const SOCKET_NAME: &str = "monitor.sock";
pub const CONFIGURATION_NAME: &str = "monitor.json";

/// How long a request may take that waits for no runtime.
const PROMPT: Duration = Duration::from_secs(10);

/// How long one may take that does: the monitor gives each runtime call two minutes, and cleans
/// up with a second one after a failed first.
const RUNTIME: Duration = Duration::from_secs(5 * 60);

/// Connections that may wait for a monitor that is busy or still starting.
const BACKLOG: i32 = 256;

/// Longest path that fits into a unix socket's address with its final zero (unix(7)).
const SUN_PATH: usize = 107;

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

#[derive(Debug, thiserror::Error)]
pub enum SpawnError {
    #[error("{what} {path}: {error}")]
    File {
        what: &'static str,
        path: PathBuf,
        error: std::io::Error,
    },
    #[error("a monitor is listening at {0} already")]
    Alive(PathBuf),
}

/// Starts the pod's monitor: writes `dir`/monitor.json, binds `dir`/monitor.sock and runs
/// `binary` with the listening socket at [`LISTEN_FD`]. Returns its pid without waiting for it:
/// a request made at once is answered when the monitor has come up, or fails with
/// [`MonitorError::Gone`] if it could not. A task of the runtime reaps it whenever it ends.
///
/// A socket that an earlier monitor left behind is replaced; one with a monitor behind it is not.
pub async fn spawn(dir: &Path, pod: &Pod, binary: &Path) -> Result<i32, SpawnError> {
    let configuration = dir.join(CONFIGURATION_NAME);
    let socket = dir.join(SOCKET_NAME);
    let failed = |what, path: &Path| {
        let path = path.to_owned();
        move |error: std::io::Error| SpawnError::File { what, path, error }
    };
    let json = serde_json::to_vec(pod)
        .map_err(|error| failed("encode", &configuration)(std::io::Error::other(error)))?;
    std::fs::write(&configuration, json).map_err(failed("write", &configuration))?;

    let listener = match bind(&socket) {
        Err(rustix::io::Errno::ADDRINUSE) => {
            // One whose backlog is full is alive, too.
            let connecting = tokio::time::timeout(PROMPT, connect(&socket)).await;
            if !matches!(connecting, Ok(Err(_))) {
                return Err(SpawnError::Alive(socket));
            }
            std::fs::remove_file(&socket).map_err(failed("remove the old", &socket))?;
            bind(&socket)
        }
        bound => bound,
    }
    .map_err(|errno| failed("listen on", &socket)(errno.into()))?;

    let pid = start(binary, dir, &listener)
        .map_err(|errno| failed("start the monitor", binary)(errno.into()))?;
    rrun_kernel::descriptor_limit::restore_for(pid);
    reap(pid);
    Ok(pid)
}

/// Path of a socket by way of its directory, for paths that are too long for an address.
fn short_path(socket: &Path) -> rustix::io::Result<(PathBuf, Option<OwnedFd>)> {
    match (socket.parent(), socket.file_name()) {
        (Some(parent), Some(name)) if socket.as_os_str().len() > SUN_PATH => {
            let flags = OFlags::PATH | OFlags::DIRECTORY | OFlags::CLOEXEC;
            let dir = rustix::fs::open(parent, flags, Mode::empty())?;
            let short = Path::new("/proc/self/fd").join(dir.as_raw_fd().to_string());
            Ok((short.join(name), Some(dir)))
        }
        _ => Ok((socket.to_owned(), None)),
    }
}

fn bind(socket: &Path) -> rustix::io::Result<OwnedFd> {
    let (path, _dir) = short_path(socket)?;
    let flags = SocketFlags::CLOEXEC | SocketFlags::NONBLOCK;
    let listener = rustix::net::socket_with(AddressFamily::UNIX, SocketType::STREAM, flags, None)?;
    rustix::net::bind(&listener, &SocketAddrUnix::new(&path)?)?;
    rustix::net::listen(&listener, BACKLOG)?;
    Ok(listener)
}

/// Connects, waiting while the monitor's backlog is full. The socket does not block, and the
/// executor does not know of it yet: what is sent at once is there when the monitor looks.
async fn connect(socket: &Path) -> std::io::Result<OwnedFd> {
    let (path, _dir) = short_path(socket)?;
    let address = SocketAddrUnix::new(&path)?;
    let flags = SocketFlags::CLOEXEC | SocketFlags::NONBLOCK;
    loop {
        let stream =
            rustix::net::socket_with(AddressFamily::UNIX, SocketType::STREAM, flags, None)?;
        match rustix::net::connect(&stream, &address) {
            Ok(()) => return Ok(stream),
            Err(rustix::io::Errno::AGAIN) => tokio::time::sleep(Duration::from_millis(5)).await,
            Err(errno) => return Err(errno.into()),
        }
    }
}

/// Runs the monitor with nothing of ours but the socket: /dev/null as stdio, no environment but
/// the search path, every signal as it is by default.
fn start(binary: &Path, dir: &Path, listener: &OwnedFd) -> nix::Result<i32> {
    let c_string = |bytes: &[u8]| std::ffi::CString::new(bytes).map_err(|_| nix::Error::EINVAL);
    let mut actions = PosixSpawnFileActions::init()?;
    let (null, write_null) = (nix::fcntl::OFlag::O_RDWR, nix::sys::stat::Mode::empty());
    actions.add_dup2(listener.as_raw_fd(), LISTEN_FD)?;
    for fd in 0..3 {
        actions.add_open(fd, "/dev/null", null, write_null)?;
    }
    let mut attributes = PosixSpawnAttr::init()?;
    attributes.set_sigmask(&nix::sys::signal::SigSet::empty())?;
    attributes.set_sigdefault(&nix::sys::signal::SigSet::all())?;
    attributes.set_flags(
        PosixSpawnFlags::POSIX_SPAWN_SETSIGMASK | PosixSpawnFlags::POSIX_SPAWN_SETSIGDEF,
    )?;
    let path = std::env::var_os("PATH")
        .unwrap_or_else(|| "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin".into());
    let mut search = b"PATH=".to_vec();
    search.extend_from_slice(path.as_encoded_bytes());
    let arguments = [
        c_string(binary.as_os_str().as_encoded_bytes())?,
        c_string(b"--dir")?,
        c_string(dir.as_os_str().as_encoded_bytes())?,
    ];
    let environment = [c_string(&search)?];
    let pid = posix_spawn(binary, &actions, &attributes, &arguments, &environment)?;
    Ok(pid.as_raw())
}

/// Waits for a monitor in a task of its own, so that its end leaves no zombie.
fn reap(pid: i32) {
    let Some(pid) = Pid::from_raw(pid) else {
        return;
    };
    // It can't have been reaped by anybody else, so the pid is still the monitor's.
    let Ok(pidfd) = rustix::process::pidfd_open(pid, PidfdFlags::NONBLOCK) else {
        return;
    };
    tokio::spawn(async move {
        // SAFETY: `pidfd` is owned, never replaced, and always gives the same descriptor.
        let registered = unsafe { AsyncFd::register_with_interest(pidfd, Interest::READABLE) };
        let Ok(pidfd) = registered else {
            return;
        };
        if pidfd.readable().await.is_ok() {
            let options = WaitIdOptions::EXITED | WaitIdOptions::NOHANG;
            let _ = rustix::process::waitid(WaitId::PidFd(pidfd.get_ref().as_fd()), options);
        }
    });
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

    pub fn socket(&self) -> &Path {
        &self.socket
    }

    /// [`Request::Create`]; the pid of the container's first process. `after` is closed here once
    /// passed.
    pub async fn create(
        &self,
        create: Create,
        after: Option<OwnedFd>,
    ) -> Result<i32, MonitorError> {
        let limit = (Instant::now() + RUNTIME, RUNTIME);
        let fds: Vec<_> = after.iter().map(AsFd::as_fd).collect();
        let request = Request::Create(create);
        let mut connection = self.send("create", &request, &fds, limit).await?;
        drop(fds);
        drop(after);
        match self.receive("create", &mut connection, Some(limit)).await? {
            Reply::Created { pid } => Ok(pid),
            other => Err(self.unexpected("create", &other)),
        }
    }

    /// [`Request::Start`].
    pub async fn start(&self, id: &str) -> Result<(), MonitorError> {
        let request = Request::Start { id: id.to_owned() };
        self.ask_done("start", &request, RUNTIME).await
    }

    /// [`Request::Kill`].
    pub async fn kill(&self, id: &str, signal: i32, all: bool) -> Result<(), MonitorError> {
        let request = Request::Kill {
            id: id.to_owned(),
            signal,
            all,
        };
        self.ask_done("kill", &request, RUNTIME).await
    }

    /// [`Request::Update`]; `resources` is the runtime specification's LinuxResources as JSON.
    pub async fn update(&self, id: &str, resources: String) -> Result<(), MonitorError> {
        let request = Request::Update {
            id: id.to_owned(),
            resources,
        };
        self.ask_done("update", &request, RUNTIME).await
    }

    /// [`Request::Delete`].
    pub async fn delete(&self, id: &str) -> Result<(), MonitorError> {
        let request = Request::Delete { id: id.to_owned() };
        self.ask_done("delete", &request, RUNTIME).await
    }

    /// [`Request::ReopenLog`].
    pub async fn reopen_log(&self, id: &str) -> Result<(), MonitorError> {
        let request = Request::ReopenLog { id: id.to_owned() };
        self.ask_done("reopen_log", &request, PROMPT).await
    }

    /// [`Request::Shutdown`].
    pub async fn shutdown(&self) -> Result<(), MonitorError> {
        self.ask_done("shutdown", &Request::Shutdown, RUNTIME).await
    }

    /// [`Request::Exec`]. `stdio` is stdin, stdout and stderr, and none with `exec.terminal`. The
    /// caller closes its own copies of them: an end of file comes only when all are closed.
    pub async fn exec(
        &self,
        exec: Exec,
        stdio: &[BorrowedFd<'_>],
    ) -> Result<ExecHandle, MonitorError> {
        let deadline = Instant::now() + RUNTIME;
        let mut connection = self
            .send("exec", &Request::Exec(exec), stdio, (deadline, RUNTIME))
            .await?;
        match self
            .receive("exec", &mut connection, Some((deadline, RUNTIME)))
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
        let deadline = Instant::now() + PROMPT;
        let fds: Vec<_> = pipes.iter().map(AsFd::as_fd).collect();
        let request = Request::Attach(attach);
        let mut connection = self
            .send("attach", &request, &fds, (deadline, PROMPT))
            .await?;
        match self
            .receive("attach", &mut connection, Some((deadline, PROMPT)))
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
        self.ask_done("close_stdin", &request, PROMPT).await
    }

    /// [`Request::Subscribe`]: what there is now, and then whatever happens.
    pub async fn subscribe(&self) -> Result<(Hello, Events), MonitorError> {
        let deadline = Instant::now() + PROMPT;
        let mut connection = self
            .send("subscribe", &Request::Subscribe, &[], (deadline, PROMPT))
            .await?;
        match self
            .receive("subscribe", &mut connection, Some((deadline, PROMPT)))
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

    async fn ask_done(
        &self,
        name: &'static str,
        request: &Request,
        limit: Duration,
    ) -> Result<(), MonitorError> {
        match self.ask(name, request, limit).await? {
            Reply::Done => Ok(()),
            other => Err(self.unexpected(name, &other)),
        }
    }

    async fn ask(
        &self,
        name: &'static str,
        request: &Request,
        limit: Duration,
    ) -> Result<Reply, MonitorError> {
        let deadline = Instant::now() + limit;
        let mut connection = self.send(name, request, &[], (deadline, limit)).await?;
        self.receive(name, &mut connection, Some((deadline, limit)))
            .await
    }

    async fn send(
        &self,
        name: &'static str,
        request: &Request,
        fds: &[BorrowedFd<'_>],
        (deadline, limit): (Instant, Duration),
    ) -> Result<Connection, MonitorError> {
        let bytes = wire::encode(request).map_err(|error| self.broken(name, &error))?;
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
        let stream = timeout_at(deadline, sending)
            .await
            .map_err(|_| self.late(name, limit))?
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
        deadline: Option<(Instant, Duration)>,
    ) -> Result<Reply, MonitorError> {
        let reply = match deadline {
            Some((at, limit)) => timeout_at(at, connection.next())
                .await
                .map_err(|_| self.late(name, limit))?,
            None => connection.next().await,
        };
        match reply {
            Ok(Some(Reply::Error(failure))) => Err(MonitorError::Failed(failure)),
            Ok(Some(reply)) => Ok(reply),
            Ok(None) => Err(self.gone(&"it closed the connection")),
            Err(ReceiveError::Io(error)) => Err(self.gone(&error)),
            Err(ReceiveError::Wire(error)) => Err(self.broken(name, &error)),
        }
    }

    fn gone(&self, reason: &dyn std::fmt::Display) -> MonitorError {
        MonitorError::Gone {
            socket: self.socket.clone(),
            reason: reason.to_string(),
        }
    }

    fn late(&self, request: &'static str, limit: Duration) -> MonitorError {
        MonitorError::Deadline {
            socket: self.socket.clone(),
            request,
            seconds: limit.as_secs(),
        }
    }

    fn broken(&self, request: &'static str, error: &WireError) -> MonitorError {
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
