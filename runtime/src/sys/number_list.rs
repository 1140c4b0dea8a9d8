//! Lists of numbers such as `0-3,5`, in the kernel's format for CPUs and memory nodes. See
//! cpuset(7), "List format".

use crate::error::{Error, Result, refuse};

/// The number of bits in a [`NumberSet`]. A kernel cannot be built for more than 8192 CPUs
/// (CONFIG_NR_CPUS).
const NUMBERS: usize = 8192;
const WORD_BITS: usize = u64::BITS as usize;

/// A set of numbers, in the form of the bit mask that system calls expect.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct NumberSet {
    words: [u64; NUMBERS / WORD_BITS],
}

impl NumberSet {
    /// The set of all numbers.
    pub(crate) const ALL: NumberSet = NumberSet {
        words: [u64::MAX; NUMBERS / WORD_BITS],
    };

    /// Parses a list of numbers. Returns `None` if the list is empty.
    ///
    /// # Errors
    /// Fails if the text is not a list, or if a number is not smaller than [`NUMBERS`].
    pub(crate) fn parse(list: &str) -> Result<Option<NumberSet>> {
        let mut set = NumberSet {
            words: [0; NUMBERS / WORD_BITS],
        };
        for range in list.split(',').map(str::trim).filter(|r| !r.is_empty()) {
            let (first, last) = range.split_once('-').unwrap_or((range, range));
            let (first, last) = (number(first)?, number(last)?);
            if first > last {
                refuse!("{range} is not a valid range");
            }
            let within = first / WORD_BITS..=last / WORD_BITS;
            for (at, word) in set.words.iter_mut().enumerate() {
                if within.contains(&at) {
                    let lowest = first.saturating_sub(at * WORD_BITS);
                    let highest = (last - at * WORD_BITS).min(WORD_BITS - 1);
                    *word |= u64::MAX << lowest & u64::MAX >> (WORD_BITS - 1 - highest);
                }
            }
        }
        if set.words.iter().all(|word| *word == 0) {
            if list.is_empty() {
                return Ok(None);
            }
            refuse!("{list:?} does not contain a number");
        }
        Ok(Some(set))
    }

    /// Returns the bit mask as bytes, the lowest byte first, without zero bytes at the end.
    pub(crate) fn bytes(&self) -> Vec<u8> {
        let bytes = self.words.iter().flat_map(|word| word.to_le_bytes());
        let mut bytes: Vec<u8> = bytes.collect();
        bytes.truncate(
            bytes
                .iter()
                .rposition(|byte| *byte != 0)
                .map_or(0, |at| at + 1),
        );
        bytes
    }

    pub(crate) fn words(&self) -> &[u64] {
        &self.words
    }
}

fn number(text: &str) -> Result<usize> {
    match text.parse::<usize>() {
        Ok(number) if number < NUMBERS => Ok(number),
        Ok(number) => Err(Error::new(format!(
            "{number} is larger than {}, the largest possible number",
            NUMBERS - 1
        ))),
        Err(_) => Err(Error::new(format!("{text:?} is not a number"))),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ranges_and_numbers_become_bits() {
        let set = NumberSet::parse("0-3, 5,,64").unwrap().unwrap();
        assert_eq!(set.words().get(..2), Some(&[0b10_1111, 1][..]));
        let set = NumberSet::parse("62-130,192-255").unwrap().unwrap();
        let words = [0b11 << 62, u64::MAX, 0b111, u64::MAX, 0];
        assert_eq!(set.words().get(..5), Some(&words[..]));
        assert_eq!(NumberSet::parse("0-8191").unwrap(), Some(NumberSet::ALL));
        assert_eq!(NumberSet::parse("").unwrap(), None);
        for wrong in ["a", "3-1", "8192", "1-", "-1", ",", "0x1"] {
            assert!(NumberSet::parse(wrong).is_err(), "{wrong}");
        }
    }
}
