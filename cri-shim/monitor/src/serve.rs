//! The monitor's loop: one epoll over the listening socket, its clients, SIGCHLD, and the
//! containers' output and out-of-memory counts.

use std::collections::{BTreeMap, VecDeque};
use std::mem::MaybeUninit;
use std::os::fd::{AsFd, OwnedFd};
use std::path::PathBuf;
use std::sync::Arc;
use std::time::{Duration, Instant};

use nix::sys::signalfd::SignalFd;
use rustix::event::{EventfdFlags, Timespec, epoll, eventfd};
use rustix::io::Errno;
use rustix::net::SocketFlags;
use rustix::process::WaitOptions;

use super::connection::{ClientId, Connection, Input, Role};
use super::container::{Container, State};
use super::container_log::{Buffers, Stream};
use super::exec::Running;
use super::exec_cgroup::Left;
use super::exit;
use super::own_log;
use super::readonly_exec;
use super::runtime::{Call, Lateness};
use rrun_kernel::errno::describe;
use rrun_protocol::{ContainerState, Event, Failure, FailureKind, Hello, Phase, Reply, Request};

/// The most clients at once; more wait in the socket's backlog.
const MAX_CLIENTS: usize = 256;

/// How long no client is accepted after descriptors have run out.
const ACCEPT_PAUSE: Duration = Duration::from_secs(1);

/// The most exit statuses that are kept for runtimes still to tell whose they are.
const MAX_UNCLAIMED: usize = 4096;

/// Output that comes in pieces smaller than [`MUCH`] and sooner than this after each other is
/// left in its pipe for the length of a nap, so that a program that writes line by line does not
/// wake us, and the thread that writes the log, for every line.
const SOON: Duration = Duration::from_millis(1);

/// A pipe is not filled in this time by a program that writes short lines.
const NAP: Timespec = Timespec {
    tv_sec: 0,
    tv_nsec: 250_000,
};

/// Bytes; a pipe holds 64 KiB at first.
pub(super) const MUCH: usize = 48 << 10;

/// What a descriptor in the epoll set belongs to. The number goes into the kernel's 64 bits.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Source {
    Listener,
    Signals,
    Client(ClientId),
    Stdout(u64),
    Stderr(u64),
    Memory(u64),
    /// A log has done what it was waited for.
    Logs,
    /// What an exec has left behind.
    ExecCgroup(u64),
    /// The set of all that is no output.
    Control,
}

impl Source {
    fn pack(self) -> epoll::EventData {
        let (kind, number) = match self {
            Source::Listener => (0, 0),
            Source::Signals => (1, 0),
            Source::Client(number) => (2, number),
            Source::Stdout(number) => (3, number),
            Source::Stderr(number) => (4, number),
            Source::Memory(number) => (5, number),
            Source::Logs => (6, 0),
            Source::ExecCgroup(number) => (7, number),
            Source::Control => (8, 0),
        };
        epoll::EventData::new_u64(number << 4 | kind)
    }

    fn unpack(data: epoll::EventData) -> Option<Self> {
        let number = data.u64() >> 4;
        Some(match data.u64() & 15 {
            0 => Source::Listener,
            1 => Source::Signals,
            2 => Source::Client(number),
            3 => Source::Stdout(number),
            4 => Source::Stderr(number),
            5 => Source::Memory(number),
            6 => Source::Logs,
            7 => Source::ExecCgroup(number),
            8 => Source::Control,
            _ => return None,
        })
    }
}

/// What a runtime call is for, and who waits for it. Containers go by their serial number here,
/// since an id can come back.
pub(crate) enum Purpose {
    Create {
        serial: u64,
        client: ClientId,
    },
    /// The cleaning up after a failed create.
    Undo {
        serial: u64,
        client: ClientId,
        failure: Failure,
    },
    Start {
        serial: u64,
        client: ClientId,
    },
    /// Kill and update: only the client wants to know.
    Plain {
        client: ClientId,
    },
    Exec(super::exec::Starting),
    /// The cleaning up after a container's end.
    Delete {
        serial: u64,
    },
}

/// What else is to be done after a round.
#[derive(Default)]
struct Seen {
    children: bool,
    control: bool,
}

