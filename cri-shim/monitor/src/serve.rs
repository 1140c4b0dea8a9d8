//! The monitor's event loop, which waits for events and handles them. The events have these
//! sources: the listening socket, the clients' sockets, SIGCHLD, the containers' output, the
//! out-of-memory counters, the threads that write the logs, and the cgroups of exited execs.

mod execs;
mod reaping;

use std::collections::BTreeMap;
use std::mem::MaybeUninit;
use std::os::fd::OwnedFd;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::{Duration, Instant};

use nix::sys::signalfd::SignalFd;
use rustix::event::epoll::{self, EventFlags};
use rustix::event::{EventfdFlags, Timespec, eventfd};
use rustix::io::Errno;
use rustix::termios::Winsize;

use super::calls::{Calls, Purpose};
use super::clients::Clients;
use super::coalescing::{self, Coalescing};
use super::connection::{ClientId, Incoming, Stage};
use super::container::{Container, State};
use super::container_log::{ReadBuffer, Stream};
use super::early_exits::EarlyExits;
use super::effect::Effect;
use super::exec::Execs;
use super::exit;
use super::joined;
use super::output::StreamState;
use super::own_log;
use super::poller::{EventSource, EventSpace, Poller};
use super::readonly_exec;
use super::relay::Relays;
use super::runtime::{Call, RuntimeCommand};
use super::serials::Serials;
use reaping::Reaping;
use rrun_kernel::errno::describe;
use rrun_protocol::{
    Attach, ContainerState, Create, Event, Exec, Failure, FailureKind, Hello, Reply, Request,
};

/// The data about the pod that is known when the monitor starts.
pub(crate) struct PodContext {
    /// The absolute path of the monitor's directory, which is also its working directory. Paths
    /// that the monitor passes to other processes begin with this absolute path.
    pub(crate) dir: PathBuf,
    /// The timeout for each runtime call.
    pub(crate) runtime_timeout: Duration,
    /// The pid of the first process in the pod's PID namespace, if the pod's containers share a PID
    /// namespace.
    pub(crate) pid1: Option<i32>,
    /// The pid of the process that [`rrun_protocol::Hello::holder`] describes.
    pub(crate) holder: Option<i32>,
    /// The runtime binary that [`rrun_protocol::Pod::runtime`] describes. `None` after the monitor
    /// has passed the runtime to [`readonly_exec::prepare`].
    pub(crate) runtime: Option<PathBuf>,
}

impl PodContext {
    /// Returns the pid of the pod's pause process. Returns `None` if the pod has no pause process,
    /// or if the monitor has reaped it.
    pub(crate) fn pause(&self) -> Option<i32> {
        self.pid1.or(self.holder)
    }
}

/// The work that the monitor must do after it has handled one batch of events.
#[derive(Default)]
struct Pending {
    children: bool,
    control: bool,
}

pub(crate) struct Monitor {
    pod: PodContext,
    poller: Poller,
    signals: SignalFd,
    clients: Clients,
    /// True once the first client has subscribed.
    had_subscriber: bool,
    serials: Serials,
    containers: BTreeMap<u64, Container>,
    execs: Execs,
    relays: Relays,
    calls: Calls,
    early_exits: EarlyExits,
    reaping: Reaping,
    read_buffer: ReadBuffer,
    /// The eventfd through which the logs' threads wake the event loop.
    log_wake: Arc<OwnedFd>,
    coalescing: Coalescing,
    /// True after the monitor has started a thread that protects its session keyring.
    is_keyring_protected: bool,
    /// The client that requested the monitor's shutdown.
    shutdown: Option<ClientId>,
}

