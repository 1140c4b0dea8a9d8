//! Checks that the runtime refuses a container correctly. The runtime must print the error in one
//! line, and must leave nothing of the container behind.

use crate::ensure;
use crate::support::bundle::{Bundle, runtime_program};
use crate::support::machine::{Output, Result};

/// Checks that the runtime's error message is one line and contains one of `words`.
pub(crate) fn complaint(output: &Output, words: &[&str]) -> Result {
    let text = output.stderr.trim_end();
    ensure!(
        !text.is_empty(),
        "the runtime prints no error message:\n{}",
        output.told()
    );
    // runc logs other lines before the error. For runc, the check therefore uses only the last
    // line.
    let line = if runtime_program().ends_with("rrun") {
        ensure!(
            !text.contains('\n'),
            "the error message has more than one line:\n{}",
            output.told()
        );
        ensure!(
            !text.contains("panicked"),
            "the runtime panicked:\n{}",
            output.told()
        );
        text
    } else {
        text.lines().last().unwrap_or_default()
    };
    ensure!(
        words.is_empty() || words.iter().any(|word| line.contains(word)),
        "the error message does not contain {}:\n{}",
        words.join(" or "),
        output.told()
    );
    Ok(())
}

/// Checks that `run` and `create` exit with 1 and leave no container behind. The printed error must
/// contain one of `words`.
pub(crate) fn refused(bundle: &Bundle, words: &[&str]) -> Result {
    for command in ["run", "create"] {
        let output = bundle.runtime(&[command, bundle.id()]).exits(1)?;
        complaint(&output, words)?;
        nothing_made(bundle, &output)?;
    }
    Ok(())
}

/// Checks that neither the container's directory nor its cgroup exists.
pub(crate) fn nothing_made(bundle: &Bundle, output: &Output) -> Result {
    ensure!(
        !bundle.root().join(bundle.id()).exists(),
        "the container's state directory still exists:\n{}",
        output.told()
    );
    ensure!(
        !bundle.cgroup().exists(),
        "the container's cgroup still exists:\n{}",
        output.told()
    );
    Ok(())
}
