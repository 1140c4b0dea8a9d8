//! How the runtime refuses: one line that says what is wrong, and nothing is left of the container.

use crate::ensure;
use crate::support::bundle::{Bundle, runtime_program};
use crate::support::machine::{Output, Result};

/// The complaint must be one line and hold one of these words.
pub(crate) fn complaint(output: &Output, words: &[&str]) -> Result {
    let text = output.stderr.trim_end();
    ensure!(
        !text.is_empty(),
        "there is no word of what is wrong:\n{}",
        output.told()
    );
    // runc says things besides.
    let line = if runtime_program().ends_with("rrun") {
        ensure!(
            !text.contains('\n'),
            "more than one line:\n{}",
            output.told()
        );
        ensure!(!text.contains("panicked"), "a panic:\n{}", output.told());
        text
    } else {
        text.lines().last().unwrap_or_default()
    };
    ensure!(
        words.is_empty() || words.iter().any(|word| line.contains(word)),
        "does not say {}:\n{}",
        words.join(" or "),
        output.told()
    );
    Ok(())
}

/// `run` and `create` fail with 1, say one of these words, and no container is there.
pub(crate) fn refused(bundle: &Bundle, words: &[&str]) -> Result {
    for command in ["run", "create"] {
        let output = bundle.runtime(&[command, bundle.id()]).exits(1)?;
        complaint(&output, words)?;
        nothing_made(bundle, &output)?;
    }
    Ok(())
}

/// Neither the container's directory nor its cgroup is there.
pub(crate) fn nothing_made(bundle: &Bundle, output: &Output) -> Result {
    ensure!(
        !bundle.root().join(bundle.id()).exists(),
        "its state is left:\n{}",
        output.told()
    );
    ensure!(
        !bundle.cgroup().exists(),
        "its cgroup is left:\n{}",
        output.told()
    );
    Ok(())
}
