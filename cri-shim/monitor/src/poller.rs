//! The monitor's epoll sets, and the sources of their events.

use std::mem::MaybeUninit;
use std::os::fd::{AsFd, OwnedFd};

use rustix::event::{Timespec, epoll};
use rustix::io::Errno;

use super::connection::ClientId;
use super::container_log::Stream;

/// The maximum number of events that one epoll_wait(2) returns.
const MAX_EVENTS: usize = 32;

/// The buffer in which epoll_wait(2) stores the events.
pub(crate) type EventSpace = [MaybeUninit<epoll::Event>; MAX_EVENTS];

/// The source of an epoll event: the object whose descriptor has become ready. The source is
/// encoded in the 64 bits of user data that the kernel stores for each descriptor.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum EventSource {
    Listener,
    Signals,
    Client(ClientId),
    Stdout(u64),
    Stderr(u64),
    Memory(u64),
    /// The eventfd through which the logs' threads wake the event loop. A log's thread writes to
    /// the eventfd when it has finished the work that the event loop waits for.
    Logs,
    /// The cgroup of an exec that has exited and left processes behind.
    ExecCgroup(u64),
    /// The pidfd of a container's first process.
    Init(u64),
    /// A relay between a process's pipe and a client's socket.
    Relay(u64),
    /// The nested epoll set, which contains all descriptors except the containers' output.
    Control,
}

impl EventSource {
    pub(crate) fn of_stream(serial: u64, stream: Stream) -> Self {
        match stream {
            Stream::Stdout => EventSource::Stdout(serial),
            Stream::Stderr => EventSource::Stderr(serial),
        }
    }

    fn pack(self) -> epoll::EventData {
        let (kind, number) = match self {
            EventSource::Listener => (0, 0),
            EventSource::Signals => (1, 0),
            EventSource::Client(number) => (2, number),
            EventSource::Stdout(number) => (3, number),
            EventSource::Stderr(number) => (4, number),
            EventSource::Memory(number) => (5, number),
            EventSource::Logs => (6, 0),
            EventSource::ExecCgroup(number) => (7, number),
            EventSource::Control => (8, 0),
            EventSource::Init(number) => (9, number),
            EventSource::Relay(number) => (10, number),
        };
        epoll::EventData::new_u64(number << 4 | kind)
    }

    pub(crate) fn unpack(data: epoll::EventData) -> Option<Self> {
        let number = data.u64() >> 4;
        Some(match data.u64() & 15 {
            0 => EventSource::Listener,
            1 => EventSource::Signals,
            2 => EventSource::Client(number),
            3 => EventSource::Stdout(number),
            4 => EventSource::Stderr(number),
            5 => EventSource::Memory(number),
            6 => EventSource::Logs,
            7 => EventSource::ExecCgroup(number),
            8 => EventSource::Control,
            9 => EventSource::Init(number),
            10 => EventSource::Relay(number),
            _ => return None,
        })
    }
}

/// The two epoll sets. With two sets, the monitor can ignore output for a moment while it waits for
/// all other events.
pub(crate) struct Poller {
    /// The set that contains the descriptors of the containers' output, and the nested set
    /// `control`.
    all: OwnedFd,
    /// The set that contains all descriptors except the containers' output.
    control: OwnedFd,
}

impl Poller {
    pub(crate) fn new() -> Result<Self, Errno> {
        let poller = Poller {
            all: epoll::create(epoll::CreateFlags::CLOEXEC)?,
            control: epoll::create(epoll::CreateFlags::CLOEXEC)?,
        };
        let (data, flags) = (EventSource::Control.pack(), epoll::EventFlags::IN);
        epoll::add(&poller.all, &poller.control, data, flags)?;
        Ok(poller)
    }

    /// Waits for any event, including a container's output.
    pub(crate) fn wait<'a>(
        &self,
        space: &'a mut EventSpace,
        timeout: Option<&Timespec>,
    ) -> Result<&'a mut [epoll::Event], Errno> {
        let (events, _) = epoll::wait(&self.all, space, timeout)?;
        Ok(events)
    }

    /// Waits for any event except a container's output.
    pub(crate) fn wait_for_control<'a>(
        &self,
        space: &'a mut EventSpace,
        timeout: Option<&Timespec>,
    ) -> Result<&'a mut [epoll::Event], Errno> {
        let (events, _) = epoll::wait(&self.control, space, timeout)?;
        Ok(events)
    }

    pub(crate) fn watch(
        &self,
        fd: impl AsFd,
        source: EventSource,
        flags: epoll::EventFlags,
    ) -> Result<(), Errno> {
        let set = match source {
            EventSource::Stdout(_) | EventSource::Stderr(_) => &self.all,
            _ => &self.control,
        };
        epoll::add(set, fd, source.pack(), flags)
    }

    /// Changes the events for which a descriptor in the set `control` is watched.
    pub(crate) fn modify(&self, fd: impl AsFd, source: EventSource, flags: epoll::EventFlags) {
        let _ = epoll::modify(&self.control, fd, source.pack(), flags);
    }

    /// Stops watching a descriptor in the set `control`.
    pub(crate) fn unwatch(&self, fd: impl AsFd) {
        let _ = epoll::delete(&self.control, fd);
    }

    /// Stops watching one of a container's output streams.
    pub(crate) fn unwatch_output(&self, fd: impl AsFd) {
        let _ = epoll::delete(&self.all, fd);
    }
}
