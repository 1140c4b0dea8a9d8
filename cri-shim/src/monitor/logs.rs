//! The container's log in the CRI's format: `TIME STREAM TAG LINE`, one line each, TAG being F
//! for a whole line and P for a part of one.
//!
//! Lines are found in place in one buffer that all containers share, and go to the file many at
//! a time, with one write(2): neither a reader nor a rotation ever sees half a line.

use std::fs::{File, OpenOptions};
use std::io::{Seek, Write};
use std::os::fd::AsFd;
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};

use rustix::io::Errno;

use super::errno::kernel_said;
use super::exit;

/// A line longer than this is cut into parts: containerd's and CRI-O's bound.
const MAX_LINE: usize = 16 << 10;

/// One read takes at most this: a pipe's capacity.
const INPUT: usize = 64 << 10;

/// One write takes at most this, and at least a line of [`MAX_LINE`] with its header.
const OUTPUT: usize = 96 << 10;

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Stream {
    Stdout,
    Stderr,
}

/// The time as the CRI's logs have it, in UTC: RFC 3339 with nine digits of a second.
pub struct Timestamp([u8; 30]);

impl Timestamp {
    pub fn now() -> Self {
        Timestamp::at(exit::now())
    }

    /// `nanoseconds` since the epoch; the years 1970 to 9999.
    pub fn at(nanoseconds: i64) -> Self {
        let (seconds, fraction) = (
            nanoseconds.max(0) / 1_000_000_000,
            nanoseconds.max(0) % 1_000_000_000,
        );
        let (days, second) = (seconds / 86_400, seconds % 86_400);
        // Days to a date by eras of 400 years that begin on a 1 March.
        let shifted = days + 719_468;
        let (era, day) = (shifted / 146_097, shifted % 146_097);
        let year_of_era = (day - day / 1_460 + day / 36_524 - day / 146_096) / 365;
        let day_of_year = day - (365 * year_of_era + year_of_era / 4 - year_of_era / 100);
        let shifted_month = (5 * day_of_year + 2) / 153;
        let month = if shifted_month < 10 {
            shifted_month + 3
        } else {
            shifted_month - 9
        };
        let year = year_of_era + era * 400 + i64::from(month <= 2);
        let mut text = *b"0000-00-00T00:00:00.000000000Z";
        for (at, width, value) in [
            (0, 4, year),
            (5, 2, month),
            (8, 2, day_of_year - (153 * shifted_month + 2) / 5 + 1),
            (11, 2, second / 3_600),
            (14, 2, second / 60 % 60),
            (17, 2, second % 60),
            (20, 9, fraction),
        ] {
            let mut rest = value;
            for digit in text.iter_mut().skip(at).take(width).rev() {
                *digit += (rest % 10) as u8;
                rest /= 10;
            }
        }
        Timestamp(text)
    }

    pub fn text(&self) -> &[u8] {
        &self.0
    }
}

/// What all containers of the pod share while one of them is read. Two allocations that are
/// large enough to be mappings of their own, of which only touched pages are memory.
pub struct Buffers {
    input: Vec<u8>,
    output: Vec<u8>,
}

impl Buffers {
    pub fn new() -> Self {
        Buffers {
            input: vec![0; INPUT],
            output: Vec::with_capacity(OUTPUT),
        }
    }
}

impl Default for Buffers {
    fn default() -> Self {
        Self::new()
    }
}

/// What a look at a stream found.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Pumped {
    /// Something; there may be more.
    Data,
    /// Nothing now.
    Empty,
    /// The writers are gone.
    End,
}

/// One container's log.
pub struct Log {
    path: Option<PathBuf>,
    file: Option<File>,
    /// The beginnings of lines whose end has not come yet, at most [`MAX_LINE`] long.
    stdout: Vec<u8>,
    stderr: Vec<u8>,
    /// Lines that could not be written since the last that could, and why.
    lost: u64,
    reason: Option<Errno>,
    /// Half a line stands at the end of the file.
    torn: bool,
}

fn open(path: &Path) -> std::io::Result<File> {
    let mut options = OpenOptions::new();
    options.append(true).create(true).mode(0o640).open(path)
}

impl Log {
    /// Opens the log, or, with no path, one that throws everything away.
    pub fn open(path: Option<PathBuf>) -> std::io::Result<Self> {
        Ok(Log {
            file: path.as_deref().map(open).transpose()?,
            path,
            stdout: Vec::new(),
            stderr: Vec::new(),
            lost: 0,
            reason: None,
            torn: false,
        })
    }