pub(crate) struct Monitor {
    /// Our directory, absolute, for paths that others use; it is our working directory, too.
    pub(super) dir: PathBuf,
    pub(super) timeout: Duration,
    pub(super) pid1: Option<i32>,
    /// See [`rrun_protocol::Hello::holder`].
    pub(super) holder: Option<i32>,
    /// See [`rrun_protocol::Pod::runtime`]; until it has been prepared for.
    runtime: Option<PathBuf>,
    /// There has been a subscriber.
    greeted: bool,
    pub(super) containers: Vec<Container>,
    pub(super) calls: BTreeMap<i32, (Call, Purpose)>,
    pub(super) execs: BTreeMap<i32, Running>,
    /// The cgroups of execs that have ended and left something behind.
    pub(super) left: BTreeMap<u64, Left>,
    pub(super) buffers: Buffers,
    /// An eventfd by which the logs' threads wake this one.
    pub(super) logs: Arc<OwnedFd>,
    /// The most bytes that a stream has given in this round of the loop, if any has.
    pub(super) came: Option<usize>,
    /// When output came last.
    last_output: Option<Instant>,
    /// Output, and `control`.
    epoll: OwnedFd,
    /// All else; what is waited for during a nap.
    control: OwnedFd,
    signals: SignalFd,
    listener: OwnedFd,
    /// When clients are accepted again, if they are not now.
    deaf_until: Option<Instant>,
    clients: BTreeMap<ClientId, Connection>,
    /// Children that ended before a runtime told whose they are.
    unclaimed: VecDeque<(i32, i32)>,
    serial: u64,
    shutdown: Option<ClientId>,
}

impl Monitor {
    pub(crate) fn new(
        dir: PathBuf,
        timeout: Duration,
        (pid1, holder): (Option<i32>, Option<i32>),
        runtime: Option<PathBuf>,
        signals: SignalFd,
        listener: OwnedFd,
    ) -> Result<Self, Errno> {
        let flags = EventfdFlags::CLOEXEC | EventfdFlags::NONBLOCK;
        let monitor = Monitor {
            dir,
            timeout,
            pid1,
            holder,
            runtime,
            greeted: false,
            containers: Vec::new(),
            calls: BTreeMap::new(),
            execs: BTreeMap::new(),
            left: BTreeMap::new(),
            buffers: Buffers::new(),
            logs: Arc::new(eventfd(0, flags)?),
            came: None,
            last_output: None,
            epoll: epoll::create(epoll::CreateFlags::CLOEXEC)?,
            control: epoll::create(epoll::CreateFlags::CLOEXEC)?,
            signals,
            listener,
            deaf_until: None,
            clients: BTreeMap::new(),
            unclaimed: VecDeque::new(),
            serial: 0,
            shutdown: None,
        };
        let (data, flags) = (Source::Control.pack(), epoll::EventFlags::IN);
        epoll::add(&monitor.epoll, &monitor.control, data, flags)?;
        monitor.watch(&monitor.listener, Source::Listener, epoll::EventFlags::IN)?;
        monitor.watch(&monitor.signals, Source::Signals, epoll::EventFlags::IN)?;
        monitor.watch(&monitor.logs, Source::Logs, epoll::EventFlags::IN)?;
        Ok(monitor)
    }

    /// Works until a client's Shutdown.
    pub(crate) fn run(&mut self) -> Result<(), Errno> {
        let mut space = [const { MaybeUninit::uninit() }; 32];
        let mut nap = false;
        loop {
            let timeout = self.timeout();
            let (set, timeout) = match nap {
                true => (&self.control, Some(timeout.map_or(NAP, |it| it.min(NAP)))),
                false => (&self.epoll, timeout),
            };
            let mut seen = match epoll::wait(set, &mut space, timeout.as_ref()) {
                Ok((events, _)) => self.handle(events),
                Err(Errno::INTR) => Seen::default(),
                Err(errno) => return Err(errno),
            };
            if seen.control {
                let timeout = Some(&Timespec::default());
                if let Ok((events, _)) = epoll::wait(&self.control, &mut space, timeout) {
                    seen.children |= self.handle(events).children;
                }
            }
            nap = self.naps();
            let children = seen.children;
            if children {
                self.reap();
            }
            self.look_at_clocks();
            if let Some(client) = self.shutdown
                && self.calls.is_empty()
            {
                self.reply(client, &Reply::Done);
                return Ok(());
            }
        }
    }

