//! The effects that a change of a container's state has outside the container.
//!
//! A container's methods change only the container's own state, files and cgroup. The methods
//! return all further effects as values, and `serve` carries out these effects in the given order.
//! For this reason, the container's code does not depend on the clients or the event loop. Tests
//! can call this code without clients and an event loop.

use std::os::fd::OwnedFd;

use super::calls::Purpose;
use super::connection::ClientId;
use super::relay::Relay;
use super::runtime::RuntimeCommand;
use rrun_protocol::{Event, Failure, FailureKind, Reply};

#[derive(Debug)]
pub(crate) enum Effect {
    /// Send this reply to the client and keep the connection open.
    Send {
        client: ClientId,
        reply: Reply,
        fds: Vec<OwnedFd>,
    },
    /// Send this last answer to the client, and then close the connection.
    Reply(ClientId, Reply),
    Disconnect(ClientId),
    /// Send this event to every subscriber.
    Publish(Event),
    Relay(Box<Relay>),
    Run(Box<RuntimeCommand>, Purpose),
    /// Shorten the deadline of the runtime's `start` for this container. The container's first
    /// process has already exited.
    ShortenStart(u64),
    /// Watch the output and the out-of-memory kills of this container, which has been created. If
    /// the container's first process has already exited, the monitor also begins the container's
    /// termination. `early_exits` contains the exit status.
    Watch(u64),
    /// Remove everything that the monitor stores about this container.
    Forget(u64),
}

impl Effect {
    pub(crate) fn fail(client: ClientId, kind: FailureKind, message: impl Into<String>) -> Self {
        let message = message.into();
        Effect::Reply(client, Reply::Error(Failure { kind, message }))
    }

    pub(crate) fn run(command: RuntimeCommand, purpose: Purpose) -> Self {
        Effect::Run(Box::new(command), purpose)
    }
}
