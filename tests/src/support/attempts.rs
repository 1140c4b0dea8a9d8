//! Runs a test, and compares the machine before and after the test. A test that fails is repeated
//! once, immediately. A test that passes on its second attempt counts as passed, but the report
//! lists it as flaky. So a single random timeout does not fail the whole run, but is visible in the
//! report.

use std::fs;
use std::path::Path;
use std::sync::Mutex;
use std::time::{Duration, Instant};

use libtest_mimic::{Completion, Failed};

use crate::ensure;
use crate::support::leak_check::Snapshot;
use crate::support::needs::Test;

/// The directory that contains one file for each flaky test. `tests/native/run` and `tests/vm/run`
/// keep /out after a run.
const KEPT: &str = "/out/flaky";

struct Flaky {
    name: &'static str,
    first: String,
}

static FLAKY: Mutex<Vec<Flaky>> = Mutex::new(Vec::new());
static TOOK: Mutex<Vec<(Duration, &'static str)>> = Mutex::new(Vec::new());

/// Runs one test, and repeats the test once if it fails.
pub(crate) fn run(name: &'static str, test: &Test) -> Result<Completion, Failed> {
    if let Some(lacking) = test.needs.iter().find_map(|need| need.lacking()) {
        return Ok(Completion::ignored_with(lacking));
    }
    let started = Instant::now();
    let outcome = attempts(test.run, Snapshot::look, left_unchanged);
    if let Ok(mut took) = TOOK.lock() {
        took.push((started.elapsed(), name));
    }
    match outcome {
        Outcome::Passed => {}
        Outcome::PassedSecond { first } => {
            if let Ok(mut flaky) = FLAKY.lock() {
                flaky.push(Flaky { name, first });
            }
        }
        Outcome::Failed { first, second } => {
            let both = format!("{second}\n\nThe first attempt failed, too:\n{first}");
            return Err(both.into());
        }
    }
    Ok(Completion::Completed)
}

enum Outcome {
    Passed,
    PassedSecond { first: String },
    Failed { first: String, second: String },
}

/// Runs a test, and repeats the test once if it fails. Before the test, `look` records the state of
/// the machine. After the test, `unchanged` compares the machine with this record.
fn attempts<M>(
    run: impl Fn() -> Result<(), Failed>,
    look: impl Fn() -> M,
    unchanged: impl Fn(&M) -> Result<(), Failed>,
) -> Outcome {
    let before = look();
    let (first, before) = match run() {
        Ok(()) => match unchanged(&before) {
            Ok(()) => return Outcome::Passed,
            // After the second attempt, the machine is compared with its state before the first
            // attempt. If both attempts leave a file at the same path, a comparison with the state
            // between the attempts would not find this file.
            Err(first) => (first, before),
        },
        Err(first) => (first, look()),
    };
    let first = message(&first);
    match run().and_then(|()| unchanged(&before)) {
        Ok(()) => Outcome::PassedSecond { first },
        Err(second) => Outcome::Failed {
            first,
            second: message(&second),
        },
    }
}

fn message(failed: &Failed) -> String {
    failed.message().unwrap_or_default().to_owned()
}

fn left_unchanged(before: &Snapshot) -> Result<(), Failed> {
    let left = before.leftovers();
    ensure!(
        left.is_empty(),
        "the test left these entries behind:\n  {}",
        left.join("\n  ")
    );
    let lost = before.losses();
    ensure!(
        lost.is_empty(),
        "the test removed entries that it did not create:\n  {}",
        lost.join("\n  ")
    );
    Ok(())
}

/// Prints the lines that `tests/run` collects. The harness calls this function after all tests. For
/// each flaky test, the function prints a line that begins with `flaky:` and contains the test's
/// name. The indented output of the failed attempt follows this line. The function also writes this
/// output to a file in /out/flaky. Lines that begin with `took` contain the times and names of the
/// slowest tests.
pub(crate) fn report() {
    for flaky in FLAKY.lock().iter().flat_map(|flaky| flaky.iter()) {
        println!("flaky: {}", flaky.name);
        for line in flaky.first.lines() {
            println!("    {line}");
        }
        let text = format!(
            "The first attempt failed:\n{}\n\nThe second attempt passed.\n",
            flaky.first
        );
        if Path::new("/out").is_dir() && fs::create_dir_all(KEPT).is_ok() {
            let _ = fs::write(format!("{KEPT}/{}.txt", flaky.name), text);
        }
    }
    if let Ok(mut took) = TOOK.lock() {
        took.sort_unstable_by(|one, other| other.cmp(one));
        for (took, name) in took.iter().take(12) {
            println!("took {:.1} s: {name}", took.as_secs_f64());
        }
    }
}

#[cfg(test)]
mod tests {
    use std::cell::{Cell, RefCell};

    use super::*;

    /// Returns a test that fails on its first `times` attempts.
    fn fails(times: u32) -> impl Fn() -> Result<(), Failed> {
        let attempt = Cell::new(0);
        move || {
            attempt.set(attempt.get() + 1);
            ensure!(attempt.get() > times, "attempt {}", attempt.get());
            Ok(())
        }
    }

    fn attempts_of(run: impl Fn() -> Result<(), Failed>) -> Outcome {
        attempts(run, || (), |()| Ok(()))
    }

    #[test]
    fn a_test_that_passes_runs_only_once() {
        let runs = Cell::new(0);
        let count = || {
            runs.set(runs.get() + 1);
            Ok(())
        };
        assert!(matches!(attempts_of(count), Outcome::Passed));
        assert_eq!(runs.get(), 1);
    }

    #[test]
    fn if_a_test_passes_on_its_second_attempt_its_first_failure_is_recorded() {
        let outcome = attempts_of(fails(1));
        assert!(matches!(outcome, Outcome::PassedSecond { first } if first == "attempt 1"));
    }

    #[test]
    fn a_test_that_fails_twice_reports_both_failures() {
        let outcome = attempts_of(fails(2));
        let Outcome::Failed { first, second } = outcome else {
            panic!("the test did not fail twice");
        };
        assert_eq!((first, second), ("attempt 1".into(), "attempt 2".into()));
    }

    #[test]
    fn a_test_fails_if_both_attempts_leave_the_same_file() {
        let files = RefCell::new(Vec::new());
        let leave = || {
            let mut files = files.borrow_mut();
            if files.is_empty() {
                files.push("left");
            }
            Ok(())
        };
        let unchanged = |before: &Vec<&str>| {
            ensure!(*before == *files.borrow(), "the test left a file behind");
            Ok(())
        };
        let outcome = attempts(leave, || files.borrow().clone(), unchanged);
        assert!(matches!(outcome, Outcome::Failed { .. }));
    }
}
