//! The lines that one port-forward session writes to the log. A client or a program in the pod can
//! cause a line for each stream, so the number of lines is limited.

use std::fmt::Arguments;
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use rrun_calls::lock::lock;

/// The maximum number of lines in [`INTERVAL`].
const MAX_LINES: usize = 10;

const INTERVAL: Duration = Duration::from_secs(60);

pub(super) struct SessionLog {
    pod: String,
    recent: Mutex<Recent>,
}

struct Recent {
    begin: Instant,
    lines: usize,
}

impl SessionLog {
    pub(super) fn new(pod: &str) -> Arc<Self> {
        Arc::new(SessionLog {
            pod: pod.to_owned(),
            recent: Mutex::new(Recent {
                begin: Instant::now(),
                lines: 0,
            }),
        })
    }

    pub(super) fn add(&self, sentence: Arguments<'_>) {
        let count = self.count(Instant::now());
        if count <= MAX_LINES {
            log::info!("pod {}: {sentence}", self.pod);
        }
        if count == MAX_LINES {
            log::info!(
                "pod {}: the server logs no more lines about this port-forward session within {} s",
                self.pod,
                INTERVAL.as_secs()
            );
        }
    }

    /// Returns the number of lines in the current interval, including the next line.
    fn count(&self, now: Instant) -> usize {
        let mut recent = lock(&self.recent);
        if now.duration_since(recent.begin) >= INTERVAL {
            recent.begin = now;
            recent.lines = 0;
        }
        recent.lines = recent.lines.saturating_add(1);
        recent.lines
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_session_can_log_again_after_a_minute() {
        let log = SessionLog::new("pod");
        let now = Instant::now();
        let counts: Vec<usize> = (0..MAX_LINES + 2).map(|_| log.count(now)).collect();
        assert_eq!(counts.last(), Some(&(MAX_LINES + 2)));
        assert_eq!(log.count(now + INTERVAL * 2), 1);
    }
}
