//! Tests of the standard streams of a container's process: of its terminal, while the runtime in the
//! foreground copies data between the terminal and its own standard streams, and of the streams of
//! the runtime's caller.

use std::fs::File;
use std::os::fd::AsRawFd as _;
use std::os::unix::fs::MetadataExt as _;
use std::process::{Command, Stdio};

use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use serde_json::json;

use crate::support::bundle::{Bundle, runtime_program};
use crate::support::machine::{Result, wait_for};
use crate::support::needs::{Need, Test};
use crate::{ensure, ensure_eq, test};

pub(crate) const TESTS: &[Test] = &[
    test!(exec_copies_more_input_than_the_terminal_stores, Need::Rrun),
    test!(
        a_signal_reaches_a_program_that_does_not_read_its_terminal,
        Need::Rrun
    ),
    test!(
        a_signal_reaches_a_program_whose_output_nobody_reads,
        Need::Rrun
    ),
    test!(
        exec_exits_although_another_process_writes_to_the_terminal,
        Need::Rrun
    ),
    test!(
        exec_copies_all_output_that_the_program_wrote_before_its_exit,
        Need::Rrun
    ),
    test!(
        output_follows_after_a_program_has_reopened_its_terminal,
        Need::Rrun
    ),
    test!(
        the_terminal_and_the_files_of_the_runtimes_caller_keep_their_owner,
        Need::Rrun
    ),
    test!(a_user_can_open_its_pipes_and_its_terminal_again),
];

/// Returns lines with more bytes than the kernel stores for a terminal.
fn many_lines() -> String {
    "a line\n".repeat(400_000) + "the last line has no end"
}

fn started(args: &[&str]) -> Result<Bundle> {
    let bundle = Bundle::new(args)?;
    bundle.start()?;
    Ok(bundle)
}

fn exec_copies_more_input_than_the_terminal_stores() -> Result {
    let bundle = started(&["sleep", "600"])?;
    let input = many_lines();
    let output = bundle
        .exec(&["--tty"], &["cat"])
        .stdin(input.clone())
        .ok()?;
    // The output contains the lines that the program printed, and lines that the terminal echoed.
    ensure!(
        output.stdout.len() >= input.len(),
        "the output of `exec --tty` has only {} bytes",
        output.stdout.len()
    );
    bundle.end()?;
    Ok(())
}

fn a_signal_reaches_a_program_that_does_not_read_its_terminal() -> Result {
    let bundle = started(&["sleep", "600"])?;
    let mut running = bundle
        .exec(&["--tty"], &["wait"])
        .stdin(many_lines())
        .start()?;
    wait_for("the program to print its first line", || {
        Ok(running.stdout().contains("ready").then_some(()))
    })?;
    running.signal(Signal::SIGTERM);
    ensure_eq!(
        running.end()?.code,
        0,
        "the exit code of `exec` after SIGTERM"
    );
    bundle.end()?;
    Ok(())
}

fn a_signal_reaches_a_program_whose_output_nobody_reads() -> Result {
    let bundle = started(&["sleep", "600"])?;
    let mut runtime = Command::new(runtime_program())
        .args(bundle.flags())
        .args(["exec", "--tty", bundle.id(), "/bin/inside", "count", "0"])
        .stdin(Stdio::null())
        .stdout(Stdio::piped())
        .spawn()?;
    let stdout = runtime.stdout.take().ok_or("the runtime has no pipe")?;
    let mut before = 0;
    wait_for("the pipe to become full", || {
        let mut stored: nix::libc::c_int = 0;
        // SAFETY: FIONREAD writes an integer to `stored`.
        nix::errno::Errno::result(unsafe {
            nix::libc::ioctl(stdout.as_raw_fd(), nix::libc::FIONREAD, &mut stored)
        })?;
        let is_full = stored > 0 && stored == before;
        before = stored;
        Ok(is_full.then_some(()))
    })?;
    kill(Pid::from_raw(runtime.id().try_into()?), Signal::SIGTERM)?;
    let status = wait_for("the runtime to exit", || Ok(runtime.try_wait()?))?;
    ensure_eq!(
        status.code(),
        Some(143),
        "the exit code of `exec` after SIGTERM"
    );
    bundle.end()?;
    Ok(())
}

fn exec_exits_although_another_process_writes_to_the_terminal() -> Result {
    let bundle = started(&["sleep", "600"])?;
    bundle.exec(&["--tty"], &["leave-writer", "3"]).exits(3)?;
    bundle.end()?;
    Ok(())
}

fn exec_copies_all_output_that_the_program_wrote_before_its_exit() -> Result {
    let bundle = started(&["sleep", "600"])?;
    let output = bundle.exec(&["--tty"], &["burst", "100000"]).ok()?;
    ensure_eq!(
        (output.stdout.lines().count(), output.stdout.lines().last()),
        (100_000, Some("line 100000")),
        "the number of lines in the output of `exec --tty`, and the last line"
    );
    bundle.end()?;
    Ok(())
}

fn output_follows_after_a_program_has_reopened_its_terminal() -> Result {
    let mut bundle = Bundle::new(&["reopen", "/dev/console"])?;
    bundle.set("/process/terminal", json!(true));
    let output = bundle.run()?;
    ensure_eq!(output.stdout, "before\nafter\n", "the output of `run`");
    Ok(())
}

/// If the owner changed, the user of the host with the id of the container's user could read what
/// the runtime's caller types.
fn the_terminal_and_the_files_of_the_runtimes_caller_keep_their_owner() -> Result {
    let mut bundle = Bundle::new(&["exit", "0"])?;
    bundle.set("/process/user", json!({ "uid": 1000, "gid": 1000 }));
    bundle.write_config()?;
    let other = started(&["sleep", "600"])?;
    let pair = nix::pty::openpty(None, None)?;
    let terminal = File::from(pair.slave);
    let file = File::create(bundle.join("file"))?;
    nix::unistd::mkfifo(&bundle.join("fifo"), nix::sys::stat::Mode::S_IRWXU)?;
    let fifo = File::options()
        .read(true)
        .write(true)
        .open(bundle.join("fifo"))?;
    let exec = [
        "exec",
        "--user",
        "1000",
        other.id(),
        "/bin/inside",
        "exit",
        "0",
    ];
    for (flags, args) in [
        (bundle.flags(), &["run", bundle.id()][..]),
        (other.flags(), &exec),
    ] {
        let status = Command::new(runtime_program())
            .args(flags)
            .args(args)
            .current_dir(bundle.path())
            .stdin(terminal.try_clone()?)
            .stdout(file.try_clone()?)
            .stderr(fifo.try_clone()?)
            .status()?;
        ensure_eq!(status.code(), Some(0), "the exit code of {args:?}");
        for (name, stream) in [("terminal", &terminal), ("file", &file), ("FIFO", &fifo)] {
            ensure_eq!(
                stream.metadata()?.uid(),
                nix::unistd::geteuid().as_raw(),
                "the owner of the {name} after {args:?}"
            );
        }
    }
    other.end()?;
    Ok(())
}

fn a_user_can_open_its_pipes_and_its_terminal_again() -> Result {
    let bundle = started(&["sleep", "600"])?;
    for options in [&["--user", "1000"][..], &["--user", "1000", "--tty"]] {
        let output = bundle
            .exec(options, &["write", "/dev/stdout", "text"])
            .ok()?;
        ensure_eq!(
            output.stdout,
            "text",
            "the output of `exec` with {options:?}"
        );
    }
    bundle.end()?;
    Ok(())
}
