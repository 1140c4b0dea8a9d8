//! What the monitor asks of a container's cgroup: is it empty, kill it, how often did memory
//! run out (cgroups(7), the kernel's cgroup-v2.rst).

use std::fs::File;
use std::io::ErrorKind;
use std::os::fd::{AsFd, BorrowedFd};
use std::os::unix::fs::FileExt;
use std::path::Path;

use rustix::process::Signal;

/// How deep below the container's cgroup we look: cgroups that the container made.
const MAX_DEPTH: u32 = 16;

/// Is any process in the cgroup or below it? A cgroup that is not there has none.
pub(crate) fn populated(cgroup: &Path) -> bool {
    std::fs::read_to_string(cgroup.join("cgroup.events"))
        .is_ok_and(|events| events.lines().any(|line| line == "populated 1"))
}

/// Kills every process in the cgroup and below, at once and with no way out by forking.
pub(crate) fn kill(cgroup: &Path) -> std::io::Result<()> {
    match std::fs::write(cgroup.join("cgroup.kill"), "1") {
        Err(error) if error.kind() != ErrorKind::NotFound => Err(error),
        _ => Ok(()),
    }
}

/// Removes the cgroup and those below it. It need not be there; its processes must be gone.
pub(crate) fn remove(cgroup: &Path) -> std::io::Result<()> {
    remove_below(cgroup, 0)
}

fn remove_below(cgroup: &Path, depth: u32) -> std::io::Result<()> {
    match std::fs::remove_dir(cgroup) {
        Err(error) if error.kind() == ErrorKind::NotFound => return Ok(()),
        Err(error) if depth >= MAX_DEPTH => return Err(error),
        Err(_) => {}
        Ok(()) => return Ok(()),
    }
    for entry in std::fs::read_dir(cgroup)?.flatten() {
        if entry.file_type().is_ok_and(|kind| kind.is_dir()) {
            remove_below(&entry.path(), depth + 1)?;
        }
    }
    std::fs::remove_dir(cgroup)
}

/// A signal's number, real-time signals included, if the kernel knows it.
pub(crate) fn known_signal(signal: i32) -> Option<Signal> {
    if !(1..=64).contains(&signal) {
        return None;
    }
    // SAFETY: the number is one of the kernel's, and nothing of ours waits for signals by the
    // real-time numbers that the C library keeps to itself.
    Some(unsafe { Signal::from_raw_unchecked(signal) })
}

/// `oom_kill` in memory.events: how often the kernel has killed in this cgroup for want of
/// memory. The file stays open, since the count must be read after the last process is gone.
pub(crate) struct OomCount {
    events: File,
    seen: u64,
}

impl OomCount {
    /// None where the memory controller is not enabled.
    pub(crate) fn open(cgroup: &Path) -> Option<Self> {
        let events = File::open(cgroup.join("memory.events")).ok()?;
        Some(OomCount { events, seen: 0 })
    }

    /// Has the kernel killed since this was last asked? Fails when the cgroup is gone.
    pub(crate) fn rose(&mut self) -> std::io::Result<bool> {
        let mut text = [0; 512];
        let count = self.events.read_at(&mut text, 0)?;
        let kills = text
            .get(..count)
            .and_then(|text| std::str::from_utf8(text).ok())
            .and_then(|text| text.lines().find_map(|line| line.strip_prefix("oom_kill ")))
            .and_then(|number| number.trim().parse().ok())
            .unwrap_or(self.seen);
        let rose = kills > self.seen;
        self.seen = kills;
        Ok(rose)
    }
}

/// The kernel says `POLLPRI` when the file's content has changed since it was read.
impl AsFd for OomCount {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.events.as_fd()
    }
}
