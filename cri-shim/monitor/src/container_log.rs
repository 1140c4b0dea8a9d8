//! The container's log in the CRI's format. Each line has the form `TIME STREAM TAG TEXT`. The tag
//! F marks text that was followed by a newline in the output. The tag P marks text without a
//! following newline: a part of a long line, or the incomplete last line.
//!
//! The monitor reads the output of all containers into one shared buffer and finds the line ends in
//! this buffer. The monitor writes many log lines to the file at a time, but never a part of a log
//! line. For this reason, neither a reader of the file nor a log rotation finds an incomplete log
//! line.

use std::os::fd::{AsFd, OwnedFd};
use std::path::PathBuf;
use std::sync::Arc;

use rustix::io::Errno;

use super::log_file::{LogFile, MAX_PENDING_BYTES};
use super::timestamp::Timestamp;

/// The length in bytes above which a line is cut into parts. containerd and CRI-O use the same
/// length.
pub(crate) const MAX_LINE_BYTES: usize = 16 << 10;

/// The maximum number of bytes that one read returns. A pipe has this capacity by default.
const READ_BYTES: usize = 64 << 10;

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Stream {
    Stdout,
    Stderr,
}

/// The buffer into which the monitor reads output. All containers of the pod share the buffer. The
/// buffer is large, but only its used pages occupy memory.
pub(crate) struct ReadBuffer {
    input: Vec<u8>,
    /// The range of `input` that contains the bytes of the last read.
    last_read: std::ops::Range<usize>,
}

impl ReadBuffer {
    pub(crate) fn new() -> Self {
        ReadBuffer {
            input: vec![0; READ_BYTES],
            last_read: 0..0,
        }
    }

    /// Returns the bytes that the last [`ContainerLog::pump`] has read.
    pub(crate) fn last_read(&self) -> &[u8] {
        self.input.get(self.last_read.clone()).unwrap_or_default()
    }
}

impl Default for ReadBuffer {
    fn default() -> Self {
        Self::new()
    }
}

/// The result of reading from one of a container's output streams.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum ReadOutcome {
    /// Data was read. More data may be available.
    Data,
    /// No data is available now.
    Empty,
    /// All writers have closed the stream.
    End,
    /// No process has the terminal's other side open. A process can open it again.
    HungUp,
}

/// One container's log. The default value discards all output.
#[derive(Default)]
pub(crate) struct ContainerLog {
    /// The log's file. `None` if the log discards all output.
    file: Option<LogFile>,
    stdout: Rest,
    stderr: Rest,
}

/// The output of a stream that was read but is not in the log yet.
#[derive(Default)]
pub(crate) struct Rest {
    /// Usually an incomplete line of at most [`MAX_LINE_BYTES`] bytes. If `has_lines` is true, this
    /// is the end of the last read.
    pub(crate) bytes: Vec<u8>,
    /// True if the log accepted only a part of the last read. A log line is up to 42 times longer
    /// than the line in the output, so even a single read can fill the log.
    pub(crate) has_lines: bool,
}

impl Rest {
    fn set(&mut self, bytes: &[u8], has_lines: bool) {
        self.has_lines = has_lines;
        if self.bytes.capacity() > MAX_LINE_BYTES || bytes.is_empty() && self.bytes.capacity() > 256
        {
            self.bytes = Vec::new();
        }
        self.bytes.clear();
        self.bytes.extend_from_slice(bytes);
    }
}

impl ContainerLog {
    /// Opens the log. Without a path, the returned log discards all output. [`LogFile::open`]
    /// describes `wake`.
    pub(crate) fn open(path: Option<PathBuf>, wake: &Arc<OwnedFd>) -> std::io::Result<Self> {
        let file = path.map(|path| LogFile::open(path, wake)).transpose()?;
        Ok(ContainerLog {
            file,
            stdout: Rest::default(),
            stderr: Rest::default(),
        })
    }

    /// Passes the lines of a stream that were read before to the log. Returns whether the log
    /// accepts more output of the stream. If the log accepts no more output, the log's thread wakes
    /// the event loop when the log has room again.
    pub(crate) fn accepts(&mut self, stream: Stream) -> bool {
        let (Some(file), rest) = self.file_and_rest(stream) else {
            return true;
        };
        while file.has_room() {
            if !rest.has_lines {
                return true;
            }
            let input = std::mem::take(&mut rest.bytes);
            file.append(|pending| push_lines(pending, rest, stream, &input));
        }
        false
    }

    /// Returns whether lines of a stream were read but are not in the log yet.
    pub(crate) fn has_lines(&self, stream: Stream) -> bool {
        match stream {
            Stream::Stdout => self.stdout.has_lines,
            Stream::Stderr => self.stderr.has_lines,
        }
    }

    pub(crate) fn file(&self) -> Option<&LogFile> {
        self.file.as_ref()
    }

    /// Returns whether all output has been written to the log's file. If the result is false, the
    /// log's thread wakes the event loop after it has written all output.
    pub(crate) fn is_written(&self) -> bool {
        self.file.as_ref().is_none_or(LogFile::is_written)
    }

    /// Calls [`LogFile::discard`] if the log has a file.
    pub(crate) fn discard(&self) {
        if let Some(file) = &self.file {
            file.discard();
        }
    }

    /// Returns the result of [`LogFile::is_discarded`], or true if the log has no file.
    pub(crate) fn is_discarded(&self) -> bool {
        self.file.as_ref().is_none_or(LogFile::is_discarded)
    }

