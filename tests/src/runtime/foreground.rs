//! Tests of the runtime in the foreground, which is then the parent of the container's process. A
//! process can make its parent trace it, and another process can trace it instead.

use nix::sys::signal::Signal;
use serde_json::json;

use crate::support::bundle::Bundle;
use crate::support::machine::{Result, Running, wait_for};
use crate::support::needs::{Need, Test};
use crate::{ensure_eq, test};

pub(crate) const TESTS: &[Test] = &[
    test!(
        run_and_exec_end_although_they_trace_a_thread_of_the_process,
        Need::Rrun
    ),
    test!(
        a_stopped_process_that_exec_traces_has_not_exited,
        Need::Rrun
    ),
    test!(
        exec_ends_although_the_container_traces_its_process,
        Need::Rrun
    ),
];

fn wait_for_line(running: &mut Running, line: &str) -> Result {
    wait_for(&format!("the program to print the line {line}"), || {
        let is_printed = running.stdout().lines().any(|it| it.trim() == line);
        Ok(is_printed.then_some(()))
    })
}

fn run_and_exec_end_although_they_trace_a_thread_of_the_process() -> Result {
    let mut bundle = Bundle::new(&["traced", "exit", "7"])?;
    for terminal in [false, true] {
        bundle.set("/process/terminal", json!(terminal));
        bundle.call(&["run"])?.exits(7)?;
    }
    bundle
        .args(&["sleep", "600"])
        .set("/process/terminal", json!(false))
        .start()?;
    for options in [&[][..], &["--tty"]] {
        bundle.exec(options, &["traced", "exit", "7"]).exits(7)?;
        let mut running = bundle.exec(options, &["traced", "wait"]).start()?;
        wait_for_line(&mut running, "ready")?;
        running.signal(Signal::SIGTERM);
        ensure_eq!(
            running.end()?.code,
            0,
            "the exit code of `exec` after SIGTERM"
        );
    }
    bundle.end()?;
    Ok(())
}

fn a_stopped_process_that_exec_traces_has_not_exited() -> Result {
    for options in [&[][..], &["--tty"]] {
        let bundle = Bundle::new(&["sleep", "600"])?;
        bundle.start()?;
        let mut running = bundle.exec(options, &["traced", "stop"]).start()?;
        wait_for_line(&mut running, "stops")?;
        // A signal makes the runtime look whether its child has exited.
        running.signal(Signal::SIGUSR2);
        bundle.end()?;
        ensure_eq!(
            running.end()?.code,
            137,
            "the exit code of `exec` after the container was killed"
        );
    }
    Ok(())
}

fn exec_ends_although_the_container_traces_its_process() -> Result {
    let mut bundle = Bundle::new(&["traced", "hold"])?;
    for set in ["bounding", "effective", "permitted"] {
        bundle.set(
            &format!("/process/capabilities/{set}"),
            json!(["CAP_SYS_PTRACE"]),
        );
    }
    let mut container = bundle.run_in_background()?;
    for (traced, options) in [&[][..], &["--tty"]].into_iter().enumerate() {
        let mut running = bundle.exec(options, &["wait"]).start()?;
        wait_for_line(&mut running, "ready")?;
        wait_for("the container to trace the process", || {
            Ok((container.stdout().lines().count() > traced).then_some(()))
        })?;
        running.signal(Signal::SIGTERM);
        running
            .end()?
            .fails_with("another process traces it and does not read its exit status")?;
    }
    bundle.end()?;
    Ok(())
}
