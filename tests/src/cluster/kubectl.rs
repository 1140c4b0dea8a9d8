//! What people do to a pod by kubectl, on a real cluster, over WebSocket as kubectl does now and over
//! SPDY as it did: logs, exec, attach, cp, port-forward, debug; and top.

use std::fs;
use std::time::Duration;

use serde_json::json;

use crate::support::cluster::{
    APISERVER, Cluster, TRANSPORTS, Transport, cluster_timeout, environment, eventually,
    timeout_flag,
};
use crate::support::kubelet::{KUBELET, Kubelet, container_status};
use crate::support::machine::{Result, Running, command, note, wait_for, wait_within};
use crate::support::needs::{Need, Test};
use crate::support::node::{BUSYBOX, Node, WEB, on_a_node};
use crate::support::terminal::{TMUX, Terminal};
use crate::{ensure, ensure_eq, test};

pub(crate) const TESTS: &[Test] = &[
    test!(
        a_pod_is_worked_with_over_both_transports,
        Need::NativeOrLong,
        APISERVER,
        TMUX,
        KUBELET,
    ),
    test!(
        top_shows_what_nodes_and_pods_use,
        Need::NativeOrLong,
        Need::Program("metrics-server"),
        Need::Controller("memory"),
        APISERVER,
        KUBELET,
    ),
];

/// How much is copied and piped each way.
const COPIED_BYTES: usize = 3_000_000;

/// How many lines a container logs while somebody follows.
const LOG_LINES: usize = 3000;

fn a_pod_is_worked_with_over_both_transports() -> Result {
    on_a_node(|node| {
        let cluster = Cluster::start(node)?;
        start_pod(&cluster)?;
        a_log_is_followed_to_its_end(&cluster)?;
        for transport in TRANSPORTS {
            exec_has_streams_and_an_exit_code(&cluster, transport)?;
            exec_carries_much_both_ways(&cluster, transport)?;
            terminals_work_and_are_resized(node, transport)?;
            attach_talks_to_the_first_process(node, &cluster, transport)?;
            files_are_copied_both_ways(node, &cluster, transport)?;
            ports_are_forwarded(&cluster, transport)?;
        }
        a_debugger_joins_its_target(&cluster)?;
        the_node_itself_is_debugged(&cluster)?;
        statistics_come_through_the_api_server(&cluster)?;
        cluster.asks(&["delete", "pod", "--all", &timeout_flag()])?;
        Kubelet::has_stopped_everything(node)
    })
}

/// A web server, a shell on a pipe and one on a terminal, and one that logs when told to.
fn start_pod(cluster: &Cluster) -> Result {
    let talk = format!(
        "while [ ! -e /tmp/go ]; do sleep 0.1; done; \
         i=0; while [ $i -lt {LOG_LINES} ]; do i=$((i+1)); echo line $i of the log; done"
    );
    cluster.apply(&json!({
        "apiVersion": "v1",
        "kind": "Pod",
        "metadata": { "name": "pod", "namespace": "default" },
        "spec": {
            "restartPolicy": "Never",
            "terminationGracePeriodSeconds": 0,
            "containers": [
                { "name": "web", "image": WEB },
                { "name": "pipe", "image": BUSYBOX, "stdin": true,
                  "command": ["sh", "-c", "while read line; do echo got $line; done"] },
                { "name": "terminal", "image": BUSYBOX, "stdin": true, "tty": true,
                  "command": ["sh"] },
                { "name": "talk", "image": BUSYBOX, "command": ["sh", "-c", talk] },
            ],
        },
    }))?;
    cluster.asks(&["wait", "pod/pod", "--for=condition=Ready", &timeout_flag()])?;
    Ok(())
}

