//! Points in time as RFC 3339 text, as runc writes them.

use std::time::{SystemTime, UNIX_EPOCH};

use rrun_kernel::date::DateTime;

/// `2026-11-21T10:39:48.123456789Z`, as runc writes a container's time of creation.
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

/// `2026-11-21T10:39:48Z`, as runc writes it into its log.
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
    fn known_points_in_time() {
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