    /// Reads from one of the container's streams once, and passes the complete lines to the log. The
    /// caller must check before that the log accepts output ([`ContainerLog::accepts`]).
    pub(crate) fn pump(
        &mut self,
        fd: impl AsFd,
        stream: Stream,
        buffer: &mut ReadBuffer,
    ) -> ReadOutcome {
        let (file, rest) = self.file_and_rest(stream);
        let length = rest.bytes.len();
        // The incomplete line always fits into the buffer, because it is much shorter than the
        // buffer.
        if let Some(front) = buffer.input.get_mut(..length) {
            front.copy_from_slice(&rest.bytes);
        }
        let room = buffer.input.get_mut(length..).unwrap_or_default();
        let count = match rustix::io::read(fd, room) {
            Ok(0) => return ReadOutcome::End,
            Ok(count) => count,
            Err(Errno::AGAIN | Errno::INTR) => return ReadOutcome::Empty,
            // No process has the other side of the terminal open.
            Err(Errno::IO) => return ReadOutcome::HungUp,
            Err(_) => return ReadOutcome::End,
        };
        buffer.last_read = length..length + count;
        if let Some(file) = file {
            let input = buffer.input.get(..length + count).unwrap_or_default();
            file.append(|pending| push_lines(pending, rest, stream, input));
        }
        ReadOutcome::Data
    }

    /// Writes the incomplete last line of a stream that has ended.
    pub(crate) fn finish(&mut self, stream: Stream) {
        let (file, rest) = self.file_and_rest(stream);
        let partial = std::mem::take(rest).bytes;
        if let (false, Some(file)) = (partial.is_empty(), file) {
            file.append(|pending| {
                let mut batch = Batch::new(stream, pending);
                batch.push(b'P', &partial);
                batch.lines
            });
        }
    }

    fn file_and_rest(&mut self, stream: Stream) -> (Option<&LogFile>, &mut Rest) {
        let rest = match stream {
            Stream::Stdout => &mut self.stdout,
            Stream::Stderr => &mut self.stderr,
        };
        (self.file.as_ref(), rest)
    }
}

/// Appends the lines of `input` to `pending` in the log's format, until `pending` is full. Returns
/// the number of appended lines. `input` begins with the previous contents of `rest`. An incomplete
/// line at the end of `input`, or the lines that do not fit, become the new contents of `rest`.
pub(crate) fn push_lines(
    pending: &mut Vec<u8>,
    rest: &mut Rest,
    stream: Stream,
    input: &[u8],
) -> u64 {
    let mut left = input;
    let mut batch = Batch::new(stream, pending);
    loop {
        let end = memchr::memchr(b'\n', left);
        if end.is_some() && batch.output.len() >= MAX_PENDING_BYTES {
            rest.set(left, true);
            return batch.lines;
        }
        let mut line = end.and_then(|end| left.get(..end)).unwrap_or(left);
        while let Some((part, more)) = line.split_at_checked(MAX_LINE_BYTES)
            && !more.is_empty()
        {
            batch.push(b'P', part);
            line = more;
        }
        let Some(end) = end else {
            rest.set(line, false);
            return batch.lines;
        };
        batch.push(b'F', line);
        left = left.get(end + 1..).unwrap_or_default();
    }
}

/// A batch of log lines for the file. All lines of a batch have the same timestamp: the time at
/// which the monitor read the lines.
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
        let mut pump = |log: &mut ContainerLog| {
            while !log.accepts(Stream::Stdout) {
                rustix::io::read(&wake, &mut [0_u8; 8]).unwrap();
            }
            log.pump(&read, Stream::Stdout, &mut buffer)
        };
        for chunk in chunks {
            rustix::io::write(&write, chunk).unwrap();
            assert_eq!(pump(&mut log), ReadOutcome::Data);
        }
        drop(write);
        assert_eq!(pump(&mut log), ReadOutcome::End);
        log.finish(Stream::Stdout);
        while !log.is_written() {
            rustix::io::read(&wake, &mut [0_u8; 8]).unwrap();
        }
        let text = std::fs::read_to_string(&dir).unwrap();
        std::fs::remove_file(&dir).unwrap();
        text.lines().map(|line| line[31..].to_owned()).collect()
    }

    #[test]
    fn a_line_read_in_two_pieces_is_logged_as_one_line() {
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
    fn a_line_of_exactly_16_kib_is_not_cut() {
        let mut line = vec![b'x'; MAX_LINE_BYTES];
        line.push(b'\n');
        assert_eq!(
            written(&[&line]),
            [format!("stdout F {}", "x".repeat(MAX_LINE_BYTES))]
        );
    }

    #[test]
    fn lines_that_do_not_fit_into_the_log_wait_as_they_were_read() {
        let (mut pending, mut rest) = (Vec::new(), Rest::default());
        let mut input = [b"\n".repeat(READ_BYTES), b"end".to_vec()].concat();
        let mut lines = 0;
        loop {
            pending.clear();
            lines += push_lines(&mut pending, &mut rest, Stream::Stdout, &input);
            assert!(pending.len() < MAX_PENDING_BYTES + 100);
            input.clone_from(&rest.bytes);
            if !rest.has_lines {
                break;
            }
        }
        assert_eq!(lines, READ_BYTES as u64);
        assert_eq!(rest.bytes, b"end");
    }

    #[test]
    fn many_short_lines_are_all_written() {
        let input = b"\n".repeat(READ_BYTES);
        assert_eq!(written(&[&input]).len(), READ_BYTES);
    }
}
