//! Attach: many clients at a container's own stdio, some of them slow; and what happens to them when
//! the server or the log changes.

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
    test!(many_attach_and_one_detaches, A_NODE),
    test!(an_attach_works_after_the_server_was_killed, A_NODE),
    test!(stdin_once_ends_with_its_first_client, A_NODE),
    test!(a_log_is_rotated_while_clients_follow, A_NODE),
    test!(a_slow_client_does_not_slow_the_container, A_NODE),
];

/// A container whose shell answers each line.
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

/// An attached crictl that types what is written to a file of its own.
fn attached(node: &Node, transport: &str, id: &str) -> Result<Running> {
    let endpoint = format!("unix://{}", node.socket().display());
    // The pipe stays open until the client is ended.
    let script = "mkfifo \"$3\"; exec 3<>\"$3\"; exec crictl --runtime-endpoint $0 attach --transport $1 -i $2 <\"$3\"";
    static NUMBER: AtomicUsize = AtomicUsize::new(0);
    let fifo = node.join(&format!("typed-{}", NUMBER.fetch_add(1, Ordering::Relaxed)));
    command("sh", ["-c", script, &endpoint, transport, id])
        .arg(&fifo)
        .start()
}

fn says(client: &mut Running, what: &str) -> Result {
    wait_for(&format!("a client to get {what:?}"), || {
        ensure!(client.lives(), "it ended: {}", client.stderr());
        Ok(client.stdout().contains(what).then_some(()))
    })
}

/// Types a line by a client of its own, which goes with the end of what it types.
fn types(node: &Node, transport: &str, id: &str, line: &str) -> Result {
    let attach = ["attach", "--transport", transport, "-i", id];
    node.crictl(&attach).stdin(format!("{line}\n")).ok()?;
    Ok(())
}

fn many_attach_and_one_detaches() -> Result {
    on_a_node(|node| {
        let id = answering(node, "many", false)?;
        let mut clients = Vec::new();
        for transport in TRANSPORTS {
            for _ in 0..2 {
                clients.push(attached(node, transport, &id)?);
            }
        }
        // Whoever is attached late has missed what was said early.
        for (round, transport) in ["spdy", "websocket"].into_iter().enumerate() {
            let line = format!("line{round}");
            wait_for("all clients to be attached", || {
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
            says(client, "got later")?;
        }
        ensure_eq!(
            node.status(&id)?["state"],
            "CONTAINER_RUNNING",
            "state after a client has gone"
        );
        // The container's end is the clients' end.
        node.asks(&["stop", "--timeout", "0", &id])?;
        for client in clients {
            client.end()?;
        }
        Ok(())
    })
}

fn an_attach_works_after_the_server_was_killed() -> Result {
    on_a_node(|node| {
        let id = answering(node, "restart", false)?;
        types(node, "spdy", &id, "before")?;
        node.kill_server()?;
        node.start_server()?;
        let mut client = attached(node, "spdy", &id)?;
        wait_for("the container to answer", || {
            types(node, "websocket", &id, "after")?;
            Ok(client.stdout().contains("got after").then_some(()))
        })?;
        client.signal(Signal::SIGKILL);
        ensure!(
            node.log_of("restart", "c")?.contains("got before"),
            "the log lacks what was said before"
        );
        Ok(())
    })
}

fn stdin_once_ends_with_its_first_client() -> Result {
    on_a_node(|node| {
        for (name, transport) in [("once-spdy", "spdy"), ("once-websocket", "websocket")] {
            let id = answering(node, name, true)?;
            let attach = ["attach", "--transport", transport, "-i", &id];
            let client = node.crictl(&attach).stdin("one\ntwo\n").ok()?;
            ensure_eq!(
                client.stdout,
                "got one\ngot two\nend\n",
                "what {transport} got"
            );
            ensure_eq!(node.exited(&id)?["exitCode"], 0, "exit code");
        }
        Ok(())
    })
}

fn a_log_is_rotated_while_clients_follow() -> Result {
    on_a_node(|node| {
        let id = answering(node, "rotated", false)?;
        let mut client = attached(node, "spdy", &id)?;
        wait_for("the client to be attached", || {
            types(node, "spdy", &id, "hello")?;
            Ok(client.stdout().contains("got hello").then_some(()))
        })?;
        let mut follows = node.crictl(&["logs", "--follow", &id]).start()?;
        says(&mut follows, "got hello")?;
        let log = node.join("logs/rotated/c.log");
        fs::rename(&log, node.join("logs/rotated/c.log.1"))?;
        let calls = Calls::new(node)?;
        let mut runtime = calls.runtime();
        let request = ReopenContainerLogRequest {
            container_id: id.clone(),
        };
        calls.wait(async move { runtime.reopen_container_log(request).await })??;
        types(node, "spdy", &id, "rotated")?;
        says(&mut client, "got rotated")?;
        says(&mut follows, "got rotated")?;
        ensure!(
            fs::read_to_string(&log)?.contains("got rotated"),
            "the new log lacks the new line"
        );
        follows.signal(Signal::SIGKILL);
        client.signal(Signal::SIGKILL);
        Ok(())
    })
}

fn a_slow_client_does_not_slow_the_container() -> Result {
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
        // By itself the kernel might find room for everything.
        setsockopt(&client, sockopt::RcvBuf, &(64 << 10))?;
        client.write_all(&message(0, b"go\n"))?;
        // 17 MB, and nobody reads: the container ends all the same.
        ensure_eq!(node.exited(&id)?["exitCode"], 0, "exit code");
        ensure!(
            node.log_of("slow", "c")?.ends_with("all written\n"),
            "the log is not whole"
        );
        if is_rrun() {
            reads(&mut client, b"this client reads too slowly")?;
        }
        Ok(())
    })
}
