//! Exec, as people use it: by crictl over SPDY and over WebSocket, in a real terminal.

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
    test!(an_exec_has_streams_and_an_exit_code, A_NODE),
    test!(an_exec_carries_much_both_ways, A_NODE),
    test!(a_terminal_is_resized, A_NODE, TMUX),
    test!(a_client_that_goes_takes_its_command_along, A_NODE),
    test!(a_gigabyte_goes_both_ways, A_NODE, OPENSSL),
    test!(a_lost_exit_code_is_no_success, A_NODE, Need::RrunCri),
];

fn an_exec_has_streams_and_an_exit_code() -> Result {
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
            ensure_eq!(both.stdout, "out\n", "stdout over {transport}");
            ensure_eq!(both.stderr, "err\n", "stderr over {transport}");
            let failed = exec(&[], &["sh", "-c", "exit 3"]).end()?;
            ensure!(
                failed.code != 0 && failed.told().contains('3'),
                "over {transport}: {}",
                failed.told()
            );
            let cat = exec(&["-i"], &["cat"]).stdin("typed").ok()?;
            ensure_eq!(cat.stdout, "typed", "stdin and stdout over {transport}");
            // Without -i nothing is there to read, and cat ends.
            let none = exec(&[], &["cat"]).stdin("typed").ok()?;
            ensure_eq!(none.stdout, "", "output without stdin over {transport}");
            let nothing = exec(&[], &["/no/such/program"]).end()?;
            ensure!(
                nothing.code != 0 && nothing.stderr.contains("/no/such/program"),
                "over {transport}: {}",
                nothing.told()
            );
            // One that leaves a child behind with its output open is not waited for.
            exec(&[], &["sh", "-c", "sleep 1000 & echo done"])
                .ok()?
                .says("done")?;
        }
        Ok(())
    })
}

fn an_exec_carries_much_both_ways() -> Result {
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
                "over {transport} there came {}, not {sum}",
                there.stdout
            );
            let back = node.crictl(&exec).arg("cat").stdin(text.clone()).ok()?;
            ensure!(
                back.stdout == text,
                "over {transport} {} of {} bytes came back, or others",
                back.stdout.len(),
                text.len()
            );
        }
        Ok(())
    })
}

/// 64 MB; 1 GB with RRUN_TEST_FULL.
fn a_gigabyte_goes_both_ways() -> Result {
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

fn a_terminal_is_resized() -> Result {
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
                // Until somebody reads it.
                wait_for("a prompt", || {
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
                wait_for("the new size", || {
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

fn a_client_that_goes_takes_its_command_along() -> Result {
    on_a_node(|node| {
        let id = waiting(node, "gone")?;
        let cgroup = node.cgroup(&id)?;
        let processes = || count_processes(&cgroup);
        ensure_eq!(processes()?, 1, "processes before");
        for transport in TRANSPORTS {
            for script in [
                // With a child, and one that nothing but SIGKILL ends. Neither reads what it is
                // sent, which is more than a pipe holds. (More than the sockets hold, too, and
                // nobody can see past it that the client has gone, before TCP gives up.)
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
                wait_for(
                    "the command to run",
                    || Ok((processes()? > 1).then_some(())),
                )?;
                client.signal(Signal::SIGKILL);
                wait_for("the command to end", || {
                    Ok((processes()? == 1).then_some(()))
                })?;
            }
        }
        Ok(())
    })
}

/// Clients take a session that just breaks off for a success.
fn a_lost_exit_code_is_no_success() -> Result {
    on_a_node(|node| {
        node.pull(BUSYBOX)?;
        for transport in TRANSPORTS {
            let pod = node.pod(transport);
            let pod_id = node.runp(&pod)?;
            let id = node.run(&pod_id, &pod, &node.container("c", &["/inside", "wait"]))?;
            let words = ["sh", "-c", "echo runs; exec sleep 1000"];
            let exec = ["exec", "--transport", transport, &id];
            let mut exec = node.crictl(&exec).args(words).start()?;
            wait_for("the command to run", || {
                Ok(exec.stdout().contains("runs").then_some(()))
            })?;
            kill(node.monitor(&pod_id)?, Signal::SIGKILL)?;
            let ended = exec.end()?;
            ensure!(
                ended.code != 0 && ended.told().contains("exit code is lost"),
                "over {transport} it ended with {}: {}",
                ended.code,
                ended.told()
            );
        }
        Ok(())
    })
}
