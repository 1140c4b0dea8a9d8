//! splice(2): bytes that go from one descriptor to another by a pipe of ours, and never come into
//! this process's memory.

use std::io;
use std::os::fd::{AsFd, OwnedFd};

use rustix::io::Errno;
use rustix::pipe::{PipeFlags, SpliceFlags, pipe_with, splice};

/// What a pipe is to hold, in bytes: the most that pipe(7) gives for the asking, and half the system
/// calls and wake-ups that 256 KiB take. It is room that is only taken while bytes are on their way.
pub const PIPE_BYTES: usize = 1 << 20;

/// A pipe, and how many bytes are in it.
pub(crate) struct Pipe {
    read: OwnedFd,
    write: OwnedFd,
    held: usize,
}

impl Pipe {
    pub(crate) fn new() -> io::Result<Self> {
        let (read, write) = pipe_with(PipeFlags::CLOEXEC | PipeFlags::NONBLOCK)?;
        // Without that it holds 64 KiB.
        let _ = rustix::pipe::fcntl_setpipe_size(&write, PIPE_BYTES);
        Ok(Pipe {
            read,
            write,
            held: 0,
        })
    }

    pub(crate) fn held(&self) -> usize {
        self.held
    }

    /// Takes at most `most` bytes of what can be read now: 0 at the end, an error of the kind
    /// `WouldBlock` if there is nothing. `from` is a socket or a pipe.
    pub(crate) fn fill(&mut self, from: impl AsFd, most: usize) -> io::Result<usize> {
        let count = moved(from, &self.write, most)?;
        self.held += count;
        Ok(count)
    }

    /// Passes on as much as `to` takes now; `WouldBlock` if that is nothing.
    pub(crate) fn drain(&mut self, to: impl AsFd) -> io::Result<usize> {
        let count = moved(&self.read, to, self.held)?;
        if count == 0 && self.held > 0 {
            return Err(io::ErrorKind::WriteZero.into());
        }
        self.held -= count.min(self.held);
        Ok(count)
    }
}

fn moved(from: impl AsFd, to: impl AsFd, most: usize) -> io::Result<usize> {
    loop {
        let flags = SpliceFlags::MOVE | SpliceFlags::NONBLOCK;
        match splice(&from, None, &to, None, most, flags) {
            Err(Errno::INTR) => {}
            moved => return Ok(moved?),
        }
    }
}

#[cfg(test)]
mod tests {
    use std::io::{Read, Write};

    use super::*;

    #[test]
    fn bytes_pass_and_the_end_is_told() -> io::Result<()> {
        let (from, mut writer) = std::io::pipe()?;
        let (mut reader, to) = std::io::pipe()?;
        let mut pipe = Pipe::new()?;
        let nothing = pipe.fill(&from, 9).map_err(|error| error.kind());
        assert_eq!(nothing, Err(io::ErrorKind::WouldBlock));
        writer.write_all(b"hello")?;
        assert_eq!(pipe.fill(&from, 4)?, 4);
        assert_eq!(pipe.held(), 4);
        assert_eq!(pipe.drain(&to)?, 4);
        assert_eq!(pipe.fill(&from, 4)?, 1);
        assert_eq!(pipe.drain(&to)?, 1);
        drop((writer, to));
        assert_eq!(pipe.fill(&from, 4)?, 0);
        let mut text = String::new();
        reader.read_to_string(&mut text)?;
        assert_eq!(text, "hello");
        Ok(())
    }
}