    /// Opens the log again at its path. The old file goes on if that fails.
    pub fn reopen(&mut self) -> std::io::Result<()> {
        if let Some(path) = &self.path {
            self.file = Some(open(path)?);
            self.torn = false;
        }
        Ok(())
    }

    /// Reads from one of the container's streams once, and writes the lines that are whole.
    pub fn pump(&mut self, fd: impl AsFd, stream: Stream, buffers: &mut Buffers) -> Pumped {
        let held = self.held(stream);
        let length = held.len();
        // What is held is shorter than the buffer by far.
        if let Some(front) = buffers.input.get_mut(..length) {
            front.copy_from_slice(held);
        }
        let room = buffers.input.get_mut(length..).unwrap_or_default();
        let count = match rustix::io::read(fd, room) {
            Ok(0) => return Pumped::End,
            Ok(count) => count,
            Err(Errno::AGAIN | Errno::INTR) => return Pumped::Empty,
            // A pty's way to say that nobody has its other side open.
            Err(_) => return Pumped::End,
        };
        if self.file.is_some() {
            self.write_lines(stream, length + count, buffers);
        }
        Pumped::Data
    }

    /// Writes what is left of a line that will never end.
    pub fn finish(&mut self, stream: Stream, buffers: &mut Buffers) {
        let held = std::mem::take(self.held(stream));
        if held.is_empty() {
            return;
        }
        let mut batch = Batch::new(stream, &mut buffers.output);
        batch.push(b'P', &held);
        self.flush(&mut batch);
    }

    fn held(&mut self, stream: Stream) -> &mut Vec<u8> {
        match stream {
            Stream::Stdout => &mut self.stdout,
            Stream::Stderr => &mut self.stderr,
        }
    }

    fn write_lines(&mut self, stream: Stream, length: usize, buffers: &mut Buffers) {
        let mut rest = buffers.input.get(..length).unwrap_or_default();
        let mut batch = Batch::new(stream, &mut buffers.output);
        loop {
            let end = memchr::memchr(b'\n', rest);
            let line = end.and_then(|end| rest.get(..end)).unwrap_or(rest);
            let mut line = line;
            while let Some((part, more)) = line.split_at_checked(MAX_LINE)
                && !more.is_empty()
            {
                self.push(&mut batch, b'P', part);
                line = more;
            }
            let Some(end) = end else {
                let held = self.held(stream);
                held.clear();
                held.extend_from_slice(line);
                if line.is_empty() && held.capacity() > 256 {
                    *held = Vec::new();
                }
                break;
            };
            self.push(&mut batch, b'F', line);
            rest = rest.get(end + 1..).unwrap_or_default();
        }
        self.flush(&mut batch);
    }

    fn push(&mut self, batch: &mut Batch<'_>, tag: u8, line: &[u8]) {
        if !batch.fits(line) {
            self.flush(batch);
        }
        batch.push(tag, line);
    }

    /// Writes a batch. What can't be written is dropped and counted, and the count is the first
    /// thing that is written when writing works again: a full disk must not stop the container.
    fn flush(&mut self, batch: &mut Batch<'_>) {
        if batch.lines > 0
            && let Some(file) = self.file.as_mut()
        {
            if self.lost > 0 || self.torn {
                let notice = notice(self.torn, self.lost, self.reason);
                match write_whole(file, &notice) {
                    Ok(()) => (self.lost, self.torn) = (0, false),
                    Err(failed) => {
                        self.torn |= failed.torn;
                        self.lost += batch.lines;
                        batch.clear();
                        return;
                    }
                }
            }
            if let Err(failed) = write_whole(file, batch.output) {
                self.torn |= failed.torn;
                self.lost += batch.lines.saturating_sub(failed.lines);
                self.reason = Some(failed.errno);
            }
        }
        batch.clear();
    }
}

fn notice(torn: bool, lost: u64, reason: Option<Errno>) -> Vec<u8> {
    let mut line = Vec::new();
    if torn {
        line.push(b'\n');
    }
    if lost > 0 {
        line.extend_from_slice(Timestamp::now().text());
        let reason = reason.map_or(String::new(), |errno: Errno| {
            format!(": {}", kernel_said(&errno.into()))
        });
        let text = format!(" stderr F rrun-monitor: {lost} lines of this log are lost{reason}\n");
        line.extend_from_slice(text.as_bytes());
    }
    line
}

struct WriteFailed {
    errno: Errno,
    /// Whole lines that did get into the file.
    lines: u64,
    /// The part of a line that got there could not be taken back.
    torn: bool,
}

