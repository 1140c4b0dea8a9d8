//! The tickets to which the URLs of the streaming server refer. Each ticket's token is valid for
//! one session.

use std::collections::BTreeMap;
use std::sync::{Arc, Mutex, MutexGuard, OnceLock};
use std::time::{Duration, Instant};

use rrun_proto::v1::{AttachRequest, ExecRequest, PortForwardRequest};
use tonic::Code;

use super::fair_share::pod_with_most;
use super::sessions::Sessions;
use rrun_calls::error::{Error, Result};
use rrun_calls::lock::lock;
use rrun_streams::remotecommand::StreamOptions;
use rrun_streams::upgrade::Purpose;

/// The lifetime of a ticket.
const TICKET_LIFETIME: Duration = Duration::from_secs(60);

/// The limit on the sum of the sizes of all tickets that are not redeemed yet, see [`StreamTicket::size`].
const MAX_TICKETS: usize = 1000;

/// The number of bytes that increases a ticket's size by one. A ticket for a usual command is
/// smaller.
const SIZE_UNIT_BYTES: usize = 64 << 10;

/// The shared state of the gRPC service and the streaming server.
pub(crate) struct Streams {
    pub(super) tickets: Tickets,
    pub(super) sessions: Arc<Sessions>,
    /// The base URL `http://ADDRESS:PORT`. It is set when the streaming server begins to listen.
    pub(super) base: OnceLock<String>,
}

impl Streams {
    /// Creates the state for at most `sessions` simultaneous sessions.
    pub(crate) fn new(sessions: usize) -> Self {
        Streams {
            tickets: Tickets::default(),
            sessions: Sessions::new(sessions),
            base: OnceLock::new(),
        }
    }

    /// Issues a ticket for the pod, and returns a URL that contains `token`. A client can use the
    /// URL once.
    pub(super) fn url(&self, token: &str, pod: &str, ticket: StreamTicket) -> Result<String> {
        let base = self
            .base
            .get()
            .ok_or_else(|| Error::internal("the streaming server does not listen yet"))?;
        let method = ticket.method();
        self.tickets.issue(token, pod, ticket)?;
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

    /// Returns the ticket's size. A ticket that contains a long command counts more than once.
    fn size(&self) -> usize {
        let bytes = match self {
            StreamTicket::Exec(request) => {
                let words = request.cmd.iter();
                words.map(|word| size_of::<String>() + word.len()).sum()
            }
            StreamTicket::Attach(_) => 0,
            StreamTicket::PortForward(request) => size_of::<i32>() * request.port.len(),
        };
        1 + bytes / SIZE_UNIT_BYTES
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

/// A ticket that is not redeemed yet.
#[derive(Clone)]
pub(super) struct IssuedTicket {
    /// The id of the pod for which the ticket is valid.
    pub pod: String,
    pub ticket: StreamTicket,
    /// See [`StreamTicket::size`].
    size: usize,
    until: Instant,
}

/// The tickets that are not redeemed yet, keyed by their tokens.
#[derive(Default)]
pub(super) struct Tickets(Mutex<BTreeMap<String, IssuedTicket>>);

impl Tickets {
    fn all(&self) -> MutexGuard<'_, BTreeMap<String, IssuedTicket>> {
        lock(&self.0)
    }

    /// Stores a ticket until a client redeems it with its token. If the limit on tickets is
    /// reached, the ticket replaces the oldest ticket of the pod with the most tickets.
    fn issue(&self, token: &str, pod: &str, ticket: StreamTicket) -> Result<()> {
        let (now, size) = (Instant::now(), ticket.size());
        let mut all = self.all();
        all.retain(|_, issued| issued.until > now);
        while all.values().map(|issued| issued.size).sum::<usize>() + size > MAX_TICKETS {
            let sizes = all
                .values()
                .map(|issued| (issued.pod.as_str(), issued.size));
            let most = pod_with_most(sizes, pod, size).ok_or_else(|| {
                Error::new(
                    Code::ResourceExhausted,
                    format!(
                        "{MAX_TICKETS} streams are waiting for their clients; try again in a minute"
                    ),
                )
            })?;
            let of_pod = all.iter().filter(|(_, issued)| issued.pod == most);
            let oldest = of_pod.min_by_key(|(_, issued)| issued.until);
            if let Some(oldest) = oldest.map(|(token, _)| token.clone()) {
                all.remove(&oldest);
            }
        }
        let issued = IssuedTicket {
            pod: pod.to_owned(),
            size,
            ticket,
            until: now + TICKET_LIFETIME,
        };
        all.insert(token.to_owned(), issued);
        Ok(())
    }

    /// Returns the ticket of a token. If the ticket has expired or is not for `method`, the result
    /// is `None`.
    pub(super) fn find(&self, method: &str, token: &str) -> Option<IssuedTicket> {
        let all = self.all();
        let issued = all.get(token)?;
        let good = issued.until > Instant::now() && issued.ticket.method() == method;
        good.then(|| issued.clone())
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
        tickets.issue("a", "pod", StreamTicket::Attach(AttachRequest::default()))?;
        assert!(tickets.find("exec", "a").is_none());
        assert!(tickets.find("attach", "a").is_some());
        assert!(tickets.redeem("a"));
        assert!(!tickets.redeem("a"));
        assert!(tickets.find("attach", "a").is_none());
        Ok(())
    }

    #[test]
    fn the_number_of_tickets_is_limited_and_no_pod_prevents_tickets_for_other_pods() -> Result<()> {
        let tickets = Tickets::default();
        let issue = |token: &str, pod: &str| {
            let ticket = StreamTicket::Attach(AttachRequest::default());
            tickets.issue(token, pod, ticket)
        };
        let is_valid = |token: &str| tickets.find("attach", token).is_some();
        for number in 0..MAX_TICKETS {
            issue(&number.to_string(), "many")?;
        }
        assert_eq!(
            issue("more", "many").err().map(|e| e.code()),
            Some(Code::ResourceExhausted)
        );
        issue("other", "few")?;
        assert!(is_valid("other") && !is_valid("0") && is_valid("1"));
        // A long command counts like several tickets.
        let long = ExecRequest {
            cmd: vec!["x".repeat(10 * SIZE_UNIT_BYTES)],
            ..ExecRequest::default()
        };
        tickets.issue("long", "few", StreamTicket::Exec(long))?;
        assert_eq!(tickets.all().len(), MAX_TICKETS - 10);
        // After one ticket has expired, it is removed, so the next ticket is accepted.
        if let Some(issued) = tickets.all().values_mut().next() {
            issued.until = Instant::now();
        }
        issue("more", "many")
    }
}
