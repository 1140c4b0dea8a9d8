//! Tests of exec through crictl, over SPDY and over WebSocket. One test uses a real terminal.

use std::fs;
use std::time::Duration;

use nix::sys::signal::{Signal, kill};

use crate::support::certificates::OPENSSL;
use crate::support::machine::{Result, command, deadline, rounds, wait_for};
use crate::support::needs::{Need, Test};
use crate::support::node::{A_NODE, BUSYBOX, on_a_node};
use crate::support::streams::{TRANSPORTS, count_processes, waiting};
use crate::support::terminal::{TMUX, Terminal};
use crate::{ensure, ensure_eq, test};

pub(crate) const TESTS: &[Test] = &[
    test!(exec_connects_the_streams_and_returns_the_exit_code, A_NODE),
    test!(exec_carries_24_megabytes_in_both_directions, A_NODE),
    test!(a_resize_of_a_terminal_reaches_the_container, A_NODE, TMUX),
    test!(
        the_command_of_an_exec_session_ends_when_the_client_is_killed,
        A_NODE
    ),
    test!(exec_carries_a_gigabyte_in_both_directions, A_NODE, OPENSSL),
    test!(
        a_lost_exit_code_is_reported_as_a_failure,
        A_NODE,
        Need::RrunCri
    ),
];

fn exec_connects_the_streams_and_returns_the_exit_code() -> Result {
    on_a_node(|node| {
        let id = waiting(node, "exec")?;
        for transport in TRANSPORTS {
            let exec = |options: &[&str], command: &[&str]| {
                node.crictl(&["exec", "--transport", transport])
                    .args(options)
                    .arg(&id)
                    .args(command)
            };
            let both = exec(&[], &["sh", "-c", "echo out; echo err >&2"]).ok()?;
            ensure_eq!(
                both.stdout,
                "out\n",
                "stdout of a command that exec ran over {transport}"
            );
            ensure_eq!(
                both.stderr,
                "err\n",
                "stderr of a command that exec ran over {transport}"
            );
            let failed = exec(&[], &["sh", "-c", "exit 3"]).end()?;
            ensure!(
                failed.code != 0 && failed.told().contains('3'),
                "crictl exec over {transport} does not report the exit code 3: {}",
                failed.told()
            );
            let cat = exec(&["-i"], &["cat"]).stdin("typed").ok()?;
            ensure_eq!(
                cat.stdout,
                "typed",
                "output of cat, which copies stdin to stdout, in an exec session over {transport}"
            );
            // Standard input is empty without -i, so cat ends.
            let none = exec(&[], &["cat"]).stdin("typed").ok()?;
            ensure_eq!(
                none.stdout,
                "",
                "output of cat that crictl exec ran without -i over {transport}"
            );
            let nothing = exec(&[], &["/no/such/program"]).end()?;
            ensure!(
                nothing.code != 0 && nothing.stderr.contains("/no/such/program"),
                "over {transport}, crictl exec does not report that the program is missing: {}",
                nothing.told()
            );
            // The exec session ends although a child process of its command still has stdout and
            // stderr open.
            exec(&[], &["sh", "-c", "sleep 1000 & echo done"])
                .ok()?
                .says("done")?;
        }
        Ok(())
    })
}

fn exec_carries_24_megabytes_in_both_directions() -> Result {
    on_a_node(|node| {
        let id = waiting(node, "much")?;
        let line = "0123456789abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ\n";
        let text = line.repeat((24 << 20) / line.len());
        let file = node.join("text");
        fs::write(&file, &text)?;
        let sum = command("sha256sum", ["-b"]).stdin(text.clone()).ok()?;
        let sum = sum.stdout.split(' ').next().unwrap_or_default().to_owned();
        for transport in TRANSPORTS {
            let exec = ["exec", "--transport", transport, "-i", &id];
            let there = node
                .crictl(&exec)
                .arg("sha256sum")
                .stdin(text.clone())
                .ok()?;
            ensure!(
                there.stdout.starts_with(&sum),
                "over {transport}, the container computed the checksum {} of its input, but the correct checksum is {sum}",
                there.stdout
            );
            let back = node.crictl(&exec).arg("cat").stdin(text.clone()).ok()?;
            ensure!(
                back.stdout == text,
                "over {transport}, the output of cat ({} bytes) differs from its input ({} bytes)",
                back.stdout.len(),
                text.len()
            );
        }
        Ok(())
    })
}

