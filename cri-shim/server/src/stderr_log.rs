//! The log on standard error, which systemd forwards to the journal.
//!
//! Clients, pods and registries can cause many lines. The journal accepts only a limited number of
//! lines from a service, and would drop the other lines of the server, too. The number of lines
//! from each place in the code is therefore limited.

use std::collections::HashMap;
use std::fmt::Write as _;
use std::io::Write as _;
use std::sync::Mutex;
use std::sync::atomic::{AtomicU32, Ordering};
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

use log::{Level, LevelFilter, Log, Metadata, Record};
use rrun_calls::lock::lock;
use rrun_kernel::date::DateTime;

/// The interval for which [`set_max_lines`] sets the maximum number of lines.
const INTERVAL: Duration = Duration::from_secs(10);

/// The maximum number of bytes of a line. Longer lines are cut.
const MAX_LINE_BYTES: usize = 6 << 10;

/// The maximum number of lines from one place in the code per [`INTERVAL`]. 0 disables the limit.
static MAX_LINES: AtomicU32 = AtomicU32::new(0);

struct Stderr {
    /// True if stderr is connected to the journal. systemd then adds the time to each line, and
    /// reads the level from a `<N>` prefix, sd-daemon(3).
    to_journal: bool,
    /// The recent lines of each place in the code, which is a file and a line number.
    places: Mutex<HashMap<(&'static str, u32), RecentLines>>,
}

/// The lines that one place in the code has logged since `begin`.
struct RecentLines {
    begin: Instant,
    lines: u64,
}

/// The decision about one line.
#[derive(Debug, PartialEq, Eq)]
enum Admission {
    /// The line is logged. The number is the number of similar lines that were dropped before.
    Logged(u64),
    /// The line is logged, and the next similar lines are dropped.
    Last,
    Dropped,
}

impl RecentLines {
    fn admit(&mut self, now: Instant, max: u64) -> Admission {
        if now.duration_since(self.begin) >= INTERVAL {
            let dropped = self.lines.saturating_sub(max);
            *self = RecentLines {
                begin: now,
                lines: 1,
            };
            return Admission::Logged(dropped);
        }
        self.lines += 1;
        match self.lines {
            lines if lines > max => Admission::Dropped,
            lines if lines == max => Admission::Last,
            _ => Admission::Logged(0),
        }
    }
}

/// Starts to log to stderr. Messages of libraries are logged only at the levels `warn` and `error`.
/// Messages at lower levels contain the headers and payloads of requests.
pub(crate) fn open(debug: bool) {
    let to_journal = std::env::var_os("JOURNAL_STREAM").is_some();
    let places = Mutex::default();
    if log::set_boxed_logger(Box::new(Stderr { to_journal, places })).is_ok() {
        set_level(debug);
    }
}

/// Sets the maximum number of lines from one place in the code per [`INTERVAL`]. 0 disables the
/// limit.
pub(crate) fn set_max_lines(max: u32) {
    MAX_LINES.store(max, Ordering::Relaxed);
}

/// Enables or disables the debug messages in the log.
pub(crate) fn set_level(debug: bool) {
    log::set_max_level(if debug {
        LevelFilter::Debug
    } else {
        LevelFilter::Info
    });
}

impl Log for Stderr {
    fn enabled(&self, metadata: &Metadata<'_>) -> bool {
        metadata.target().starts_with("rrun") || metadata.level() <= Level::Warn
    }

    fn log(&self, record: &Record<'_>) {
        if !self.enabled(record.metadata()) {
            return;
        }
        let max = MAX_LINES.load(Ordering::Relaxed);
        let admission = self.admit(record, max);
        if admission == Admission::Dropped {
            return;
        }
        let text = record.args().to_string();
        match admission {
            Admission::Dropped | Admission::Logged(0) => self.write(record.level(), &text),
            Admission::Logged(dropped) => {
                let note = format!("the server did not log {dropped} lines like the next one");
                self.write(Level::Warn, &note);
                self.write(record.level(), &text);
            }
            Admission::Last => {
                self.write(record.level(), &text);
                let note = format!(
                    "{max} lines like the previous one were logged within {} s, so the server drops such lines until the {} s are over (log_lines)",
                    INTERVAL.as_secs(),
                    INTERVAL.as_secs()
                );
                self.write(Level::Warn, &note);
            }
        }
    }

    fn flush(&self) {}
}

impl Stderr {
    fn admit(&self, record: &Record<'_>, max: u32) -> Admission {
        if max == 0 || record.level() > Level::Info {
            return Admission::Logged(0);
        }
        let now = Instant::now();
        let place = (record.file_static().unwrap_or_default(), record.line());
        let mut places = lock(&self.places);
        let recent = places.entry((place.0, place.1.unwrap_or_default()));
        let recent = recent.or_insert(RecentLines {
            begin: now,
            lines: 0,
        });
        recent.admit(now, max.into())
    }

    fn write(&self, level: Level, text: &str) {
        let mut line = String::with_capacity(160);
        if self.to_journal {
            line.push_str(match level {
                Level::Error => "<3>",
                Level::Warn => "<4>",
                Level::Info => "<6>",
                Level::Debug | Level::Trace => "<7>",
            });
        } else {
            let since = SystemTime::now()
                .duration_since(UNIX_EPOCH)
                .unwrap_or_default();
            let second = DateTime::from_unix(since.as_secs());
            let _ = write!(line, "{second}.{:03}Z", since.subsec_millis());
            line.push_str(match level {
                Level::Error => " error: ",
                Level::Warn => " warning: ",
                Level::Info => " ",
                Level::Debug | Level::Trace => " debug: ",
            });
        }
        // Text from other programs can contain line breaks, which must not start a new line in the
        // log.
        for c in text.chars() {
            if line.len() >= MAX_LINE_BYTES {
                line.push('…');
                break;
            }
            if c == '\n' || c == '\r' {
                line.push_str("; ");
            } else if !c.is_control() {
                line.push(c);
            }
        }
        line.push('\n');
        let _ = std::io::stderr().lock().write_all(line.as_bytes());
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_number_of_lines_in_an_interval_is_limited_and_the_dropped_lines_are_counted() {
        let begin = Instant::now();
        let mut recent = RecentLines { begin, lines: 0 };
        assert_eq!(recent.admit(begin, 3), Admission::Logged(0));
        assert_eq!(recent.admit(begin, 3), Admission::Logged(0));
        assert_eq!(recent.admit(begin, 3), Admission::Last);
        for _ in 0..5 {
            assert_eq!(recent.admit(begin + INTERVAL / 2, 3), Admission::Dropped);
        }
        let later = begin + INTERVAL;
        assert_eq!(recent.admit(later, 3), Admission::Logged(5));
        assert_eq!(recent.admit(later, 3), Admission::Logged(0));
        assert_eq!(recent.admit(later + INTERVAL, 3), Admission::Logged(0));
        assert_eq!(recent.admit(later + INTERVAL, 1), Admission::Dropped);
    }
}
