//! What a process under its filter still says to rrun outside, without a system call.
//!
//! Between the load of a filter and execve(2) nothing is certain to be allowed: the least
//! profile under which runc and crun start a program allows little more than execve(2), and the
//! rest is refused, or the end of the process, or put to an agent that does not have the
//! listener yet. A page of shared memory, handed over before, carries the two things that are
//! left to say: which descriptor the listener is, and why the execution failed.

use std::ffi::CStr;
use std::fs::File;
use std::mem::offset_of;
use std::os::fd::{AsFd, AsRawFd as _, BorrowedFd, OwnedFd};
use std::os::unix::fs::FileExt as _;
use std::sync::atomic::{AtomicU8, AtomicU32, Ordering};

use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::fs::MemfdFlags;
use rustix::io::Errno;

use crate::error::{Context, Result};
use crate::process::not_executed;
use crate::syscalls;

/// The part of the program's path that is carried, with a NUL at its end.
const PATH_LIMIT: usize = 3072;

/// What lies in the page. All of it is 0 at first.
#[repr(C)]
struct Content {
    /// The descriptor's number, never one of the standard three.
    listener: AtomicU32,
    /// [`TAKEN`] or [`REFUSED`].
    answer: AtomicU32,
    /// The errno of execve(2).
    failure: AtomicU32,
    program: [AtomicU8; PATH_LIMIT],
}

const TAKEN: u32 = 1;
const REFUSED: u32 = 2;

/// How often the process looks for the answer, some ten nanoseconds apart, before it takes rrun
/// for dead. It can't ask for the time: where the clock is no memory of the kernel's, that is a
/// system call.
const PATIENCE: u64 = 1 << 31;

/// How long rrun sleeps between two looks for the listener.
const LOOK_AGAIN: Timespec = Timespec {
    tv_sec: 0,
    tv_nsec: 100_000,
};

/// The page, in the process that will be filtered.
pub struct SharedPage {
    file: OwnedFd,
    content: &'static Content,
}

impl SharedPage {
    /// To be made before the limits of the process are set, which may forbid it.
    pub fn new() -> Result<SharedPage> {
        let doing = || "make memory for a filtered process to report by (memfd_create)";
        let flags = MemfdFlags::CLOEXEC;
        let file = match rustix::fs::memfd_create("rrun", flags | MemfdFlags::NOEXEC_SEAL) {
            // Before Linux 6.3.
            Err(Errno::INVAL) => rustix::fs::memfd_create("rrun", flags),
            file => file,
        };
        let file = file.doing(doing)?;
        rustix::fs::ftruncate(&file, size_of::<Content>() as u64).doing(doing)?;
        let address = syscalls::map_shared(file.as_fd(), size_of::<Content>()).doing(doing)?;
        // SAFETY: so many bytes are mapped there, aligned to a page, and are never unmapped. Any
        // value of them is valid, and what others write meanwhile is seen by atomic accesses only.
        let content = unsafe { address.cast::<Content>().as_ref() };
        Ok(SharedPage { file, content })
    }

    /// Has `send` hand the page over.
    pub fn hand_over(
        self,
        program: &CStr,
        send: impl FnOnce(BorrowedFd<'_>) -> Result<()>,
    ) -> Result<Reporter> {
        let place = self.content.program.iter().take(PATH_LIMIT - 1);
        for (to, byte) in place.zip(program.to_bytes()) {
            to.store(*byte, Ordering::Relaxed);
        }
        send(self.file.as_fd())?;
        Ok(Reporter(self.content))
    }
}

impl AsFd for SharedPage {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.file.as_fd()
    }
}

/// The page when rrun has it.
pub struct Reporter(&'static Content);

impl Reporter {
    /// Tells rrun which descriptor the listener is, and waits until the agent has it. If not, rrun
    /// reports why, or is dead.
    pub fn await_agent(&self, listener: BorrowedFd<'_>) -> bool {
        let number = listener.as_raw_fd() as u32;
        self.0.listener.store(number, Ordering::Release);
        for _ in 0..PATIENCE {
            match self.0.answer.load(Ordering::Acquire) {
                0 => std::hint::spin_loop(),
                answer => return answer == TAKEN,
            }
        }
        false
    }

    /// Why the program could not be executed.
    pub fn failed(&self, errno: Errno) {
        let number = errno.raw_os_error() as u32;
        self.0.failure.store(number, Ordering::Release);
    }
}

/// The same page, outside.
pub struct Report {
    file: File,
}

impl Report {
    pub fn new(page: OwnedFd) -> Report {
        Report { file: page.into() }
    }

    fn word(&self, offset: usize) -> Option<u32> {
        let mut word = [0; size_of::<u32>()];
        self.file.read_exact_at(&mut word, offset as u64).ok()?;
        Some(u32::from_ne_bytes(word)).filter(|word| *word != 0)
    }

    /// Waits until the process has loaded its filter. `None` if it can't have done so any more.
    pub fn await_listener(&self, pidfd: &OwnedFd) -> Option<i32> {
        loop {
            let mut process = [PollFd::new(pidfd, PollFlags::IN)];
            let dead = poll(&mut process, Some(&LOOK_AGAIN)).is_ok_and(|dead| dead > 0);
            if let Some(number) = self.word(offset_of!(Content, listener)) {
                return Some(number as i32);
            }
            if dead || self.word(offset_of!(Content, failure)).is_some() {
                return None;
            }
        }
    }

    /// Lets the process go on, or not if the agent could not be given the listener.
    pub fn answer(&self, taken: bool) {
        let word = if taken { TAKEN } else { REFUSED };
        // A process that is not answered gives up.
        let offset = offset_of!(Content, answer) as u64;
        let _ = self.file.write_all_at(&word.to_ne_bytes(), offset);
    }

    /// Once the process has executed its program or died.
    ///
    /// # Errors
    /// Why the program could not be executed.
    pub fn verdict(&self) -> Result<()> {
        let Some(errno) = self.word(offset_of!(Content, failure)) else {
            return Ok(());
        };
        let mut path = [0; PATH_LIMIT];
        let offset = offset_of!(Content, program) as u64;
        let length = self.file.read_at(&mut path, offset).unwrap_or(0);
        let path = path
            .get(..length)
            .and_then(|it| it.split(|byte| *byte == 0).next());
        let path = String::from_utf8_lossy(path.unwrap_or_default());
        let errno = Errno::from_raw_os_error(errno as i32);
        Err(not_executed(&path, errno, true))
    }
}