    fn handle(&mut self, events: &[epoll::Event]) -> Seen {
        let mut seen = Seen::default();
        for event in events {
            match Source::unpack(event.data) {
                Some(Source::Listener) => self.accept(),
                Some(Source::Signals) => seen.children = true,
                Some(Source::Client(client)) => self.client_ready(client, event.flags),
                Some(Source::Stdout(serial)) => self.output_ready(serial, Stream::Stdout),
                Some(Source::Stderr(serial)) => self.output_ready(serial, Stream::Stderr),
                Some(Source::Memory(serial)) => self.memory_ready(serial),
                Some(Source::Logs) => self.logs_ready(),
                Some(Source::ExecCgroup(number)) => self.exec_cgroup_changed(number),
                Some(Source::Control) => seen.control = true,
                None => {}
            }
        }
        seen
    }

    /// Whether output that comes now can wait a moment for more to come.
    fn naps(&mut self) -> bool {
        let Some(came) = self.came.take() else {
            return false;
        };
        let now = Instant::now();
        let last = self.last_output.replace(now);
        came < MUCH && last.is_some_and(|last| now.duration_since(last) < SOON)
    }

    /// A number that is never given twice.
    pub(super) fn number(&mut self) -> u64 {
        self.serial += 1;
        self.serial
    }

    pub(super) fn watch(
        &self,
        fd: impl AsFd,
        source: Source,
        flags: epoll::EventFlags,
    ) -> Result<(), Errno> {
        let set = match source {
            Source::Stdout(_) | Source::Stderr(_) => &self.epoll,
            _ => &self.control,
        };
        epoll::add(set, fd, source.pack(), flags)
    }

    /// Looks at an output no more.
    pub(super) fn unwatch(&self, fd: impl AsFd) {
        let _ = epoll::delete(&self.epoll, fd);
    }

    // Clients.

    fn accept(&mut self) {
        while self.clients.len() < MAX_CLIENTS {
            let flags = SocketFlags::CLOEXEC | SocketFlags::NONBLOCK;
            let socket = match rustix::net::accept_with(&self.listener, flags) {
                Ok(socket) => socket,
                Err(Errno::INTR | Errno::CONNABORTED) => continue,
                Err(Errno::AGAIN) => return,
                Err(errno) => {
                    own_log::write(&format!("accept a client: {}", describe(&errno.into())));
                    break;
                }
            };
            let client = self.number();
            let flags = epoll::EventFlags::IN;
            if self.watch(&socket, Source::Client(client), flags).is_ok() {
                self.clients.insert(client, Connection::new(socket));
                // The request is mostly there already.
                self.client_ready(client, flags);
            }
        }
        let none = epoll::EventFlags::empty();
        let _ = epoll::modify(&self.control, &self.listener, Source::Listener.pack(), none);
        self.deaf_until = Some(Instant::now() + ACCEPT_PAUSE);
    }

    fn client_ready(&mut self, client: ClientId, flags: epoll::EventFlags) {
        let Some(connection) = self.clients.get_mut(&client) else {
            return;
        };
        let writable = flags.contains(epoll::EventFlags::OUT);
        if writable && !connection.flush() {
            return self.drop_client(client);
        }
        let input = connection.read();
        match input {
            Input::Partial if writable => self.watch_client(client),
            Input::Partial => {}
            Input::Closed => self.drop_client(client),
            Input::Request(request) => {
                let fds = connection.take_fds();
                self.answer(client, request, fds);
            }
        }
    }

    /// Asks for readiness to write while there is something to.
    fn watch_client(&mut self, client: ClientId) {
        if let Some(connection) = self.clients.get(&client) {
            let mut flags = epoll::EventFlags::IN;
            if connection.has_output() {
                flags |= epoll::EventFlags::OUT;
            }
            let data = Source::Client(client).pack();
            let _ = epoll::modify(&self.control, connection.socket(), data, flags);
        }
    }

