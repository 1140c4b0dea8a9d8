//! Runs a test, and compares the machine before and after it. A test that fails is repeated once,
//! immediately. A test that passes the second time counts as passed, and its name is reported. So
//! one unlucky wait does not fail the run, and does not stay hidden.

use std::fs;
use std::path::Path;
use std::sync::Mutex;
use std::time::{Duration, Instant};

use libtest_mimic::{Completion, Failed};

use crate::ensure;
use crate::support::leak_check::Snapshot;
use crate::support::needs::Test;

/// The directory with one file for each flaky test. The views keep /out after a run.
const KEPT: &str = "/out/flaky";

struct Flaky {
    name: &'static str,
    first: String,
}

static FLAKY: Mutex<Vec<Flaky>> = Mutex::new(Vec::new());
static TOOK: Mutex<Vec<(Duration, &'static str)>> = Mutex::new(Vec::new());

/// Runs one test, and repeats it once if it fails.
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
            let both = format!("{second}\n\nThe attempt before this one failed, too:\n{first}");
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

/// Runs a test, and repeats it once if it fails. `look` records what is on the machine before the
/// test, and `unchanged` compares the machine with that record afterwards.
fn attempts<M>(
    run: impl Fn() -> Result<(), Failed>,
    look: impl Fn() -> M,
    unchanged: impl Fn(&M) -> Result<(), Failed>,
) -> Outcome {
    let before = look();
    let (first, before) = match run() {
        Ok(()) => match unchanged(&before) {
            Ok(()) => return Outcome::Passed,
            // The second attempt is compared with the machine before the first one. Otherwise a
            // file that the test leaves at the same path each time would count as there before.
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
    let left = before.leavings();
    ensure!(left.is_empty(), "left behind:\n  {}", left.join("\n  "));
    let lost = before.losses();
    ensure!(
        lost.is_empty(),
        "took away what was not its own:\n  {}",
        lost.join("\n  ")
    );
    Ok(())
}

/// Prints what `tests/run` collects after all tests: `flaky: NAME`, with the output of the failed
/// attempt indented below it, and `took SECONDS NAME` for the slowest ones. Both outputs of a
/// flaky test are kept in /out/flaky, too.
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

    /// A test that fails the first `times` times.
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
    fn a_test_that_passes_is_run_once() {
        let runs = Cell::new(0);
        let count = || {
            runs.set(runs.get() + 1);
            Ok(())
        };
        assert!(matches!(attempts_of(count), Outcome::Passed));
        assert_eq!(runs.get(), 1);
    }

    #[test]
    fn a_test_that_fails_once_passes_and_its_first_failure_is_kept() {
        let outcome = attempts_of(fails(1));
        assert!(matches!(outcome, Outcome::PassedSecond { first } if first == "attempt 1"));
    }

    #[test]
    fn a_test_that_fails_twice_fails_with_both_failures() {
        let outcome = attempts_of(fails(2));
        let Outcome::Failed { first, second } = outcome else {
            panic!("it did not fail");
        };
        assert_eq!((first, second), ("attempt 1".into(), "attempt 2".into()));
    }

    #[test]
    fn a_test_that_always_leaves_the_same_file_fails() {
        let files = RefCell::new(Vec::new());
        let leave = || {
            let mut files = files.borrow_mut();
            if files.is_empty() {
                files.push("left");
            }
            Ok(())
        };
        let unchanged = |before: &Vec<&str>| {
            ensure!(*before == *files.borrow(), "left behind");
            Ok(())
        };
        let outcome = attempts(leave, || files.borrow().clone(), unchanged);
        assert!(matches!(outcome, Outcome::Failed { .. }));
    }
}
