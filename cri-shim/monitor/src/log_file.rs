//! A container's log file, and the thread that writes it.
//!
//! A file system can hang, for example because its disk is frozen or its file server does not
//! respond. A thread that writes to such a file system hangs, too, and no signal can interrupt the
//! thread. The event loop serves the whole pod. For this reason, the event loop never accesses a
//! log file, but stores lines in a mailbox of limited size. Each log has its own thread, which
//! writes the lines to the log's file. A log that hangs blocks only the output of its container.
//! While the thread is in a write(2), further lines can arrive. The thread writes all these lines
//! with its next write(2).

use std::fs::{File, OpenOptions};
use std::io::ErrorKind::AlreadyExists;
use std::io::{Seek, Write};
use std::os::fd::OwnedFd;
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use rustix::fs::{CWD, OFlags};
use rustix::io::Errno;

use super::timestamp::Timestamp;
use rrun_kernel::regular_file::{self, Unfit};

/// The number of waiting bytes at which the mailbox is full. While the mailbox is full, the event
/// loop does not read the container's output.
pub(crate) const MAX_PENDING_BYTES: usize = 256 << 10;

/// The capacity in bytes above which the log's thread frees an empty buffer.
const MAX_IDLE_CAPACITY: usize = 32 << 10;

/// The time for which [`LogFile::opened`] waits for the log's thread. The event loop does not serve
/// the pod meanwhile. On a busy node, the thread can need many milliseconds until it runs.
const OPEN_TIMEOUT: Duration = Duration::from_millis(100);

/// The stack size in bytes of the thread that writes the log. The thread needs little stack.
const STACK_BYTES: usize = 64 << 10;

/// The handle through which the monitor's event loop uses a container's log file. When the handle
/// is dropped, the log's thread writes the waiting lines and exits.
pub(crate) struct LogFile {
    shared: Arc<Shared>,
}

struct Shared {
    path: PathBuf,
    mailbox: Mutex<Mailbox>,
    work: Condvar,
    /// Notified when `opened` in the mailbox is set.
    is_opened: Condvar,
    /// The eventfd(2) through which the log's thread wakes the event loop.
    wake: Arc<OwnedFd>,
}

