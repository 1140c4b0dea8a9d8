//! What a change of a container's state brings about outside of it.
//!
//! A container's methods only change its state (and its files and cgroup), and return what else is
//! to be done. `serve` does that, in the order given. So a container knows neither the clients nor
//! the loop, and its life can be tested without either.

use std::os::fd::OwnedFd;

use super::calls::Purpose;
use super::connection::ClientId;
use super::runtime::RuntimeCommand;
use rrun_protocol::{Event, Failure, FailureKind, Reply};

#[derive(Debug)]
pub(crate) enum Effect {
    /// Send this, after which the connection stays.
    Send {
        client: ClientId,
        reply: Reply,
        fds: Vec<OwnedFd>,
    },
    /// Send the one answer that ends a connection.
    Reply(ClientId, Reply),
    Disconnect(ClientId),
    /// Send this to every subscriber.
    Publish(Event),
    Run(Box<RuntimeCommand>, Purpose),
    /// Leave the runtime that starts this container little time: its first process has ended.
    ShortenStart(u64),
    /// Watch this container's output and out-of-memory kills: it has been created. If its first
    /// process has ended already, this claims its exit status and begins the termination.
    Watch(u64),
    /// Remove all that the monitor has of this container.
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
