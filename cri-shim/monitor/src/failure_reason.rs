//! Searches the runtime's log for the reason why a runtime call failed. The reason is a sentence
//! for the client.

use serde::Deserialize;

/// The maximum length of a reason in bytes.
const MAX_REASON_BYTES: usize = 2 << 10;

/// A line of a runtime's log in runc's JSON format, which all other runtimes use, too.
#[derive(Deserialize)]
struct LogLine {
    level: String,
    msg: String,
}

/// Returns the last error-level message of a log with JSON lines. If the log contains no such
/// message, returns all plain-text lines at the end of the log. The last line alone is not enough,
/// because it often names only a place in the runtime's source code. The first of the plain-text
/// lines often names the failed action.
pub(crate) fn last_error(log: &[u8]) -> Option<String> {
    let mut plain: Vec<String> = Vec::new();
    let mut plain_ended = false;
    for line in log.rsplit(|byte| *byte == b'\n') {
        match serde_json::from_slice::<LogLine>(line) {
            Ok(entry) if matches!(entry.level.as_str(), "error" | "fatal" | "panic") => {
                let lines: Vec<&str> = entry.msg.lines().map(str::trim).collect();
                return Some(bounded(&joined(&lines)));
            }
            Ok(_) => plain_ended = !plain.is_empty(),
            // Skip plain text that is not at the end of the log. Also skip a JSON line whose
            // beginning is missing: the monitor reads only the end of a long log.
            Err(_) if plain_ended || line.ends_with(b"\"}") => {}
            Err(_) => {
                let text = String::from_utf8_lossy(line).trim().to_owned();
                if !text.is_empty() {
                    plain.push(text);
                }
            }
        }
    }
    plain.reverse();
    (!plain.is_empty()).then(|| bounded(&joined(&plain)))
}

/// Joins several lines into one line.
fn joined<T: AsRef<str>>(lines: &[T]) -> String {
    let mut all = String::new();
    for line in lines
        .iter()
        .map(AsRef::as_ref)
        .filter(|line| !line.is_empty())
    {
        if !all.is_empty() {
            all.push_str(if all.ends_with(':') { " " } else { "; " });
        }
        all.push_str(line);
    }
    all
}

fn bounded(text: &str) -> String {
    let mut end = text.len().min(MAX_REASON_BYTES);
    while !text.is_char_boundary(end) {
        end -= 1;
    }
    text.get(..end).unwrap_or_default().to_owned()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_last_error_of_a_json_log_is_the_reason() {
        let log = br#"{"level":"error","msg":"first","time":"t"}
{"msg":"mount proc on /proc: Operation not permitted (EPERM)","level":"error"}
{"level":"info","msg":"bye"}
"#;
        assert_eq!(
            last_error(log).unwrap(),
            "mount proc on /proc: Operation not permitted (EPERM)"
        );
    }

    #[test]
    fn without_an_error_the_last_plain_lines_are_the_reason() {
        assert_eq!(
            last_error(b"before\n{\"level\":\"info\",\"msg\":\"x\"}\npanic: oh\n\n  dear\n")
                .unwrap(),
            "panic: oh; dear"
        );
        assert!(last_error(b"").is_none());
    }

    #[test]
    fn an_error_of_several_lines_is_reported_completely() {
        let log = br#"{"level":"error","msg":"update cpu.max:\n  write: invalid\n"}
{"level":"warning","msg":"bye"}
"#;
        assert_eq!(last_error(log).unwrap(), "update cpu.max: write: invalid");
    }

    #[test]
    fn a_long_reason_is_cut_at_a_character_boundary() {
        let long = "é".repeat(MAX_REASON_BYTES);
        assert_eq!(bounded(&long).len(), MAX_REASON_BYTES);
        assert_eq!(bounded(&format!("a{long}")).len(), MAX_REASON_BYTES - 1);
    }
}
