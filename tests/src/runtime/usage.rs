//! Tests of correct and wrong use of the runtime's command line. The tests cover the help, the exit
//! codes, the messages that callers parse, and the log.

use std::fs;

use serde_json::{Value, json};

use crate::support::bundle::Bundle;
use crate::support::fields::{is_time, keys};
use crate::support::machine::{Output, Result, command, program_path, wait_for};
use crate::support::needs::{Need, Test};
use crate::{ensure, ensure_eq, test};

pub(crate) const TESTS: &[Test] = &[
    test!(help_describes_the_program_and_each_command),
    test!(bash_offers_each_completion_once, Need::Rrun, COMPLETIONS),
    test!(wrong_usage_is_refused_with_runcs_exit_codes_and_messages),
    test!(refusals_contain_runcs_messages),
    test!(the_log_format_is_text_or_json_and_each_call_appends_to_the_log),
    test!(kill_sends_sigterm_for_an_empty_signal_name),
];

const COMPLETIONS: Need = Need::File("/src/contrib/completions/bash/rrun");

const COMMANDS: [(&str, &[&str]); 15] = [
    (
        "create",
        &[
            "--bundle",
            "--console-socket",
            "--pidfd-socket",
            "--pid-file",
            "--no-pivot",
            "--no-new-keyring",
            "--preserve-fds",
        ],
    ),
    ("delete", &["--force"]),
    ("events", &["--interval", "--stats"]),
    (
        "exec",
        &[
            "--console-socket",
            "--pidfd-socket",
            "--cwd",
            "--env",
            "--tty",
            "--user",
            "--additional-gids",
            "--process",
            "--detach",
            "--pid-file",
            "--process-label",
            "--apparmor",
            "--no-new-privs",
            "--cap",
            "--preserve-fds",
            "--cgroup",
            "--ignore-paused",
        ],
    ),
    ("features", &[]),
    ("kill", &[]),
    ("list", &["--format", "--quiet"]),
    ("pause", &[]),
    ("ps", &["--format"]),
    ("resume", &[]),
    (
        "run",
        &[
            "--bundle",
            "--console-socket",
            "--pidfd-socket",
            "--detach",
            "--keep",
            "--pid-file",
            "--no-subreaper",
            "--no-pivot",
            "--no-new-keyring",
            "--preserve-fds",
        ],
    ),
    ("spec", &["--bundle", "--rootless"]),
    ("start", &[]),
    ("state", &[]),
    (
        "update",
        &[
            "--resources",
            "--blkio-weight",
            "--cpu-period",
            "--cpu-quota",
            "--cpu-burst",
            "--cpu-share",
            "--cpu-rt-period",
            "--cpu-rt-runtime",
            "--cpuset-cpus",
            "--cpuset-mems",
            "--cpu-idle",
            "--memory",
            "--memory-reservation",
            "--memory-swap",
            "--pids-limit",
            "--l3-cache-schema",
            "--mem-bw-schema",
        ],
    ),
];

fn help_describes_the_program_and_each_command() -> Result {
    let bundle = Bundle::new(&[])?;
    let global = [
        "--any-owner",
        "--debug",
        "--log",
        "--log-format",
        "--root",
        "--systemd-cgroup",
        "--rootless",
        "--help",
        "--version",
    ];
    for args in [
        &["--help"][..],
        &["-h"],
        &["help"],
        &["help", "--help"],
        &["help", "-h"],
        &[],
    ] {
        let output = bundle.runtime(args).ok()?;
        for (name, _) in COMMANDS {
            let listed = output
                .stdout
                .lines()
                .any(|line| line.split_whitespace().next() == Some(name));
            ensure!(
                listed,
                "the help does not list the command {name}:\n{}",
                output.told()
            );
        }
        for flag in global {
            ensure!(
                output.stdout.contains(flag),
                "the help does not list the flag {flag}:\n{}",
                output.told()
            );
        }
    }
    for (name, flags) in COMMANDS {
        for args in [[name, "--help"], [name, "-h"], ["help", name]] {
            let output = bundle.runtime(&args).ok()?;
            for flag in flags.iter().chain([&name]) {
                ensure!(
                    output.stdout.contains(flag),
                    "the help of the command {name} does not contain {flag}:\n{}",
                    output.told()
                );
            }
        }
    }
    Ok(())
}

