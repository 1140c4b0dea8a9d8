//! Points in time as RFC 3339 text, in UTC.
//!
//! Written here because the time zone database would have to be loaded for a local time,
//! and every caller parses UTC just as well.

use std::time::{SystemTime, UNIX_EPOCH};

/// `2026-11-21T10:39:48.123456789Z`, as runc writes a container's time of creation.
pub(crate) fn rfc3339_nanos(time: SystemTime) -> String {
    let since = time.duration_since(UNIX_EPOCH).unwrap_or_default();
    let mut text = seconds_text(since.as_secs());
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
    let mut text = seconds_text(since.as_secs());
    text.push('Z');
    text
}

fn seconds_text(seconds: u64) -> String {
    let (days, of_day) = (seconds / 86_400, seconds % 86_400);
    let (year, month, day) = civil_date(days);
    format!(
        "{year:04}-{month:02}-{day:02}T{:02}:{:02}:{:02}",
        of_day / 3600,
        of_day / 60 % 60,
        of_day % 60
    )
}

/// Year, month and day of the Gregorian calendar, `days` after 1970-01-01.
fn civil_date(days: u64) -> (u64, u64, u64) {
    // Years that begin in March have the leap day at their end, which makes months regular.
    let since_era = days + 719_468; // days since 0000-03-01
    let era = since_era / 146_097;
    let of_era = since_era % 146_097;
    let year_of_era = (of_era - of_era / 1460 + of_era / 36_524 - of_era / 146_096) / 365;
    let of_year = of_era - (365 * year_of_era + year_of_era / 4 - year_of_era / 100);
    let march_month = (5 * of_year + 2) / 153;
    let day = of_year - (153 * march_month + 2) / 5 + 1;
    let month = if march_month < 10 {
        march_month + 3
    } else {
        march_month - 9
    };
    let year = era * 400 + year_of_era + u64::from(month <= 2);
    (year, month, day)
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
