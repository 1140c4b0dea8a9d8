//! The numbered lines that `inside count` and other programs write, and a check that a log contains
//! all of them.

use crate::ensure_eq;
use crate::support::machine::Result;

/// Returns the number N of each line `line N` in the CRI log `log`.
pub(crate) fn line_numbers(log: &str) -> Result<Vec<u64>> {
    log.lines()
        .map(|line| {
            let number = line
                .splitn(4, ' ')
                .nth(3)
                .and_then(|text| text.strip_prefix("line "));
            Ok(number
                .ok_or(format!(
                    "the log contains a line that is not `line N`: {line:?}"
                ))?
                .parse()?)
        })
        .collect()
}

/// Checks that `numbers` contains 1, 2, 3 … in this order, without a gap or a repetition.
pub(crate) fn without_gap(numbers: &[u64]) -> Result {
    for (at, number) in numbers.iter().enumerate() {
        ensure_eq!(
            *number,
            at as u64 + 1,
            "the number in line {} of the log",
            at + 1
        );
    }
    Ok(())
}
