//! The runtime's command line used well and wrongly: help, exit codes, the words of refusals that
//! callers look for, the log.

use std::fs;

use serde_json::{Value, json};

use crate::support::bundle::Bundle;
use crate::support::fields::{is_time, keys};
use crate::support::machine::{Output, Result, command, program_path, wait_for};
use crate::support::needs::{Need, Test};
use crate::{ensure, ensure_eq, test};

pub(crate) const TESTS: &[Test] = &[
    test!(help_is_there_for_all_and_for_each_command),
    test!(bash_completes_each_word_once, Need::Rrun, COMPLETIONS),
    test!(wrong_use_has_runcs_exit_codes_and_words),
    test!(refusals_have_runcs_words),
    test!(the_log_is_text_or_json_and_grows),
    test!(an_empty_signal_is_sigterm),
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

fn help_is_there_for_all_and_for_each_command() -> Result {
    let bundle = Bundle::new(&[])?;
    let global = [
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
            let there = output
                .stdout
                .lines()
                .any(|line| line.split_whitespace().next() == Some(name));
            ensure!(there, "no {name} in {}", output.told());
        }
        for flag in global {
            ensure!(
                output.stdout.contains(flag),
                "no {flag} in {}",
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
                    "no {flag} in {}",
                    output.told()
                );
            }
        }
    }
    Ok(())
}

/// What bash offers for the last of these words.
fn offered(program: &str, words: &[&str]) -> Result<Vec<String>> {
    const SCRIPT: &str = r#"
        . "/src/contrib/completions/bash/$1"
        function=_${1/-/_} COMP_WORDS=("${@:2}") COMP_CWORD=$(($# - 2)) COMP_LINE="${*:2}"
        "$function"
        printf '%s\n' "${COMPREPLY[@]}""#;
    let path = program_path(program).ok_or("no such program")?;
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

fn bash_completes_each_word_once() -> Result {
    let bundle = Bundle::new(&["sleep", "600"])?;
    bundle.start()?;
    let root = bundle.root().display().to_string();
    for (program, words) in [
        ("rrun", &["--"][..]),
        ("rrun", &["run", "--"]),
        ("rrun", &[""]),
        ("rrun-cri", &["--"]),
    ] {
        let mut all = offered(program, words)?;
        ensure!(all.len() > 5, "{program} {words:?} offers {all:?}");
        let count = all.len();
        all.sort();
        all.dedup();
        ensure_eq!(
            all.len(),
            count,
            "words offered once of {program} {words:?}"
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
        ensure_eq!(offered(program, words)?, expected, "{program} {words:?}");
    }
    bundle.end()?;
    Ok(())
}

/// The last line of standard error must hold this.
fn complains(output: &Output, words: &str) -> Result {
    let line = output.stderr.trim_end().lines().last().unwrap_or_default();
    ensure!(
        line.contains(words),
        "should say {words:?}:\n{}",
        output.told()
    );
    Ok(())
}

fn wrong_use_has_runcs_exit_codes_and_words() -> Result {
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
    let takes_none = ["features", "list", "spec"];
    let takes_more = ["exec", "kill", "ps"];
    for (name, _) in COMMANDS
        .iter()
        .filter(|(name, _)| !takes_none.contains(name))
    {
        let output = bundle.runtime(&[name]).exits(1)?;
        complains(&output, "argument")?;
        if !takes_more.contains(name) {
            let output = bundle.runtime(&[name, "one", "two"]).exits(1)?;
            complains(&output, "argument")?;
        }
    }
    for name in takes_none {
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
    // A flag's other forms.
    bundle.runtime(&["delete", "-force", "x"]).ok()?;
    bundle.runtime(&["delete", "--force=true", "x"]).ok()?;
    bundle.runtime(&["delete", "--force=false", "x"]).exits(1)?;
    Ok(())
}

fn refusals_have_runcs_words() -> Result {
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
    // Whom a signal for all of them finds no more is no error.
    bundle.call(&["kill", "--all"])?.arg("KILL").ok()?;
    bundle.delete()?;
    Ok(())
}

/// A line `time="…" level=error msg="…"`.
fn is_text_line(line: &str) -> bool {
    let rest = line.strip_prefix("time=\"").unwrap_or_default();
    let (time, rest) = rest.split_once("\" level=").unwrap_or_default();
    let (level, message) = rest.split_once(" msg=\"").unwrap_or_default();
    is_time(time) && level == "error" && message.ends_with('"')
}

fn the_log_is_text_or_json_and_grows() -> Result {
    let bundle = Bundle::new(&["exit", "0"])?;
    for format in ["text", "json"] {
        let log = bundle.join(format);
        let path = log.to_string_lossy();
        for lines in 1..=2 {
            let output = bundle
                .runtime(&["--log", &path, "--log-format", format, "state", "nobody"])
                .exits(1)?;
            // The sentence alone goes to standard error, too.
            let text = fs::read_to_string(&log)?;
            let said = output.stderr.trim_end();
            ensure!(
                said.starts_with("container does not exist") && text.contains(said),
                "{}\nthe log: {text}",
                output.told()
            );
            ensure_eq!(text.lines().count(), lines, "lines of the log");
            for line in text.lines() {
                if format == "text" {
                    ensure!(is_text_line(line), "in the log: {line}");
                    continue;
                }
                let line: Value = serde_json::from_str(line)?;
                ensure_eq!(keys(&line), ["level", "msg", "time"], "fields of {line}");
                ensure_eq!(line["level"], "error", "level");
                ensure_eq!(line["msg"], json!(said), "msg");
                ensure!(line["time"].as_str().is_some_and(is_time), "{line}");
            }
        }
    }
    // Without a file both go to standard error.
    let text = bundle.runtime(&["state", "nobody"]).exits(1)?;
    ensure!(is_text_line(text.stderr.trim_end()), "{}", text.told());
    let json = bundle
        .runtime(&["--log-format", "json", "state", "nobody"])
        .exits(1)?;
    let line: Value = serde_json::from_str(&json.stderr)?;
    ensure_eq!(keys(&line), ["level", "msg", "time"], "fields of {line}");
    Ok(())
}

fn an_empty_signal_is_sigterm() -> Result {
    let bundle = Bundle::new(&["wait"])?;
    let mut running = bundle.run_beside()?;
    wait_for("the program's first line", || {
        Ok(running.stdout().contains("ready").then_some(()))
    })?;
    bundle.call(&["kill"])?.arg("").ok()?;
    let output = running.end()?;
    ensure_eq!(output.stdout, "ready\nSIGTERM\n", "what it heard");
    Ok(())
}
