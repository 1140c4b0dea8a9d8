//! A container's log file, and the thread that writes it.
//!
//! A file system can hang (a frozen disk, a server that does not answer), and whoever writes to it
//! hangs, past every signal. The loop that looks after the whole pod therefore never touches a
//! log's file: it leaves lines here, as many as there is room for, and a thread of the log's own
//! writes them. A log that hangs stalls its container's output and nothing else. Lines that come
//! while the thread writes go with its next write(2), all at once.

use std::fs::{File, OpenOptions};
use std::io::ErrorKind::AlreadyExists;
use std::io::{Seek, Write};
use std::os::fd::OwnedFd;
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};

use rustix::fs::{CWD, OFlags};
use rustix::io::Errno;

use super::timestamp::Timestamp;
use rrun_kernel::regular_file::{self, Unfit};

/// Bytes that may wait for the file; beyond that the container's pipes are not read.
const MAX_PENDING_BYTES: usize = 256 << 10;

/// A buffer with a larger capacity than this, in bytes, goes back to the heap when it is empty.
const MAX_IDLE_CAPACITY: usize = 32 << 10;

/// The thread's stack; it calls little.
const STACK_BYTES: usize = 64 << 10;

/// The loop's side of a log's file. When it is dropped the thread writes what waits, and ends.
pub(crate) struct LogFile {
    shared: Arc<Shared>,
}

struct Shared {
    path: PathBuf,
    mailbox: Mutex<Mailbox>,
    work: Condvar,
    /// An eventfd(2) that the loop waits for.
    wake: Arc<OwnedFd>,
}

/// What the two sides leave for each other.
#[derive(Default)]
struct Mailbox {
    /// Whole lines for the file.
    pending: Vec<u8>,
    lines: u64,
    reopen: bool,
    discard: bool,
    discarded: bool,
    close: bool,
    /// The thread has nothing to do and waits.
    idle: bool,
    /// The loop wants to be woken when the thread is done with something.
    wake_loop: bool,
    opened: Option<Result<(), Unfit>>,
    reopened: Option<Result<(), Unfit>>,
}

