//! The descriptors that rrun inherits from its caller, and how rrun keeps them out of the container
//! (CVE-2024-21626).
//!
//! Suppose that a process enters a container with an open descriptor of a file on the host. The
//! path /proc/self/fd/N in the container then leads to that file. The fields `process.cwd` and
//! `process.args` and the symbolic links of the image can contain this path. The kernel resolves
//! the path long before execve(2) closes any descriptor, so close-on-exec is not enough. Before
//! rrun resolves the first path in the container, it therefore closes every descriptor that the
//! program must not have.
//!
//! rrun opens all its own descriptors close-on-exec. The descriptors that rrun inherited through
//! execve(2) are not marked close-on-exec. rrun lists the inherited descriptors at its start,
//! before it opens any file.

use std::os::fd::{AsRawFd, BorrowedFd};

use rustix::fs::{Mode, OFlags, RawDir};

use crate::error::{Context, Result, refuse};
use crate::sys::syscalls;

const OPEN_DESCRIPTORS: &str = "/proc/self/fd";

/// The lowest descriptor number after standard input, output and error.
const FIRST_INHERITED: u32 = 3;

/// The descriptors that rrun inherited from its caller, from 3 upwards. The program gets the first
/// `listen + preserve` descriptors, and must not get the others.
#[derive(Clone, Debug, Default)]
pub(crate) struct Descriptors {
    /// The number of sockets that the variable LISTEN_FDS announces (sd_listen_fds(3)).
    pub(crate) listen: u32,
    /// The number of additional descriptors that the program gets (the value of --preserve-fds).
    preserve: u32,
    /// The inherited descriptors that the program must not get, in ascending order.
    leaked: Vec<u32>,
}

/// Returns the numbers of the descriptors that rrun's caller left open, from 3 upwards in ascending
/// order. rrun must call this function before it opens any file. Otherwise, the list would contain
/// the descriptor of that file.
pub(crate) fn inherited() -> Result<Vec<u32>> {
    let doing = || format!("list the open descriptors in {OPEN_DESCRIPTORS}");
    // Since Linux 6.2, the size of the directory /proc/self/fd is the number of open descriptors,
    // and a size of 3 means that rrun inherited only the standard descriptors. On older kernels,
    // the size of the directory is 0.
    let size = rustix::fs::stat(OPEN_DESCRIPTORS).doing(doing)?.st_size;
    if size == i64::from(FIRST_INHERITED) {
        return Ok(Vec::new());
    }
    let flags = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::CLOEXEC;
    let directory = rustix::fs::open(OPEN_DESCRIPTORS, flags, Mode::empty()).doing(doing)?;
    let own = directory.as_raw_fd() as u32;
    let mut buffer = Vec::with_capacity(4096);
    let mut entries = RawDir::new(&directory, buffer.spare_capacity_mut());
    let mut numbers = Vec::new();
    while let Some(entry) = entries.next() {
        let entry = entry.doing(doing)?;
        let number: Option<u32> = entry
            .file_name()
            .to_str()
            .ok()
            .and_then(|it| it.parse().ok());
        numbers.extend(number.filter(|number| *number >= FIRST_INHERITED && *number != own));
    }
    numbers.sort_unstable();
    Ok(numbers)
}

/// Marks every inherited descriptor close-on-exec, so that hooks do not inherit these descriptors.
pub(crate) fn keep_from_hooks() -> Result<()> {
    syscalls::close_range_cloexec(FIRST_INHERITED).doing(|| "mark descriptors close-on-exec")
}

impl Descriptors {
    /// Divides the descriptors that rrun inherited into two groups: the descriptors that the
    /// program gets, and the descriptors that rrun's caller leaked. `inherited` contains the
    /// numbers of all inherited descriptors. Hooks on the host get no inherited descriptor.
    ///
    /// # Errors
    /// Fails if a descriptor that the program should get is not open. Without this check, rrun
    /// could later open a file with this descriptor number, and the program would get rrun's file.
    pub(crate) fn new(listen: u32, preserve: u32, mut inherited: Vec<u32>) -> Result<Descriptors> {
        let mut descriptors = Descriptors {
            listen,
            preserve,
            leaked: Vec::new(),
        };
        let first = descriptors.first_closed();
        let missing =
            (FIRST_INHERITED..first).find(|number| inherited.binary_search(number).is_err());
        if let Some(number) = missing {
            refuse!(
                "descriptor {number} cannot be preserved (--preserve-fds, LISTEN_FDS): it is not open"
            );
        }
        if !inherited.is_empty() {
            keep_from_hooks()?;
        }
        inherited.retain(|number| *number >= first);
        descriptors.leaked = inherited;
        Ok(descriptors)
    }

    /// Returns the lowest descriptor number that the program does not get.
    fn first_closed(&self) -> u32 {
        FIRST_INHERITED
            .saturating_add(self.listen)
            .saturating_add(self.preserve)
    }

    /// Closes the descriptors that rrun's caller leaked. A new process must call this function
    /// first. As soon as the new process exists, the container's other processes can reach its
    /// descriptors through /proc/PID/fd.
    pub(crate) fn close_leaked(&self) -> Result<()> {
        let adjacent = |a: &u32, b: &u32| b.checked_sub(1) == Some(*a);
        for range in self.leaked.chunk_by(adjacent) {
            if let (Some(first), Some(last)) = (range.first(), range.last()) {
                // SAFETY: rrun inherited these descriptors, so no value in this program owns them.
                unsafe { syscalls::close_range(*first, *last) }
                    .doing(|| "close the descriptors that rrun's caller leaked")?;
            }
        }
        Ok(())
    }

    /// Closes the calling process's descriptors. The exceptions are standard input, output and
    /// error, the descriptors that the program gets, and the descriptors in `kept`. execve(2) will
    /// close the descriptors in `kept`. After this call, the calling process has no other file of
    /// the host open.
    ///
    /// # Safety
    /// After this call, the caller must neither use nor drop a value that owns a closed descriptor.
    pub(crate) unsafe fn close_all_but(&self, kept: &[BorrowedFd<'_>]) -> Result<()> {
        let doing = || "close the descriptors that the container must not have";
        for number in FIRST_INHERITED..self.first_closed() {
            // SAFETY: rrun inherited this descriptor and never closes it.
            let fd = unsafe { BorrowedFd::borrow_raw(number as i32) };
            rustix::io::fcntl_setfd(fd, rustix::io::FdFlags::empty())
                .doing(|| format!("preserve descriptor {number}"))?;
        }
        let mut kept: Vec<u32> = kept.iter().map(|fd| fd.as_raw_fd() as u32).collect();
        kept.sort_unstable();
        let mut next = self.first_closed();
        for number in kept {
            if next < number {
                // SAFETY: the caller guarantees that no value that owns one of these descriptors
                // is used any more.
                unsafe { syscalls::close_range(next, number - 1) }.doing(doing)?;
            }
            next = number.saturating_add(1);
        }
        // SAFETY: the caller guarantees that no value that owns one of these descriptors is used
        // any more.
        unsafe { syscalls::close_range(next, u32::MAX) }.doing(doing)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_preserved_descriptor_must_be_open() {
        for inherited in [&[][..], &[4], &[3, 5]] {
            let error = Descriptors::new(1, 1, inherited.to_vec()).unwrap_err();
            assert!(error.to_string().contains("it is not open"), "{error}");
        }
    }
}
