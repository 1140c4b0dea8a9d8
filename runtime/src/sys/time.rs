//! Functions that format a time as RFC 3339 text, as runc does.

use std::time::{SystemTime, UNIX_EPOCH};

use rrun_kernel::date::DateTime;

/// Formats a time like `2026-11-21T10:39:48.123456789Z`. runc writes the creation time of a
/// container in the same format.
pub(crate) fn rfc3339_nanos(time: SystemTime) -> String {
    let since = time.duration_since(UNIX_EPOCH).unwrap_or_default();
    let mut text = DateTime::from_unix(since.as_secs()).to_string();
    let nanos = since.subsec_nanos();
    if nanos != 0 {
        let digits = format!("{nanos:09}");
        text.push('.');
        text.push_str(digits.trim_end_matches('0'));
    }
    text.push('Z');
    text
}

/// Formats a time like `2026-11-21T10:39:48Z`, the format in which runc writes a time into its log.
pub(crate) fn rfc3339_seconds(time: SystemTime) -> String {
    let since = time.duration_since(UNIX_EPOCH).unwrap_or_default();
    let mut text = DateTime::from_unix(since.as_secs()).to_string();
    text.push('Z');
    text
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::time::Duration;

    #[test]
    fn known_times_are_formatted_correctly() {
        let at = |seconds, nanos| UNIX_EPOCH + Duration::new(seconds, nanos);
        assert_eq!(rfc3339_seconds(at(0, 0)), "1970-01-01T00:00:00Z");
        assert_eq!(
            rfc3339_nanos(at(951_782_400, 500_000_000)),
            "2000-02-29T00:00:00.5Z"
        );
        assert_eq!(
            rfc3339_nanos(at(1_795_257_588, 120)),
            "2026-11-21T10:39:48.00000012Z"
        );
        assert_eq!(
            rfc3339_seconds(at(4_107_542_399, 0)),
            "2100-02-28T23:59:59Z"
        );
    }
}
