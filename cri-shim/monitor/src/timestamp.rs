//! The time as container logs and the monitor's own log have it.

use super::exit;

/// The time as the CRI's logs have it, in UTC: RFC 3339 with nine digits of a second.
pub(crate) struct Timestamp([u8; 30]);

impl Timestamp {
    pub(crate) fn now() -> Self {
        Timestamp::at(exit::now())
    }

    /// `nanoseconds` since the epoch; the years 1970 to 9999.
    pub(crate) fn at(nanoseconds: i64) -> Self {
        let (seconds, fraction) = (
            nanoseconds.max(0) / 1_000_000_000,
            nanoseconds.max(0) % 1_000_000_000,
        );
        let (days, second) = (seconds / 86_400, seconds % 86_400);
        // Days to a date by eras of 400 years that begin on a 1 March.
        let shifted = days + 719_468;
        let (era, day) = (shifted / 146_097, shifted % 146_097);
        let year_of_era = (day - day / 1_460 + day / 36_524 - day / 146_096) / 365;
        let day_of_year = day - (365 * year_of_era + year_of_era / 4 - year_of_era / 100);
        let shifted_month = (5 * day_of_year + 2) / 153;
        let month = if shifted_month < 10 {
            shifted_month + 3
        } else {
            shifted_month - 9
        };
        let year = year_of_era + era * 400 + i64::from(month <= 2);
        let mut text = *b"0000-00-00T00:00:00.000000000Z";
        for (at, width, value) in [
            (0, 4, year),
            (5, 2, month),
            (8, 2, day_of_year - (153 * shifted_month + 2) / 5 + 1),
            (11, 2, second / 3_600),
            (14, 2, second / 60 % 60),
            (17, 2, second % 60),
            (20, 9, fraction),
        ] {
            let mut rest = value;
            for digit in text.iter_mut().skip(at).take(width).rev() {
                *digit += (rest % 10) as u8;
                rest /= 10;
            }
        }
        Timestamp(text)
    }

    pub(crate) fn text(&self) -> &[u8] {
        &self.0
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn timestamps_are_rfc_3339() {
        let text = |at| String::from_utf8(Timestamp::at(at).text().to_vec()).unwrap();
        assert_eq!(text(0), "1970-01-01T00:00:00.000000000Z");
        assert_eq!(
            text(1_709_210_096_000_000_007),
            "2024-02-29T12:34:56.000000007Z"
        );
        assert_eq!(
            text(4_102_444_799_999_999_999),
            "2099-12-31T23:59:59.999999999Z"
        );
    }
}
