//! Logs in the CRI's format: at full speed, through rotations and restarts of the server, in
//! parts, of both streams, of a terminal.

use std::fs;

use rrun_proto::v1::ReopenContainerLogRequest;
use serde_json::json;

use crate::support::calls::Calls;
use crate::support::counted_lines::{line_numbers, without_gap};
use crate::support::machine::{Result, rounds, wait_for};
use crate::support::needs::{Need, Test};
use crate::support::node::{A_NODE, BUSYBOX, is_rrun, on_a_node};
use crate::{ensure, ensure_eq, test};

pub(crate) const TESTS: &[Test] = &[
    test!(
        at_full_speed_no_line_is_lost_by_rotations_and_a_killed_server,
        A_NODE
    ),
    test!(
        a_container_that_writes_much_gets_a_larger_pipe,
        A_NODE,
        Need::RrunCri
    ),
    test!(
        parts_of_lines_are_told_from_whole_ones_in_each_stream,
        A_NODE
    ),
    test!(a_terminals_log_has_one_stream, A_NODE),
];

fn at_full_speed_no_line_is_lost_by_rotations_and_a_killed_server() -> Result {
    on_a_node(|node| {
        node.pull(BUSYBOX)?;
        let pod = node.pod("fast");
        let pod_id = node.runp(&pod)?;
        let lines = rounds(300_000, 3_000_000);
        let burst = ["/inside", "burst", &lines.to_string()];
        let id = node.run(&pod_id, &pod, &node.container("writes", &burst))?;
        let log = node.join("logs/fast/writes.log");
        let mut old = Vec::new();
        for round in 0..8 {
            let rotated = node.join(&format!("logs/fast/writes.log.{round}"));
            fs::rename(&log, &rotated)?;
            old.push(rotated);
            // Between the renaming and the opening, as it may happen.
            if round % 2 == 1 && is_rrun() {
                node.kill_server()?;
                node.start_server()?;
            }
            let calls = Calls::new(node)?;
            let mut client = calls.runtime();
            let request = ReopenContainerLogRequest {
                container_id: id.clone(),
            };
            let reopened = calls.wait(async move { client.reopen_container_log(request).await })?;
            match reopened {
                Ok(_) => {
                    wait_for("the new file", || Ok(log.exists().then_some(())))?;
                }
                // It has ended meanwhile; a last file is not opened.
                Err(status) => {
                    ensure!(
                        status.message().contains("not running"),
                        "reopen: {status:?}"
                    );
                    break;
                }
            }
        }
        node.exited(&id)?;
        if log.exists() {
            old.push(log);
        }
        let mut all = String::new();
        for file in &old {
            let text = fs::read_to_string(file)?;
            ensure!(
                text.is_empty() || text.ends_with('\n'),
                "{} ends in the middle of a line",
                file.display()
            );
            all += &text;
        }
        let numbers = line_numbers(&all)?;
        ensure_eq!(numbers.len() as u64, lines, "lines");
        without_gap(&numbers)
    })
}

/// What stands behind the time: stream, tag and text of each line.
fn parts(log: &str) -> Result<Vec<(&str, &str, &str)>> {
    log.lines()
        .map(|line| {
            let mut words = line.splitn(4, ' ').skip(1);
            match (words.next(), words.next(), words.next()) {
                (Some(stream), Some(tag), Some(text)) => Ok((stream, tag, text)),
                _ => Err(format!("no line of a CRI log: {line:?}").into()),
            }
        })
        .collect()
}

/// It writes while the monitor sleeps; one that writes little costs no more than it did.
fn a_container_that_writes_much_gets_a_larger_pipe() -> Result {
    on_a_node(|node| {
        node.pull(BUSYBOX)?;
        let pod = node.pod("pipes");
        let pod_id = node.runp(&pod)?;
        let script = "echo told; dd if=/dev/zero bs=64k count=200 >&2; exec sleep 1000";
        let config = node.container("writes", &["sh", "-c", script]);
        let id = node.run(&pod_id, &pod, &config)?;
        let size = |stream: u32| -> Result<i32> {
            let pid = node.pid(&id)?;
            let pipe = fs::File::open(format!("/proc/{pid}/fd/{stream}"))?;
            let asked = nix::fcntl::FcntlArg::F_GETPIPE_SZ;
            Ok(nix::fcntl::fcntl(&pipe, asked)?)
        };
        // While dd runs in the shell's own process, its stdout is the other pipe.
        wait_for(
            "a larger pipe for one stream, and not for the other",
            || Ok((size(2)? == 1 << 20 && size(1)? == 64 << 10).then_some(())),
        )
    })
}

fn parts_of_lines_are_told_from_whole_ones_in_each_stream() -> Result {
    on_a_node(|node| {
        node.pull(BUSYBOX)?;
        let pod = node.pod("parts");
        let pod_id = node.runp(&pod)?;
        // A line of three parts in each stream, both at once; then whole ones, and one unended.
        let script = "long() { head -c 40000 /dev/zero | tr '\\0' $1; echo; }; \
                      long o & long e >&2 & wait; echo whole; echo >&2; printf 'no end'";
        let id = node.run(
            &pod_id,
            &pod,
            &node.container("both", &["sh", "-c", script]),
        )?;
        node.exited(&id)?;
        let log = node.log_of("parts", "both")?;
        let parts = parts(&log)?;
        for (stream, letter, rest) in [
            ("stdout", "o", &[("F", "whole"), ("P", "no end")][..]),
            ("stderr", "e", &[("F", "")][..]),
        ] {
            let mut own = parts.iter().filter(|part| part.0 == stream);
            let mut length = 0;
            for (_, tag, text) in own.by_ref() {
                ensure!(
                    text.bytes().all(|byte| letter.as_bytes() == [byte]),
                    "{stream} has another's bytes"
                );
                length += text.len();
                ensure_eq!(
                    *tag == "F",
                    length == 40_000,
                    "the tag after {length} bytes of {stream} is {tag}"
                );
                if *tag == "F" {
                    break;
                }
                ensure_eq!(text.len(), 16 << 10, "length of a part");
            }
            let last: Vec<_> = own.map(|(_, tag, text)| (*tag, *text)).collect();
            // containerd calls the last of a stream whole, too.
            if is_rrun() {
                ensure_eq!(last, rest, "the lines after the long one of {stream}")
            } else {
                ensure_eq!(last.len(), rest.len(), "lines of {stream}")
            }
        }
        Ok(())
    })
}

fn a_terminals_log_has_one_stream() -> Result {
    on_a_node(|node| {
        node.pull(BUSYBOX)?;
        let pod = node.pod("terminal");
        let pod_id = node.runp(&pod)?;
        let script = "test -t 0 && test -t 1 && test -t 2 && echo out && echo err >&2";
        let mut container = node.container("tty", &["sh", "-c", script]);
        container["tty"] = json!(true);
        let id = node.run(&pod_id, &pod, &container)?;
        let status = node.exited(&id)?;
        ensure_eq!(status["exitCode"], 0, "exit code");
        let log = node.log_of("terminal", "tty")?;
        // A terminal ends its lines with a carriage return, too.
        let expected = [("stdout", "F", "out\r"), ("stdout", "F", "err\r")];
        let lines: Vec<&str> = log.split_terminator('\n').collect();
        ensure_eq!(lines.len(), 2, "lines");
        for (line, (stream, tag, text)) in lines.iter().zip(expected) {
            let end = format!(" {stream} {tag} {text}");
            ensure!(line.ends_with(&end), "{line:?} does not end with {end:?}");
        }
        Ok(())
    })
}
