//! The host's /proc, through which the kernel is told of processes and parameters.
//!
//! What is written there decides what protects a container. A process that another container
//! shares a mount namespace with, or a race with one, may have put another file in the place of
//! the one that is meant (CVE-2025-52881): so /proc is made sure of to be the root of a procfs,
//! and nothing that is mounted inside it is ever entered.

use std::os::fd::OwnedFd;

use rustix::fs::{Mode, OFlags, ResolveFlags};
use rustix::io::Errno;

use crate::error::{Context, Result, refuse};

/// linux/magic.h
pub(crate) const PROC_SUPER_MAGIC: u64 = 0x9fa0;

/// linux/proc_fs.h, PROC_ROOT_INO
const ROOT_INODE: u64 = 1;

/// The root directory of a procfs.
pub(crate) struct Procfs(OwnedFd);

impl Procfs {
    /// The one at /proc.
    ///
    /// # Errors
    /// If that is no procfs, or a part of one.
    pub(crate) fn open() -> Result<Procfs> {
        let doing = || "open /proc";
        let flags = OFlags::PATH | OFlags::DIRECTORY | OFlags::NOFOLLOW | OFlags::CLOEXEC;
        let root = rustix::fs::open("/proc", flags, Mode::empty()).doing(doing)?;
        let is_procfs = rustix::fs::fstatfs(&root).doing(doing)?.f_type as u64 == PROC_SUPER_MAGIC;
        if !is_procfs || rustix::fs::fstat(&root).doing(doing)?.st_ino != ROOT_INODE {
            refuse!("open /proc: what is mounted there is not the kernel's own");
        }
        Ok(Procfs(root))
    }

    /// Opens a file by its path below /proc, for writing.
    pub(crate) fn for_writing(&self, path: &str) -> std::result::Result<OwnedFd, Errno> {
        // `self` is a link, but to a name beside it.
        rustix::fs::openat2(
            &self.0,
            path,
            OFlags::WRONLY | OFlags::CLOEXEC | OFlags::NOFOLLOW,
            Mode::empty(),
            ResolveFlags::BENEATH | ResolveFlags::NO_XDEV | ResolveFlags::NO_MAGICLINKS,
        )
    }

    /// Opens for reading the file that descriptor `number` of this process refers to. For an O_PATH
    /// descriptor, that is the file that was looked up, even if its path names another one by now.
    pub(crate) fn own_descriptor(&self, number: i32) -> std::result::Result<OwnedFd, Errno> {
        let directory = rustix::fs::openat2(
            &self.0,
            "thread-self/fd",
            OFlags::PATH | OFlags::DIRECTORY | OFlags::CLOEXEC,
            Mode::empty(),
            ResolveFlags::BENEATH | ResolveFlags::NO_XDEV | ResolveFlags::NO_MAGICLINKS,
        )?;
        // For a regular file O_NOCTTY has no effect, and O_NONBLOCK only avoids a wait for a
        // lease.
        let flags = OFlags::RDONLY | OFlags::NONBLOCK | OFlags::NOCTTY | OFlags::CLOEXEC;
        rustix::fs::openat(directory, number.to_string(), flags, Mode::empty())
    }

    /// Writes a file by its path below /proc with one write(2), as the kernel wants it.
    pub(crate) fn write(&self, path: &str, text: &str) -> std::result::Result<(), Errno> {
        let file = self.for_writing(path)?;
        match rustix::io::write(&file, text.as_bytes())? {
            length if length == text.len() => Ok(()),
            _ => Err(Errno::INVAL),
        }
    }
}

/// When a process was started, and whether it is a zombie; `None` if there is none.
pub(crate) fn process_stat(pid: i32) -> Result<Option<(u64, bool)>> {
    let path = format!("/proc/{pid}/stat");
    let mut buffer = [0u8; 1024];
    let read = rustix::fs::open(&path, OFlags::RDONLY | OFlags::CLOEXEC, Mode::empty())
        .and_then(|file| rustix::io::read(&file, &mut buffer));
    match read {
        Ok(length) => Ok(parse_stat(buffer.get(..length).unwrap_or_default())),
        Err(Errno::NOENT | Errno::SRCH) => Ok(None),
        Err(errno) => Err(errno).doing(|| format!("read {path}")),
    }
}

fn parse_stat(stat: &[u8]) -> Option<(u64, bool)> {
    // The second field is the program's name in parentheses, with anything in it.
    let after_name = stat.iter().rposition(|byte| *byte == b')')?;
    let mut fields = stat
        .get(after_name + 1..)?
        .trim_ascii()
        .split(|byte| *byte == b' ');
    let state = fields.next()?;
    let start_time = std::str::from_utf8(fields.nth(18)?).ok()?.parse().ok()?;
    Some((start_time, matches!(state, b"Z" | b"X" | b"x")))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_name_in_proc_stat_can_not_deceive() {
        let stat = b"7 (a) Z 1 ) S 1 7 7 0 -1 4194560 1 2 3 4 5 6 7 8 20 0 1 0 4242 9 9\n";
        assert_eq!(parse_stat(stat), Some((4242, false)));
        let own = process_stat(std::process::id() as i32).unwrap().unwrap();
        assert!(own.0 > 0 && !own.1);
        assert_eq!(process_stat(i32::MAX).unwrap(), None);
    }
}
