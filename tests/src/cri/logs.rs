//! Tests of logs in the CRI's format. The tests cover fast containers, log rotations, restarts of
//! the server, partial lines, both output streams, and terminals.

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
        log_rotations_and_kills_of_the_server_lose_no_line_of_a_fast_container,
        A_NODE
    ),
    test!(
        a_container_that_writes_a_lot_gets_a_larger_pipe,
        A_NODE,
        Need::RrunCri
    ),
    test!(the_log_marks_partial_and_whole_lines_of_each_stream, A_NODE),
    test!(
        the_log_of_a_container_with_a_terminal_has_one_stream,
        A_NODE
    ),
    test!(
        the_log_contains_output_to_a_terminal_that_was_closed_and_opened_again,
        A_NODE,
        Need::RrunCri
    ),
    test!(an_absolute_log_path_is_inside_the_log_directory, A_NODE),
    test!(
        a_log_path_outside_the_log_directory_is_refused,
        A_NODE,
        Need::RrunCri
    ),
];

fn log_rotations_and_kills_of_the_server_lose_no_line_of_a_fast_container() -> Result {
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
            // The test has renamed the log file, but has not yet called ReopenContainerLog. The
            // server can crash at this moment too.
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
                    wait_for("the new log file to exist", || {
                        Ok(log.exists().then_some(()))
                    })?;
                }
                // The container exited before ReopenContainerLog. The call therefore opens no new
                // log file.
                Err(status) => {
                    ensure!(
                        status.message().contains("not running"),
                        "ReopenContainerLog failed, but not because the container has exited: {status:?}"
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
                "the log file {} ends in the middle of a line",
                file.display()
            );
            all += &text;
        }
        let numbers = line_numbers(&all)?;
        ensure_eq!(
            numbers.len() as u64,
            lines,
            "number of lines in all log files"
        );
        without_gap(&numbers)
    })
}

/// Returns the stream, the tag and the text of each log line, without the time of the line.
fn parts(log: &str) -> Result<Vec<(&str, &str, &str)>> {
    log.lines()
        .map(|line| {
            let mut words = line.splitn(4, ' ').skip(1);
            match (words.next(), words.next(), words.next()) {
                (Some(stream), Some(tag), Some(text)) => Ok((stream, tag, text)),
                _ => {
                    Err(format!("this line does not have the format of a CRI log: {line:?}").into())
                }
            }
        })
        .collect()
}

/// With a larger pipe, the container can continue to write while the monitor sleeps. A container
/// that writes little keeps a pipe of the default size. This pipe needs less memory.
fn a_container_that_writes_a_lot_gets_a_larger_pipe() -> Result {
    on_a_node(|node| {
        node.pull(BUSYBOX)?;
        let pod = node.pod("pipes");
        let pod_id = node.runp(&pod)?;
        let script = "echo small; dd if=/dev/zero bs=64k count=200 >&2; exec sleep 1000";
        let config = node.container("writes", &["sh", "-c", script]);
        let id = node.run(&pod_id, &pod, &config)?;
        let size = |stream: u32| -> Result<i32> {
            let pid = node.pid(&id)?;
            let pipe = fs::File::open(format!("/proc/{pid}/fd/{stream}"))?;
            let get_size = nix::fcntl::FcntlArg::F_GETPIPE_SZ;
            Ok(nix::fcntl::fcntl(&pipe, get_size)?)
        };
        // BusyBox's shell can run dd in the shell's own process. While dd runs, the stdout of this
        // process is then the stderr pipe. The test therefore waits until dd has ended.
        wait_for(
            "stderr to have a larger pipe and stdout to have a pipe of the default size",
            || Ok((size(2)? == 1 << 20 && size(1)? == 64 << 10).then_some(())),
        )
    })
}

fn the_log_marks_partial_and_whole_lines_of_each_stream() -> Result {
    on_a_node(|node| {
        node.pull(BUSYBOX)?;
        let pod = node.pod("parts");
        let pod_id = node.runp(&pod)?;
        // The script writes a long line to stdout and, at the same time, a long line to stderr.
        // Each of these lines needs three log records. After the long lines, the script writes a
        // short line to stdout and an empty line to stderr. At the end, the script writes an
        // unterminated line to stdout.
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
                    "the log's {stream} lines contain bytes of the other stream"
                );
                length += text.len();
                ensure_eq!(
                    *tag == "F",
                    length == 40_000,
                    "whether the tag {tag} of a {stream} log record marks the end of a line ({length} bytes of the line have been logged, and the line has 40000 bytes)"
                );
                if *tag == "F" {
                    break;
                }
                ensure_eq!(
                    text.len(),
                    16 << 10,
                    "number of bytes in a partial log record"
                );
            }
            let last: Vec<_> = own.map(|(_, tag, text)| (*tag, *text)).collect();
            // containerd marks the unterminated last line as a whole line, so the test compares
            // only the number of lines.
            if is_rrun() {
                ensure_eq!(
                    last,
                    rest,
                    "tags and texts of the log records of {stream} after the long line"
                )
            } else {
                ensure_eq!(
                    last.len(),
                    rest.len(),
                    "number of log records of {stream} after the long line"
                )
            }
        }
        Ok(())
    })
}

