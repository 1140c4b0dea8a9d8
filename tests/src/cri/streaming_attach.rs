//! Tests of attach sessions. The tests cover many clients of one container, slow clients, a restart
//! of the server, and a log rotation.

use std::fs;
use std::io::Write;
use std::sync::atomic::{AtomicUsize, Ordering};

use nix::sys::signal::Signal;
use nix::sys::socket::{setsockopt, sockopt};
use rrun_proto::v1::{AttachRequest, ReopenContainerLogRequest};

use crate::support::calls::Calls;
use crate::support::machine::{Result, Running, command, wait_for};
use crate::support::needs::Test;
use crate::support::node::{A_NODE, BUSYBOX, Node, is_rrun, on_a_node};
use crate::support::streams::TRANSPORTS;
use crate::support::websocket::{message, reads, websocket};
use crate::{ensure, ensure_eq, test};

pub(crate) const TESTS: &[Test] = &[
    test!(
        killing_one_attached_client_does_not_affect_the_other_clients,
        A_NODE
    ),
    test!(attach_works_after_the_server_was_killed, A_NODE),
    test!(
        the_stdin_once_option_closes_stdin_when_the_first_client_disconnects,
        A_NODE
    ),
    test!(a_log_rotation_does_not_interrupt_attached_clients, A_NODE),
    test!(
        a_slow_attach_client_does_not_slow_down_the_container,
        A_NODE
    ),
];

/// Runs a container whose shell answers each line of its input, and returns the container's id.
fn answering(node: &Node, name: &str, once: bool) -> Result<String> {
    node.pull(BUSYBOX)?;
    let pod = node.pod(name);
    let pod_id = node.runp(&pod)?;
    let script = "while read line; do echo got $line; done; echo end";
    let mut container = node.container("c", &["sh", "-c", script]);
    container["stdin"] = true.into();
    container["stdin_once"] = once.into();
    node.run(&pod_id, &pod, &container)
}

/// Starts `crictl attach`, which reads its input from a separate FIFO.
fn attached(node: &Node, transport: &str, id: &str) -> Result<Running> {
    let endpoint = format!("unix://{}", node.socket().display());
    // The client's shell also opens the FIFO for writing. The client's input therefore never ends.
    let script = "mkfifo \"$3\"; exec 3<>\"$3\"; exec crictl --runtime-endpoint $0 attach --transport $1 -i $2 <\"$3\"";
    static NUMBER: AtomicUsize = AtomicUsize::new(0);
    let fifo = node.join(&format!("typed-{}", NUMBER.fetch_add(1, Ordering::Relaxed)));
    command("sh", ["-c", script, &endpoint, transport, id])
        .arg(&fifo)
        .start()
}

fn receives(client: &mut Running, what: &str) -> Result {
    wait_for(&format!("the attach client to receive {what:?}"), || {
        ensure!(
            client.lives(),
            "the attach client exited; its stderr: {}",
            client.stderr()
        );
        Ok(client.stdout().contains(what).then_some(()))
    })
}

/// Starts a separate client that sends one line to the container and then ends.
fn types(node: &Node, transport: &str, id: &str, line: &str) -> Result {
    let attach = ["attach", "--transport", transport, "-i", id];
    node.crictl(&attach).stdin(format!("{line}\n")).ok()?;
    Ok(())
}

fn killing_one_attached_client_does_not_affect_the_other_clients() -> Result {
    on_a_node(|node| {
        let id = answering(node, "many", false)?;
        let mut clients = Vec::new();
        for transport in TRANSPORTS {
            for _ in 0..2 {
                clients.push(attached(node, transport, &id)?);
            }
        }
        // Some clients may attach late and miss the line. The test therefore repeats the line until
        // every client has received a copy.
        for (round, transport) in ["spdy", "websocket"].into_iter().enumerate() {
            let line = format!("line{round}");
            wait_for("all clients to be attached to the container", || {
                types(node, transport, &id, &line)?;
                let all = clients
                    .iter_mut()
                    .all(|client| client.stdout().contains(&line));
                Ok(all.then_some(()))
            })?;
        }
        let first = clients.remove(0);
        first.signal(Signal::SIGKILL);
        first.end()?;
        types(node, "spdy", &id, "later")?;
        for client in &mut clients {
            receives(client, "got later")?;
        }
        ensure_eq!(
            node.status(&id)?["state"],
            "CONTAINER_RUNNING",
            "the container's state after a client was killed"
        );
        // The attach clients exit when the container exits.
        node.asks(&["stop", "--timeout", "0", &id])?;
        for client in clients {
            client.end()?;
        }
        Ok(())
    })
}