fn a_log_is_followed_to_its_end(cluster: &Cluster) -> Result {
    let follow = ["logs", "--follow", "pod", "--container", "talk"];
    let follower = cluster.kubectl(&follow).start()?;
    let go = [
        "exec",
        "pod",
        "--container",
        "talk",
        "--",
        "touch",
        "/tmp/go",
    ];
    cluster.asks(&go)?;
    // It ends by itself, with the container.
    let output = follower.end_within(cluster_timeout())?;
    let all: String = (1..=LOG_LINES)
        .map(|n| format!("line {n} of the log\n"))
        .collect();
    ensure!(
        output.code == 0 && output.stdout == all,
        "not all lines in their order, or a failure:\n{}",
        output.told()
    );
    let last = ["logs", "--tail=1", "pod", "--container", "talk"];
    let last_line = format!("line {LOG_LINES} of the log");
    ensure_eq!(cluster.asks(&last)?, last_line, "the log's tail");
    Ok(())
}

fn exec_has_streams_and_an_exit_code(cluster: &Cluster, transport: Transport) -> Result {
    let script = "echo to stdout; echo to stderr >&2; exit 7";
    let exec = ["exec", "pod", "-c", "web", "--", "sh", "-c", script];
    let output = cluster.kubectl_over(transport, &exec).exits(7)?;
    ensure_eq!(output.stdout, "to stdout\n", "stdout over {transport:?}");
    ensure!(
        output.stderr.starts_with("to stderr\n"),
        "stderr over {transport:?}: {}",
        output.stderr
    );
    Ok(())
}

/// Text without a pattern that a stream could hide a mistake in.
fn much() -> String {
    let mut number = 12345_u32;
    let mut line = || {
        number = number.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
        format!("{number:08x}\n")
    };
    std::iter::repeat_with(&mut line)
        .take(COPIED_BYTES / 9)
        .collect()
}

fn exec_carries_much_both_ways(cluster: &Cluster, transport: Transport) -> Result {
    let text = much();
    let exec = ["exec", "-i", "pod", "-c", "web", "--", "cat"];
    let cat = cluster.kubectl_over(transport, &exec);
    let back = cat.stdin(text.clone()).ok()?.stdout;
    ensure!(
        back == text,
        "over {transport:?} {} of {} bytes came back, or others",
        back.len(),
        text.len()
    );
    Ok(())
}

fn terminals_work_and_are_resized(node: &Node, transport: Transport) -> Result {
    let kubectl = format!("env {} kubectl", environment(transport).join(" "));
    for what in ["exec -it pod -c web -- sh", "attach -it pod -c terminal"] {
        let terminal = Terminal::open(node.join("tmux"), &format!("{kubectl} {what}"))?;
        let answers = |typed: &str, line: &str| {
            eventually(&format!("{line:?} by {what}"), || {
                terminal.types(typed)?;
                std::thread::sleep(Duration::from_millis(200));
                let screen = terminal.tmux(&["capture-pane", "-p"])?;
                ensure!(screen.lines().any(|one| one.trim() == line), "{screen}");
                Ok(Some(()))
            })
        };
        // Until somebody reads it.
        answers("echo pro''mpt", "prompt")?;
        answers("clear; stty size", "24 80")?;
        terminal.tmux(&["resize-window", "-x", "101", "-y", "31"])?;
        answers("clear; stty size", "31 101")?;
        terminal.tmux(&["resize-window", "-x", "80", "-y", "24"])?;
    }
    Ok(())
}

fn attach_talks_to_the_first_process(
    node: &Node,
    cluster: &Cluster,
    transport: Transport,
) -> Result {
    // The pipe stays open until the client is ended.
    let fifo = node.join(&format!("typed-{transport:?}"));
    let script = "mkfifo \"$0\"; exec 3<>\"$0\"; exec \"$@\" <\"$0\"";
    let mut client = command("env", environment(transport))
        .args(["sh", "-c", script])
        .arg(&fifo)
        .args(["kubectl", "attach", "-i", "pod", "-c", "pipe"])
        .start()?;
    wait_for("the client to open its pipe", || {
        Ok(fifo.exists().then_some(()))
    })?;
    fs::write(&fifo, format!("hello over {transport:?}\n"))?;
    let answer = format!("got hello over {transport:?}");
    says(&mut client, &answer)?;
    drop(client);
    // A client that went took nothing along.
    let log = ["logs", "pod", "-c", "pipe"];
    wait_for("the log to have it too", || {
        Ok(cluster.asks(&log)?.contains(&answer).then_some(()))
    })
}

