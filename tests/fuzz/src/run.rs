//! Runs a target in this process, and records each input before the target gets it. If the target
//! kills the process, the parent finds the input in the record.

use std::fs::File;
use std::os::unix::fs::FileExt;
use std::time::{Duration, Instant};

use super::Target;
use super::change::{Numbers, changed};

/// The result of a run that ended without a finding.
pub struct Report {
    /// The number of inputs that the target got.
    pub executions: u64,
}

/// Passes the corpus to the target, and then changed inputs until `time` has passed. Writes each
/// input to `record` first, after the input's length as eight bytes.
///
/// # Errors
/// An error means that the corpus cannot be read or the record cannot be written.
pub fn run(target: Target, time: Duration, seed: u64, record: &File) -> std::io::Result<Report> {
    let corpus = target.corpus()?;
    let mut executions = 0;
    let mut execute = |input: &[u8]| -> std::io::Result<()> {
        let length = u64::try_from(input.len()).unwrap_or(u64::MAX);
        record.write_all_at(&[&length.to_le_bytes(), input].concat(), 0)?;
        (target.function)(input);
        executions += 1;
        Ok(())
    };
    let end = Instant::now() + time;
    for input in &corpus {
        execute(input)?;
    }
    let mut numbers = Numbers::new(seed);
    while Instant::now() < end {
        execute(&changed(&corpus, &mut numbers))?;
    }
    Ok(Report { executions })
}