fn attach_works_after_the_server_was_killed() -> Result {
    on_a_node(|node| {
        let id = answering(node, "restart", false)?;
        types(node, "spdy", &id, "before")?;
        node.kill_server()?;
        node.start_server()?;
        let mut client = attached(node, "spdy", &id)?;
        wait_for("the container to answer the line `after`", || {
            types(node, "websocket", &id, "after")?;
            Ok(client.stdout().contains("got after").then_some(()))
        })?;
        client.signal(Signal::SIGKILL);
        ensure!(
            node.log_of("restart", "c")?.contains("got before"),
            "the container's log lacks the line from before the server's restart"
        );
        Ok(())
    })
}

fn the_stdin_once_option_closes_stdin_when_the_first_client_disconnects() -> Result {
    on_a_node(|node| {
        for (name, transport) in [("once-spdy", "spdy"), ("once-websocket", "websocket")] {
            let id = answering(node, name, true)?;
            let attach = ["attach", "--transport", transport, "-i", &id];
            let client = node.crictl(&attach).stdin("one\ntwo\n").ok()?;
            ensure_eq!(
                client.stdout,
                "got one\ngot two\nend\n",
                "output of the attach client over {transport}"
            );
            ensure_eq!(
                node.exited(&id)?["exitCode"],
                0,
                "exit code of the container"
            );
        }
        Ok(())
    })
}

fn a_log_rotation_does_not_interrupt_attached_clients() -> Result {
    on_a_node(|node| {
        let id = answering(node, "rotated", false)?;
        let mut client = attached(node, "spdy", &id)?;
        wait_for("the client to be attached to the container", || {
            types(node, "spdy", &id, "hello")?;
            Ok(client.stdout().contains("got hello").then_some(()))
        })?;
        let mut follows = node.crictl(&["logs", "--follow", &id]).start()?;
        receives(&mut follows, "got hello")?;
        let log = node.join("logs/rotated/c.log");
        fs::rename(&log, node.join("logs/rotated/c.log.1"))?;
        let calls = Calls::new(node)?;
        let mut runtime = calls.runtime();
        let request = ReopenContainerLogRequest {
            container_id: id.clone(),
        };
        calls.wait(async move { runtime.reopen_container_log(request).await })??;
        types(node, "spdy", &id, "rotated")?;
        receives(&mut client, "got rotated")?;
        receives(&mut follows, "got rotated")?;
        ensure!(
            fs::read_to_string(&log)?.contains("got rotated"),
            "the new log file lacks the line from after the rotation"
        );
        follows.signal(Signal::SIGKILL);
        client.signal(Signal::SIGKILL);
        Ok(())
    })
}

fn a_slow_attach_client_does_not_slow_down_the_container() -> Result {
    on_a_node(|node| {
        node.pull(BUSYBOX)?;
        let pod = node.pod("slow");
        let pod_id = node.runp(&pod)?;
        let script = "read line; yes 0123456789abcdef | head -n 1000000; echo all written";
        let mut container = node.container("c", &["sh", "-c", script]);
        container["stdin"] = true.into();
        let id = node.run(&pod_id, &pod, &container)?;
        let calls = Calls::new(node)?;
        let mut runtime = calls.runtime();
        let request = AttachRequest {
            container_id: id.clone(),
            stdin: true,
            stdout: true,
            ..AttachRequest::default()
        };
        let answer = calls.wait(async move { runtime.attach(request).await })??;
        let mut client = websocket(&answer.into_inner().url, "v4.channel.k8s.io")?;
        // A receive buffer of the default size could store the whole output. The test therefore
        // sets a small receive buffer.
        setsockopt(&client, sockopt::RcvBuf, &(64 << 10))?;
        client.write_all(&message(0, b"go\n"))?;
        // The container writes 17 MB and exits, although the client does not read this output.
        ensure_eq!(
            node.exited(&id)?["exitCode"],
            0,
            "exit code of the container"
        );
        ensure!(
            node.log_of("slow", "c")?.ends_with("all written\n"),
            "the container's log does not contain the whole output"
        );
        if is_rrun() {
            reads(&mut client, b"this client reads too slowly")?;
        }
        Ok(())
    })
}