/// Sends 64 MB, or 1 GB if the variable RRUN_TEST_FULL is set.
fn exec_carries_a_gigabyte_in_both_directions() -> Result {
    on_a_node(|node| {
        let id = waiting(node, "gigabyte")?;
        let bytes = rounds(64 << 20, 1 << 30);
        let (file, back) = (node.join("sent"), node.join("back"));
        let make =
            "openssl enc -aes-128-ctr -K 00 -iv 00 -in /dev/zero 2>/dev/null | head -c $0 >$1";
        command("sh", ["-c", make, &bytes.to_string()])
            .arg(&file)
            .ok()?;
        let endpoint = format!("unix://{}", node.socket().display());
        for transport in TRANSPORTS {
            let script = "crictl --runtime-endpoint $0 exec --transport $1 -i $2 cat <$3 >$4; \
                          cmp $3 $4";
            command("sh", ["-c", script, &endpoint, transport, &id])
                .arg(&file)
                .arg(&back)
                .within(deadline() * 20)
                .ok()?;
        }
        Ok(())
    })
}

fn a_resize_of_a_terminal_reaches_the_container() -> Result {
    on_a_node(|node| {
        node.pull(BUSYBOX)?;
        let pod = node.pod("terminal");
        let pod_id = node.runp(&pod)?;
        let mut shell = node.container("shell", &["sh"]);
        for option in ["tty", "stdin"] {
            shell[option] = true.into();
        }
        let id = node.run(&pod_id, &pod, &shell)?;
        let crictl = format!(
            "crictl --runtime-endpoint unix://{}",
            node.socket().display()
        );
        for transport in TRANSPORTS {
            for what in [
                format!("exec --transport {transport} -it {id} sh"),
                format!("attach --transport {transport} -it {id}"),
            ] {
                let terminal = Terminal::open(node.join("tmux"), &format!("{crictl} {what}"))?;
                // The shell may not be ready yet. The test therefore repeats the command until its
                // output appears.
                wait_for("the shell to answer", || {
                    terminal.types("echo pro''mpt")?;
                    std::thread::sleep(Duration::from_millis(200));
                    let screen = terminal.tmux(&["capture-pane", "-p"])?;
                    Ok(screen
                        .lines()
                        .any(|line| line.trim() == "prompt")
                        .then_some(()))
                })?;
                terminal.types("clear; stty size")?;
                terminal.shows("24 80")?;
                terminal.tmux(&["resize-window", "-x", "101", "-y", "31"])?;
                wait_for("the shell to print the new size of the terminal", || {
                    terminal.types("clear; stty size")?;
                    std::thread::sleep(Duration::from_millis(200));
                    let screen = terminal.tmux(&["capture-pane", "-p"])?;
                    Ok(screen
                        .lines()
                        .any(|line| line.trim() == "31 101")
                        .then_some(()))
                })?;
            }
        }
        Ok(())
    })
}

fn the_command_of_an_exec_session_ends_when_the_client_is_killed() -> Result {
    on_a_node(|node| {
        let id = waiting(node, "gone")?;
        let cgroup = node.cgroup(&id)?;
        let processes = || count_processes(&cgroup);
        ensure_eq!(
            processes()?,
            1,
            "number of processes in the container before the exec session"
        );
        for transport in TRANSPORTS {
            for script in [
                // The first command has a child process, and the second command ends only on
                // SIGKILL. Neither command reads its input, which is larger than a pipe's buffer.
                // But the input is too small to fill the sockets' buffers too. If these buffers
                // were full, the server would notice the client's end only after TCP's timeout.
                "sleep 1000 & sleep 1001",
                "trap '' HUP; exec sleep 1000",
            ] {
                let exec = [
                    "exec",
                    "--transport",
                    transport,
                    "-i",
                    &id,
                    "sh",
                    "-c",
                    script,
                ];
                let client = node.crictl(&exec).stdin(vec![b'x'; 80_000]).start()?;
                wait_for("the command of the exec session to start", || {
                    Ok((processes()? > 1).then_some(()))
                })?;
                client.signal(Signal::SIGKILL);
                wait_for("the command of the exec session to exit", || {
                    Ok((processes()? == 1).then_some(()))
                })?;
            }
        }
        Ok(())
    })
}

/// If the server ends a session without an error, the client reports success. The server must
/// therefore report an error if the exit code is lost.
fn a_lost_exit_code_is_reported_as_a_failure() -> Result {
    on_a_node(|node| {
        node.pull(BUSYBOX)?;
        for transport in TRANSPORTS {
            let pod = node.pod(transport);
            let pod_id = node.runp(&pod)?;
            let id = node.run(&pod_id, &pod, &node.container("c", &["/inside", "wait"]))?;
            let words = ["sh", "-c", "echo runs; exec sleep 1000"];
            let exec = ["exec", "--transport", transport, &id];
            let mut exec = node.crictl(&exec).args(words).start()?;
            wait_for("the command of the exec session to start", || {
                Ok(exec.stdout().contains("runs").then_some(()))
            })?;
            kill(node.monitor(&pod_id)?, Signal::SIGKILL)?;
            let ended = exec.end()?;
            ensure!(
                ended.code != 0 && ended.told().contains("exit code is unknown"),
                "over {transport}, crictl exec exited with exit code {} and did not report that the exit code is unknown; its output: {}",
                ended.code,
                ended.told()
            );
        }
        Ok(())
    })
}
