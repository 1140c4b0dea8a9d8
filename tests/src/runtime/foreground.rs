//! Tests of the runtime in the foreground, which is then the parent of the container's process. A
//! process can make its parent trace it, and another process can trace it instead.

use std::fs;

use nix::sys::signal::Signal;
use serde_json::{Value, json};

use crate::support::bundle::{Bundle, runtime_program};
use crate::support::machine::{Result, Run, Running, command, wait_for};
use crate::support::needs::{Need, Test};
use crate::{ensure_eq, test};

pub(crate) const TESTS: &[Test] = &[
    test!(
        run_and_exec_end_although_they_trace_a_thread_of_the_process,
        Need::Rrun
    ),
    test!(
        signals_reach_a_process_although_the_runtime_traces_thousands_of_its_threads,
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
    test!(
        a_container_ignores_no_signal_that_the_runtimes_caller_ignores,
        Need::Rrun
    ),
    test!(
        a_hangup_that_the_runtime_ignores_does_not_reach_the_container,
        Need::Rrun
    ),
    test!(
        a_signal_ends_exec_although_the_container_stops_its_process,
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

fn signals_reach_a_process_although_the_runtime_traces_thousands_of_its_threads() -> Result {
    let bundle = Bundle::new(&["sleep", "600"])?;
    bundle.start()?;
    for options in [&[][..], &["--tty"]] {
        let mut running = bundle.exec(options, &["traced", "flood"]).start()?;
        wait_for_line(&mut running, "ready")?;
        running.signal(Signal::SIGTERM);
        ensure_eq!(
            running.end()?.code,
            143,
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

/// Returns a command that calls the runtime. The runtime's caller ignores the signals `ignored`.
fn ignoring(bundle: &Bundle, ignored: &str, args: &[&str]) -> Result<Run> {
    bundle.write_config()?;
    let script = format!("trap '' {ignored}; exec \"$@\"");
    let runtime = command("sh", ["-c", &script, "sh", &runtime_program()]);
    Ok(runtime.args(bundle.flags()).args(args).dir(bundle.path()))
}

fn a_container_ignores_no_signal_that_the_runtimes_caller_ignores() -> Result {
    let all = "HUP INT QUIT USR1 USR2 TERM CHLD TSTP TTIN TTOU XFSZ PWR";
    // The program `inside` itself ignores SIGPIPE, like every Rust program. Each signal is a bit of
    // the number. The real-time signals begin with 32, and the runtime does not reset them.
    let sigpipe = 1 << (Signal::SIGPIPE as i32 - 1);
    let standard = |text: &str| -> Result<u64> { Ok(u64::from_str_radix(text, 16)? & 0x7fff_ffff) };
    let ignored =
        |report: &Value| standard(report["status"]["SigIgn"].as_str().unwrap_or_default());
    let mut bundle = Bundle::new(&["report"])?;
    bundle.set("/hooks/prestart", json!([{ "path": "/bin/true" }]));
    let report = ignoring(&bundle, all, &["run", bundle.id()])?
        .ok()?
        .json()?;
    ensure_eq!(
        ignored(&report)?,
        sigpipe,
        "the signals that the program of `run` ignores"
    );
    bundle.args(&["exit", "3"]);
    ignoring(&bundle, all, &["run", bundle.id()])?.exits(3)?;

    bundle.args(&["sleep", "600"]);
    ignoring(&bundle, all, &["create", bundle.id()])?.ok()?;
    ignoring(&bundle, all, &["start", bundle.id()])?.ok()?;
    let exec = ["exec", bundle.id(), "/bin/inside", "report"];
    let report = ignoring(&bundle, all, &exec)?.ok()?.json()?;
    let first = fs::read_to_string(format!("/proc/{}/status", bundle.pid()?))?;
    let of_first = first
        .lines()
        .find_map(|line| line.strip_prefix("SigIgn:\t"));
    ensure_eq!(
        standard(of_first.unwrap_or_default())?,
        sigpipe,
        "the signals that the container's first process ignores"
    );
    ensure_eq!(
        ignored(&report)?,
        sigpipe,
        "the signals that the program of `exec` ignores"
    );
    bundle.end()?;
    Ok(())
}

/// nohup(1) makes a program ignore SIGHUP.
fn a_hangup_that_the_runtime_ignores_does_not_reach_the_container() -> Result {
    let bundle = Bundle::new(&["wait"])?;
    let mut running = ignoring(&bundle, "HUP", &["run", bundle.id()])?.start()?;
    wait_for_line(&mut running, "ready")?;
    for signal in [Signal::SIGHUP, Signal::SIGUSR1, Signal::SIGTERM] {
        running.signal(signal);
        // The runtime forwards SIGHUP before SIGUSR1, because SIGHUP has the lower number.
        if signal != Signal::SIGHUP {
            wait_for_line(&mut running, signal.as_str())?;
        }
    }
    ensure_eq!(
        running.end()?.stdout,
        "ready\nSIGUSR1\nSIGTERM\n",
        "the signals that the container received"
    );
    Ok(())
}

fn a_signal_ends_exec_although_the_container_stops_its_process() -> Result {
    let bundle = Bundle::new(&["stop-others"])?;
    let mut container = bundle.run_in_background()?;
    wait_for_line(&mut container, "ready")?;
    // The container can also stop a process that executes its program already.
    let running = wait_for("the container to stop a process of the runtime", || {
        let mut running = bundle.exec(&[], &["exit", "0"]).start()?;
        Ok(is_stopped_in_setup(&mut running)?.then_some(running))
    })?;
    running.signal(Signal::SIGTERM);
    let output = running.end()?;
    ensure_eq!(output.code, 255, "the exit code of `exec` after SIGTERM");
    output
        .fails_with("signal 15 arrived, and the container's process was not ready 500 ms later")?;
    bundle.end()?;
    Ok(())
}

/// Waits until the runtime has exited, or until its child is stopped. Returns whether the child is
/// stopped before it executes its program.
fn is_stopped_in_setup(running: &mut Running) -> Result<bool> {
    let parent = running.pid();
    let children = format!("/proc/{parent}/task/{parent}/children");
    wait_for("the runtime to exit, or its child to be stopped", || {
        if !running.lives() {
            return Ok(Some(false));
        }
        let children = fs::read_to_string(&children).unwrap_or_default();
        let stat = children
            .split_whitespace()
            .next()
            .map(|child| fs::read_to_string(format!("/proc/{child}/stat")).unwrap_or_default());
        let stat = stat.unwrap_or_default();
        Ok(stat.contains(") T ").then(|| stat.contains("(rrun)")))
    })
}
