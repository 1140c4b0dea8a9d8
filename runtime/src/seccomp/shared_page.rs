//! Memory through which a process under its filter reports to rrun without a system call.
//!
//! Between the load of a filter and execve(2), no other system call is certain to be allowed. The
//! least profile under which runc and crun start a program allows little more than execve(2). Any
//! other call may fail, end the process, or wait for an agent that does not have the listener yet.
//! So the process hands over a page of shared memory before it loads the filter. The page carries
//! two reports: the number of the listener's descriptor, and the reason why the program was not executed.

use std::ffi::CStr;
use std::fs::File;
use std::mem::offset_of;
use std::os::fd::{AsFd, AsRawFd as _, BorrowedFd, OwnedFd};
use std::os::unix::fs::FileExt as _;
use std::sync::atomic::{AtomicU8, AtomicU32, Ordering};

use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::fs::{MemfdFlags, SealFlags};
use rustix::io::Errno;

use crate::error::{Context, Error, Result};
use crate::process::not_executed;
use crate::sys::syscalls;

/// The most bytes of the text that the page carries, with a NUL at the end.
const TEXT_BYTES: usize = 3072;

/// The content of the page, which is all 0 at first.
#[repr(C)]
struct PageContent {
    /// The number of the listener's descriptor, which is never 0, 1 or 2.
    listener: AtomicU32,
    /// [`TAKEN`] or [`REFUSED`].
    answer: AtomicU32,
    /// The errno of execve(2), or [`HOOK_FAILED`].
    failure: AtomicU32,
    /// The program's path, or the error of a hook.
    text: [AtomicU8; TEXT_BYTES],
}

impl PageContent {
    fn write(&self, text: &[u8]) {
        let end = std::iter::once(&0);
        let text = text.iter().take(TEXT_BYTES - 1).chain(end);
        for (to, byte) in self.text.iter().zip(text) {
            to.store(*byte, Ordering::Relaxed);
        }
    }
}

const TAKEN: u32 = 1;
const REFUSED: u32 = 2;
const HOOK_FAILED: u32 = u32::MAX;

/// How often the process checks for the answer before it assumes that rrun is dead. It can't read
/// the clock instead: that may be a system call.
///
/// A check takes 10 to 50 nanoseconds, so this is 3 to 13 seconds of processor time. rrun needs
/// milliseconds. On a busy machine it gets them, because the scheduler gives both processes their
/// share while this one checks. Even if this one is real-time and both have one processor, the
/// kernel leaves the others 50 milliseconds of every second (sched_rt_runtime_us).
const ANSWER_CHECKS: u64 = 1 << 28;

/// How long rrun sleeps between two checks for the listener.
const LISTENER_CHECK_INTERVAL: Timespec = Timespec {
    tv_sec: 0,
    tv_nsec: 100_000,
};

/// The page, in the process that will be filtered.
pub(crate) struct SharedPage {
    file: OwnedFd,
    content: &'static PageContent,
}

impl SharedPage {
    /// Must be called before the limits of the process are set, because they may forbid it.
    pub(crate) fn new() -> Result<SharedPage> {
        let doing = || "make shared memory for the reports of a filtered process (memfd_create)";
        let flags = MemfdFlags::CLOEXEC | MemfdFlags::ALLOW_SEALING;
        let file = match rustix::fs::memfd_create("rrun", flags | MemfdFlags::NOEXEC_SEAL) {
            // Before Linux 6.3.
            Err(Errno::INVAL) => rustix::fs::memfd_create("rrun", flags),
            file => file,
        };
        let file = file.doing(doing)?;
        rustix::fs::ftruncate(&file, size_of::<PageContent>() as u64).doing(doing)?;
        // A process in the same PID namespace may open the file through /proc. If it made the file
        // shorter, an access to the page would end this process with SIGBUS.
        let seals = SealFlags::SHRINK | SealFlags::GROW | SealFlags::SEAL;
        rustix::fs::fcntl_add_seals(&file, seals).doing(doing)?;
        let address = syscalls::map_shared(file.as_fd(), size_of::<PageContent>()).doing(doing)?;
        // SAFETY: this many bytes are mapped there, aligned to a page, and are never unmapped. Any
        // value of them is valid. Others may write them meanwhile, but all accesses are atomic.
        let content = unsafe { address.cast::<PageContent>().as_ref() };
        Ok(SharedPage { file, content })
    }

