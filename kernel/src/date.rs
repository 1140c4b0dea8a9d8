//! Dates of the Gregorian calendar, in UTC.
//!
//! Local time is not supported, because it would need the time zone database. Every program that
//! reads rrun's timestamps can parse UTC.

use std::fmt;

/// A point in time in UTC, with a resolution of one second. The display format of a `DateTime` is
/// `2026-11-21T10:39:48`, which is the format of RFC 3339 without the `Z`.
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
    /// Returns the date and the time of day `seconds` seconds after the epoch (1970-01-01T00:00:00
    /// UTC).
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

/// Returns the year, month and day of the date `days` days after 1970-01-01.
fn civil_date(days: u64) -> (u64, u64, u64) {
    /// An era is a period of 400 years. The Gregorian calendar repeats after each era.
    const DAYS_PER_ERA: u64 = 146_097;
    // In this calculation every year begins in March. The leap day is then the last day of the
    // year, and the lengths of the months follow a regular pattern.
    let since_march_0000 = days + 719_468;
    let era = since_march_0000 / DAYS_PER_ERA;
    let day_of_era = since_march_0000 % DAYS_PER_ERA;
    let year_of_era =
        (day_of_era - day_of_era / 1460 + day_of_era / 36_524 - day_of_era / 146_096) / 365;
    let day_of_year = day_of_era - (365 * year_of_era + year_of_era / 4 - year_of_era / 100);
    let march_month = (5 * day_of_year + 2) / 153;
    let day = day_of_year - (153 * march_month + 2) / 5 + 1;
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
    fn seconds_since_the_epoch_are_converted_to_dates() {
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
