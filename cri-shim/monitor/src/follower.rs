//! A client that receives a copy of a container's output, in parallel with the log.
//!
//! The monitor writes only as much as fits into the client's pipes, and omits the rest of the
//! output. A client that does not read fills only its own pipes, and does not slow down the
//! container.

use std::os::fd::OwnedFd;

use rustix::io::Errno;

use super::connection::ClientId;
use super::container_log::Stream;
use rrun_protocol::{Reply, omission_notice};

/// When a client's pipe is full, the monitor stops writing to the pipe. The monitor continues when
/// the pipe contains at most this many bytes.
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
    /// The number of bytes of output that the monitor has omitted since its last notice.
    omitted: u64,
    /// The line ending that the monitor writes before and after a notice.
    newline: &'static str,
}

impl Follower {
    /// Creates a follower. The pipes must be non-blocking. `newline` is the line ending of the
    /// container's output.
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

    /// Writes as many of the bytes to the client's pipe as fit into it.
    pub(crate) fn write(&mut self, stream: Stream, bytes: &[u8]) {
        let pipe = match stream {
            Stream::Stdout => &mut self.stdout,
            Stream::Stderr => &mut self.stderr,
        };
        if pipe.as_mut().is_some_and(|pipe| !pipe.write(bytes)) {
            *pipe = None;
        }
    }

    /// Closes the pipes, and returns the message that reports how many bytes were omitted at the
    /// end of each stream.
    pub(crate) fn end(self) -> Reply {
        let omitted = |pipe: &Option<ClientPipe>| pipe.as_ref().map_or(0, |pipe| pipe.omitted);
        Reply::Ended {
            stdout: omitted(&self.stdout),
            stderr: omitted(&self.stderr),
        }
    }
}

impl ClientPipe {
    /// Writes bytes to the client's pipe. Returns false if the client has closed the pipe.
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

    /// Writes a notice about the omitted bytes if the pipe has enough room. Returns whether the
    /// notice was written. The notice is shorter than PIPE_BUF, so the pipe accepts it either
    /// completely or not at all (pipe(7)).
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
    fn a_client_that_does_not_read_loses_output_and_receives_a_notice() {
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
    fn a_write_detects_a_client_that_has_disconnected() {
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