/// The state through which the event loop and the log's thread communicate.
#[derive(Default)]
struct Mailbox {
    /// Complete lines that wait to be written to the file.
    pending: Vec<u8>,
    lines: u64,
    reopen: bool,
    discard: bool,
    discarded: bool,
    close: bool,
    /// True while the log's thread waits for work.
    idle: bool,
    /// True if the event loop waits for the log's thread. The thread wakes the event loop when the
    /// thread is idle or the mailbox has room.
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
    /// Starts the log's thread, which opens the file. While the thread has not finished the
    /// requested work, functions such as [`LogFile::is_written`] and [`LogFile::reopened`] return
    /// false or `None`. When the thread has finished, it wakes the event loop through the eventfd
    /// `wake`. The event loop then calls the function again.
    pub(crate) fn open(path: PathBuf, wake: &Arc<OwnedFd>) -> std::io::Result<Self> {
        let shared = Arc::new(Shared {
            path,
            mailbox: Mutex::default(),
            work: Condvar::new(),
            is_opened: Condvar::new(),
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

    /// Returns the result of the first attempt to open the file. Usually the thread has already tried
    /// to open the file. Otherwise, this function waits for the thread. Returns `None` if the file
    /// system does not answer within [`OPEN_TIMEOUT`].
    pub(crate) fn opened(&self) -> Option<Result<(), Unfit>> {
        let is_opening = |mailbox: &mut Mailbox| mailbox.opened.is_none();
        let mailbox = self.shared.mailbox();
        let waited = self
            .shared
            .is_opened
            .wait_timeout_while(mailbox, OPEN_TIMEOUT, is_opening);
        waited.unwrap_or_else(PoisonError::into_inner).0.opened
    }

    /// Returns whether more lines can be appended. If the result is false, the log's thread wakes
    /// the event loop when the mailbox has room again.
    pub(crate) fn has_room(&self) -> bool {
        let mut mailbox = self.shared.mailbox();
        let room = mailbox.pending.len() < MAX_PENDING_BYTES;
        mailbox.wake_loop |= !room;
        room
    }

    /// Calls `fill`, which appends complete lines to the waiting bytes and returns the number of
    /// lines.
    pub(crate) fn append(&self, fill: impl FnOnce(&mut Vec<u8>) -> u64) {
        let mut mailbox = self.shared.mailbox();
        mailbox.lines += fill(&mut mailbox.pending);
        self.wake_writer(mailbox);
    }

    /// Requests that the log's thread opens the file at its path again. The thread first writes the
    /// waiting lines to the old file.
    pub(crate) fn reopen(&self) {
        let mut mailbox = self.shared.mailbox();
        mailbox.reopen = true;
        mailbox.reopened = None;
        mailbox.wake_loop = true;
        self.wake_writer(mailbox);
    }

    /// Returns the result of the last [`LogFile::reopen`]. Returns `None` until the log's thread
    /// has tried to reopen the file.
    pub(crate) fn reopened(&self) -> Option<Result<(), Unfit>> {
        let mut mailbox = self.shared.mailbox();
        mailbox.wake_loop |= mailbox.reopened.is_none();
        mailbox.reopened
    }

    /// Requests the removal of the file by the log's thread. The thread removes the file only if
    /// the file is empty and was created by this thread. An empty file must not remain: kubelet can
    /// derive a container's restart count from the names of the container's log files. If this
    /// handle is dropped before the removal, the file remains.
    pub(crate) fn discard(&self) {
        let mut mailbox = self.shared.mailbox();
        mailbox.discard = true;
        self.wake_writer(mailbox);
    }

    /// Returns whether the log's thread has completed the request of [`LogFile::discard`]. If the
    /// result is false, the thread wakes the event loop as soon as it has completed the request.
    pub(crate) fn is_discarded(&self) -> bool {
        let mut mailbox = self.shared.mailbox();
        mailbox.wake_loop |= !mailbox.discarded;
        mailbox.discarded
    }

    /// Returns whether all lines have been written to the file. If the result is false, the log's
    /// thread wakes the event loop after it has written all lines.
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
    let opened = writer.open_first(&shared.path);
    let mut batch = Vec::new();
    let mut mailbox = shared.mailbox();
    mailbox.opened = Some(opened);
    shared.is_opened.notify_all();
    loop {
        if !mailbox.pending.is_empty() || mailbox.reopen {
            std::mem::swap(&mut batch, &mut mailbox.pending);
            let lines = std::mem::take(&mut mailbox.lines);
            // The reopening must not wait until no line arrives any more. So it follows the lines
            // that waited at the time of the request.
            let reopen = std::mem::take(&mut mailbox.reopen);
            drop(mailbox);
            if !batch.is_empty() {
                writer.write(&batch, lines);
                batch.clear();
            }
            let reopened = reopen.then(|| writer.open(&shared.path));
            mailbox = shared.mailbox();
            mailbox.reopened = reopened.or(mailbox.reopened);
        } else if mailbox.discard {
            mailbox.discard = false;
            drop(mailbox);
            writer.discard(&shared.path);
            mailbox = shared.mailbox();
            mailbox.discarded = true;
        } else if writer.has_untried_notice() {
            drop(mailbox);
            writer.write_notice();
            mailbox = shared.mailbox();
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
                // The result of the write is ignored. The write fails only if the eventfd's 64-bit
                // counter overflows, which does not happen in practice.
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

/// The open file, and the number of lines that could not be written to it.
#[derive(Default)]
struct LogWriter {
    file: Option<File>,
    /// True if the thread's last open created the file. False if the file already existed.
    created: bool,
    /// The number of lines that have been lost since the last successful write.
    lost: u64,
    /// The reason for the last failure to open or write the file.
    reason: Option<Unfit>,
    /// True if the file ends with an incomplete line.
    torn: bool,
    /// True if the thread has tried to write a notice since the last line was lost.
    tried_notice: bool,
}

impl LogWriter {
    /// Opens the log for the first time. The CRI server creates the log's directory, but this thread
    /// can run before the directory exists. In this case, the thread creates the directory itself.
    fn open_first(&mut self, path: &Path) -> Result<(), Unfit> {
        let opened = self.open(path);
        if opened == Err(Errno::NOENT.into())
            && let Some(dir) = path.parent()
            && std::fs::create_dir_all(dir).is_ok()
        {
            return self.open(path);
        }
        opened
    }

    /// Opens the file. If opening fails, the old file remains in use. A pod can have write access
    /// to the log's directory. For this reason, the function opens only a regular file, and does
    /// not follow a symbolic link at the path.
    fn open(&mut self, path: &Path) -> Result<(), Unfit> {
        let mut opened = self.try_open(path);
        // `try_open` first tries to create the file. If the file exists, `try_open` then opens the
        // existing file. A log rotation between these two steps can move the file away, and
        // `try_open` then fails with ENOENT. The second attempt creates the file.
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
        // `create_new` refuses an existing file, such as a link or a device that a pod has created.
        // O_EXCL: the opened file is always new, so opening it by its path is safe.
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

    /// Writes a batch of lines. A full disk must not stop the container, so the function drops and
    /// counts lines that it cannot write. When writing works again, the function first writes a
    /// notice with the number of lost lines.
    fn write(&mut self, batch: &[u8], lines: u64) {
        self.write_notice();
        let Some(file) = self.file.as_mut().filter(|_| self.lost == 0 && !self.torn) else {
            self.lost += lines;
            return;
        };
        if let Err(failed) = write_whole(file, batch) {
            self.torn |= failed.torn;
            self.lost += lines.saturating_sub(failed.lines);
            self.reason = Some(failed.errno.into());
            self.tried_notice = false;
        }
    }

    /// Returns whether lines were lost and the thread has not tried to write a notice yet. The
    /// container may write no further line, so the notice does not wait for the next line.
    fn has_untried_notice(&self) -> bool {
        !self.tried_notice && (self.lost > 0 || self.torn)
    }

    /// Writes a notice with the number of lost lines, if lines were lost.
    fn write_notice(&mut self) {
        self.tried_notice = true;
        let Some(file) = self.file.as_mut().filter(|_| self.lost > 0 || self.torn) else {
            return;
        };
        let notice = notice(self.torn, self.lost, self.reason);
        match write_whole(file, &notice) {
            Ok(()) => (self.lost, self.torn) = (0, false),
            Err(failed) => self.torn |= failed.torn,
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
    /// The number of complete lines that were written to the file.
    lines: u64,
    /// True if the file ends with an incomplete line that the thread could not remove.
    torn: bool,
}

/// Writes all bytes to the file. If a write fails in the middle of a line, the function removes the
/// written part of this line from the file.
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

/// Removes the last `count` bytes of a file to which only this monitor appends. Returns whether the
/// removal succeeded.
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
    fn the_number_of_lost_lines_is_logged_before_the_next_line() {
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
    fn a_log_either_reports_why_it_cannot_be_opened_or_is_written() {
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
            // The eventfd becomes readable as soon as the log has been written.
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
    fn a_log_must_be_a_regular_file_and_not_a_symbolic_link() {
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
