//! What a URL of the streaming server stands for: its token is good for one session.

use std::collections::BTreeMap;
use std::sync::{Mutex, MutexGuard, OnceLock};
use std::time::{Duration, Instant};

use rrun_proto::v1::{AttachRequest, ExecRequest, PortForwardRequest};
use tonic::Code;

use rrun_calls::error::{Error, Result};
use rrun_calls::lock::lock;
use rrun_streams::remotecommand::StreamOptions;
use rrun_streams::upgrade::Purpose;

/// How long a ticket is good for.
const TICKET_LIFETIME: Duration = Duration::from_secs(60);

/// The most tickets that wait for their clients.
const MAX_TICKETS: usize = 1000;

/// What the gRPC service and the streaming server share.
#[derive(Default)]
pub(crate) struct Streams {
    pub(super) tickets: Tickets,
    /// `http://ADDRESS:PORT`, once the server listens.
    pub(super) base: OnceLock<String>,
}

impl Streams {
    /// A URL that ends with `token`, for one use of the ticket.
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

/// What a client may do, once.
#[derive(Clone, Debug, PartialEq)]
pub(super) enum StreamTicket {
    Exec(ExecRequest),
    Attach(AttachRequest),
    PortForward(PortForwardRequest),
}

impl StreamTicket {
    /// The first part of its URL's path.
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

    /// The streams that the caller requested; PortForward has none of these.
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

/// The tickets that wait for their clients, by their tokens.
#[derive(Default)]
pub(super) struct Tickets(Mutex<BTreeMap<String, (Instant, StreamTicket)>>);

impl Tickets {
    fn all(&self) -> MutexGuard<'_, BTreeMap<String, (Instant, StreamTicket)>> {
        lock(&self.0)
    }

    /// Keeps a ticket for the client that comes with its token.
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

    /// The ticket of a token, if it is still good and for this method.
    pub(super) fn find(&self, method: &str, token: &str) -> Option<StreamTicket> {
        let all = self.all();
        let (until, ticket) = all.get(token)?;
        let good = *until > Instant::now() && ticket.method() == method;
        good.then(|| ticket.clone())
    }

    /// Uses a ticket up; false if another client was quicker.
    pub(super) fn redeem(&self, token: &str) -> bool {
        self.all().remove(token).is_some()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_ticket_is_good_once_and_for_its_method() -> Result<()> {
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
    fn tickets_are_counted() -> Result<()> {
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
        // An old one makes room.
        if let Some((until, _)) = tickets.all().values_mut().next() {
            *until = Instant::now();
        }
        issue("more")
    }
}
