//! Lists of numbers as the kernel writes them for CPUs and memory nodes: `0-3,5`. See
//! cpuset(7), "List format".

use crate::error::{Error, Result, refuse};

/// More than any kernel can be built for (CONFIG_NR_CPUS).
const NUMBERS: usize = 8192;
const WORD_BITS: usize = u64::BITS as usize;

/// A set of numbers, as the bit mask that system calls take.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct NumberSet {
    words: [u64; NUMBERS / WORD_BITS],
}

impl NumberSet {
    /// Every number.
    pub(crate) const ALL: NumberSet = NumberSet {
        words: [u64::MAX; NUMBERS / WORD_BITS],
    };

    /// The set that a list names; `None` if it is empty.
    ///
    /// # Errors
    /// What is no list, or a number that no kernel knows.
    pub(crate) fn parse(list: &str) -> Result<Option<NumberSet>> {
        let mut set = NumberSet {
            words: [0; NUMBERS / WORD_BITS],
        };
        for range in list.split(',').map(str::trim).filter(|r| !r.is_empty()) {
            let (first, last) = range.split_once('-').unwrap_or((range, range));
            let (first, last) = (number(first)?, number(last)?);
            if first > last {
                refuse!("{range} is no range");
            }
            for number in first..=last {
                if let Some(word) = set.words.get_mut(number / WORD_BITS) {
                    *word |= 1 << (number % WORD_BITS);
                }
            }
        }
        if set.words.iter().all(|word| *word == 0) {
            if list.is_empty() {
                return Ok(None);
            }
            refuse!("{list:?} names no number");
        }
        Ok(Some(set))
    }

    /// The same in bytes, the lowest first, as far as there are numbers.
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
            "{number} is more than {}, the most there can be",
            NUMBERS - 1
        ))),
        Err(_) => Err(Error::new(format!("{text:?} is no number"))),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ranges_and_numbers_become_bits() {
        let set = NumberSet::parse("0-3, 5,,64").unwrap().unwrap();
        assert_eq!(set.words().get(..2), Some(&[0b10_1111, 1][..]));
        assert_eq!(NumberSet::parse("").unwrap(), None);
        for wrong in ["a", "3-1", "8192", "1-", "-1", ",", "0x1"] {
            assert!(NumberSet::parse(wrong).is_err(), "{wrong}");
        }
    }
}
