//! The log, which the flags `--log`, `--log-format` and `--debug` configure. The lines of the log
//! have exactly runc's format, because rrun's callers parse the log to find rrun's last error.

use std::fmt::Write as _;
use std::fs::{File, OpenOptions};
use std::io::Write as _;
use std::sync::{Mutex, MutexGuard, OnceLock, PoisonError};
use std::time::SystemTime;

use crate::error::{Context, Result};
use crate::sys::time::rfc3339_seconds;

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum LogFormat {
    Text,
    Json,
}

struct Log {
    destination: Mutex<LogDestination>,
    format: LogFormat,
    debug: bool,
}

enum LogDestination {
    StandardError,
    File(File),
    /// No destination. A process in a container writes no log, because a container must not be able
    /// to reach the host's log file.
    Nowhere,
}

static LOG: OnceLock<Log> = OnceLock::new();

impl Log {
    fn destination(&self) -> MutexGuard<'_, LogDestination> {
        // A thread can panic while it holds the lock. The panic truncates at most one line, so the
        // log is still usable.
        self.destination
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
    }
}

/// Opens the log file at `path`. Without a path, the log is standard error. rrun calls this
/// function once, at its start.
pub(crate) fn open(path: Option<&str>, format: LogFormat, debug: bool) -> Result<()> {
    let destination = match path.filter(|path| !path.is_empty() && *path != "/dev/stderr") {
        None => LogDestination::StandardError,
        Some(path) => LogDestination::File(
            OpenOptions::new()
                .append(true)
                .create(true)
                .open(path)
                .doing(|| format!("open log file {path}"))?,
        ),
    };
    let _ = LOG.set(Log {
        destination: Mutex::new(destination),
        format,
        debug,
    });
    Ok(())
}

/// Logs the error that ends this program. If the log is a file, this function also writes the
/// sentence, without time and level, to standard error.
pub(crate) fn fatal(sentence: &str) {
    write("error", sentence);
    let is_file = |log: &Log| matches!(*log.destination(), LogDestination::File(_));
    if LOG.get().is_some_and(is_file) {
        let line = without_control_characters(sentence) + "\n";
        let _ = std::io::stderr().write_all(line.as_bytes());
    }
}

pub(crate) fn warning(sentence: &str) {
    write("warning", sentence);
}

pub(crate) fn debug(sentence: impl FnOnce() -> String) {
    if LOG.get().is_some_and(|log| log.debug) {
        write("debug", &sentence());
    }
}

fn write(level: &str, message: &str) {
    let format = LOG.get().map_or(LogFormat::Text, |log| log.format);
    let line = line(format, level, message, &rfc3339_seconds(SystemTime::now()));
    // A failure to write the log is ignored, because rrun has no other place to which it could
    // report the failure.
    let _ = match LOG.get().map(Log::destination).as_deref_mut() {
        Some(LogDestination::File(file)) => file.write_all(line.as_bytes()),
        Some(LogDestination::Nowhere) => Ok(()),
        Some(LogDestination::StandardError) | None => std::io::stderr().write_all(line.as_bytes()),
    };
}

/// Closes the log file, which is on the host. A process calls this function before it resolves
/// paths in the container. Otherwise, the path /proc/self/fd/N could lead to the log file.
pub(crate) fn close() {
    if let Some(mut destination) = LOG.get().map(Log::destination)
        && let LogDestination::File(_) = *destination
    {
        *destination = LogDestination::Nowhere;
    }
}

fn line(format: LogFormat, level: &str, message: &str, time: &str) -> String {
    let quoted = serde_json::Value::from(message).to_string();
    // JSON allows some of the control characters in a text, for example U+009B, with which a
    // terminal's escape sequence can begin.
    let quoted = without_control_characters(&quoted);
    let mut line = String::with_capacity(quoted.len() + 64);
    let _ = match format {
        LogFormat::Json => writeln!(
            line,
            "{{\"level\":\"{level}\",\"msg\":{quoted},\"time\":\"{time}\"}}"
        ),
        LogFormat::Text => writeln!(line, "time=\"{time}\" level={level} msg={quoted}"),
    };
    line
}

/// Returns the text with an escape sequence of JSON in place of each control character. A sentence
/// can contain text of an image or of a pod spec, which must neither begin a new line nor control
/// the terminal on which the sentence appears. The same applies to the output of commands.
pub(crate) fn without_control_characters(text: &str) -> String {
    let mut shown = String::with_capacity(text.len() + 1);
    for character in text.chars() {
        let _ = match character {
            '\n' => shown.write_str("\\n"),
            '\t' => shown.write_str("\\t"),
            '\r' => shown.write_str("\\r"),
            _ if character.is_control() => write!(shown, "\\u{:04x}", u32::from(character)),
            _ => shown.write_char(character),
        };
    }
    shown
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn no_control_character_of_a_message_reaches_the_log_or_the_terminal() {
        let message = "a\nb\tc\rd\u{1b}[2J\u{7f}\u{9b}1m \u{e9}\\n";
        assert_eq!(
            without_control_characters(message),
            "a\\nb\\tc\\rd\\u001b[2J\\u007f\\u009b1m \u{e9}\\n"
        );
        for format in [LogFormat::Json, LogFormat::Text] {
            let line = line(format, "error", message, "");
            let line = line.strip_suffix('\n').unwrap();
            assert!(!line.contains(char::is_control), "{line}");
        }
        let json = line(LogFormat::Json, "error", message, "");
        let parsed: serde_json::Value = serde_json::from_str(&json).unwrap();
        assert_eq!(parsed["msg"], message);
    }

    #[test]
    fn log_lines_have_the_format_that_callers_of_runc_parse() {
        let time = "2026-11-21T10:39:48Z";
        assert_eq!(
            line(LogFormat::Json, "error", "a \"b\"\n", time),
            "{\"level\":\"error\",\"msg\":\"a \\\"b\\\"\\n\",\"time\":\"2026-11-21T10:39:48Z\"}\n"
        );
        assert_eq!(
            line(LogFormat::Text, "warning", "x", time),
            "time=\"2026-11-21T10:39:48Z\" level=warning msg=\"x\"\n"
        );
    }
}
