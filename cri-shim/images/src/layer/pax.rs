//! Parses the records of pax extended headers (POSIX, pax: extended header).

use std::collections::BTreeMap;

use super::error::ArchiveError;

/// The maximum number of bytes in one extended header, which contains pax records or a GNU long
/// name.
pub(super) const EXTENDED_BYTES: u64 = 1 << 20;

/// The maximum number of pieces (ranges with data) in one sparse file.
pub(super) const SPARSE_PIECES: usize = 1 << 18;

#[derive(Clone, Default)]
pub(super) struct Pax {
    records: BTreeMap<Vec<u8>, Vec<u8>>,
    /// The numbers of a sparse file's map in GNU tar's format 0.0, in the order of the records. In
    /// this format, several records have the same key, but `records` stores only one value for each
    /// key. The numbers are therefore stored in this list instead.
    pub sparse: Vec<u64>,
}

impl Pax {
    pub(super) fn get(&self, key: &str) -> Option<&[u8]> {
        self.records.get(key.as_bytes()).map(Vec::as_slice)
    }

    /// Returns the number in the record `key`, or `in_header` if the record `key` does not exist.
    /// Returns `None` if the record does not contain a number.
    pub(super) fn number(&self, key: &str, in_header: Option<u64>) -> Option<u64> {
        match self.get(key) {
            Some(value) => decimal(value),
            None => in_header,
        }
    }

    /// Returns the extended attributes that the records contain.
    pub(super) fn into_xattrs(self) -> Vec<(Vec<u8>, Vec<u8>)> {
        self.records
            .into_iter()
            .filter_map(|(key, value)| Some((key.strip_prefix(b"SCHILY.xattr.")?.to_vec(), value)))
            .collect()
    }

    /// Parses the records of one pax header and adds the records to `self`. Each record has the
    /// form `LENGTH KEY=VALUE\n` (POSIX, pax: extended header).
    pub(super) fn parse(&mut self, mut records: &[u8]) -> Result<(), ArchiveError> {
        let bad = || ArchiveError::Malformed("a pax header can't be read".into());
        while records.first().is_some_and(|byte| *byte != 0) {
            let space = records
                .iter()
                .position(|byte| *byte == b' ')
                .ok_or_else(bad)?;
            let length = decimal(&records[..space]).ok_or_else(bad)?;
            let length = usize::try_from(length).map_err(|_| bad())?;
            let record = records
                .get(space + 1..length)
                .and_then(|record| record.strip_suffix(b"\n"))
                .ok_or_else(bad)?;
            let equals = record
                .iter()
                .position(|byte| *byte == b'=')
                .ok_or_else(bad)?;
            let (key, value) = (&record[..equals], &record[equals + 1..]);
            if key == b"GNU.sparse.offset" || key == b"GNU.sparse.numbytes" {
                if self.sparse.len() >= 2 * SPARSE_PIECES {
                    return Err(bad());
                }
                self.sparse.push(decimal(value).ok_or_else(bad)?);
            } else if value.is_empty() && !key.starts_with(b"SCHILY.xattr.") {
                self.records.remove(key);
            } else {
                self.records.insert(key.to_vec(), value.to_vec());
            }
            records = records.get(length..).unwrap_or_default();
        }
        let size: usize = self
            .records
            .iter()
            .map(|(key, value)| key.len() + value.len())
            .sum();
        if size as u64 > EXTENDED_BYTES {
            return Err(bad());
        }
        Ok(())
    }
}

pub(super) fn decimal(digits: &[u8]) -> Option<u64> {
    if !digits.iter().all(u8::is_ascii_digit) {
        return None;
    }
    std::str::from_utf8(digits).ok()?.parse().ok()
}

/// Parses a pax time, which is a number of seconds with an optional fraction. A time before 1970 is
/// negative.
pub(super) fn time(value: &[u8]) -> Option<(i64, u32)> {
    let text = std::str::from_utf8(value).ok()?;
    let (whole, fraction) = text.split_once('.').unwrap_or((text, ""));
    let seconds: i64 = whole.parse().ok()?;
    let mut nanos: u32 = 0;
    let mut digits = fraction.bytes();
    for _ in 0..9 {
        let digit = match digits.next() {
            Some(digit) if digit.is_ascii_digit() => u32::from(digit - b'0'),
            Some(_) => return None,
            None => 0,
        };
        nanos = nanos * 10 + digit;
    }
    if whole.starts_with('-') && nanos > 0 {
        return Some((seconds.checked_sub(1)?, 1_000_000_000 - nanos));
    }
    Some((seconds, nanos))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn times_can_have_fractions_and_be_before_1970() {
        assert_eq!(time(b"12.5"), Some((12, 500_000_000)));
        assert_eq!(time(b"-1.25"), Some((-2, 750_000_000)));
        assert_eq!(time(b"7"), Some((7, 0)));
        assert_eq!(time(b"x"), None);
    }

    #[test]
    fn pax_records_are_parsed_and_malformed_records_are_refused() {
        let mut pax = Pax::default();
        assert!(pax.parse(b"9 path=a\n16 linkpath=b/c\n").is_ok());
        assert_eq!(pax.get("path"), Some(b"a".as_slice()));
        assert_eq!(pax.get("linkpath"), Some(b"b/c".as_slice()));
        assert!(pax.parse(b"99 path=a\n").is_err());
        assert!(pax.parse(b"0 path=a\n").is_err());
        assert!(pax.parse(b"path=a\n").is_err());
        assert!(pax.parse(b"18446744073709551615 path=a\n").is_err());
    }
}
