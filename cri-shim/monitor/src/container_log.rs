//! The container's log in the CRI's format: `TIME STREAM TAG LINE`, one line each, TAG being F
//! for a whole line and P for a part of one.
//!
//! Lines are found in place in one buffer that all containers share, and go to the log's file
//! many at a time: neither a reader nor a rotation ever sees half a line.

use std::os::fd::{AsFd, OwnedFd};
use std::path::PathBuf;
use std::sync::Arc;

use rustix::io::Errno;

use super::log_file::LogFile;
use super::timestamp::Timestamp;

/// A line longer than this is cut into parts: containerd's and CRI-O's bound.
const MAX_LINE_BYTES: usize = 16 << 10;

/// One read takes at most this: a pipe's capacity.
const READ_BYTES: usize = 64 << 10;

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Stream {
    Stdout,
    Stderr,
}

/// Where output is read to. All containers of the pod share it: it is large, but only touched
/// pages are memory.
pub(crate) struct ReadBuffer {
    input: Vec<u8>,
    /// Where in `input` the bytes of the last read are.
    last_read: std::ops::Range<usize>,
}

impl ReadBuffer {
    pub(crate) fn new() -> Self {
        ReadBuffer {
            input: vec![0; READ_BYTES],
            last_read: 0..0,
        }
    }

    /// What the last [`ContainerLog::pump`] read.
    pub(crate) fn last_read(&self) -> &[u8] {
        self.input.get(self.last_read.clone()).unwrap_or_default()
    }
}

impl Default for ReadBuffer {
    fn default() -> Self {
        Self::new()
    }
}

/// What a read of a stream found.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum ReadOutcome {
    /// Something; there may be more.
    Data,
    /// Nothing now.
    Empty,
    /// The writers are gone.
    End,
}

/// One container's log.
pub(crate) struct ContainerLog {
    /// `None` throws everything away.
    file: Option<LogFile>,
    /// The beginnings of lines whose end has not come yet, at most [`MAX_LINE_BYTES`] long.
    partial_stdout: Vec<u8>,
    partial_stderr: Vec<u8>,
}

impl ContainerLog {
    /// Has the log opened, or, with no path, throws everything away. `wake` as in
    /// [`LogFile::open`].
    pub(crate) fn open(path: Option<PathBuf>, wake: &Arc<OwnedFd>) -> std::io::Result<Self> {
        let file = path.map(|path| LogFile::open(path, wake)).transpose()?;
        Ok(ContainerLog {
            file,
            partial_stdout: Vec::new(),
            partial_stderr: Vec::new(),
        })
    }

    /// Whether the log takes more. If not, the loop is woken when it does.
    pub(crate) fn has_room(&self) -> bool {
        self.file.as_ref().is_none_or(LogFile::has_room)
    }

    pub(crate) fn file(&self) -> Option<&LogFile> {
        self.file.as_ref()
    }

    /// Whether all is in the file. If not, the loop is woken when it is.
    pub(crate) fn is_written(&self) -> bool {
        self.file.as_ref().is_none_or(LogFile::is_written)
    }

    /// As [`LogFile::discard`].
    pub(crate) fn discard(&self) {
        if let Some(file) = &self.file {
            file.discard();
        }
    }

    /// As [`LogFile::is_discarded`].
    pub(crate) fn is_discarded(&self) -> bool {
        self.file.as_ref().is_none_or(LogFile::is_discarded)
    }

    /// Reads from one of the container's streams once, and passes the lines that are whole on.
    pub(crate) fn pump(
        &mut self,
        fd: impl AsFd,
        stream: Stream,
        buffer: &mut ReadBuffer,
    ) -> ReadOutcome {
        let partial = self.partial(stream);
        let length = partial.len();
        // The partial line is shorter than the buffer by far.
        if let Some(front) = buffer.input.get_mut(..length) {
            front.copy_from_slice(partial);
        }
        let room = buffer.input.get_mut(length..).unwrap_or_default();
        let count = match rustix::io::read(fd, room) {
            Ok(0) => return ReadOutcome::End,
            Ok(count) => count,
            Err(Errno::AGAIN | Errno::INTR) => return ReadOutcome::Empty,
            // A pty's way to say that nobody has its other side open.
            Err(_) => return ReadOutcome::End,
        };
        buffer.last_read = length..length + count;
        let (file, partial) = match stream {
            Stream::Stdout => (&self.file, &mut self.partial_stdout),
            Stream::Stderr => (&self.file, &mut self.partial_stderr),
        };
        if let Some(file) = file {
            let input = buffer.input.get(..length + count).unwrap_or_default();
            file.append(|pending| push_lines(pending, partial, stream, input));
        }
        ReadOutcome::Data
    }

    /// Writes what is left of a line that will never end.
    pub(crate) fn finish(&mut self, stream: Stream) {
        let partial = std::mem::take(self.partial(stream));
        if let (false, Some(file)) = (partial.is_empty(), &self.file) {
            file.append(|pending| {
                let mut batch = Batch::new(stream, pending);
                batch.push(b'P', &partial);
                batch.lines
            });
        }
    }

