//! Decides whether the monitor delays its next read of the containers' output. A delayed read
//! returns more bytes.
//!
//! If small pieces of output arrive in quick succession, the monitor leaves the output in the
//! container's pipe for a moment. Without this delay, every line of the output would wake the
//! monitor and the log's thread.

use std::time::{Duration, Instant};

use rustix::event::Timespec;

use super::output::LARGE_READ_BYTES;

/// The monitor delays reading if two pieces of output arrive within less than this time.
const COALESCING_WINDOW: Duration = Duration::from_millis(1);

/// The time for which the monitor delays reading. A program that writes short lines cannot fill a
/// pipe in this time.
pub(crate) const COALESCING_DELAY: Timespec = Timespec {
    tv_sec: 0,
    tv_nsec: 250_000,
};

#[derive(Default)]
pub(crate) struct Coalescing {
    /// The largest number of bytes that one read returned in this round of the event loop. `None`
    /// if no stream was read.
    largest_read: Option<usize>,
    last_output: Option<Instant>,
}

impl Coalescing {
    /// Records that one read from a stream returned this many bytes.
    pub(crate) fn add_read(&mut self, bytes: usize) {
        self.largest_read = self.largest_read.max(Some(bytes));
    }

    /// Ends a round of the event loop. Returns whether the monitor delays reading output in the
    /// next round.
    pub(crate) fn end_round(&mut self) -> bool {
        let Some(bytes) = self.largest_read.take() else {
            return false;
        };
        let now = Instant::now();
        let last = self.last_output.replace(now);
        bytes < LARGE_READ_BYTES
            && last.is_some_and(|last| now.duration_since(last) < COALESCING_WINDOW)
    }
}