fn says(client: &mut Running, what: &str) -> Result {
    wait_within(
        cluster_timeout(),
        &format!("a client to get {what:?}"),
        || {
            ensure!(client.lives(), "it ended: {}", client.stderr());
            Ok(client.stdout().contains(what).then_some(()))
        },
    )
}

fn files_are_copied_both_ways(node: &Node, cluster: &Cluster, transport: Transport) -> Result {
    let there = node.join(&format!("there-{transport:?}"));
    let back = node.join(&format!("back-{transport:?}"));
    fs::create_dir_all(there.join("below"))?;
    fs::write(there.join("much"), much())?;
    fs::write(there.join("below/little"), format!("{transport:?}\n"))?;
    let inside = format!("pod:/tmp/{transport:?}");
    let copy = |from: &str, to: &str| {
        let copy = ["cp", from, to, "-c", "web"];
        cluster.kubectl_over(transport, &copy).ok()
    };
    copy(&there.to_string_lossy(), &inside)?;
    copy(&inside, &back.to_string_lossy())?;
    let sums = "find . -type f -exec sha256sum {} + | sort -k 2";
    let wanted = command("sh", ["-c", sums]).dir(&there).ok()?.stdout;
    ensure_eq!(wanted.lines().count(), 2, "files to copy");
    let cd = format!("cd /tmp/{transport:?} && {sums}");
    let exec = ["exec", "pod", "-c", "web", "--", "sh", "-c", &cd];
    let inside = cluster.kubectl_over(transport, &exec).ok()?.stdout;
    ensure_eq!(
        inside,
        wanted,
        "the sums in the container over {transport:?}"
    );
    let back = command("sh", ["-c", sums]).dir(&back).ok()?.stdout;
    ensure_eq!(
        back,
        wanted,
        "the sums of what came back over {transport:?}"
    );
    Ok(())
}

fn ports_are_forwarded(cluster: &Cluster, transport: Transport) -> Result {
    let forward = ["port-forward", "pod/pod", ":5000"];
    let mut forward = cluster.kubectl_over(transport, &forward).start()?;
    let from = "Forwarding from 127.0.0.1:";
    says(&mut forward, from)?;
    let told = forward.stdout();
    let port = told
        .split(from)
        .nth(1)
        .and_then(|rest| rest.split(' ').next());
    let url = format!("http://127.0.0.1:{}/", port.ok_or("no port")?);
    // One after the other, then at once, by streams of one connection.
    let ask = || command("curl", ["-fsS", &url]).within(cluster_timeout());
    for _ in 0..3 {
        ask().ok()?.says("hello from rrun")?;
    }
    let all: Vec<Running> = (0..10).map(|_| ask().start()).collect::<Result<_>>()?;
    for one in all {
        let output = one.end_within(cluster_timeout())?;
        ensure_eq!(output.code, 0, "{}", output.told());
        output.says("hello from rrun")?;
    }
    ensure!(
        forward.lives(),
        "port-forward ended over {transport:?}: {}",
        forward.stderr()
    );
    Ok(())
}

/// An ephemeral container sees the processes of the one that it is to debug.
fn a_debugger_joins_its_target(cluster: &Cluster) -> Result {
    let name = "debugger";
    let debug = [
        "debug",
        "pod",
        "--target=web",
        "--image",
        BUSYBOX,
        "-c",
        name,
    ];
    let debug = cluster.kubectl(&debug).args(["--", "ps"]);
    debug.ok()?;
    eventually("the debugger's end", || {
        let pod = cluster.json(&["get", "pod", "pod"])?;
        let all = pod["status"]["ephemeralContainerStatuses"].as_array();
        let status = all.into_iter().flatten().find(|one| one["name"] == name);
        let status = status.ok_or("no ephemeral container")?;
        ensure!(status["state"]["terminated"]["exitCode"] == 0, "{status}");
        Ok(Some(()))
    })?;
    let seen = cluster.asks(&["logs", "pod", "-c", name])?;
    ensure!(seen.contains("httpd"), "the debugger sees\n{seen}");
    // Its coming has disturbed nobody.
    let pod = cluster.json(&["get", "pod", "pod"])?;
    for container in ["web", "pipe", "terminal"] {
        let status = container_status(&pod, container)?;
        ensure!(
            status["restartCount"] == 0 && status["state"]["running"].is_object(),
            "{status}"
        );
    }
    Ok(())
}