impl Monitor {
    pub(crate) fn new(
        pod: PodContext,
        signals: SignalFd,
        listener: OwnedFd,
    ) -> Result<Self, Errno> {
        let flags = EventfdFlags::CLOEXEC | EventfdFlags::NONBLOCK;
        let log_wake = Arc::new(eventfd(0, flags)?);
        let poller = Poller::new()?;
        let clients = Clients::new(listener, &poller)?;
        poller.watch(&signals, EventSource::Signals, EventFlags::IN)?;
        poller.watch(&log_wake, EventSource::Logs, EventFlags::IN)?;
        Ok(Monitor {
            pod,
            poller,
            signals,
            clients,
            had_subscriber: false,
            serials: Serials::default(),
            containers: BTreeMap::new(),
            execs: Execs::default(),
            relays: Relays::default(),
            calls: Calls::default(),
            early_exits: EarlyExits::default(),
            reaping: Reaping::new(),
            read_buffer: ReadBuffer::new(),
            log_wake,
            coalescing: Coalescing::default(),
            is_keyring_protected: false,
            shutdown: None,
        })
    }

    /// Handles events until a client has requested the monitor's shutdown and no runtime call is in
    /// progress.
    pub(crate) fn run(&mut self) -> Result<(), Errno> {
        let mut space: EventSpace = [const { MaybeUninit::uninit() }; _];
        let mut coalesce = false;
        loop {
            let pending = self.wait(&mut space, coalesce)?;
            coalesce = self.coalescing.end_round();
            if pending.children {
                self.reap();
            }
            self.check_deadlines();
            if let Some(client) = self.shutdown
                && self.calls.is_empty()
            {
                self.reply(client, &Reply::Done);
                return Ok(());
            }
        }
    }

    /// Waits for events and handles them. If `coalesce` is true, this call ignores the containers'
    /// output and waits at most [`coalescing::COALESCING_DELAY`].
    fn wait(&mut self, space: &mut EventSpace, coalesce: bool) -> Result<Pending, Errno> {
        let timeout = self.next_timeout();
        let events = if coalesce {
            let delay = timeout.map_or(coalescing::COALESCING_DELAY, |it| {
                it.min(coalescing::COALESCING_DELAY)
            });
            self.poller.wait_for_control(space, Some(&delay))
        } else {
            self.poller.wait(space, timeout.as_ref())
        };
        let mut pending = match events {
            Ok(events) => self.handle(events),
            Err(Errno::INTR) => Pending::default(),
            Err(errno) => return Err(errno),
        };
        if pending.control {
            let now = Some(&Timespec::default());
            if let Ok(events) = self.poller.wait_for_control(space, now) {
                pending.children |= self.handle(events).children;
            }
        }
        Ok(pending)
    }

    fn handle(&mut self, events: &[epoll::Event]) -> Pending {
        let mut pending = Pending::default();
        for event in events {
            match EventSource::unpack(event.data) {
                Some(EventSource::Listener) => self.accept(),
                Some(EventSource::Signals) => pending.children = true,
                Some(EventSource::Client(client)) => self.client_ready(client, event.flags),
                Some(EventSource::Stdout(serial)) => self.output_ready(serial, Stream::Stdout),
                Some(EventSource::Stderr(serial)) => self.output_ready(serial, Stream::Stderr),
                Some(EventSource::Memory(serial)) => self.act_on(serial, Container::check_oom),
                Some(EventSource::Logs) => self.logs_ready(),
                Some(EventSource::ExecCgroup(number)) => self.execs.leftovers.changed(number),
                Some(EventSource::Init(serial)) => self.init_died(serial),
                Some(EventSource::Relay(number)) => self.relay_ready(number),
                Some(EventSource::Control) => pending.control = true,
                None => {}
            }
        }
        pending
    }

    // The functions below handle the containers' output and logs.

    fn output_ready(&mut self, serial: u64, stream: Stream) {
        let Some(container) = self.containers.get_mut(&serial) else {
            return;
        };
        match container.output.ready(stream, &mut self.read_buffer) {
            StreamState::Read(bytes) => self.coalescing.add_read(bytes),
            StreamState::Idle => {}
            StreamState::Paused => {
                if let Some(fd) = container.output.stream(stream) {
                    self.poller.unwatch_output(fd);
                }
            }
        }
    }

    /// Handles a wake-up by a log's thread. The thread has made room for more lines, written all
    /// lines, reopened the log, or removed the log's file.
    fn logs_ready(&mut self) {
        let _ = rustix::io::read(&self.log_wake, &mut [0_u8; 8]);
        let serials: Vec<u64> = self.containers.keys().copied().collect();
        for serial in serials {
            self.act_on(serial, |container| {
                container.output.log_reopened(&container.spec.id)
            });
            self.resume_output(serial);
            self.continue_termination(serial);
            self.act_on(serial, Container::continue_rollback);
        }
    }

