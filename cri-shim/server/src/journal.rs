//! The log: lines on stderr, where systemd and people read it.

use std::io::Write;
use std::time::{SystemTime, UNIX_EPOCH};

use log::{Level, LevelFilter, Log, Metadata, Record};

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
            line.push_str(&time_of_day(since.as_secs(), since.subsec_millis()));
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

/// UTC, RFC 3339, from seconds since the epoch.
fn time_of_day(seconds: u64, millis: u32) -> String {
    let (days, second) = (seconds / 86_400, seconds % 86_400);
    // Howard Hinnant's civil_from_days, for days after 1970 only.
    let z = days + 719_468;
    let era = z / 146_097;
    let doe = z % 146_097;
    let yoe = (doe - doe / 1460 + doe / 36_524 - doe / 146_096) / 365;
    let doy = doe - (365 * yoe + yoe / 4 - yoe / 100);
    let mp = (5 * doy + 2) / 153;
    let day = doy - (153 * mp + 2) / 5 + 1;
    let month = if mp < 10 { mp + 3 } else { mp - 9 };
    let year = yoe + era * 400 + u64::from(month <= 2);
    format!(
        "{year:04}-{month:02}-{day:02}T{:02}:{:02}:{:02}.{millis:03}Z",
        second / 3600,
        second / 60 % 60,
        second % 60
    )
}

#[cfg(test)]
mod tests {
    use super::time_of_day;

    #[test]
    fn times_are_utc() {
        assert_eq!(time_of_day(0, 0), "1970-01-01T00:00:00.000Z");
        assert_eq!(time_of_day(951_782_400, 7), "2000-02-29T00:00:00.007Z");
        assert_eq!(time_of_day(1_795_257_299, 999), "2026-11-21T10:34:59.999Z");
    }
}
