//! Clients that are attached to a running container's stdio. An attached client receives the
//! container's output, and can write to the container's stdin.

use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::net::UnixStream;

use rustix::io::fcntl_dupfd_cloexec;

use super::connection::ClientId;
use super::container::Container;
use super::effect::Effect;
use super::follower::Follower;
use super::relay::{Direction, Relay};
use rrun_kernel::errno::describe;
use rrun_protocol::{Attach, FailureKind, Reply};

impl Container {
    pub(crate) fn attach(
        &mut self,
        client: ClientId,
        attach: &Attach,
        pipes: Vec<OwnedFd>,
    ) -> Vec<Effect> {
        let id = &attach.id;
        if !self.has_init() {
            let message = format!("attach to container {id}: the container is not running");
            return vec![Effect::fail(client, FailureKind::WrongState, message)];
        }
        let (count, requested) = (
            pipes.len(),
            usize::from(attach.stdout) + usize::from(attach.stderr),
        );
        if count != requested {
            let message = format!(
                "attach to container {id}: the request carries {count} pipes for {requested} streams"
            );
            return vec![Effect::fail(client, FailureKind::Monitor, message)];
        }
        let (input, relay) = match self.input_for(client, attach, &pipes) {
            Ok(input) => input,
            Err(error) => {
                let message = format!("attach to container {id}: {}", describe(&error));
                return vec![Effect::fail(client, FailureKind::Monitor, message)];
            }
        };
        let terminal = self.spec.terminal;
        if input.is_some() && !terminal && self.spec.stdin_once {
            self.stdin_client = Some(client);
        }
        let newline = if terminal { "\r\n" } else { "\n" };
        let mut pipes = pipes.into_iter();
        let mut pipe = |requested: bool| requested.then(|| pipes.next()).flatten();
        let (stdout, stderr) = (pipe(attach.stdout), pipe(attach.stderr));
        let follower = Follower::new(client, stdout, stderr, newline);
        self.output.follow(follower);
        let send = Effect::Send {
            client,
            reply: Reply::Attached,
            fds: input.into_iter().collect(),
        };
        let relay = relay.map(|relay| Effect::Relay(Box::new(relay)));
        relay.into_iter().chain([send]).collect()
    }

    /// Makes the client's pipes non-blocking. Returns a descriptor through which this client can write
    /// to the container. It is a socket, with the relay between the socket and the container's stdin
    /// or terminal. It is `None` in three cases: the client did not request stdin, stdin is closed, or
    /// stdin is reserved for another client. A client that does not support this socket for a terminal
    /// gets the terminal's master.
    fn input_for(
        &self,
        client: ClientId,
        attach: &Attach,
        pipes: &[OwnedFd],
    ) -> std::io::Result<(Option<OwnedFd>, Option<Relay>)> {
        for pipe in pipes {
            rustix::io::ioctl_fionbio(pipe, true)?;
        }
        let (input, is_allowed) = if self.spec.terminal {
            (self.output.terminal(), true)
        } else {
            let stdin = self.stdin.as_ref().map(AsFd::as_fd);
            (stdin, self.stdin_client.is_none())
        };
        let input = input
            .map(|input| fcntl_dupfd_cloexec(input, 3))
            .transpose()?;
        if self.spec.terminal && !attach.relays_terminal {
            return Ok((input, None));
        }
        let Some(input) = input.filter(|_| attach.stdin && is_allowed) else {
            return Ok((None, None));
        };
        let (ours, theirs) = UnixStream::pair()?;
        let relay = if self.spec.terminal {
            Relay::to_terminal(client, ours.into(), input)?
        } else {
            Relay::new(client, Direction::Input, ours.into(), input)?
        };
        Ok((Some(theirs.into()), Some(relay)))
    }

    /// Detaches a client that has disconnected. If only this client was allowed to write to the
    /// container's stdin, this function closes stdin.
    pub(crate) fn client_gone(&mut self, client: ClientId) {
        self.output.unfollow(client);
        if self.stdin_client == Some(client) {
            self.stdin = None;
        }
    }

    pub(crate) fn close_stdin(&mut self, client: ClientId) -> Vec<Effect> {
        if self.spec.stdin_once {
            self.stdin = None;
        }
        vec![Effect::Reply(client, Reply::Done)]
    }
}
