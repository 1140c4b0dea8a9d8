//! Timestamps for container logs and the monitor's own log.

use rrun_kernel::date::DateTime;

use super::exit;

/// A UTC timestamp in the format of the CRI's logs: RFC 3339, with nine decimal places of a second.
pub(crate) struct Timestamp([u8; 30]);

impl Timestamp {
    pub(crate) fn now() -> Self {
        Timestamp::at(exit::now())
    }

    /// Formats a time, given in `nanoseconds` since the epoch. The year must be between 1970 and
    /// 9999.
    pub(crate) fn at(nanoseconds: i64) -> Self {
        let nanoseconds = u64::try_from(nanoseconds).unwrap_or_default();
        let date = DateTime::from_unix(nanoseconds / 1_000_000_000);
        let mut text = *b"0000-00-00T00:00:00.000000000Z";
        for (at, width, value) in [
            (0, 4, date.year),
            (5, 2, date.month),
            (8, 2, date.day),
            (11, 2, date.hour),
            (14, 2, date.minute),
            (17, 2, date.second),
            (20, 9, nanoseconds % 1_000_000_000),
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
