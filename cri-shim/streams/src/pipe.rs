//! Transfers with splice(2): bytes move from one descriptor to another through a pipe, without a
//! copy into this process's memory.

use std::io;
use std::os::fd::{AsFd, OwnedFd};

use rustix::io::Errno;
use rustix::pipe::{PipeFlags, SpliceFlags, pipe_with, splice};

/// The maximum number of bytes that one transfer moves into a pipe. A pipe can have a lower
/// capacity.
pub(crate) const PIPE_BYTES: usize = 1 << 20;

/// A pipe, and the number of bytes in it.
pub(crate) struct Pipe {
    read: OwnedFd,
    write: OwnedFd,
    held: usize,
}

impl Pipe {
    /// Creates a pipe with a capacity of `bytes`. With a larger pipe, a transfer needs fewer system
    /// calls and wake-ups. A pipe uses memory only for the bytes in the pipe.
    pub(crate) fn new(bytes: usize) -> io::Result<Self> {
        let (read, write) = pipe_with(PipeFlags::CLOEXEC | PipeFlags::NONBLOCK)?;
        // A failure to change the capacity is ignored, because the default capacity of 64 KiB is
        // sufficient.
        let _ = rustix::pipe::fcntl_setpipe_size(&write, bytes);
        Ok(Pipe {
            read,
            write,
            held: 0,
        })
    }

    pub(crate) fn held(&self) -> usize {
        self.held
    }

    /// Moves the bytes that can be read from `from` now into this pipe, at most `most` bytes.
    /// `from` must be a socket or a pipe. Returns the number of moved bytes, which is 0 at the end
    /// of the data. Fails with `WouldBlock` if no data is available now.
    pub(crate) fn fill(&mut self, from: impl AsFd, most: usize) -> io::Result<usize> {
        let count = moved(from, &self.write, most)?;
        self.held += count;
        Ok(count)
    }

    /// Moves as many bytes from this pipe to `to` as `to` accepts now. Fails with `WouldBlock` if
    /// `to` accepts no bytes.
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
    fn a_pipe_passes_on_bytes_and_reports_the_end_of_the_data() -> io::Result<()> {
        let (from, mut writer) = std::io::pipe()?;
        let (mut reader, to) = std::io::pipe()?;
        let mut pipe = Pipe::new(PIPE_BYTES)?;
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
