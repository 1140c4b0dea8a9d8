//! The lines that `inside count` and others number: whether a log has all of them.

use crate::ensure_eq;
use crate::support::machine::Result;

/// The numbers of the lines `line N` in a CRI log.
pub(crate) fn line_numbers(log: &str) -> Result<Vec<u64>> {
    log.lines()
        .map(|line| {
            let number = line
                .splitn(4, ' ')
                .nth(3)
                .and_then(|text| text.strip_prefix("line "));
            Ok(number
                .ok_or(format!("not a line of the counter: {line:?}"))?
                .parse()?)
        })
        .collect()
}

/// 1, 2, 3 … without a gap or a repetition.
pub(crate) fn without_gap(numbers: &[u64]) -> Result {
    for (at, number) in numbers.iter().enumerate() {
        ensure_eq!(*number, at as u64 + 1, "number of the line {}", at + 1);
    }
    Ok(())
}