fn the_log_of_a_container_with_a_terminal_has_one_stream() -> Result {
    on_a_node(|node| {
        node.pull(BUSYBOX)?;
        let pod = node.pod("terminal");
        let pod_id = node.runp(&pod)?;
        let script = "test -t 0 && test -t 1 && test -t 2 && echo out && echo err >&2";
        let mut container = node.container("tty", &["sh", "-c", script]);
        container["tty"] = json!(true);
        let id = node.run(&pod_id, &pod, &container)?;
        let status = node.exited(&id)?;
        ensure_eq!(status["exitCode"], 0, "exit code of the container");
        let log = node.log_of("terminal", "tty")?;
        // A terminal adds a carriage return at the end of each line.
        let expected = [("stdout", "F", "out\r"), ("stdout", "F", "err\r")];
        let lines: Vec<&str> = log.split_terminator('\n').collect();
        ensure_eq!(lines.len(), 2, "number of lines in the container's log");
        for (line, (stream, tag, text)) in lines.iter().zip(expected) {
            let end = format!(" {stream} {tag} {text}");
            ensure!(
                line.ends_with(&end),
                "the log line {line:?} does not end with {end:?}"
            );
        }
        Ok(())
    })
}

fn an_absolute_log_path_is_inside_the_log_directory() -> Result {
    on_a_node(|node| {
        node.pull(BUSYBOX)?;
        let outside = node.join("outside");
        fs::create_dir(&outside)?;
        let pod = node.pod("absolute");
        let pod_id = node.runp(&pod)?;
        let absolute = outside.join("a.log").display().to_string();
        for (name, path) in [
            ("absolute", absolute.clone()),
            ("slashes", format!("//{absolute}")),
            ("deep", "deep/er/b.log".to_owned()),
        ] {
            let script = "echo first; while ! [ -e /go ]; do sleep 0.1; done; echo second";
            let mut container = node.container(name, &["sh", "-c", script]);
            container["log_path"] = json!(path);
            let id = node.run(&pod_id, &pod, &container)?;
            let expected = node
                .join("logs/absolute")
                .join(path.trim_start_matches('/'));
            let holds = |line: &str| {
                wait_for(&format!("{} to contain {line}", expected.display()), || {
                    let log = fs::read_to_string(&expected).unwrap_or_default();
                    Ok(log.contains(line).then_some(()))
                })
            };
            holds("first")?;
            let shown = node.status(&id)?["logPath"].clone();
            ensure_eq!(
                shown.as_str().map(|shown| shown.replace("//", "/")),
                Some(expected.display().to_string()),
                "logPath in the status of the container {name}"
            );
            fs::remove_file(&expected)?;
            node.asks(&["logs", "--reopen", &id])?;
            node.asks(&["exec", "-s", &id, "touch", "/go"])?;
            holds("second")?;
            node.asks(&["rm", "--force", &id])?;
        }
        let written = fs::read_dir(&outside)?.count();
        ensure_eq!(written, 0, "number of logs outside the pod's log directory");
        Ok(())
    })
}

fn a_log_path_outside_the_log_directory_is_refused() -> Result {
    on_a_node(|node| {
        node.pull(BUSYBOX)?;
        let pod = node.pod("refused");
        let pod_id = node.runp(&pod)?;
        for path in [
            "../a.log",
            "/../a.log",
            "b/../../a.log",
            "b/..",
            "/",
            ".",
            "b/",
            "a\0.log",
        ] {
            let mut container = node.container("c", &["true"]);
            container["log_path"] = json!(path);
            let created = node.try_create(&pod_id, &pod, &container)?;
            ensure!(
                created.code != 0 && created.told().contains("log"),
                "a container with the log path {path:?} was created, or the error does not name the log: {}",
                created.told()
            );
        }
        let written: Vec<_> = fs::read_dir(node.join("logs"))?.flatten().collect();
        ensure!(
            written.len() == 1,
            "the refused log paths left files behind: {written:?}"
        );
        Ok(())
    })
}

/// Processes can close their terminal and open it again later. The monitor reads at once that the
/// terminal is closed.
fn the_log_contains_output_to_a_terminal_that_was_closed_and_opened_again() -> Result {
    on_a_node(|node| {
        node.pull(BUSYBOX)?;
        let pod = node.pod("terminal");
        let pod_id = node.runp(&pod)?;
        let script = "echo before; exec <&- >&- 2>&-; sleep 1; echo after >/dev/console; exit 4";
        let mut container = node.container("c", &["sh", "-c", script]);
        container["tty"] = json!(true);
        let id = node.run(&pod_id, &pod, &container)?;
        let status = node.exited(&id)?;
        ensure_eq!(status["exitCode"], 4, "exit code of the container");
        let log = node.log_of("terminal", "c")?;
        ensure!(
            log.contains("before") && log.contains("after"),
            "the log lacks output of the container: {log}"
        );
        Ok(())
    })
}