    fn resume_output(&mut self, serial: u64) {
        let Some(container) = self.containers.get_mut(&serial) else {
            return;
        };
        for stream in container.output.resume() {
            if let Some(fd) = container.output.stream(stream) {
                let source = EventSource::of_stream(serial, stream);
                let _ = self.poller.watch(fd, source, EventFlags::IN);
            }
        }
    }

    // The functions below handle clients and their requests.

    fn accept(&mut self) {
        while let Some(client) = self.clients.accept(&self.poller, &mut self.serials) {
            // The client's request has usually arrived already, so this call reads the request
            // without another wait for events.
            self.client_ready(client, EventFlags::IN);
        }
    }

    fn client_ready(&mut self, client: ClientId, flags: EventFlags) {
        match self.clients.ready(client, flags, &self.poller) {
            Incoming::Partial => {}
            Incoming::Closed => self.disconnect(client),
            Incoming::Request(request, fds) => self.answer(client, request, fds),
        }
    }

    fn disconnect(&mut self, client: ClientId) {
        if self.clients.remove(client) {
            self.relays.client_gone(client, &self.poller);
            self.execs.client_gone(client, &self.calls);
            for container in self.containers.values_mut() {
                container.client_gone(client);
            }
        }
    }

    fn send(&mut self, client: ClientId, next: Stage, reply: &Reply, fds: Vec<OwnedFd>) {
        if !self.clients.send(client, next, reply, fds, &self.poller) {
            self.disconnect(client);
        }
    }

    /// Sends the last answer on a client's connection, and then closes the connection.
    fn reply(&mut self, client: ClientId, reply: &Reply) {
        self.send(client, Stage::Answered, reply, Vec::new());
    }

    fn fail(&mut self, client: ClientId, kind: FailureKind, message: impl Into<String>) {
        let message = message.into();
        self.reply(client, &Reply::Error(Failure { kind, message }));
    }

    fn publish(&mut self, event: Event) {
        let reply = Reply::Event(event);
        for client in self.clients.subscribers() {
            self.send(client, Stage::Subscribed, &reply, Vec::new());
        }
    }

    fn answer(&mut self, client: ClientId, request: Request, fds: Vec<OwnedFd>) {
        if let Request::Exec(Exec { id, .. }) | Request::Attach(Attach { id, .. }) = &request
            && let Some(container) = self.serial_of(id)
        {
            let abandoned = self.execs.abandoned(&self.clients);
            if let Err(message) = self.clients.begin_session(client, container, &abandoned) {
                return self.fail(client, FailureKind::WrongState, message);
            }
        }
        match request {
            Request::Subscribe => self.subscribe(client),
            Request::Create(create) => self.create(client, create, fds),
            Request::Start { id } => self.act_for(client, &id, |it| it.start(client)),
            Request::Kill { id, signal, all } => {
                self.act_for(client, &id, |it| it.kill(client, signal, all));
            }
            Request::Update { id, resources } => {
                self.act_for(client, &id, |it| it.update(client, &resources));
            }
            Request::Delete { id } => self.delete(client, &id),
            Request::Exec(exec) => self.exec(client, &exec, fds),
            Request::Attach(attach) => {
                self.act_for(client, &attach.id, |it| it.attach(client, &attach, fds));
            }
            Request::Resize {
                id,
                exec,
                columns,
                rows,
            } => {
                let size = Winsize {
                    ws_col: columns,
                    ws_row: rows,
                    ws_xpixel: 0,
                    ws_ypixel: 0,
                };
                self.resize(client, &id, exec, size);
            }
            Request::CloseStdin { id } => self.act_for(client, &id, |it| it.close_stdin(client)),
            Request::ReopenLog { id } => {
                let wake = Arc::clone(&self.log_wake);
                self.act_for(client, &id, |it| it.reopen_log(client, &wake));
            }
            Request::Shutdown => self.shut_down(client),
        }
    }

