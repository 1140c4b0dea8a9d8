//! A client that follows a container's output as it goes to the log.
//!
//! It has pipes of its own, into which everything is written that fits. What does not is left
//! out: a client that does not read costs its pipes, and the container nothing.

use std::os::fd::OwnedFd;

use rustix::io::Errno;

use super::connection::ClientId;
use super::container_log::Stream;
use rrun_protocol::{Reply, omission_notice};

/// A pipe that overflowed is written to again when it has at most this in it.
const RESUME_BELOW_BYTES: u64 = 16 << 10;

/// An attached client.
pub(crate) struct Follower {
    client: ClientId,
    stdout: Option<ClientPipe>,
    stderr: Option<ClientPipe>,
}

/// A pipe to a client.
struct ClientPipe {
    pipe: OwnedFd,
    /// Bytes left out since the last notice.
    omitted: u64,
    /// The end of a notice's lines.
    newline: &'static str,
}

impl Follower {
    /// The pipes do not block. `newline` ends lines of the container's output.
    pub(crate) fn new(
        client: ClientId,
        stdout: Option<OwnedFd>,
        stderr: Option<OwnedFd>,
        newline: &'static str,
    ) -> Self {
        let pipe = |pipe| ClientPipe {
            pipe,
            omitted: 0,
            newline,
        };
        Follower {
            client,
            stdout: stdout.map(pipe),
            stderr: stderr.map(pipe),
        }
    }

    pub(crate) fn client(&self) -> ClientId {
        self.client
    }

    /// Passes on what was read, as far as the client keeps up.
    pub(crate) fn write(&mut self, stream: Stream, bytes: &[u8]) {
        let pipe = match stream {
            Stream::Stdout => &mut self.stdout,
            Stream::Stderr => &mut self.stderr,
        };
        if pipe.as_mut().is_some_and(|pipe| !pipe.write(bytes)) {
            *pipe = None;
        }
    }

    /// Closes the pipes, and returns what the client needs to know of the streams' ends.
    pub(crate) fn end(self) -> Reply {
        let omitted = |pipe: &Option<ClientPipe>| pipe.as_ref().map_or(0, |pipe| pipe.omitted);
        Reply::Ended {
            stdout: omitted(&self.stdout),
            stderr: omitted(&self.stderr),
        }
    }
}

impl ClientPipe {
    /// False when nobody reads the pipe any more.
    fn write(&mut self, mut bytes: &[u8]) -> bool {
        if self.omitted > 0 && !self.write_notice() {
            self.omitted += bytes.len() as u64;
            return true;
        }
        while !bytes.is_empty() {
            match rustix::io::write(&self.pipe, bytes) {
                Ok(count) => bytes = bytes.get(count..).unwrap_or_default(),
                Err(Errno::INTR) => {}
                Err(Errno::AGAIN) => {
                    self.omitted += bytes.len() as u64;
                    return true;
                }
                Err(_) => return false,
            }
        }
        true
    }

    /// Writes how much is missing, once there is room for more than that. A pipe takes so short a
    /// text whole or not at all.
    fn write_notice(&mut self) -> bool {
        if rustix::io::ioctl_fionread(&self.pipe).is_ok_and(|held| held > RESUME_BELOW_BYTES) {
            return false;
        }
        let text = omission_notice(self.omitted, self.newline);
        let written = rustix::io::write(&self.pipe, text.as_bytes()).is_ok();
        if written {
            self.omitted = 0;
        }
        written
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
        let mut pipe = ClientPipe {
            pipe,
            omitted: 0,
            newline: "\n",
        };
        let chunk = vec![b'x'; 40 << 10];
        assert!(pipe.write(&chunk) && pipe.write(&chunk) && pipe.write(&chunk));
        assert_eq!(pipe.omitted, (120 << 10) - (64 << 10));
        let mut file = std::fs::File::from(read);
        let mut held = vec![0; 64 << 10];
        file.read_exact(&mut held).unwrap();
        assert!(pipe.write(b"again"));
        drop(pipe);
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
        let mut pipe = ClientPipe {
            pipe,
            omitted: 0,
            newline: "\n",
        };
        assert!(!pipe.write(b"x"));
    }
}
