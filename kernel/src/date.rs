//! Dates of the Gregorian calendar, in UTC.
//!
//! Written here because a local time would need the time zone database, and every reader of our
//! times parses UTC just as well.

use std::fmt;

/// A second in UTC. Displayed as `2026-11-21T10:39:48`, RFC 3339 without its `Z`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct DateTime {
    pub year: u64,
    pub month: u64,
    pub day: u64,
    pub hour: u64,
    pub minute: u64,
    pub second: u64,
}

impl DateTime {
    /// `seconds` since the epoch.
    pub fn from_unix(seconds: u64) -> Self {
        let (days, second) = (seconds / 86_400, seconds % 86_400);
        let (year, month, day) = civil_date(days);
        DateTime {
            year,
            month,
            day,
            hour: second / 3600,
            minute: second / 60 % 60,
            second: second % 60,
        }
    }
}

impl fmt::Display for DateTime {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(
            f,
            "{:04}-{:02}-{:02}T{:02}:{:02}:{:02}",
            self.year, self.month, self.day, self.hour, self.minute, self.second
        )
    }
}

/// Year, month and day, `days` after 1970-01-01.
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

    #[test]
    fn known_points_in_time() {
        for (seconds, text) in [
            (0, "1970-01-01T00:00:00"),
            (951_782_400, "2000-02-29T00:00:00"),
            (1_795_257_588, "2026-11-21T10:39:48"),
            (4_107_542_399, "2100-02-28T23:59:59"),
        ] {
            assert_eq!(DateTime::from_unix(seconds).to_string(), text);
        }
    }
}