    fn subscribe(&mut self, client: ClientId) {
        let containers = self.containers.values().filter_map(|container| {
            Some(ContainerState {
                id: container.id().to_owned(),
                pid: container.pid,
                phase: container.phase()?,
            })
        });
        let hello = Reply::Hello(Hello {
            pid: std::process::id().cast_signed(),
            holder: self.pod.holder,
            pid1: self.pod.pid1,
            passes_after: true,
            relays: true,
            relays_terminals: true,
            containers: containers.collect(),
        });
        self.send(client, Stage::Subscribed, &hello, Vec::new());
        // `prepare` creates a mount in advance, so the pod's first container starts faster. The
        // first subscriber is about to set up the pod. If the monitor called `prepare` at this
        // time, the first subscriber's own mounts would have to wait. The second subscriber
        // connects after the pod has been set up. For this reason, the monitor calls `prepare` for
        // the second subscriber.
        if std::mem::replace(&mut self.had_subscriber, true)
            && let Some(runtime) = self.pod.runtime.take()
        {
            readonly_exec::prepare(&runtime);
        }
    }

    fn create(&mut self, client: ClientId, spec: Create, mut fds: Vec<OwnedFd>) {
        if self.serial_of(&spec.id).is_some() || self.shutdown.is_some() {
            let id = &spec.id;
            let message = format!(
                "create container {id}: the container already exists, or the monitor is shutting down"
            );
            return self.fail(client, FailureKind::WrongState, message);
        }
        let joined = match joined::owners(&spec.namespaces_of, &self.pod, &self.containers) {
            Ok(joined) => joined,
            Err(failure) => return self.reply(client, &Reply::Error(failure)),
        };
        if let Err(error) = self.protect_keyring(&spec) {
            let reason = describe(&error);
            let message = format!(
                "protect the monitor's session keyring from container {}: {reason}",
                spec.id
            );
            return self.fail(client, FailureKind::Monitor, message);
        }
        let serial = self.serials.next();
        match Container::create(serial, spec, fds.pop(), &self.log_wake) {
            Ok((mut container, command)) => {
                container.joined = joined;
                self.containers.insert(serial, container);
                self.start_call(command, Purpose::Create { serial, client });
            }
            Err(message) => self.fail(client, FailureKind::Monitor, message),
        }
    }

    /// Makes sure that a container's processes, which are children of the monitor, do not replace the
    /// monitor's session keyring. They cannot do so while the monitor has several threads. The
    /// thread that writes a container's log exists as long as the container.
    fn protect_keyring(&mut self, spec: &Create) -> std::io::Result<()> {
        if spec.log.is_none() && !self.is_keyring_protected {
            rrun_kernel::session_keyring::protect_by_thread()?;
            self.is_keyring_protected = true;
        }
        Ok(())
    }

    fn delete(&mut self, client: ClientId, id: &str) {
        let deadline = Instant::now() + self.pod.runtime_timeout;
        match self.serial_of(id) {
            Some(serial) => self.act_on(serial, |it| it.delete(client, deadline)),
            None => self.reply(client, &Reply::Done),
        }
    }

    fn shut_down(&mut self, client: ClientId) {
        let has_exited = |container: &Container| matches!(container.state, State::Exited { .. });
        match self.containers.values().find(|it| !has_exited(it)) {
            Some(container) => {
                let message = format!(
                    "shut down the monitor: container {} has not exited",
                    container.id()
                );
                self.fail(client, FailureKind::WrongState, message);
            }
            None => self.shutdown = Some(client),
        }
    }

    // The functions below find containers and carry out effects.

    fn serial_of(&self, id: &str) -> Option<u64> {
        let container = self.containers.values().find(|it| it.id() == id)?;
        Some(container.serial)
    }

    fn not_found(&mut self, client: ClientId, id: &str) {
        let message = format!("container {id} does not exist in this pod");
        self.fail(client, FailureKind::NotFound, message);
    }