/// Writes all the bytes, or whole lines of them.
fn write_whole(file: &mut File, bytes: &[u8]) -> Result<(), WriteFailed> {
    let mut written = 0;
    let errno = loop {
        let rest = bytes.get(written..).unwrap_or_default();
        if rest.is_empty() {
            return Ok(());
        }
        match file.write(rest) {
            Ok(0) => break Errno::NOSPC,
            Ok(count) => written += count,
            Err(error) if error.kind() == std::io::ErrorKind::Interrupted => {}
            Err(error) => break Errno::from_io_error(&error).unwrap_or(Errno::IO),
        }
    };
    let done = bytes.get(..written).unwrap_or_default();
    let whole = memchr::memrchr(b'\n', done).map_or(0, |at| at + 1);
    let torn = written > whole && !take_back(file, (written - whole) as u64);
    Err(WriteFailed {
        errno,
        lines: memchr::memchr_iter(b'\n', done).count() as u64,
        torn,
    })
}

/// Cuts the last bytes off a file that only we append to.
fn take_back(file: &mut File, count: u64) -> bool {
    file.stream_position()
        .and_then(|end| file.set_len(end.saturating_sub(count)))
        .is_ok()
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
        output.clear();
        Batch {
            header,
            output,
            lines: 0,
        }
    }

    fn fits(&self, line: &[u8]) -> bool {
        self.output.len() + self.header.len() + line.len() < OUTPUT
    }

    fn push(&mut self, tag: u8, line: &[u8]) {
        self.header[38] = tag;
        self.output.extend_from_slice(&self.header);
        self.output.extend_from_slice(line);
        self.output.push(b'\n');
        self.lines += 1;
    }

    fn clear(&mut self) {
        self.output.clear();
        self.lines = 0;
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
        let mut buffers = Buffers::new();
        let mut log = Log::open(Some(dir.clone())).unwrap();
        let (read, write) = rustix::pipe::pipe().unwrap();
        for chunk in chunks {
            rustix::io::write(&write, chunk).unwrap();
            assert_eq!(log.pump(&read, Stream::Stdout, &mut buffers), Pumped::Data);
        }
        drop(write);
        assert_eq!(log.pump(&read, Stream::Stdout, &mut buffers), Pumped::End);
        log.finish(Stream::Stdout, &mut buffers);
        let text = std::fs::read_to_string(&dir).unwrap();
        std::fs::remove_file(&dir).unwrap();
        text.lines().map(|line| line[31..].to_owned()).collect()
    }

    #[test]
    fn timestamps_are_rfc_3339() {
        let text = |at| String::from_utf8(Timestamp::at(at).text().to_vec()).unwrap();
        assert_eq!(text(0), "1970-01-01T00:00:00.000000000Z");
        assert_eq!(
            text(1_709_210_096_000_000_007),
            "2024-02-29T12:34:56.000000007Z"
        );
        assert_eq!(
            text(4_102_444_799_999_999_999),
            "2099-12-31T23:59:59.999999999Z"
        );
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
        let mut line = vec![b'x'; MAX_LINE * 2 + 5];
        line.push(b'\n');
        let lines = written(&[&line[..100], &line[100..20_000], &line[20_000..]]);
        let part = "x".repeat(MAX_LINE);
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
        let mut line = vec![b'x'; MAX_LINE];
        line.push(b'\n');
        assert_eq!(
            written(&[&line]),
            [format!("stdout F {}", "x".repeat(MAX_LINE))]
        );
    }

    #[test]
    fn many_short_lines_fill_more_than_one_write() {
        let input = b"\n".repeat(INPUT);
        assert_eq!(written(&[&input]).len(), INPUT);
    }

    #[test]
    fn lost_lines_are_counted_where_the_log_goes_on() {
        let mut buffers = Buffers::new();
        let mut log = Log::open(Some("/dev/full".into())).unwrap();
        let (read, write) = rustix::pipe::pipe().unwrap();
        rustix::io::write(&write, b"a\nb\nc\n").unwrap();
        log.pump(&read, Stream::Stdout, &mut buffers);
        assert_eq!(log.lost, 3);
        let path = std::env::temp_dir().join(format!("rrun-lost-{}", std::process::id()));
        log.path = Some(path.clone());
        log.reopen().unwrap();
        rustix::io::write(&write, b"d\n").unwrap();
        log.pump(&read, Stream::Stdout, &mut buffers);
        let text = std::fs::read_to_string(&path).unwrap();
        std::fs::remove_file(&path).unwrap();
        let lines: Vec<_> = text.lines().map(|line| &line[31..]).collect();
        assert!(lines[0].starts_with("stderr F rrun-monitor: 3 lines of this log are lost: "));
        assert_eq!(lines[1], "stdout F d");
    }
}