    pub(super) fn drop_client(&mut self, client: ClientId) {
        if self.clients.remove(&client).is_some() {
            self.exec_client_gone(client);
            self.attach_client_gone(client);
            // There is room for another.
            self.deaf_until = self.deaf_until.map(|_| Instant::now());
        }
    }

    pub(super) fn has_client(&self, client: ClientId) -> bool {
        self.clients.contains_key(&client)
    }

    /// Sends the one answer that ends a connection. A client that has gone needs none.
    pub(super) fn reply(&mut self, client: ClientId, reply: &Reply) {
        self.send(client, Role::Answered, reply, Vec::new());
    }

    pub(super) fn fail(&mut self, client: ClientId, kind: FailureKind, message: impl Into<String>) {
        let message = message.into();
        self.reply(client, &Reply::Error(Failure { kind, message }));
    }

    pub(super) fn send(&mut self, client: ClientId, role: Role, reply: &Reply, fds: Vec<OwnedFd>) {
        let Some(connection) = self.clients.get_mut(&client) else {
            return;
        };
        connection.role = role;
        if !connection.send(reply, fds) {
            self.drop_client(client);
        } else if connection.has_output() {
            self.watch_client(client);
        }
    }

    pub(super) fn publish(&mut self, event: Event) {
        let subscribers: Vec<ClientId> = self
            .clients
            .iter()
            .filter(|(_, connection)| connection.role == Role::Subscriber)
            .map(|(client, _)| *client)
            .collect();
        let reply = Reply::Event(event);
        for client in subscribers {
            self.send(client, Role::Subscriber, &reply, Vec::new());
        }
    }

    fn answer(&mut self, client: ClientId, request: Request, fds: Vec<OwnedFd>) {
        match request {
            Request::Subscribe => {
                let hello = Reply::Hello(self.hello());
                self.send(client, Role::Subscriber, &hello, Vec::new());
                // The first client makes the pod, and what it mounts would have to wait for this;
                // the second comes when the pod is made. Its first container need not wait then.
                if std::mem::replace(&mut self.greeted, true)
                    && let Some(runtime) = self.runtime.take()
                {
                    readonly_exec::prepare(&runtime);
                }
            }
            Request::Create(create) => self.create(client, create, fds),
            Request::Start { id } => self.start(client, &id),
            Request::Kill { id, signal, all } => self.kill(client, &id, signal, all),
            Request::Update { id, resources } => self.update(client, &id, &resources),
            Request::Delete { id } => self.delete(client, &id),
            Request::Exec(exec) => self.exec(client, &exec, &fds),
            Request::Attach(attach) => self.attach(client, &attach, fds),
            Request::CloseStdin { id } => self.close_stdin(client, &id),
            Request::ReopenLog { id } => self.reopen_log(client, &id),
            Request::Shutdown => self.shut_down(client),
        }
    }

    fn hello(&self) -> Hello {
        let containers = self.containers.iter().filter_map(|container| {
            let phase = match &container.state {
                State::Creating => return None,
                State::Created => Phase::Created,
                State::Running | State::Ending(_) => Phase::Running,
                State::Exited { exit, .. } => Phase::Exited(exit.clone()),
            };
            Some(ContainerState {
                id: container.id().to_owned(),
                pid: container.pid,
                phase,
            })
        });
        Hello {
            pid: std::process::id().cast_signed(),
            holder: self.holder,
            pid1: self.pid1,
            passes_after: true,
            containers: containers.collect(),
        }
    }

    fn shut_down(&mut self, client: ClientId) {
        let alive = self
            .containers
            .iter()
            .find(|container| !matches!(container.state, State::Exited { .. }));
        match alive {
            Some(container) => {
                let message = format!("end the monitor: container {} is alive", container.id());
                self.fail(client, FailureKind::WrongState, message);
            }
            None => self.shutdown = Some(client),
        }
    }

    pub(super) fn is_shutting_down(&self) -> bool {
        self.shutdown.is_some()
    }

    // Children.

