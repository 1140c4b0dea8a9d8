//! What the monitor waits for: its epoll sets, and what each descriptor in them belongs to.

use std::mem::MaybeUninit;
use std::os::fd::{AsFd, OwnedFd};

use rustix::event::{Timespec, epoll};
use rustix::io::Errno;

use super::connection::ClientId;
use super::container_log::Stream;

/// The most events that one wait returns.
const MAX_EVENTS: usize = 32;

/// Where a wait puts its events.
pub(crate) type EventSpace = [MaybeUninit<epoll::Event>; MAX_EVENTS];

/// What a descriptor in an epoll set belongs to. The number goes into the kernel's 64 bits.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum EventSource {
    Listener,
    Signals,
    Client(ClientId),
    Stdout(u64),
    Stderr(u64),
    Memory(u64),
    /// A log's thread has done what it was waited for.
    Logs,
    /// The cgroup that an exec has left behind.
    ExecCgroup(u64),
    /// The nested epoll set of everything but output.
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
            _ => return None,
        })
    }
}

/// Two epoll sets, so that output can be left alone for a moment while all else is waited for.
pub(crate) struct Poller {
    /// The containers' output, and `control`.
    all: OwnedFd,
    /// Everything but output.
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

    /// Waits for whatever comes.
    pub(crate) fn wait<'a>(
        &self,
        space: &'a mut EventSpace,
        timeout: Option<&Timespec>,
    ) -> Result<&'a mut [epoll::Event], Errno> {
        let (events, _) = epoll::wait(&self.all, space, timeout)?;
        Ok(events)
    }

    /// Waits for whatever comes but output.
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

    /// Changes what is waited for at a descriptor that is no output.
    pub(crate) fn modify(&self, fd: impl AsFd, source: EventSource, flags: epoll::EventFlags) {
        let _ = epoll::modify(&self.control, fd, source.pack(), flags);
    }

    /// Waits for an output no more.
    pub(crate) fn unwatch_output(&self, fd: impl AsFd) {
        let _ = epoll::delete(&self.all, fd);
    }
}
