//! Clients that follow a container's output as it goes to the log, and write to its stdin.
//!
//! Each has pipes of its own, into which everything is written that fits. What does not is left
//! out: a client that does not read costs its pipes, and the container nothing.

use std::os::fd::{AsFd, OwnedFd};

use rustix::io::Errno;

use super::connection::{ClientId, Role};
use super::container::{Output, State};
use super::container_log::Stream;
use super::serve::Monitor;
use rrun_kernel::errno::describe;
use rrun_protocol::{Attach, FailureKind, Reply, left_out};

/// A pipe that overflowed is written to again when it has at most this in it.
const RESUME: u64 = 16 << 10;

/// An attached client.
pub(crate) struct Follower {
    client: ClientId,
    stdout: Option<Tap>,
    stderr: Option<Tap>,
}

/// A pipe to a client.
struct Tap {
    pipe: OwnedFd,
    /// Bytes left out since the last note.
    lost: u64,
    /// The end of a note's lines.
    newline: &'static str,
}

impl Follower {
    /// Gives on what was read, as far as the client keeps up.
    pub(crate) fn give(&mut self, stream: Stream, bytes: &[u8]) {
        let tap = match stream {
            Stream::Stdout => &mut self.stdout,
            Stream::Stderr => &mut self.stderr,
        };
        if tap.as_mut().is_some_and(|tap| !tap.give(bytes)) {
            *tap = None;
        }
    }
}

impl Tap {
    /// False when nobody reads any more.
    fn give(&mut self, mut bytes: &[u8]) -> bool {
        if self.lost > 0 && !self.note() {
            self.lost += bytes.len() as u64;
            return true;
        }
        while !bytes.is_empty() {
            match rustix::io::write(&self.pipe, bytes) {
                Ok(count) => bytes = bytes.get(count..).unwrap_or_default(),
                Err(Errno::INTR) => {}
                Err(Errno::AGAIN) => {
                    self.lost += bytes.len() as u64;
                    return true;
                }
                Err(_) => return false,
            }
        }
        true
    }

    /// Says how much is missing, once there is room for more than that. A pipe takes so short a
    /// text whole or not at all.
    fn note(&mut self) -> bool {
        if rustix::io::ioctl_fionread(&self.pipe).is_ok_and(|held| held > RESUME) {
            return false;
        }
        let text = left_out(self.lost, self.newline);
        let written = rustix::io::write(&self.pipe, text.as_bytes()).is_ok();
        if written {
            self.lost = 0;
        }
        written
    }
}
impl Output {
    /// The container writes no more: closes everybody's pipes, and says whose they were, and what
    /// they are to be told of the end of their streams.
    pub(super) fn end_followers(&mut self) -> Vec<(ClientId, Reply)> {
        let followers = std::mem::take(&mut self.followers);
        let lost = |tap: &Option<Tap>| tap.as_ref().map_or(0, |tap| tap.lost);
        let end = |follower: Follower| {
            let (stdout, stderr) = (lost(&follower.stdout), lost(&follower.stderr));
            (follower.client, Reply::Ended { stdout, stderr })
        };
        followers.into_iter().map(end).collect()
    }
}

impl Monitor {
    pub(super) fn attach(&mut self, client: ClientId, attach: &Attach, fds: Vec<OwnedFd>) {
        let id = &attach.id;
        let Some(container) = self.containers.iter_mut().find(|c| c.id() == id) else {
            return self.not_found(client, id);
        };
        if !matches!(container.state, State::Created | State::Running) {
            let message = format!("attach to container {id}: it is not running");
            return self.fail(client, FailureKind::WrongState, message);
        }
        let terminal = container.spec.terminal;
        let wanted = usize::from(attach.stdout) + usize::from(attach.stderr);
        if fds.len() != wanted {
            let count = fds.len();
            let message = format!("attach to container {id}: {count} pipes for {wanted} streams");
            return self.fail(client, FailureKind::Monitor, message);
        }
        let input = if terminal {
            container.output.stdout.as_ref()
        } else if attach.stdin && container.stdin_client.is_none() {
            container.stdin.as_ref()
        } else {
            None
        };
        let prepared = fds
            .iter()
            .try_for_each(|pipe| rustix::io::ioctl_fionbio(pipe, true))
            .and_then(|()| {
                let copy = input.map(|input| rustix::io::fcntl_dupfd_cloexec(input.as_fd(), 3));
                copy.transpose()
            });
        let input = match prepared {
            Ok(input) => input,
            Err(errno) => {
                let said = describe(&errno.into());
                let message = format!("attach to container {id}: {said}");
                return self.fail(client, FailureKind::Monitor, message);
            }
        };
        if input.is_some() && !terminal && container.spec.stdin_once {
            container.stdin_client = Some(client);
        }
        let newline = if terminal { "\r\n" } else { "\n" };
        let mut pipes = fds.into_iter();
        let mut tap = |wanted: bool| {
            let pipe = wanted.then(|| pipes.next()).flatten()?;
            Some(Tap {
                pipe,
                lost: 0,
                newline,
            })
        };
        let follower = Follower {
            client,
            stdout: tap(attach.stdout),
            stderr: tap(attach.stderr),
        };
        container.output.followers.push(follower);
        self.send(
            client,
            Role::Waiting,
            &Reply::Attached,
            input.into_iter().collect(),
        );
    }

    /// A client that was attached detaches, and takes along what only it could write to.
    pub(super) fn attach_client_gone(&mut self, client: ClientId) {
        for container in &mut self.containers {
            let followers = &mut container.output.followers;
            followers.retain(|follower| follower.client != client);
            if container.stdin_client == Some(client) {
                container.stdin = None;
            }
        }
    }

    pub(super) fn close_stdin(&mut self, client: ClientId, id: &str) {
        let Some(container) = self.containers.iter_mut().find(|c| c.id() == id) else {
            return self.not_found(client, id);
        };
        if container.spec.stdin_once {
            container.stdin = None;
        }
        self.reply(client, &Reply::Done);
    }
}

#[cfg(test)]
mod tests {
    use std::io::Read;

    use super::*;

    #[test]
    fn a_client_that_does_not_read_loses_output_and_is_told_so() {
        let (read, pipe) = rustix::pipe::pipe().unwrap();
        rustix::io::ioctl_fionbio(&pipe, true).unwrap();
        let mut tap = Tap {
            pipe,
            lost: 0,
            newline: "\n",
        };
        let chunk = vec![b'x'; 40 << 10];
        assert!(tap.give(&chunk) && tap.give(&chunk) && tap.give(&chunk));
        assert_eq!(tap.lost, (120 << 10) - (64 << 10));
        let mut file = std::fs::File::from(read);
        let mut held = vec![0; 64 << 10];
        file.read_exact(&mut held).unwrap();
        assert!(tap.give(b"again"));
        drop(tap);
        let mut rest = String::new();
        file.read_to_string(&mut rest).unwrap();
        assert_eq!(
            rest,
            "\n[rrun: 57344 bytes of output are left out here: this client reads too slowly]\nagain"
        );
    }

    #[test]
    fn a_client_that_is_gone_is_noticed() {
        let (read, pipe) = rustix::pipe::pipe().unwrap();
        drop(read);
        let mut tap = Tap {
            pipe,
            lost: 0,
            newline: "\n",
        };
        assert!(!tap.give(b"x"));
    }
}
