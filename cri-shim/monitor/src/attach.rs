//! Clients at a running container's stdio: they follow its output, and write to its stdin.

use std::os::fd::{AsFd, OwnedFd};

use super::connection::ClientId;
use super::container::Container;
use super::effect::Effect;
use super::follower::Follower;
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
            let message = format!("attach to container {id}: it is not running");
            return vec![Effect::fail(client, FailureKind::WrongState, message)];
        }
        let (count, wanted) = (
            pipes.len(),
            usize::from(attach.stdout) + usize::from(attach.stderr),
        );
        if count != wanted {
            let message = format!("attach to container {id}: {count} pipes for {wanted} streams");
            return vec![Effect::fail(client, FailureKind::Monitor, message)];
        }
        let input = match self.input_for(attach, &pipes) {
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
        let mut pipe = |wanted: bool| wanted.then(|| pipes.next()).flatten();
        let (stdout, stderr) = (pipe(attach.stdout), pipe(attach.stderr));
        let follower = Follower::new(client, stdout, stderr, newline);
        self.output.follow(follower);
        vec![Effect::Send {
            client,
            reply: Reply::Attached,
            fds: input.into_iter().collect(),
        }]
    }

    /// Prepares the pipes, and copies what the client writes the container's input to, if there
    /// is such a thing and it may.
    fn input_for(&self, attach: &Attach, pipes: &[OwnedFd]) -> std::io::Result<Option<OwnedFd>> {
        let input = if self.spec.terminal {
            self.output.terminal()
        } else if attach.stdin && self.stdin_client.is_none() {
            self.stdin.as_ref().map(AsFd::as_fd)
        } else {
            None
        };
        for pipe in pipes {
            rustix::io::ioctl_fionbio(pipe, true)?;
        }
        let copy = input.map(|input| rustix::io::fcntl_dupfd_cloexec(input, 3));
        Ok(copy.transpose()?)
    }

    /// A client that was attached detaches, and takes along what only it could write to.
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