    /// Writes the program's path into the page, and hands the page over with `send`.
    pub(crate) fn hand_over(
        self,
        program: &CStr,
        send: impl FnOnce(BorrowedFd<'_>) -> Result<()>,
    ) -> Result<Reporter> {
        self.content.write(program.to_bytes());
        send(self.file.as_fd())?;
        Ok(Reporter(self.content))
    }
}

impl AsFd for SharedPage {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.file.as_fd()
    }
}

/// The page in the process, once rrun has it as well.
pub(crate) struct Reporter(&'static PageContent);

impl Reporter {
    /// Reports the listener's descriptor to rrun, and waits until the agent has it. False: rrun
    /// failed to hand it over and reports the reason, or rrun is dead.
    pub(crate) fn await_agent(&self, listener: BorrowedFd<'_>) -> bool {
        let number = listener.as_raw_fd() as u32;
        self.0.listener.store(number, Ordering::Release);
        for _ in 0..ANSWER_CHECKS {
            match self.0.answer.load(Ordering::Acquire) {
                0 => std::hint::spin_loop(),
                answer => return answer == TAKEN,
            }
        }
        false
    }

    /// Reports why the program could not be executed.
    pub(crate) fn failed(&self, errno: Errno) {
        let number = errno.raw_os_error() as u32;
        self.0.failure.store(number, Ordering::Release);
    }

    /// Reports why the program is not executed at all.
    pub(crate) fn hook_failed(&self, error: &Error) {
        self.0.write(error.to_string().as_bytes());
        self.0.failure.store(HOOK_FAILED, Ordering::Release);
    }
}

/// The same page, in rrun outside the container.
pub(crate) struct Report {
    file: File,
}

impl Report {
    pub(crate) fn new(page: OwnedFd) -> Report {
        Report { file: page.into() }
    }

    fn word(&self, offset: usize) -> Option<u32> {
        let mut word = [0; size_of::<u32>()];
        self.file.read_exact_at(&mut word, offset as u64).ok()?;
        Some(u32::from_ne_bytes(word)).filter(|word| *word != 0)
    }

    /// Waits until the process has loaded its filter, and returns the number of its listener.
    /// `None`: the process died or failed before that.
    pub(crate) fn await_listener(&self, pidfd: &OwnedFd) -> Option<i32> {
        loop {
            let mut process = [PollFd::new(pidfd, PollFlags::IN)];
            let dead =
                poll(&mut process, Some(&LISTENER_CHECK_INTERVAL)).is_ok_and(|dead| dead > 0);
            if let Some(number) = self.word(offset_of!(PageContent, listener)) {
                return Some(number as i32);
            }
            if dead || self.word(offset_of!(PageContent, failure)).is_some() {
                return None;
            }
        }
    }

    /// Lets the process go on if the agent has the listener (`taken`); otherwise the process ends.
    pub(crate) fn answer(&self, taken: bool) {
        let word = if taken { TAKEN } else { REFUSED };
        // If this fails, the process gives up after a while.
        let offset = offset_of!(PageContent, answer) as u64;
        let _ = self.file.write_all_at(&word.to_ne_bytes(), offset);
    }

    /// The result, to be read once the process has executed its program or died.
    ///
    /// # Errors
    /// A hook failed under the filter, or the program could not be executed.
    pub(crate) fn verdict(&self) -> Result<()> {
        let Some(errno) = self.word(offset_of!(PageContent, failure)) else {
            return Ok(());
        };
        let mut text = [0; TEXT_BYTES];
        let offset = offset_of!(PageContent, text) as u64;
        let length = self.file.read_at(&mut text, offset).unwrap_or(0);
        let text = text
            .get(..length)
            .and_then(|it| it.split(|byte| *byte == 0).next());
        let text = String::from_utf8_lossy(text.unwrap_or_default());
        if errno == HOOK_FAILED {
            return Err(Error::new(text));
        }
        // Another process may have written the number, and rustix panics at one out of range.
        let errno = i32::try_from(errno)
            .ok()
            .filter(|it| (1..4096).contains(it));
        let errno = errno.map_or(Errno::IO, Errno::from_raw_os_error);
        Err(not_executed(&text, errno, true))
    }
}