    /// Calls `act` with the container that has this serial number, if the container still exists.
    /// Then carries out the effects that `act` returns.
    fn act_on(&mut self, serial: u64, act: impl FnOnce(&mut Container) -> Vec<Effect>) {
        if let Some(container) = self.containers.get_mut(&serial) {
            let effects = act(container);
            self.carry_out(effects);
        }
    }

    /// Calls `act` with the container that has this id, and carries out the effects that `act`
    /// returns. If no container has this id, the client receives an error.
    fn act_for(
        &mut self,
        client: ClientId,
        id: &str,
        act: impl FnOnce(&mut Container) -> Vec<Effect>,
    ) {
        match self.serial_of(id) {
            Some(serial) => self.act_on(serial, act),
            None => self.not_found(client, id),
        }
    }

    /// Carries out effects in the given order. An effect can cause further effects. The monitor
    /// carries out these further effects before the next effect in `effects`.
    fn carry_out(&mut self, effects: Vec<Effect>) {
        for effect in effects {
            match effect {
                Effect::Send { client, reply, fds } => {
                    self.send(client, Stage::Working, &reply, fds);
                }
                Effect::Reply(client, reply) => self.reply(client, &reply),
                Effect::Disconnect(client) => self.disconnect(client),
                Effect::Publish(event) => self.publish(event),
                Effect::Relay(relay) => self.begin_relay(*relay),
                Effect::Run(command, purpose) => self.start_call(*command, purpose),
                Effect::ShortenStart(serial) => self.calls.shorten_start(serial),
                Effect::Watch(serial) => self.watch_container(serial),
                Effect::Forget(serial) => self.forget(serial),
            }
        }
    }

    fn watch_container(&mut self, serial: u64) {
        let Some(container) = self.containers.get_mut(&serial) else {
            return;
        };
        container.oom.open(&container.spec.cgroup);
        let stream = |stream| container.output.stream(stream);
        let watches = [
            (
                stream(Stream::Stdout),
                EventSource::Stdout(serial),
                EventFlags::IN,
            ),
            (
                stream(Stream::Stderr),
                EventSource::Stderr(serial),
                EventFlags::IN,
            ),
            (
                container.oom.fd(),
                EventSource::Memory(serial),
                EventFlags::PRI,
            ),
        ];
        for (fd, source, flags) in watches {
            if let Some(fd) = fd
                && let Err(errno) = self.poller.watch(fd, source, flags)
            {
                let (id, reason) = (container.id(), describe(&errno.into()));
                own_log::write(&format!("watch {source:?} of container {id}: {reason}"));
            }
        }
        if let Some(called) = container.create_called
            && let Some(code) = self.early_exits.claim(container.pid, called)
        {
            return self.init_exited(serial, code);
        }
        let watched = container.open_pidfd().and_then(|pidfd| {
            let source = EventSource::Init(serial);
            self.poller.watch(pidfd, source, EventFlags::IN)
        });
        if let Err(errno) = watched {
            let (id, reason) = (container.id(), describe(&errno.into()));
            own_log::write(&format!(
                "watch the first process of container {id}: {reason}"
            ));
        }
    }

    fn init_exited(&mut self, serial: u64, code: i32) {
        self.act_on(serial, |container| container.init_exited(code));
        self.continue_termination(serial);
    }

    fn continue_termination(&mut self, serial: u64) {
        self.act_on(serial, Container::check_oom);
        if let Some(container) = self.containers.get_mut(&serial) {
            let effects = container.continue_termination(&mut self.read_buffer);
            self.carry_out(effects);
        }
    }

    /// Removes everything that the monitor stores about a container, and answers the clients that
    /// requested the deletion.
    fn forget(&mut self, serial: u64) {
        let Some(container) = self.containers.remove(&serial) else {
            return;
        };
        self.execs.leftovers.container_gone(&container.spec.cgroup);
        exit::forget(&container.spec.bundle);
        for client in container.deletion.map(|it| it.clients).unwrap_or_default() {
            self.reply(client, &Reply::Done);
        }
    }

    // The functions below start runtime calls and handle their results.

    fn start_call(&mut self, mut command: RuntimeCommand, purpose: Purpose) {
        match Call::start(&mut command, self.pod.runtime_timeout) {
            Ok(call) => self.calls.add(call, purpose),
            Err(error) => self.call_not_run(&command, purpose, &error),
        }
    }

