//! A process that keeps leases on files, see F_SETLEASE in fcntl(2).

use std::fs::File;
use std::os::fd::AsRawFd;
use std::time::Duration;

use nix::libc;

use super::InsideError;

/// The interval at which broken leases are taken again.
const INTERVAL: Duration = Duration::from_micros(300);

/// Runs `inside lease FILE…`, which keeps a write lease on each of these files that exists. Another
/// process that opens one of the files waits until the kernel breaks the lease. Prints `leased` when
/// the process has all leases for the first time.
pub(super) fn lease(paths: &[&str]) -> Result<(), InsideError> {
    // SAFETY: the call only changes how this process handles SIGIO. The kernel sends SIGIO when
    // another process opens one of the files, and the signal would end this process.
    unsafe { libc::signal(libc::SIGIO, libc::SIG_IGN) };
    let files: Vec<File> = paths.iter().flat_map(File::open).collect();
    let mut printed = false;
    loop {
        let taken = files.iter().filter(|file| {
            // SAFETY: this fcntl(2) has an integer as its argument, and uses no memory of this
            // process.
            let set = unsafe { libc::fcntl(file.as_raw_fd(), libc::F_SETLEASE, libc::F_WRLCK) };
            set == 0
        });
        if taken.count() == files.len() && !printed {
            super::say("leased")?;
            printed = true;
        }
        std::thread::sleep(INTERVAL);
    }
}