impl Shared {
    fn mailbox(&self) -> MutexGuard<'_, Mailbox> {
        self.mailbox.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl LogFile {
    /// Starts the thread, which opens the file. `wake` is written to when something is done that
    /// the loop has been refused before.
    pub(crate) fn open(path: PathBuf, wake: &Arc<OwnedFd>) -> std::io::Result<Self> {
        let shared = Arc::new(Shared {
            path,
            mailbox: Mutex::default(),
            work: Condvar::new(),
            wake: Arc::clone(wake),
        });
        let for_writer = Arc::clone(&shared);
        std::thread::Builder::new()
            .name("log".into())
            .stack_size(STACK_BYTES)
            .spawn(move || write_loop(&for_writer))?;
        Ok(LogFile { shared })
    }

    pub(crate) fn path(&self) -> &Path {
        &self.shared.path
    }

    /// Whether the file could be opened at first; `None` while that is under way.
    pub(crate) fn opened(&self) -> Option<Result<(), Unfit>> {
        self.shared.mailbox().opened
    }

    /// Whether more may come. If not, the loop is woken when it may.
    pub(crate) fn has_room(&self) -> bool {
        let mut mailbox = self.shared.mailbox();
        let room = mailbox.pending.len() < MAX_PENDING_BYTES;
        mailbox.wake_loop |= !room;
        room
    }

    /// Lets `fill` append whole lines to what waits; it gives their number.
    pub(crate) fn append(&self, fill: impl FnOnce(&mut Vec<u8>) -> u64) {
        let mut mailbox = self.shared.mailbox();
        mailbox.lines += fill(&mut mailbox.pending);
        self.wake_writer(mailbox);
    }

    /// Has the file opened again at its path once what waits is written.
    pub(crate) fn reopen(&self) {
        let mut mailbox = self.shared.mailbox();
        mailbox.reopen = true;
        mailbox.reopened = None;
        mailbox.wake_loop = true;
        self.wake_writer(mailbox);
    }

    /// What came of [`LogFile::reopen`]; `None` while that is under way.
    pub(crate) fn reopened(&self) -> Option<Result<(), Unfit>> {
        let mut mailbox = self.shared.mailbox();
        mailbox.wake_loop |= mailbox.reopened.is_none();
        mailbox.reopened
    }

    /// Has the file removed if it was made for this log and nothing is in it: kubelet counts a
    /// container's attempts by its logs. Never mind if this is dropped before.
    pub(crate) fn discard(&self) {
        let mut mailbox = self.shared.mailbox();
        mailbox.discard = true;
        self.wake_writer(mailbox);
    }

    /// Whether [`LogFile::discard`] has been done. If not, the loop is woken when it is.
    pub(crate) fn is_discarded(&self) -> bool {
        let mut mailbox = self.shared.mailbox();
        mailbox.wake_loop |= !mailbox.discarded;
        mailbox.discarded
    }

    /// Whether all is in the file. If not, the loop is woken when it is.
    pub(crate) fn is_written(&self) -> bool {
        let mut mailbox = self.shared.mailbox();
        let written = mailbox.idle && mailbox.pending.is_empty() && !mailbox.reopen;
        mailbox.wake_loop |= !written;
        written
    }

    fn wake_writer(&self, mailbox: MutexGuard<'_, Mailbox>) {
        let idle = mailbox.idle;
        drop(mailbox);
        if idle {
            self.shared.work.notify_one();
        }
    }
}

impl Drop for LogFile {
    fn drop(&mut self) {
        let mut mailbox = self.shared.mailbox();
        mailbox.close = true;
        mailbox.discard = false;
        self.wake_writer(mailbox);
    }
}

fn write_loop(shared: &Shared) {
    let mut writer = LogWriter::default();
    let mut opened = writer.open(&shared.path);
    // The server makes the log's directory, and perhaps is at it now.
    if opened == Err(Errno::NOENT.into())
        && let Some(dir) = shared.path.parent()
        && std::fs::create_dir_all(dir).is_ok()
    {
        opened = writer.open(&shared.path);
    }
    let mut batch = Vec::new();
    let mut mailbox = shared.mailbox();
    mailbox.opened = Some(opened);
    loop {
        if !mailbox.pending.is_empty() {
            std::mem::swap(&mut batch, &mut mailbox.pending);
            let lines = std::mem::take(&mut mailbox.lines);
            drop(mailbox);
            writer.write(&batch, lines);
            batch.clear();
            mailbox = shared.mailbox();
        } else if mailbox.reopen {
            mailbox.reopen = false;
            drop(mailbox);
            let reopened = writer.open(&shared.path);
            mailbox = shared.mailbox();
            mailbox.reopened = Some(reopened);
        } else if mailbox.discard {
            mailbox.discard = false;
            drop(mailbox);
            writer.discard(&shared.path);
            mailbox = shared.mailbox();
            mailbox.discarded = true;
        } else if mailbox.close {
            return;
        } else {
            for buffer in [&mut batch, &mut mailbox.pending] {
                if buffer.capacity() > MAX_IDLE_CAPACITY {
                    *buffer = Vec::new();
                }
            }
            mailbox.idle = true;
            if std::mem::take(&mut mailbox.wake_loop) {
                // The counter of an eventfd does not fill up by ones.
                let _ = rustix::io::write(&shared.wake, &1_u64.to_ne_bytes());
            }
            mailbox = shared
                .work
                .wait(mailbox)
                .unwrap_or_else(PoisonError::into_inner);
            mailbox.idle = false;
        }
        if mailbox.pending.len() < MAX_PENDING_BYTES && mailbox.wake_loop {
            mailbox.wake_loop = false;
            let _ = rustix::io::write(&shared.wake, &1_u64.to_ne_bytes());
        }
    }
}

/// The file, and what did not get into it.
#[derive(Default)]
struct LogWriter {
    file: Option<File>,
    /// There was no file at the path before.
    created: bool,
    /// Lines that could not be written since the last that could, and why.
    lost: u64,
    reason: Option<Unfit>,
    /// Half a line stands at the end of the file.
    torn: bool,
}

impl LogWriter {
    /// Opens the file; if that fails, the old one stays in use. A pod may be able to write to the
    /// directory, so this does not follow a link at the path, and opens only a regular file.
    fn open(&mut self, path: &Path) -> Result<(), Unfit> {
        let mut opened = self.try_open(path);
        // The file existed at the first open and was gone at the second: it was rotated.
        if opened
            .as_ref()
            .is_err_and(|unfit| *unfit == Errno::NOENT.into())
        {
            opened = self.try_open(path);
        }
        match opened {
            Ok(file) => {
                self.file = Some(file);
                self.torn = false;
                Ok(())
            }
            Err(unfit) => {
                self.reason = Some(unfit);
                Err(unfit)
            }
        }
    }

    fn try_open(&mut self, path: &Path) -> Result<File, Unfit> {
        // Ours: `create_new` opens only a file that this call makes.
        let created = OpenOptions::new()
            .append(true)
            .mode(0o640)
            .create_new(true)
            .open(path);
        self.created = created.is_ok();
        match created {
            Err(error) if error.kind() == AlreadyExists => {
                regular_file::open_at(CWD, path, OFlags::WRONLY | OFlags::APPEND, false)
            }
            created => {
                created.map_err(|error| Errno::from_io_error(&error).unwrap_or(Errno::IO).into())
            }
        }
    }

    fn discard(&mut self, path: &Path) {
        let file = self.file.take().filter(|_| self.created);
        let length = file
            .and_then(|file| file.metadata().ok())
            .map(|it| it.len());
        if length == Some(0) {
            let _ = std::fs::remove_file(path);
        }
    }

