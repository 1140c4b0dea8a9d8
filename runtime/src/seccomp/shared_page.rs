//! A page of shared memory. After a process has loaded its seccomp filter, it reports to rrun
//! through this page, without a system call.
//!
//! After a process has loaded its filter, only execve(2) is certain to be allowed. The smallest
//! profile with which runc and crun can start a program allows little more than execve(2). Any
//! other system call could fail, end the process, or wait for an agent that does not have the
//! listener yet. So the process sends the descriptor of a page of shared memory to rrun before it
//! loads the filter. The process writes two reports into the page: the number of the listener's
//! descriptor, and the reason why the program was not executed.

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

/// The size in bytes of the text in the shared page, including the final NUL.
const TEXT_BYTES: usize = 3072;

/// The content of the shared page. All bytes of the page are 0 at first.
#[repr(C)]
struct PageContent {
    /// The number of the listener's descriptor, or 0 before the process has loaded the filter. The
    /// listener itself never has the number 0, because descriptors 0 to 2 are always in use.
    listener: AtomicU32,
    /// rrun's answer to the process, which is 0 before rrun answers, and then [`TAKEN`] or
    /// [`REFUSED`].
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

/// The number of times that the process checks for rrun's answer. After this number of checks, the
/// process assumes that rrun is dead. The process cannot measure the time instead. Reading the
/// clock can require a system call, and the filter might not allow this call.
///
/// Each check of the page takes 10 to 50 nanoseconds. All checks together take 3 to 13 seconds of
/// processor time, but rrun needs only milliseconds to answer. Even on a busy machine, the
/// scheduler gives rrun these milliseconds while the process checks the page. Even if the process
/// has a real-time policy and shares one processor with rrun, the kernel leaves 50 milliseconds of
/// every second to other processes (sched_rt_runtime_us).
const ANSWER_CHECKS: u64 = 1 << 28;

/// The interval at which rrun checks whether the process has reported the listener's descriptor.
const LISTENER_CHECK_INTERVAL: Timespec = Timespec {
    tv_sec: 0,
    tv_nsec: 100_000,
};

/// The shared page, mapped into the process that will load the filter.
pub(crate) struct SharedPage {
    file: OwnedFd,
    content: &'static PageContent,
}

impl SharedPage {
    /// Creates the page. The caller must call this function before it sets the resource limits of
    /// the process. These limits can prevent the creation of the page.
    pub(crate) fn new() -> Result<SharedPage> {
        let doing = || "create the shared memory through which a process with a seccomp filter reports to rrun (memfd_create)";
        let flags = MemfdFlags::CLOEXEC | MemfdFlags::ALLOW_SEALING;
        let file = match rustix::fs::memfd_create("rrun", flags | MemfdFlags::NOEXEC_SEAL) {
            // Linux before 6.3 does not support MFD_NOEXEC_SEAL.
            Err(Errno::INVAL) => rustix::fs::memfd_create("rrun", flags),
            file => file,
        };
        let file = file.doing(doing)?;
        rustix::fs::ftruncate(&file, size_of::<PageContent>() as u64).doing(doing)?;
        // Another process in the same PID namespace can open the page's file through /proc. Without
        // the seals, that process could make the file shorter, and the next access to the page
        // would end this process with SIGBUS.
        let seals = SealFlags::SHRINK | SealFlags::GROW | SealFlags::SEAL;
        rustix::fs::fcntl_add_seals(&file, seals).doing(doing)?;
        let address = syscalls::map_shared(file.as_fd(), size_of::<PageContent>()).doing(doing)?;
        // SAFETY: the whole `PageContent` is mapped at `address`, which is aligned to a page, and
        // is never unmapped. Every bit pattern is a valid `PageContent`. Other processes can write
        // to the page at the same time, but all accesses are atomic.
        let content = unsafe { address.cast::<PageContent>().as_ref() };
        Ok(SharedPage { file, content })
    }

