//! The log: lines on stderr, where systemd and people read it.

use std::fmt::Write as _;
use std::io::Write as _;
use std::time::{SystemTime, UNIX_EPOCH};

use log::{Level, LevelFilter, Log, Metadata, Record};
use rrun_kernel::date::DateTime;

struct Stderr {
    /// systemd stamps the lines itself and takes their level from a `<N>` prefix, sd-daemon(3).
    to_journal: bool,
}

/// Sends what this program logs to stderr. Libraries' lines come through from `warn` up only:
/// below that they carry headers and payloads.
pub(crate) fn open(debug: bool) {
    let to_journal = std::env::var_os("JOURNAL_STREAM").is_some();
    if log::set_boxed_logger(Box::new(Stderr { to_journal })).is_ok() {
        set_level(debug);
    }
}

/// Whether what is done is logged, too, and not only what goes wrong.
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
        // What comes from outside must not begin a line of its own.
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