    /// Writes a batch. What can't be written is dropped and counted, and the count is the first
    /// thing that is written when writing works again: a full disk must not stop the container.
    fn write(&mut self, batch: &[u8], lines: u64) {
        let Some(file) = self.file.as_mut() else {
            self.lost += lines;
            return;
        };
        if self.lost > 0 || self.torn {
            let notice = notice(self.torn, self.lost, self.reason);
            match write_whole(file, &notice) {
                Ok(()) => (self.lost, self.torn) = (0, false),
                Err(failed) => {
                    self.torn |= failed.torn;
                    self.lost += lines;
                    return;
                }
            }
        }
        if let Err(failed) = write_whole(file, batch) {
            self.torn |= failed.torn;
            self.lost += lines.saturating_sub(failed.lines);
            self.reason = Some(failed.errno.into());
        }
    }
}

fn notice(torn: bool, lost: u64, reason: Option<Unfit>) -> Vec<u8> {
    let mut line = Vec::new();
    if torn {
        line.push(b'\n');
    }
    if lost > 0 {
        line.extend_from_slice(Timestamp::now().text());
        let reason = reason.map_or(String::new(), |unfit| format!(": {unfit}"));
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

#[cfg(test)]
mod tests {
    use rustix::fs::FileType;

    use super::*;

    #[test]
    fn lost_lines_are_counted_where_the_log_goes_on() {
        let full = OpenOptions::new().append(true).open("/dev/full").unwrap();
        let mut writer = LogWriter {
            file: Some(full),
            ..LogWriter::default()
        };
        writer.write(b"a\nb\nc\n", 3);
        assert_eq!(writer.lost, 3);
        let path = std::env::temp_dir().join(format!("rrun-lost-{}", std::process::id()));
        writer.open(&path).unwrap();
        writer.write(b"d\n", 1);
        let text = std::fs::read_to_string(&path).unwrap();
        std::fs::remove_file(&path).unwrap();
        let mut lines = text.lines();
        let notice = lines.next().unwrap().get(31..).unwrap_or_default();
        assert!(notice.starts_with("stderr F rrun-monitor: 3 lines of this log are lost: "));
        assert_eq!(lines.next(), Some("d"));
    }

    #[test]
    fn a_log_that_can_not_be_opened_says_why_and_one_that_can_is_written() {
        let wake =
            Arc::new(rustix::event::eventfd(0, rustix::event::EventfdFlags::CLOEXEC).unwrap());
        let opened = |file: &LogFile| loop {
            if let Some(opened) = file.opened() {
                break opened;
            }
            std::thread::yield_now();
        };
        let file = LogFile::open("/proc/self/comm/log".into(), &wake).unwrap();
        assert_eq!(opened(&file), Err(Errno::NOTDIR.into()));

        let dir = std::env::temp_dir().join(format!("rrun-log-file-{}", std::process::id()));
        let path = dir.join("made-for-it/log");
        let file = LogFile::open(path.clone(), &wake).unwrap();
        assert_eq!(opened(&file), Ok(()));
        file.append(|pending| {
            pending.extend_from_slice(b"one\n");
            1
        });
        while !file.is_written() {
            // The eventfd is written to as soon as it is.
            rustix::io::read(&wake, &mut [0_u8; 8]).unwrap();
        }
        assert_eq!(std::fs::read(&path).unwrap(), b"one\n");
        std::fs::remove_file(&path).unwrap();
        file.reopen();
        while file.reopened().is_none() {
            rustix::io::read(&wake, &mut [0_u8; 8]).unwrap();
        }
        assert_eq!(file.reopened(), Some(Ok(())));
        assert_eq!(std::fs::read(&path).unwrap(), b"");
        std::fs::remove_dir_all(&dir).unwrap();
    }

    #[test]
    fn a_log_is_a_regular_file_and_no_link_to_one() {
        let dir = std::env::temp_dir().join(format!("rrun-log-kinds-{}", std::process::id()));
        std::fs::create_dir_all(&dir).unwrap();
        let path = dir.join("log");
        let mut writer = LogWriter::default();
        std::fs::write(dir.join("other"), "").unwrap();
        std::os::unix::fs::symlink("other", &path).unwrap();
        assert_eq!(writer.open(&path), Err(Unfit::Kind(FileType::Symlink)));
        assert_eq!(
            writer.open(Path::new("/dev/full")),
            Err(Unfit::Kind(FileType::CharacterDevice))
        );
        assert_eq!(writer.open(&dir.join("other")), Ok(()));
        writer.write(b"a\n", 1);
        assert_eq!(std::fs::read(dir.join("other")).unwrap(), b"a\n");
        std::fs::remove_dir_all(&dir).unwrap();
    }
}
