//! The monitor's loop: it waits for the listening socket, its clients, SIGCHLD, and the containers'
//! output and out-of-memory counts, and carries out what follows from their events.

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
use rustix::process::WaitOptions;

use super::calls::{Calls, Purpose};
use super::clients::Clients;
use super::coalescing::{self, Coalescing};
use super::connection::{ClientId, Incoming, Stage};
use super::container::{Container, State};
use super::container_log::{ReadBuffer, Stream};
use super::early_exits::EarlyExits;
use super::effect::Effect;
use super::exec::{ExecProcess, Execs, StartedExec};
use super::exec_cgroup::ExecCgroup;
use super::exit;
use super::output::StreamState;
use super::own_log;
use super::poller::{EventSource, EventSpace, Poller};
use super::readonly_exec;
use super::runtime::{Call, RuntimeCommand};
use super::serials::Serials;
use rrun_kernel::errno::describe;
use rrun_protocol::{
    ContainerState, Create, Event, Exec, Failure, FailureKind, Hello, Reply, Request,
};

/// What a monitor knows of its pod from the start.
pub(crate) struct PodContext {
    /// The monitor's directory, absolute, for paths that others use; it is the working directory,
    /// too.
    pub(crate) dir: PathBuf,
    /// How long one run of a runtime may take.
    pub(crate) runtime_timeout: Duration,
    /// The first process of the pod's PID namespace, if the pod shares one.
    pub(crate) pid1: Option<i32>,
    /// See [`rrun_protocol::Hello::holder`].
    pub(crate) holder: Option<i32>,
    /// See [`rrun_protocol::Pod::runtime`]; until it has been prepared for.
    pub(crate) runtime: Option<PathBuf>,
}