/// Returns the completions that bash offers for the last word in `words`.
fn completions(program: &str, words: &[&str]) -> Result<Vec<String>> {
    const SCRIPT: &str = r#"
        . "/src/contrib/completions/bash/$1"
        function=_${1/-/_} COMP_WORDS=("${@:2}") COMP_CWORD=$(($# - 2)) COMP_LINE="${*:2}"
        "$function"
        printf '%s\n' "${COMPREPLY[@]}""#;
    let path = program_path(program)
        .ok_or("the program whose completions the test checks is not in PATH")?;
    let output = command("bash", ["-c", SCRIPT, "bash", program])
        .arg(path)
        .args(words)
        .ok()?;
    Ok(output
        .text()
        .split_whitespace()
        .map(str::to_owned)
        .collect())
}

fn bash_offers_each_completion_once() -> Result {
    let bundle = Bundle::new(&["sleep", "600"])?;
    bundle.start()?;
    let root = bundle.root().display().to_string();
    for (program, words) in [
        ("rrun", &["--"][..]),
        ("rrun", &["run", "--"]),
        ("rrun", &[""]),
        ("rrun-cri", &["--"]),
    ] {
        let mut all = completions(program, words)?;
        ensure!(
            all.len() > 5,
            "bash offers too few completions for the command {program} with the words {words:?}; the completions: {all:?}"
        );
        let count = all.len();
        all.sort();
        all.dedup();
        ensure_eq!(
            all.len(),
            count,
            "the number of distinct completions for the command {program} with the words {words:?}"
        );
    }
    let id = bundle.id();
    for (program, words, expected) in [
        ("rrun", &["--log-format", ""][..], &["text", "json"][..]),
        ("rrun", &["--roo"], &["--root", "--rootless"]),
        ("rrun", &["--root", &root, "kill", ""], &[id]),
        (
            "rrun",
            &["--root", &root, "kill", "--all", id, "K"],
            &["KILL"],
        ),
        ("rrun", &["kill", id, "SIGTE"], &["TERM"]),
        ("rrun", &["--root", &root, "state", ""], &[id]),
        ("rrun", &["--rootless", ""], &["true", "false", "auto"]),
        ("rrun", &["list", "--format", ""], &["table", "json"]),
        ("rrun", &["help", "fea"], &["features"]),
        (
            "rrun",
            &["create", "--bundle", "/src/Makef"],
            &["/src/Makefile"],
        ),
        ("rrun-cri", &["--listen", "/ru"], &[]),
        ("rrun-cri", &["config", ""], &["default", "check"]),
        ("rrun-cri", &["config", "check", "--"], &["--config"]),
    ] {
        ensure_eq!(
            completions(program, words)?,
            expected,
            "the completions for the command {program} with the words {words:?}"
        );
    }
    bundle.end()?;
    Ok(())
}

/// Checks that the last line of standard error contains `words`.
fn complains(output: &Output, words: &str) -> Result {
    let line = output.stderr.trim_end().lines().last().unwrap_or_default();
    ensure!(
        line.contains(words),
        "the last line of standard error does not contain {words:?}:\n{}",
        output.told()
    );
    Ok(())
}

fn wrong_usage_is_refused_with_runcs_exit_codes_and_messages() -> Result {
    let bundle = Bundle::new(&["exit", "0"])?;
    bundle.write_config()?;
    fs::create_dir(bundle.root())?;
    let no_flag = "flag provided but not defined: -nosuch";
    bundle.runtime(&["nosuch"]).exits(3)?;
    complains(&bundle.runtime(&["--nosuch", "list"]).exits(1)?, no_flag)?;
    for (name, _) in COMMANDS {
        let output = bundle.runtime(&[name, "--nosuch"]).exits(1)?;
        complains(&output, no_flag)?;
    }
    let without_arguments = ["features", "list", "spec"];
    let with_more_arguments = ["exec", "kill", "ps"];
    for (name, _) in COMMANDS
        .iter()
        .filter(|(name, _)| !without_arguments.contains(name))
    {
        let output = bundle.runtime(&[name]).exits(1)?;
        complains(&output, "argument")?;
        if !with_more_arguments.contains(name) {
            let output = bundle.runtime(&[name, "one", "two"]).exits(1)?;
            complains(&output, "argument")?;
        }
    }
    for name in without_arguments {
        complains(&bundle.runtime(&[name, "extra"]).exits(1)?, "argument")?;
    }
    bundle.runtime(&["kill", "one", "TERM", "three"]).exits(1)?;
    for (args, words) in [
        (&["run", "--bundle"][..], "flag needs an argument: -bundle"),
        (
            &["delete", "--force=maybe", "x"],
            "invalid boolean value \\\"maybe\\\" for -force",
        ),
        (&["list", "-f", "nosuch"], "format"),
        (&["--log-format", "nosuch", "list"], "log-format"),
        (&["--log", "/nowhere/log", "list"], "/nowhere/log"),
        (&["create", "-b", "/nowhere", "x"], "/nowhere"),
        (&["create", ""], "container id"),
    ] {
        complains(&bundle.runtime(args).exits(1)?, words)?;
    }
    // A boolean flag can also begin with one dash, and can have a value.
    bundle.runtime(&["delete", "-force", "x"]).ok()?;
    bundle.runtime(&["delete", "--force=true", "x"]).ok()?;
    bundle.runtime(&["delete", "--force=false", "x"]).exits(1)?;
    Ok(())
}

fn refusals_contain_runcs_messages() -> Result {
    let bundle = Bundle::new(&["sleep", "600"])?;
    let says = |args: &[&str], code: i32, words: &str| -> Result {
        complains(&bundle.call(args)?.exits(code)?, words)
    };
    for command in ["state", "start", "kill", "delete", "pause", "resume", "ps"] {
        says(&[command], 1, "container does not exist")?;
    }
    says(&["events", "--stats"], 1, "container does not exist")?;
    says(&["update", "--pids-limit=5"], 1, "container does not exist")?;
    complains(
        &bundle.runtime(&["exec", bundle.id(), "true"]).exits(255)?,
        "container does not exist",
    )?;
    bundle.start()?;
    says(&["resume"], 1, "container not paused")?;
    says(&["start"], 1, "already running")?;
    says(&["delete"], 1, "that is not stopped: running")?;
    bundle.call(&["pause"])?.ok()?;
    says(&["pause"], 1, "container not running")?;
    says(&["delete"], 1, "that is not stopped: paused")?;
    complains(
        &bundle.runtime(&["exec", bundle.id(), "true"]).exits(255)?,
        "cannot exec in a paused container (use --ignore-paused to override)",
    )?;
    bundle.call(&["resume"])?.ok()?;
    bundle.call(&["kill"])?.arg("KILL").ok()?;
    bundle.wait_status("stopped")?;
    says(&["kill"], 1, "container not running")?;
    says(&["pause"], 1, "container not running")?;
    says(&["resume"], 1, "container not paused")?;
    says(&["start"], 1, "that has stopped")?;
    says(&["update", "--pids-limit=5"], 1, "container not running")?;
    says(&["events", "--stats"], 1, "is not running")?;
    complains(
        &bundle.runtime(&["exec", bundle.id(), "true"]).exits(255)?,
        "cannot exec in a stopped container",
    )?;
    // `kill --all` does not fail if no process of the container is left.
    bundle.call(&["kill", "--all"])?.arg("KILL").ok()?;
    bundle.delete()?;
    Ok(())
}

/// Returns whether a line has the form `time="…" level=error msg="…"`.
fn is_text_line(line: &str) -> bool {
    let rest = line.strip_prefix("time=\"").unwrap_or_default();
    let (time, rest) = rest.split_once("\" level=").unwrap_or_default();
    let (level, message) = rest.split_once(" msg=\"").unwrap_or_default();
    is_time(time) && level == "error" && message.ends_with('"')
}

fn the_log_format_is_text_or_json_and_each_call_appends_to_the_log() -> Result {
    let bundle = Bundle::new(&["exit", "0"])?;
    for format in ["text", "json"] {
        let log = bundle.join(format);
        let path = log.to_string_lossy();
        for lines in 1..=2 {
            let output = bundle
                .runtime(&["--log", &path, "--log-format", format, "state", "nobody"])
                .exits(1)?;
            // The runtime also writes the message to standard error, without the other fields of
            // the log line.
            let text = fs::read_to_string(&log)?;
            let message = output.stderr.trim_end();
            ensure!(
                message.starts_with("container does not exist") && text.contains(message),
                "the log does not contain the error that was written to standard error:\n{}\nthe log:\n{text}",
                output.told()
            );
            ensure_eq!(
                text.lines().count(),
                lines,
                "the number of lines in the log"
            );
            for line in text.lines() {
                if format == "text" {
                    ensure!(
                        is_text_line(line),
                        "the log contains a line that is not in the text format: {line}"
                    );
                    continue;
                }
                let line: Value = serde_json::from_str(line)?;
                ensure_eq!(
                    keys(&line),
                    ["level", "msg", "time"],
                    "the fields of the log line {line}"
                );
                ensure_eq!(line["level"], "error", "the level of the log line");
                ensure_eq!(line["msg"], json!(message), "the message of the log line");
                ensure!(
                    line["time"].as_str().is_some_and(is_time),
                    "the field `time` of the log line is not in RFC 3339 format; the line: {line}"
                );
            }
        }
    }
    // Without a log file, the runtime writes log lines to standard error.
    let text = bundle.runtime(&["state", "nobody"]).exits(1)?;
    ensure!(
        is_text_line(text.stderr.trim_end()),
        "standard error is not a log line in the text format:\n{}",
        text.told()
    );
    let json = bundle
        .runtime(&["--log-format", "json", "state", "nobody"])
        .exits(1)?;
    let line: Value = serde_json::from_str(&json.stderr)?;
    ensure_eq!(
        keys(&line),
        ["level", "msg", "time"],
        "the fields of the log line {line}"
    );
    Ok(())
}

fn kill_sends_sigterm_for_an_empty_signal_name() -> Result {
    let bundle = Bundle::new(&["wait"])?;
    let mut running = bundle.run_in_background()?;
    wait_for("the program to print its first line", || {
        Ok(running.stdout().contains("ready").then_some(()))
    })?;
    bundle.call(&["kill"])?.arg("").ok()?;
    let output = running.end()?;
    ensure_eq!(
        output.stdout,
        "ready\nSIGTERM\n",
        "the program's output after `kill` with an empty signal name"
    );
    Ok(())
}