    fn reap(&mut self) {
        while let Ok(Some(_)) = self.signals.read_signal() {}
        while let Ok(Some((pid, status))) = rustix::process::wait(WaitOptions::NOHANG) {
            self.child_ended(pid.as_raw_nonzero().get(), exit::code(status));
        }
        if self.calls.is_empty() {
            self.unclaimed.clear();
        }
    }

    fn child_ended(&mut self, pid: i32, code: i32) {
        if let Some((call, purpose)) = self.calls.remove(&pid) {
            self.call_ended(&call, purpose, code);
        } else if let Some(running) = self.execs.remove(&pid) {
            self.exec_ended(running, code);
        } else if let Some(container) = self.containers.iter().find(|c| c.is_alive_as(pid)) {
            let serial = container.serial;
            self.init_ended(serial, code);
        } else if self.pid1 == Some(pid) {
            own_log::write("the first process of the pod's PID namespace ended, and all in it");
            self.pid1 = None;
        } else if !self.calls.is_empty() {
            if self.unclaimed.len() >= MAX_UNCLAIMED {
                self.unclaimed.pop_front();
            }
            self.unclaimed.push_back((pid, code));
        }
    }

    /// The exit status of a child that ended before we knew what it was.
    pub(super) fn claim(&mut self, pid: i32) -> Option<i32> {
        let at = self
            .unclaimed
            .iter()
            .rposition(|(ended, _)| *ended == pid)?;
        self.unclaimed.remove(at).map(|(_, code)| code)
    }

    fn call_ended(&mut self, call: &Call, purpose: Purpose, code: i32) {
        match purpose {
            Purpose::Create { serial, client } => self.create_ended(serial, client, call, code),
            Purpose::Undo {
                serial,
                client,
                failure,
            } => self.undo_ended(serial, client, failure),
            Purpose::Start { serial, client } => self.start_ended(serial, client, call, code),
            Purpose::Plain { client } if code == 0 => self.reply(client, &Reply::Done),
            Purpose::Plain { client } => {
                self.fail(client, FailureKind::Runtime, call.reason(code, None));
            }
            Purpose::Exec(starting) => self.exec_started(starting, call, code),
            Purpose::Delete { serial } => self.delete_ended(serial, call, code),
        }
    }

    // Time.

    fn timeout(&self) -> Option<Timespec> {
        let calls = self
            .calls
            .values()
            .filter_map(|(call, _)| call.next_check());
        let containers = self.containers.iter().filter_map(Container::next_check);
        let clients = self.clients.values().filter_map(Connection::deadline);
        let next = calls
            .chain(containers)
            .chain(clients)
            .chain(self.deaf_until)
            .min()?;
        let left = next.saturating_duration_since(Instant::now());
        Timespec::try_from(left).ok()
    }

    fn look_at_clocks(&mut self) {
        let now = Instant::now();
        if self.deaf_until.is_some_and(|until| now >= until) {
            self.deaf_until = None;
            let (data, flags) = (Source::Listener.pack(), epoll::EventFlags::IN);
            let _ = epoll::modify(&self.control, &self.listener, data, flags);
        }
        for (call, _) in self.calls.values_mut() {
            let (late, pid, what) = (call.check(now), call.pid, call.what());
            match late {
                Lateness::None => {}
                Lateness::Slow(seconds) => {
                    own_log::write(&format!(
                        "{what}: waiting for the runtime, process {pid}, for {seconds} s"
                    ));
                }
                Lateness::Expired(seconds) => {
                    own_log::write(&format!(
                        "{what}: killed the runtime, process {pid}, after {seconds} s"
                    ));
                }
            }
        }
        let late = |connection: &Connection| connection.deadline().is_some_and(|at| now >= at);
        let late: Vec<ClientId> = self
            .clients
            .iter()
            .filter(|(_, connection)| late(connection))
            .map(|(client, _)| *client)
            .collect();
        for client in late {
            self.drop_client(client);
        }
        let due: Vec<u64> = self
            .containers
            .iter()
            .filter(|container| container.next_check().is_some_and(|at| now >= at))
            .map(|container| container.serial)
            .collect();
        for serial in due {
            self.container_due(serial);
        }
    }
}
