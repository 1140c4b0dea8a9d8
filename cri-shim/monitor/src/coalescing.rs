//! Whether output that comes next waits for more, to be read with it.
//!
//! Output that comes in small pieces soon after each other is left in its pipe for a moment, so
//! that a program that writes line by line does not wake us, and the thread that writes the log,
//! for every line.

use std::time::{Duration, Instant};

use rustix::event::Timespec;

use super::output::LARGE_READ_BYTES;

/// Pieces that come sooner than this after each other are worth the wait.
const COALESCING_WINDOW: Duration = Duration::from_millis(1);

/// How long output waits. A pipe is not filled in this time by a program that writes short lines.
pub(crate) const COALESCING_DELAY: Timespec = Timespec {
    tv_sec: 0,
    tv_nsec: 250_000,
};

#[derive(Default)]
pub(crate) struct Coalescing {
    /// The most bytes that a stream has given in this round of the loop, if any has.
    largest_read: Option<usize>,
    last_output: Option<Instant>,
}

impl Coalescing {
    /// A stream has given this many bytes.
    pub(crate) fn add_read(&mut self, bytes: usize) {
        self.largest_read = self.largest_read.max(Some(bytes));
    }

    /// Whether output is to wait in the next round of the loop.
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