    fn partial(&mut self, stream: Stream) -> &mut Vec<u8> {
        match stream {
            Stream::Stdout => &mut self.partial_stdout,
            Stream::Stderr => &mut self.partial_stderr,
        }
    }
}

/// Formats what was read, after the partial line from before. A rest without an end becomes the
/// partial line.
fn push_lines(pending: &mut Vec<u8>, partial: &mut Vec<u8>, stream: Stream, input: &[u8]) -> u64 {
    let mut rest = input;
    let mut batch = Batch::new(stream, pending);
    loop {
        let end = memchr::memchr(b'\n', rest);
        let mut line = end.and_then(|end| rest.get(..end)).unwrap_or(rest);
        while let Some((part, more)) = line.split_at_checked(MAX_LINE_BYTES)
            && !more.is_empty()
        {
            batch.push(b'P', part);
            line = more;
        }
        let Some(end) = end else {
            partial.clear();
            partial.extend_from_slice(line);
            if line.is_empty() && partial.capacity() > 256 {
                *partial = Vec::new();
            }
            return batch.lines;
        };
        batch.push(b'F', line);
        rest = rest.get(end + 1..).unwrap_or_default();
    }
}

/// Lines on their way to the file, all with the time at which they were read.
struct Batch<'a> {
    header: [u8; 40],
    output: &'a mut Vec<u8>,
    lines: u64,
}

impl<'a> Batch<'a> {
    fn new(stream: Stream, output: &'a mut Vec<u8>) -> Self {
        let mut header = *b"0000-00-00T00:00:00.000000000Z stdout F ";
        header[..30].copy_from_slice(Timestamp::now().text());
        if stream == Stream::Stderr {
            header[31..37].copy_from_slice(b"stderr");
        }
        Batch {
            header,
            output,
            lines: 0,
        }
    }

    fn push(&mut self, tag: u8, line: &[u8]) {
        self.header[38] = tag;
        self.output.reserve(self.header.len() + line.len() + 1);
        self.output.extend_from_slice(&self.header);
        self.output.extend_from_slice(line);
        self.output.push(b'\n');
        self.lines += 1;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn written(chunks: &[&[u8]]) -> Vec<String> {
        let dir = std::env::temp_dir().join(format!(
            "rrun-logs-{}-{:?}",
            std::process::id(),
            std::thread::current().id()
        ));
        let mut buffer = ReadBuffer::new();
        let flags = rustix::event::EventfdFlags::CLOEXEC;
        let wake = Arc::new(rustix::event::eventfd(0, flags).unwrap());
        let mut log = ContainerLog::open(Some(dir.clone()), &wake).unwrap();
        let (read, write) = rustix::pipe::pipe().unwrap();
        for chunk in chunks {
            rustix::io::write(&write, chunk).unwrap();
            assert_eq!(
                log.pump(&read, Stream::Stdout, &mut buffer),
                ReadOutcome::Data
            );
        }
        drop(write);
        assert_eq!(
            log.pump(&read, Stream::Stdout, &mut buffer),
            ReadOutcome::End
        );
        log.finish(Stream::Stdout);
        while !log.is_written() {
            rustix::io::read(&wake, &mut [0_u8; 8]).unwrap();
        }
        let text = std::fs::read_to_string(&dir).unwrap();
        std::fs::remove_file(&dir).unwrap();
        text.lines().map(|line| line[31..].to_owned()).collect()
    }

    #[test]
    fn a_line_in_two_pieces_is_one_line() {
        assert_eq!(
            written(&[b"one\ntw", b"o\n\nend"]),
            ["stdout F one", "stdout F two", "stdout F ", "stdout P end"]
        );
    }

    #[test]
    fn a_long_line_is_cut_into_parts_of_16_kib() {
        let mut line = vec![b'x'; MAX_LINE_BYTES * 2 + 5];
        line.push(b'\n');
        let lines = written(&[&line[..100], &line[100..20_000], &line[20_000..]]);
        let part = "x".repeat(MAX_LINE_BYTES);
        assert_eq!(
            lines,
            [
                format!("stdout P {part}"),
                format!("stdout P {part}"),
                "stdout F xxxxx".to_owned()
            ]
        );
    }

    #[test]
    fn a_line_of_just_16_kib_is_whole() {
        let mut line = vec![b'x'; MAX_LINE_BYTES];
        line.push(b'\n');
        assert_eq!(
            written(&[&line]),
            [format!("stdout F {}", "x".repeat(MAX_LINE_BYTES))]
        );
    }

    #[test]
    fn many_short_lines_fill_more_than_one_write() {
        let input = b"\n".repeat(READ_BYTES);
        assert_eq!(written(&[&input]).len(), READ_BYTES);
    }
}
