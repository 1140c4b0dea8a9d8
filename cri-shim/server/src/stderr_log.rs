//! The log on standard error, which systemd forwards to the journal.

use std::fmt::Write as _;
use std::io::Write as _;
use std::time::{SystemTime, UNIX_EPOCH};

use log::{Level, LevelFilter, Log, Metadata, Record};
use rrun_kernel::date::DateTime;

struct Stderr {
    /// True if stderr is connected to the journal. systemd then adds the time to each line, and
    /// reads the level from a `<N>` prefix, sd-daemon(3).
    to_journal: bool,
}

/// Starts to log to stderr. Messages of libraries are logged only at the levels `warn` and `error`.
/// Messages at lower levels contain the headers and payloads of requests.
pub(crate) fn open(debug: bool) {
    let to_journal = std::env::var_os("JOURNAL_STREAM").is_some();
    if log::set_boxed_logger(Box::new(Stderr { to_journal })).is_ok() {
        set_level(debug);
    }
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
        let mut line = String::with_capacity(160);
        if self.to_journal {
            line.push_str(match record.level() {
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
            line.push_str(match record.level() {
                Level::Error => " error: ",
                Level::Warn => " warning: ",
                Level::Info => " ",
                Level::Debug | Level::Trace => " debug: ",
            });
        }
        // Text from other programs can contain line breaks, which must not start a new line in the
        // log.
        for c in record.args().to_string().chars() {
            if c == '\n' || c == '\r' {
                line.push_str("; ");
            } else if !c.is_control() {
                line.push(c);
            }
        }
        line.push('\n');
        let _ = std::io::stderr().lock().write_all(line.as_bytes());
    }

    fn flush(&self) {}
}