    /// Writes the program's path into the page, and sends the page's descriptor to rrun by calling
    /// `send`.
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

/// The shared page in the process that loads the filter, after rrun has received the page.
pub(crate) struct Reporter(&'static PageContent);

impl Reporter {
    /// Reports the listener's descriptor to rrun, and waits until the agent has the listener.
    /// Returns false if rrun is dead, or if rrun could not send the listener to the agent. If rrun
    /// could not send the listener, rrun itself reports the reason to its caller.
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

    /// Reports the error of a failed hook. After this report, the process does not execute its
    /// program.
    pub(crate) fn hook_failed(&self, error: &Error) {
        self.0.write(error.to_string().as_bytes());
        self.0.failure.store(HOOK_FAILED, Ordering::Release);
    }
}

const READ_PAGE: &str = "read the report of the process in the shared memory";

/// The shared page in the rrun process outside the container. This process reads and writes the
/// page through the page's file.
pub(crate) struct Report {
    file: File,
}

impl Report {
    pub(crate) fn new(page: OwnedFd) -> Report {
        Report { file: page.into() }
    }

    /// Returns a number in the page, or `None` if the number is 0.
    fn word(&self, offset: usize) -> Result<Option<u32>> {
        let mut word = [0; size_of::<u32>()];
        self.file
            .read_exact_at(&mut word, offset as u64)
            .doing(|| READ_PAGE)?;
        Ok(Some(u32::from_ne_bytes(word)).filter(|word| *word != 0))
    }

    /// Waits until the process has loaded its filter, and returns the number of the listener's
    /// descriptor in that process. Returns `None` if the process died or failed before it loaded
    /// the filter. `check` is called again and again, and can end the wait with an error.
    pub(crate) fn await_listener(
        &self,
        pidfd: &OwnedFd,
        mut check: impl FnMut() -> Result<()>,
    ) -> Result<Option<i32>> {
        loop {
            check()?;
            let mut process = [PollFd::new(pidfd, PollFlags::IN)];
            let dead =
                poll(&mut process, Some(&LISTENER_CHECK_INTERVAL)).is_ok_and(|dead| dead > 0);
            if let Some(number) = self.word(offset_of!(PageContent, listener))? {
                return Ok(Some(number as i32));
            }
            if dead || self.word(offset_of!(PageContent, failure))?.is_some() {
                return Ok(None);
            }
        }
    }

    /// Answers the process. If the agent has received the listener, `taken` is true, and the
    /// process continues. If `taken` is false, the process ends itself.
    ///
    /// # Errors
    /// Fails if rrun cannot write the answer. The process then ends itself after it has read
    /// `answer` [`ANSWER_CHECKS`] times.
    pub(crate) fn answer(&self, taken: bool) -> Result<()> {
        let word = if taken { TAKEN } else { REFUSED };
        let offset = offset_of!(PageContent, answer) as u64;
        self.file
            .write_all_at(&word.to_ne_bytes(), offset)
            .doing(|| "answer the process in the shared memory")
    }

    /// Reads the result that the process reported. The caller must first wait until the process has
    /// executed its program or died.
    ///
    /// # Errors
    /// Fails if a hook failed after the filter was loaded, or if the program could not be executed.
    pub(crate) fn verdict(&self) -> Result<()> {
        let Some(errno) = self.word(offset_of!(PageContent, failure))? else {
            return Ok(());
        };
        let mut text = [0; TEXT_BYTES];
        let offset = offset_of!(PageContent, text) as u64;
        let length = self.file.read_at(&mut text, offset).doing(|| READ_PAGE)?;
        let text = text
            .get(..length)
            .and_then(|it| it.split(|byte| *byte == 0).next());
        let text = String::from_utf8_lossy(text.unwrap_or_default());
        if errno == HOOK_FAILED {
            return Err(Error::new(text));
        }
        // rrun checks that the errno is in range, because rustix panics for any other number.
        // Another process can write any number into the page.
        let errno = i32::try_from(errno)
            .ok()
            .filter(|it| (1..4096).contains(it));
        let errno = errno.map_or(Errno::IO, Errno::from_raw_os_error);
        Err(not_executed(&text, errno, true))
    }
}
