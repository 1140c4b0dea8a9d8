//! Parses the records of pax extended headers (POSIX, pax: extended header).

use std::collections::BTreeMap;

use super::error::{ArchiveError, malformed};

/// The maximum number of bytes in one extended header, which contains pax records or a GNU long
/// name.
pub(super) const EXTENDED_BYTES: u64 = 1 << 20;

/// The maximum number of pieces (ranges with data) in one sparse file.
pub(super) const SPARSE_PIECES: usize = 1 << 18;

/// The maximum number of global records that apply to every later entry, and of bytes in these
/// records. Usual archives contain at most a few global records. The limits are low, because the
/// records are applied to each entry again.
const GLOBAL_RECORDS: usize = 32;
const GLOBAL_BYTES: usize = 16 << 10;

/// The keys of the records that describe an entry. GNU tar's keys for sparse files and the keys of
/// extended attributes are not in this list.
const KEYS: [&[u8]; 6] = [b"path", b"linkpath", b"uid", b"gid", b"size", b"mtime"];
const SPARSE_KEYS: [&[u8]; 5] = [
    b"GNU.sparse.name",
    b"GNU.sparse.realsize",
    b"GNU.sparse.size",
    b"GNU.sparse.major",
    b"GNU.sparse.map",
];
const XATTR: &[u8] = b"SCHILY.xattr.";

/// The records that apply to an entry. Records with other keys are not stored. The time for each
/// entry therefore does not depend on the number of unknown records in a global header.
#[derive(Clone, Default)]
pub(super) struct Pax {
    records: BTreeMap<Vec<u8>, Vec<u8>>,
    /// The number of bytes of all keys and values in `records`.
    bytes: usize,
    /// The numbers of a sparse file's map in GNU tar's format 0.0, in the order of the records. In
    /// this format, several records have the same key, but `records` stores only one value for each
    /// key. The numbers are therefore stored in this list instead.
    pub sparse: Vec<u64>,
}

impl Pax {
    /// Returns the value of the record `key`. A record without a value counts as missing.
    pub(super) fn get(&self, key: &str) -> Option<&[u8]> {
        let value = self.records.get(key.as_bytes()).map(Vec::as_slice);
        value.filter(|value| !value.is_empty())
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
            .filter_map(|(key, value)| Some((key.strip_prefix(XATTR)?.to_vec(), value)))
            .collect()
    }

    /// Parses the records of one pax header that applies to one entry, and adds them to `self`.
    pub(super) fn parse(&mut self, header: &[u8]) -> Result<(), ArchiveError> {
        for record in Records(header) {
            let (key, value) = record?;
            if key == b"GNU.sparse.offset" || key == b"GNU.sparse.numbytes" {
                if self.sparse.len() >= 2 * SPARSE_PIECES {
                    return Err(unreadable());
                }
                self.sparse.push(decimal(value).ok_or_else(unreadable)?);
            } else if SPARSE_KEYS.contains(&key) {
                self.set(key, value);
            } else {
                self.set_common(key, value);
            }
        }
        if self.bytes as u64 > EXTENDED_BYTES {
            return Err(unreadable());
        }
        Ok(())
    }

    /// Parses the records of one global pax header, and adds them to `self`. Ignores the records of
    /// sparse files, because such a record can be right for only one file.
    pub(super) fn parse_global(&mut self, header: &[u8]) -> Result<(), ArchiveError> {
        for record in Records(header) {
            let (key, value) = record?;
            self.set_common(key, value);
            if self.records.len() > GLOBAL_RECORDS || self.bytes > GLOBAL_BYTES {
                return malformed(format!(
                    "the global pax headers contain more than the limit of {GLOBAL_RECORDS} records or {GLOBAL_BYTES} bytes that apply to every file"
                ));
            }
        }
        Ok(())
    }

    fn set_common(&mut self, key: &[u8], value: &[u8]) {
        if KEYS.contains(&key) || key.starts_with(XATTR) {
            self.set(key, value);
        }
    }

    fn set(&mut self, key: &[u8], value: &[u8]) {
        self.bytes += key.len() + value.len();
        if let Some(before) = self.records.insert(key.to_vec(), value.to_vec()) {
            self.bytes -= key.len() + before.len();
        }
    }

    /// Adds the global records for which `self` contains no record with the same key.
    pub(super) fn with_global(mut self, global: &Pax) -> Self {
        for (key, value) in &global.records {
            if !self.records.contains_key(key) {
                self.records.insert(key.clone(), value.clone());
            }
        }
        self
    }
}

