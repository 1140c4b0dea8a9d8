//! The numbers of open file descriptors and of sockets of a container's processes.
//!
//! The kernel needs time for each descriptor whose target the server reads, and a container can have
//! millions of descriptors. The server therefore limits the number of these reads for each pod.

use rustix::fs::{Dir, Mode, OFlags, open, readlinkat_raw};

/// The first bytes of the link in /proc/PID/fd that represents a socket, proc_pid_fd(5).
const SOCKET: &[u8; 7] = b"socket:";

/// The open descriptors of a container's processes. A field is `None` if its value is unknown
/// because of the limit.
#[derive(Debug, PartialEq, Eq)]
pub(super) struct OpenDescriptors {
    pub all: Option<u64>,
    pub sockets: Option<u64>,
}

impl OpenDescriptors {
    /// Counts the open descriptors of the processes. `left` is the number of descriptors whose
    /// targets the server can still read for the pod. This call blocks.
    pub(super) fn of(processes: &[i32], left: &mut u64) -> Self {
        let mut counted = OpenDescriptors {
            all: Some(0),
            sockets: Some(0),
        };
        for pid in processes {
            // O_DIRECTORY: only the kernel's directory is opened.
            let flags = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::CLOEXEC;
            let opened = open(format!("/proc/{pid}/fd"), flags, Mode::empty());
            // A process that has exited has no descriptors.
            if let Ok(dir) = opened.and_then(Dir::new) {
                counted.add(dir, left);
            }
        }
        counted
    }

    /// Adds the descriptors of a process.
    fn add(&mut self, dir: Dir, left: &mut u64) {
        // Since Linux 6.2, the size of /proc/PID/fd is the number of descriptors. Before, it is 0.
        let size = dir.stat().map_or(0, |stat| stat.st_size);
        let size = u64::try_from(size).unwrap_or_default();
        let counted = match self.sockets {
            Some(_) if size <= *left => read(dir, left),
            _ => None,
        };
        let known = counted.map(|(all, _)| all).or((size > 0).then_some(size));
        let sum = |total: Option<u64>, more: Option<u64>| Some(total? + more?);
        self.all = sum(self.all, known);
        self.sockets = sum(self.sockets, counted.map(|(_, sockets)| sockets));
    }
}

/// Returns the number of descriptors and the number of sockets of a process. Returns `None` if the
/// process has more than `left` descriptors. Subtracts the number of descriptors from `left`.
fn read(mut dir: Dir, left: &mut u64) -> Option<(u64, u64)> {
    let (mut all, mut sockets) = (0, 0);
    while let Some(entry) = dir.read() {
        // The process has exited.
        let Ok(entry) = entry else { break };
        if entry.file_name().to_bytes().starts_with(b".") {
            continue;
        }
        *left = left.checked_sub(1)?;
        all += 1;
        let mut target = [0_u8; SOCKET.len()];
        let read = dir
            .fd()
            .and_then(|fd| readlinkat_raw(fd, entry.file_name(), &mut target));
        sockets += u64::from(read.is_ok() && target == *SOCKET);
    }
    Some((all, sockets))
}

#[cfg(test)]
mod tests {
    use std::os::unix::net::UnixStream;

    use super::*;

    /// Returns the descriptors of the test's process, and the number of descriptors that were read.
    fn own(limit: u64) -> (OpenDescriptors, u64) {
        let mut left = limit;
        let own = i32::try_from(std::process::id()).unwrap_or(0);
        let counted = OpenDescriptors::of(&[own, own], &mut left);
        (counted, limit - left)
    }

    #[test]
    fn descriptors_are_counted_up_to_the_limit() -> std::io::Result<()> {
        let sockets: std::io::Result<Vec<_>> = (0..50).map(|_| UnixStream::pair()).collect();
        let sockets = sockets?;
        let (counted, read) = own(1_000_000);
        assert!(
            counted.sockets.is_some_and(|count| count >= 200),
            "{counted:?}"
        );
        assert_eq!(counted.all, Some(read));
        let (counted, read) = own(120);
        assert_eq!(counted.sockets, None);
        assert!(read <= 120, "{read} descriptors were read");
        // Only Linux 6.2 and later report the number of descriptors without this limit.
        assert!(counted.all.is_none_or(|count| count >= 200), "{counted:?}");
        drop(sockets);
        Ok(())
    }
}