/// What else is to be done after a round of events.
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
    /// There has been a subscriber.
    had_subscriber: bool,
    serials: Serials,
    containers: BTreeMap<u64, Container>,
    execs: Execs,
    calls: Calls,
    early_exits: EarlyExits,
    read_buffer: ReadBuffer,
    /// An eventfd by which the logs' threads wake this one.
    log_wake: Arc<OwnedFd>,
    coalescing: Coalescing,
    /// The client that ends the monitor.
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
            calls: Calls::default(),
            early_exits: EarlyExits::default(),
            read_buffer: ReadBuffer::new(),
            log_wake,
            coalescing: Coalescing::default(),
            shutdown: None,
        })
    }

    /// Works until a client's Shutdown.
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

    /// Waits for events and handles them. With `coalesce` output waits for a moment.
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
                Some(EventSource::ExecCgroup(number)) => self.execs.cgroup_changed(number),
                Some(EventSource::Control) => pending.control = true,
                None => {}
            }
        }
        pending
    }

    // Output.

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

    /// Some log has done what it was waited for: taken lines, been opened again, been completed.
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

    // Clients.

    fn accept(&mut self) {
        while let Some(client) = self.clients.accept(&self.poller, &mut self.serials) {
            // The request is mostly there already.
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
            self.execs.client_gone(client);
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

    /// Sends the one answer that ends a connection.
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
            Request::CloseStdin { id } => self.act_for(client, &id, |it| it.close_stdin(client)),
            Request::ReopenLog { id } => {
                self.act_for(client, &id, |it| it.output.reopen_log(client));
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
            containers: containers.collect(),
        });
        self.send(client, Stage::Subscribed, &hello, Vec::new());
        // The first client makes the pod, and what it mounts would have to wait for this; the
        // second comes when the pod is made. Its first container need not wait then.
        if std::mem::replace(&mut self.had_subscriber, true)
            && let Some(runtime) = self.pod.runtime.take()
        {
            readonly_exec::prepare(&runtime);
        }
    }

    fn create(&mut self, client: ClientId, spec: Create, mut fds: Vec<OwnedFd>) {
        if self.serial_of(&spec.id).is_some() || self.shutdown.is_some() {
            let id = &spec.id;
            let message = format!("create container {id}: it exists, or the pod is being ended");
            return self.fail(client, FailureKind::WrongState, message);
        }
        let serial = self.serials.next();
        match Container::create(serial, spec, fds.pop(), &self.log_wake) {
            Ok((container, command)) => {
                self.containers.insert(serial, container);
                self.start_call(command, Purpose::Create { serial, client });
            }
            Err(message) => self.fail(client, FailureKind::Monitor, message),
        }
    }

    fn delete(&mut self, client: ClientId, id: &str) {
        let deadline = Instant::now() + self.pod.runtime_timeout;
        match self.serial_of(id) {
            Some(serial) => self.act_on(serial, |it| it.delete(client, deadline)),
            None => self.reply(client, &Reply::Done),
        }
    }

    fn exec(&mut self, client: ClientId, exec: &Exec, fds: Vec<OwnedFd>) {
        let number = self.serials.next();
        let Some(container) = self.containers.values().find(|it| it.id() == exec.id) else {
            return self.not_found(client, &exec.id);
        };
        let dir = &self.pod.dir;
        let effects = self.execs.begin(number, client, exec, fds, container, dir);
        self.carry_out(effects);
    }

    fn shut_down(&mut self, client: ClientId) {
        let has_exited = |container: &Container| matches!(container.state, State::Exited { .. });
        match self.containers.values().find(|it| !has_exited(it)) {
            Some(container) => {
                let message = format!("end the monitor: container {} is alive", container.id());
                self.fail(client, FailureKind::WrongState, message);
            }
            None => self.shutdown = Some(client),
        }
    }

    // Containers.

    fn serial_of(&self, id: &str) -> Option<u64> {
        let container = self.containers.values().find(|it| it.id() == id)?;
        Some(container.serial)
    }

    fn not_found(&mut self, client: ClientId, id: &str) {
        let message = format!("there is no container {id} in this pod");
        self.fail(client, FailureKind::NotFound, message);
    }

    /// Does something with a container, if it is still there, and what follows from it.
    fn act_on(&mut self, serial: u64, act: impl FnOnce(&mut Container) -> Vec<Effect>) {
        if let Some(container) = self.containers.get_mut(&serial) {
            let effects = act(container);
            self.carry_out(effects);
        }
    }

    /// Does something for a client with the container that has this id now.
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

    /// In the order given, and with all that follows from the one before the next.
    fn carry_out(&mut self, effects: Vec<Effect>) {
        for effect in effects {
            match effect {
                Effect::Send { client, reply, fds } => {
                    self.send(client, Stage::Working, &reply, fds);
                }
                Effect::Reply(client, reply) => self.reply(client, &reply),
                Effect::Disconnect(client) => self.disconnect(client),
                Effect::Publish(event) => self.publish(event),
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
                own_log::write(&format!("watch {source:?} of {id}: {reason}"));
            }
        }
        if let Some(code) = self.early_exits.claim(container.pid) {
            self.init_exited(serial, code);
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

    /// Removes all that the monitor has of a container, and answers those who asked for that.
    fn forget(&mut self, serial: u64) {
        let Some(container) = self.containers.remove(&serial) else {
            return;
        };
        self.execs.container_gone(&container.spec.cgroup);
        exit::forget(&container.spec.bundle);
        for client in container.deletion.map(|it| it.clients).unwrap_or_default() {
            self.reply(client, &Reply::Done);
        }
    }

    // Children.

    fn reap(&mut self) {
        while let Ok(Some(_)) = self.signals.read_signal() {}
        while let Ok(Some((pid, status))) = rustix::process::wait(WaitOptions::NOHANG) {
            self.child_ended(pid.as_raw_nonzero().get(), exit::code(status));
        }
        if self.calls.is_empty() {
            self.early_exits.clear();
        }
    }

    fn child_ended(&mut self, pid: i32, code: i32) {
        if let Some((call, purpose)) = self.calls.remove(pid) {
            self.call_ended(&call, purpose, code);
        } else if let Some(process) = self.execs.take_running(pid) {
            self.exec_exited(process, code);
        } else if let Some(container) = self.containers.values().find(|it| it.is_init(pid)) {
            let serial = container.serial;
            self.init_exited(serial, code);
        } else if self.pod.pid1 == Some(pid) {
            own_log::write("the first process of the pod's PID namespace ended, and all in it");
            self.pod.pid1 = None;
        } else if !self.calls.is_empty() {
            self.early_exits.add(pid, code);
        }
    }

    // Runtime calls.

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
                self.act_on(serial, |it| it.create_ended(client, call, code));
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

    // Execs.

    fn exec_call_ended(&mut self, number: u64, call: &Call, code: i32) {
        let Some(exec) = self.execs.take_starting(number) else {
            return;
        };
        match exec.finish(call, code) {
            Ok(started) => self.exec_started(started),
            Err(failed) => {
                self.fail(failed.client(), FailureKind::Runtime, failed.reason());
                let pid = failed.pid();
                let reaped = pid.is_some_and(|pid| self.early_exits.claim(pid).is_some());
                self.remove_exec_cgroup(failed.kill(reaped));
            }
        }
    }

    fn exec_started(&mut self, StartedExec { process, terminal }: StartedExec) {
        let (client, pid) = (process.client(), process.pid());
        let exited = self.early_exits.claim(pid);
        match terminal {
            Ok(master) => {
                let fds = master.into_iter().collect();
                self.send(client, Stage::Working, &Reply::Started { pid }, fds);
            }
            Err(errno) => {
                let reason = describe(&errno.into());
                let message = format!("take the terminal of an exec: {reason}");
                self.fail(client, FailureKind::Monitor, message);
                // The pid of a process that has been reaped may be another one's by now.
                if exited.is_none() {
                    process.kill();
                }
            }
        }
        match exited {
            Some(code) => self.exec_exited(process, code),
            None => {
                if !self.clients.contains(client) {
                    process.kill();
                }
                self.execs.add_running(process);
            }
        }
    }

    fn exec_exited(&mut self, process: ExecProcess, code: i32) {
        self.reply(process.client(), &Reply::Exited { code });
        self.remove_exec_cgroup(process.into_cgroup());
    }

    fn remove_exec_cgroup(&mut self, cgroup: Option<ExecCgroup>) {
        self.execs
            .remove_cgroup(cgroup, &self.poller, &mut self.serials);
    }

    // Time.

    fn next_timeout(&self) -> Option<Timespec> {
        let containers = self.containers.values().filter_map(Container::next_check);
        let next = containers
            .chain(self.calls.next_check())
            .chain(self.clients.next_check())
            .min()?;
        let left = next.saturating_duration_since(Instant::now());
        Timespec::try_from(left).ok()
    }

    fn check_deadlines(&mut self) {
        let now = Instant::now();
        self.clients.end_accept_pause(now, &self.poller);
        self.calls.check(now);
        for client in self.clients.overdue(now) {
            self.disconnect(client);
        }
        let is_due = |it: &&Container| it.next_check().is_some_and(|at| now >= at);
        let due = self.containers.values().filter(is_due);
        let due: Vec<u64> = due.map(|container| container.serial).collect();
        for serial in due {
            self.container_due(serial);
        }
    }

    /// The time of [`Container::next_check`] has come.
    fn container_due(&mut self, serial: u64) {
        match self.containers.get(&serial).map(|it| &it.state) {
            Some(State::Creating) => self.act_on(serial, Container::continue_rollback),
            Some(State::Terminating(_)) => self.continue_termination(serial),
            _ => self.act_on(serial, Container::deletion_overdue),
        }
    }
}
