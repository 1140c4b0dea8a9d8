//! Open descriptors, kept out of the container (CVE-2024-21626).
//!
//! A descriptor of the host that is open in a process on its way into a container has a name
//! there: /proc/self/fd/N. The kernel resolves that name in `process.cwd`, in `process.args` and
//! in every symbolic link of the image, long before execve(2) closes anything. Close-on-exec is
//! therefore not enough: rrun closes every descriptor that the program must not have before it
//! resolves the first path of the container.
//!
//! A descriptor that rrun inherited through execve(2) is not marked close-on-exec, and rrun marks
//! all of its own. rrun lists the inherited ones at its start, before it opens a file.

use std::os::fd::{AsRawFd, BorrowedFd};

use rustix::fs::{Mode, OFlags, RawDir};

use crate::error::{Context, Result, refuse};
use crate::sys::syscalls;

const OPEN_DESCRIPTORS: &str = "/proc/self/fd";

/// Standard input, output and error.
const FIRST_INHERITED: u32 = 3;

/// The descriptors of rrun's caller that the program gets beside the standard three, and those
/// that it must not get.
#[derive(Clone, Debug, Default)]
pub(crate) struct Descriptors {
    /// How many sockets LISTEN_FDS announces.
    pub(crate) listen: u32,
    /// How many further descriptors --preserve-fds requests.
    preserve: u32,
    /// All other descriptors that the caller left open, in ascending order.
    leaked: Vec<u32>,
}

/// The descriptors, other than the standard three, that rrun's caller left open, in ascending
/// order. Must be called before rrun opens a file of its own.
pub(crate) fn inherited() -> Result<Vec<u32>> {
    let doing = || format!("look at the open descriptors in {OPEN_DESCRIPTORS}");
    // Since Linux 6.2 the size is the number of open descriptors; before, it is 0.
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

/// Marks every inherited descriptor close-on-exec, so that hooks do not get it.
pub(crate) fn keep_from_hooks() -> Result<()> {
    syscalls::close_range_cloexec(FIRST_INHERITED).doing(|| "mark descriptors close-on-exec")
}

impl Descriptors {
    /// Separates the [`inherited`] descriptors that the program gets from the leaked ones. Hooks
    /// on the host get neither.
    ///
    /// # Errors
    /// A descriptor that the program should get is not open: a descriptor of rrun's own could
    /// take its number.
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
                "descriptor {number} can not be preserved (--preserve-fds, LISTEN_FDS): it is not open"
            );
        }
        if !inherited.is_empty() {
            keep_from_hooks()?;
        }
        inherited.retain(|number| *number >= first);
        descriptors.leaked = inherited;
        Ok(descriptors)
    }

    /// The first number that the program does not get.
    fn first_closed(&self) -> u32 {
        FIRST_INHERITED
            .saturating_add(self.listen)
            .saturating_add(self.preserve)
    }

    /// Closes what the caller leaked. A new process must do this first, because other processes of
    /// the container may see it as soon as it exists.
    pub(crate) fn close_leaked(&self) -> Result<()> {
        let adjacent = |a: &u32, b: &u32| b.checked_sub(1) == Some(*a);
        for range in self.leaked.chunk_by(adjacent) {
            if let (Some(first), Some(last)) = (range.first(), range.last()) {
                // SAFETY: rrun inherited these, so that nothing in this program owns them.
                unsafe { syscalls::close_range(*first, *last) }
                    .doing(|| "close the descriptors that rrun's caller leaked")?;
            }
        }
        Ok(())
    }

    /// Closes all descriptors but the standard three, those that the program gets, and `kept`,
    /// which execve(2) will close. Afterwards no file of the host is open in this process.
    ///
    /// # Safety
    /// Nothing that owns another descriptor may be used or dropped afterwards.
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
                // SAFETY: the caller guarantees that the owners are not used any more.
                unsafe { syscalls::close_range(next, number - 1) }.doing(doing)?;
            }
            next = number.saturating_add(1);
        }
        // SAFETY: as above.
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