/// An iterator over the keys and values of one pax header. Each record has the form `LENGTH
/// KEY=VALUE\n` (POSIX, pax: extended header).
struct Records<'a>(&'a [u8]);

impl<'a> Iterator for Records<'a> {
    type Item = Result<(&'a [u8], &'a [u8]), ArchiveError>;

    fn next(&mut self) -> Option<Self::Item> {
        if self.0.first().is_none_or(|byte| *byte == 0) {
            return None;
        }
        let record = self.take();
        if record.is_none() {
            self.0 = &[];
        }
        Some(record.ok_or_else(unreadable))
    }
}

impl<'a> Records<'a> {
    fn take(&mut self) -> Option<(&'a [u8], &'a [u8])> {
        let space = self.0.iter().position(|byte| *byte == b' ')?;
        let length = usize::try_from(decimal(&self.0[..space])?).ok()?;
        let record = self.0.get(space + 1..length)?.strip_suffix(b"\n")?;
        let equals = record.iter().position(|byte| *byte == b'=')?;
        self.0 = self.0.get(length..).unwrap_or_default();
        Some((&record[..equals], &record[equals + 1..]))
    }
}

fn unreadable() -> ArchiveError {
    ArchiveError::Malformed("a pax header can't be read".into())
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

    fn record(key: &str, value: &str) -> Vec<u8> {
        let rest = key.len() + value.len() + 3;
        let mut length = rest;
        while length != rest + length.to_string().len() {
            length = rest + length.to_string().len();
        }
        format!("{length} {key}={value}\n").into_bytes()
    }

    /// The records of a global header are applied to each entry. A hostile archive can contain a
    /// million entries, and tens of thousands of global records.
    #[test]
    fn only_a_few_records_of_a_global_header_are_stored() -> Result<(), ArchiveError> {
        let mut global = Pax::default();
        for key in ["comment", "GNU.sparse.offset", "GNU.sparse.map", "vendor"] {
            let header: Vec<u8> = (0..20_000)
                .flat_map(|number| [record(key, "1"), record(&format!("{key}{number}"), "1")])
                .flatten()
                .collect();
            global.parse_global(&header)?;
        }
        assert!(global.records.is_empty() && global.sparse.is_empty());
        let mut many = Pax::default();
        for number in 0..GLOBAL_RECORDS {
            many.parse_global(&record(&format!("SCHILY.xattr.user.{number}"), "1"))?;
        }
        let error = many.parse_global(&record("mtime", "1"));
        assert!(error.is_err_and(|e| e.to_string().contains("more than the limit of 32 records")));
        let long = "v".repeat(GLOBAL_BYTES);
        assert!(global.parse_global(&record("path", &long)).is_err());
        Ok(())
    }

    #[test]
    fn a_record_of_an_entry_takes_precedence_over_a_global_record() -> Result<(), ArchiveError> {
        let mut global = Pax::default();
        global.parse_global(&[record("mtime", "7"), record("uid", "8")].concat())?;
        global.parse_global(&record("SCHILY.xattr.user.all", "9"))?;
        let mut pax = Pax::default();
        pax.parse(&[record("mtime", ""), record("SCHILY.xattr.user.own", "")].concat())?;
        pax.parse(&record("gid", "1"))?;
        let pax = pax.with_global(&global);
        assert_eq!(pax.get("mtime"), None);
        assert_eq!(pax.number("uid", Some(0)), Some(8));
        assert_eq!(pax.number("gid", Some(0)), Some(1));
        let all = (b"user.all".to_vec(), b"9".to_vec());
        assert_eq!(pax.into_xattrs(), [all, (b"user.own".to_vec(), Vec::new())]);
        Ok(())
    }

    /// Several headers can precede one entry. Each header must not cause a pass over the records
    /// of all earlier headers.
    #[test]
    fn the_size_of_all_records_is_known_and_limited() -> Result<(), ArchiveError> {
        let mut pax = Pax::default();
        for value in ["1", "22", ""] {
            pax.parse(&record("SCHILY.xattr.user.a", value))?;
            assert_eq!(pax.bytes, "SCHILY.xattr.user.a".len() + value.len());
        }
        let half = "v".repeat(600 << 10);
        pax.parse(&record("path", &half))?;
        assert!(pax.parse(&record("linkpath", &half)).is_err());
        Ok(())
    }
}