    fn call_not_run(&mut self, command: &RuntimeCommand, purpose: Purpose, error: &std::io::Error) {
        let message = command.not_run(error);
        match purpose {
            Purpose::Create { serial, client } => {
                self.containers.remove(&serial);
                self.fail(client, FailureKind::Monitor, message);
            }
            Purpose::Rollback {
                serial,
                client,
                failure,
            } => self.act_on(serial, |it| it.rollback_ended(client, failure)),
            Purpose::Start { serial, client } => {
                self.act_on(serial, |it| it.start_not_run(client, message));
            }
            Purpose::Request { client } => self.fail(client, FailureKind::Monitor, message),
            Purpose::Exec { number } => {
                if let Some(exec) = self.execs.take_starting(number) {
                    self.fail(exec.client(), FailureKind::Monitor, message);
                }
            }
            Purpose::Delete { serial } => {
                let reason = format!("run the runtime: {}", describe(error));
                self.act_on(serial, |it| it.cleaned_up(Some(&reason)));
            }
        }
    }

    fn call_ended(&mut self, call: &Call, purpose: Purpose, code: i32) {
        match purpose {
            Purpose::Create { serial, client } => {
                let container = self.containers.get(&serial);
                let joined =
                    container.and_then(|it| joined::failure(it, &self.pod, &self.containers));
                self.act_on(serial, |it| it.create_ended(client, call, code, joined));
            }
            Purpose::Rollback {
                serial,
                client,
                failure,
            } => self.act_on(serial, |it| it.rollback_ended(client, failure)),
            Purpose::Start { serial, client } => {
                self.act_on(serial, |it| it.start_ended(client, call.failure(code)));
                self.continue_termination(serial);
            }
            Purpose::Request { client } => match call.failure(code) {
                None => self.reply(client, &Reply::Done),
                Some(reason) => self.fail(client, FailureKind::Runtime, reason),
            },
            Purpose::Exec { number } => self.exec_call_ended(number, call, code),
            Purpose::Delete { serial } => {
                let failure = call.failure(code);
                self.act_on(serial, |it| it.cleaned_up(failure.as_deref()));
            }
        }
    }

    // The functions below handle deadlines.

    fn next_timeout(&self) -> Option<Timespec> {
        let containers = self.containers.values().filter_map(Container::next_check);
        let next = containers
            .chain(self.calls.next_check())
            .chain(self.clients.next_check())
            .chain(self.execs.next_zombie_check())
            .chain(self.relays.next_check())
            .chain(self.execs.killed.next_check())
            .chain(self.execs.leftovers.next_examination())
            .chain(self.reaping.next())
            .min()?;
        let left = next.saturating_duration_since(Instant::now());
        Timespec::try_from(left).ok()
    }

    fn check_deadlines(&mut self) {
        let now = Instant::now();
        self.continue_reaping(now);
        self.check_killed_execs(now);
        self.clients.end_accept_pause(now, &self.poller);
        self.calls.check(now);
        for number in self.relays.due(now) {
            self.relay_ready(number);
        }
        self.execs.killed.check(now);
        let (poller, serials) = (&self.poller, &mut self.serials);
        self.execs.leftovers.examine(now, poller, serials);
        for client in self.clients.overdue(now) {
            self.disconnect(client);
        }
        let is_due = |it: &&Container| it.next_check().is_some_and(|at| now >= at);
        let due = self.containers.values().filter(is_due);
        let due: Vec<u64> = due.map(|container| container.serial).collect();
        for serial in due {
            self.container_due(serial, now);
        }
    }

    /// Continues the operation in progress on a container, after the time [`Container::next_check`]
    /// has passed.
    fn container_due(&mut self, serial: u64, now: Instant) {
        match self.containers.get(&serial).map(|it| &it.state) {
            Some(State::Creating) => self.act_on(serial, Container::continue_rollback),
            Some(State::Terminating(_)) => self.continue_termination(serial),
            _ => self.init_due(serial, now),
        }
    }
}
