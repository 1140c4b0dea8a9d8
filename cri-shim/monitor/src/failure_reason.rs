//! Why a runtime failed: the sentence for the client, found in the runtime's log.

use serde::Deserialize;

/// The longest reason.
const MAX_REASON_BYTES: usize = 2 << 10;

/// A runtime's log line: runc's form, which all others follow.
#[derive(Deserialize)]
struct LogLine {
    level: String,
    msg: String,
}

/// The last error-level message of a log of JSON lines. Without one it is the plain text at the
/// log's end, all lines of it: the first often says what was being done, the last only where.
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
            // The beginning of a JSON line may be cut off.
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

/// Several lines as one.
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
    fn an_error_of_several_lines_is_told_whole() {
        let log = br#"{"level":"error","msg":"update cpu.max:\n  write: invalid\n"}
{"level":"warning","msg":"bye"}
"#;
        assert_eq!(last_error(log).unwrap(), "update cpu.max: write: invalid");
    }

    #[test]
    fn a_reason_is_bounded_at_a_character() {
        let long = "é".repeat(MAX_REASON_BYTES);
        assert_eq!(bounded(&long).len(), MAX_REASON_BYTES);
        assert_eq!(bounded(&format!("a{long}")).len(), MAX_REASON_BYTES - 1);
    }
}
