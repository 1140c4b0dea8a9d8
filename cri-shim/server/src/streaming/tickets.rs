//! The tickets to which the URLs of the streaming server refer. Each ticket's token is valid for
//! one session.

use std::collections::BTreeMap;
use std::sync::{Mutex, MutexGuard, OnceLock};
use std::time::{Duration, Instant};

use rrun_proto::v1::{AttachRequest, ExecRequest, PortForwardRequest};
use tonic::Code;

use rrun_calls::error::{Error, Result};
use rrun_calls::lock::lock;
use rrun_streams::remotecommand::StreamOptions;
use rrun_streams::upgrade::Purpose;

/// The lifetime of a ticket.
const TICKET_LIFETIME: Duration = Duration::from_secs(60);

/// The limit on tickets that are not redeemed yet.
const MAX_TICKETS: usize = 1000;

/// The shared state of the gRPC service and the streaming server.
#[derive(Default)]
pub(crate) struct Streams {
    pub(super) tickets: Tickets,
    /// The base URL `http://ADDRESS:PORT`. It is set when the streaming server begins to listen.
    pub(super) base: OnceLock<String>,
}

impl Streams {
    /// Issues a ticket, and returns a URL that contains `token`. A client can use the URL once.
    pub(super) fn url(&self, token: &str, ticket: StreamTicket) -> Result<String> {
        let base = self
            .base
            .get()
            .ok_or_else(|| Error::internal("the streaming server does not listen yet"))?;
        let method = ticket.method();
        self.tickets.issue(token, ticket)?;
        Ok(format!("{base}/{method}/{token}"))
    }
}

/// The request that a client is allowed to make once.
#[derive(Clone, Debug, PartialEq)]
pub(super) enum StreamTicket {
    Exec(ExecRequest),
    Attach(AttachRequest),
    PortForward(PortForwardRequest),
}

impl StreamTicket {
    /// Returns the method's name, which is the first component of the path in the ticket's URL.
    pub(super) fn method(&self) -> &'static str {
        match self {
            StreamTicket::Exec(_) => "exec",
            StreamTicket::Attach(_) => "attach",
            StreamTicket::PortForward(_) => "portforward",
        }
    }

    pub(super) fn purpose(&self) -> Purpose {
        match self {
            StreamTicket::Exec(_) | StreamTicket::Attach(_) => Purpose::Command,
            StreamTicket::PortForward(_) => Purpose::PortForward,
        }
    }

    /// Returns the stdio streams that the caller requested. A PortForward request has no stdio
    /// streams.
    pub(super) fn stream_options(&self) -> StreamOptions {
        match *self {
            StreamTicket::Exec(ExecRequest {
                stdin,
                stdout,
                stderr,
                tty,
                ..
            })
            | StreamTicket::Attach(AttachRequest {
                stdin,
                stdout,
                stderr,
                tty,
                ..
            }) => StreamOptions {
                stdin,
                stdout,
                stderr,
                tty,
            },
            StreamTicket::PortForward(_) => StreamOptions::default(),
        }
    }
}

/// The tickets that are not redeemed yet, keyed by their tokens.
#[derive(Default)]
pub(super) struct Tickets(Mutex<BTreeMap<String, (Instant, StreamTicket)>>);

impl Tickets {
    fn all(&self) -> MutexGuard<'_, BTreeMap<String, (Instant, StreamTicket)>> {
        lock(&self.0)
    }

    /// Stores a ticket until a client redeems it with its token.
    fn issue(&self, token: &str, ticket: StreamTicket) -> Result<()> {
        let now = Instant::now();
        let mut all = self.all();
        all.retain(|_, (until, _)| *until > now);
        if all.len() >= MAX_TICKETS {
            return Err(Error::new(
                Code::ResourceExhausted,
                format!(
                    "{MAX_TICKETS} streams are waiting for their clients; try again in a minute"
                ),
            ));
        }
        all.insert(token.to_owned(), (now + TICKET_LIFETIME, ticket));
        Ok(())
    }

    /// Returns the ticket of a token. If the ticket has expired or is not for `method`, the result
    /// is `None`.
    pub(super) fn find(&self, method: &str, token: &str) -> Option<StreamTicket> {
        let all = self.all();
        let (until, ticket) = all.get(token)?;
        let good = *until > Instant::now() && ticket.method() == method;
        good.then(|| ticket.clone())
    }

    /// Removes a ticket. Returns false if another client redeemed the ticket first.
    pub(super) fn redeem(&self, token: &str) -> bool {
        self.all().remove(token).is_some()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_ticket_is_valid_once_and_only_for_its_method() -> Result<()> {
        let tickets = Tickets::default();
        tickets.issue("a", StreamTicket::Attach(AttachRequest::default()))?;
        assert_eq!(tickets.find("exec", "a"), None);
        assert!(tickets.find("attach", "a").is_some());
        assert!(tickets.redeem("a"));
        assert!(!tickets.redeem("a"));
        assert_eq!(tickets.find("attach", "a"), None);
        Ok(())
    }

    #[test]
    fn the_number_of_tickets_is_limited() -> Result<()> {
        let tickets = Tickets::default();
        let issue = |token: &str| {
            let ticket = StreamTicket::Attach(AttachRequest::default());
            tickets.issue(token, ticket)
        };
        for number in 0..MAX_TICKETS {
            issue(&number.to_string())?;
        }
        assert_eq!(
            issue("more").err().map(|e| e.code()),
            Some(Code::ResourceExhausted)
        );
        // After one ticket has expired, it is removed, so the next ticket is accepted.
        if let Some((until, _)) = tickets.all().values_mut().next() {
            *until = Instant::now();
        }
        issue("more")
    }
}