/// A pod in the node's namespaces, with its root.
fn the_node_itself_is_debugged(cluster: &Cluster) -> Result {
    let node = cluster.asks(&["get", "nodes", "-o", "jsonpath={.items[0].metadata.name}"])?;
    let debug = ["debug", &format!("node/{node}"), "--image", BUSYBOX];
    let script = "cat /host/etc/debian_version && ps | grep -c kube-apiserver";
    let debug = cluster
        .kubectl(&debug)
        .args(["--", "sh", "-c", script])
        .ok()?;
    // Creating debugging pod NAME with container debugger on node NODE.
    let words: Vec<&str> = debug.stdout.split_whitespace().collect();
    let name = words.iter().find(|word| word.starts_with("node-debugger-"));
    let name = *name.ok_or(format!("no pod's name in {}", debug.told()))?;
    eventually("the node's debugger to end well", || {
        let pod = cluster.json(&["get", "pod", name])?;
        let said = cluster.kubectl(&["logs", name]).end()?.told();
        ensure!(
            pod["status"]["phase"] == "Succeeded",
            "{said}\n{}",
            pod["status"]
        );
        Ok(Some(()))
    })?;
    let seen = cluster.asks(&["logs", name])?;
    let wanted = fs::read_to_string("/etc/debian_version")?;
    ensure!(
        seen.starts_with(&wanted),
        "the node's debugger sees\n{seen}"
    );
    Ok(())
}

/// What `top` stands on, and what there is of it where nothing counts memory.
fn statistics_come_through_the_api_server(cluster: &Cluster) -> Result {
    let node = cluster.asks(&["get", "nodes", "-o", "jsonpath={.items[0].metadata.name}"])?;
    let path = |what: &str| format!("/api/v1/nodes/{node}/proxy{what}");
    eventually("the pod in the node's statistics", || {
        let summary = cluster
            .kubectl(&["get", "--raw", &path("/stats/summary")])
            .ok()?;
        let summary = summary.json()?;
        let pods = summary["pods"].as_array().into_iter().flatten();
        let pod = pods.into_iter().find(|pod| pod["podRef"]["name"] == "pod");
        let pod = pod.ok_or("no such pod")?;
        let containers = pod["containers"].as_array().map_or(0, Vec::len);
        ensure!(containers >= 3, "{pod}");
        let cpu = pod.pointer("/cpu/usageCoreNanoSeconds");
        ensure!(cpu.and_then(serde_json::Value::as_u64) > Some(0), "{pod}");
        Ok(Some(()))
    })?;
    let metrics = cluster.asks(&["get", "--raw", &path("/metrics/resource")])?;
    ensure!(
        metrics.contains("container_cpu_usage_seconds_total{container=\"web\""),
        "{metrics}"
    );
    if Need::Controller("memory").lacking().is_some() {
        note(
            "kubectl top was not tried: nothing counts memory here; its sources were read"
                .to_owned(),
        );
    }
    Ok(())
}

fn top_shows_what_nodes_and_pods_use() -> Result {
    on_a_node(|node| {
        let cluster = Cluster::start(node)?;
        cluster.serve_metrics()?;
        start_pod(&cluster)?;
        eventually("kubectl top", || {
            let pods = cluster.asks(&["top", "pods", "--containers", "--no-headers"])?;
            ensure!(pods.lines().count() >= 4, "{pods}");
            let nodes = cluster.asks(&["top", "nodes", "--no-headers"])?;
            ensure!(nodes.contains('%'), "{nodes}");
            note(format!("kubectl top:\n{pods}\n{nodes}"));
            Ok(Some(()))
        })?;
        cluster.asks(&["delete", "pod", "--all", &timeout_flag()])?;
        Kubelet::has_stopped_everything(node)
    })
}
