//! Tests of kubectl on a real cluster: logs, exec, attach, cp, port-forward, debug and top. The
//! tests use WebSocket, like current versions of kubectl, and SPDY, like older versions.

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
        kubectl_works_with_a_pod_over_both_transports,
        Need::NativeOrLong,
        APISERVER,
        TMUX,
        KUBELET,
    ),
    test!(
        kubectl_top_shows_the_usage_of_nodes_and_pods,
        Need::NativeOrLong,
        Need::Program("metrics-server"),
        Need::Controller("memory"),
        APISERVER,
        KUBELET,
    ),
];

/// The number of bytes in each transfer with `kubectl cp` or `kubectl exec`.
const COPIED_BYTES: usize = 3_000_000;

/// The number of lines in the log of a container whose log a client follows.
const LOG_LINES: usize = 3000;

fn kubectl_works_with_a_pod_over_both_transports() -> Result {
    on_a_node(|node| {
        let cluster = Cluster::start(node)?;
        start_pod(&cluster)?;
        kubectl_follows_a_log_to_its_end(&cluster)?;
        for transport in TRANSPORTS {
            kubectl_exec_connects_the_streams_and_returns_the_exit_code(&cluster, transport)?;
            exec_carries_megabytes_in_both_directions(&cluster, transport)?;
            kubectl_exec_and_attach_connect_and_resize_a_terminal(node, transport)?;
            kubectl_attach_connects_to_the_first_process_of_a_container(node, &cluster, transport)?;
            kubectl_copies_files_in_both_directions(node, &cluster, transport)?;
            ports_are_forwarded(&cluster, transport)?;
        }
        a_debugger_sees_the_processes_of_its_target_container(&cluster)?;
        kubectl_debug_shows_the_files_and_the_processes_of_the_node(&cluster)?;
        statistics_are_available_through_the_api_server(&cluster)?;
        cluster.asks(&["delete", "pod", "--all", &timeout_flag()])?;
        Kubelet::has_stopped_everything(node)
    })
}

/// Starts a pod with four containers: a web server, a shell on a pipe, a shell on a terminal, and a
/// shell for the log test. The last shell waits for the file /tmp/go and then writes a log.
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

fn kubectl_follows_a_log_to_its_end(cluster: &Cluster) -> Result {
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
    // `kubectl logs --follow` ends by itself when the container ends.
    let output = follower.end_within(cluster_timeout())?;
    let all: String = (1..=LOG_LINES)
        .map(|n| format!("line {n} of the log\n"))
        .collect();
    ensure!(
        output.code == 0 && output.stdout == all,
        "kubectl failed or did not print all lines in order:\n{}",
        output.told()
    );
    let last = ["logs", "--tail=1", "pod", "--container", "talk"];
    let last_line = format!("line {LOG_LINES} of the log");
    ensure_eq!(
        cluster.asks(&last)?,
        last_line,
        "the last line of the container's log"
    );
    Ok(())
}

fn kubectl_exec_connects_the_streams_and_returns_the_exit_code(
    cluster: &Cluster,
    transport: Transport,
) -> Result {
    let script = "echo to stdout; echo to stderr >&2; exit 7";
    let exec = ["exec", "pod", "-c", "web", "--", "sh", "-c", script];
    let output = cluster.kubectl_over(transport, &exec).exits(7)?;
    ensure_eq!(
        output.stdout,
        "to stdout\n",
        "stdout of kubectl exec over {transport:?}"
    );
    ensure!(
        output.stderr.starts_with("to stderr\n"),
        "kubectl exec printed the wrong stderr over {transport:?}: {}",
        output.stderr
    );
    Ok(())
}

/// Returns text without a repeated pattern. If a part of the text is lost or repeated, a comparison
/// detects the difference.
fn long_text() -> String {
    let mut number = 12345_u32;
    let mut line = || {
        number = number.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
        format!("{number:08x}\n")
    };
    std::iter::repeat_with(&mut line)
        .take(COPIED_BYTES / 9)
        .collect()
}

fn exec_carries_megabytes_in_both_directions(cluster: &Cluster, transport: Transport) -> Result {
    let text = long_text();
    let exec = ["exec", "-i", "pod", "-c", "web", "--", "cat"];
    let cat = cluster.kubectl_over(transport, &exec);
    let back = cat.stdin(text.clone()).ok()?.stdout;
    ensure!(
        back == text,
        "over {transport:?}, the output of cat ({} bytes) differs from its input ({} bytes)",
        back.len(),
        text.len()
    );
    Ok(())
}

fn kubectl_exec_and_attach_connect_and_resize_a_terminal(
    node: &Node,
    transport: Transport,
) -> Result {
    let kubectl = format!("env {} kubectl", environment(transport).join(" "));
    for what in ["exec -it pod -c web -- sh", "attach -it pod -c terminal"] {
        let terminal = Terminal::open(node.join("tmux"), &format!("{kubectl} {what}"))?;
        let answers = |typed: &str, line: &str| {
            eventually(
                &format!("`kubectl {what}` to show the line {line:?}"),
                || {
                    terminal.types(typed)?;
                    std::thread::sleep(Duration::from_millis(200));
                    let screen = terminal.tmux(&["capture-pane", "-p"])?;
                    ensure!(
                        screen.lines().any(|one| one.trim() == line),
                        "the line {line:?} is missing on the terminal's screen, which shows:\n{screen}"
                    );
                    Ok(Some(()))
                },
            )
        };
        // The shell may not be ready yet. The test therefore repeats the command until its output
        // appears.
        answers("echo pro''mpt", "prompt")?;
        answers("clear; stty size", "24 80")?;
        terminal.tmux(&["resize-window", "-x", "101", "-y", "31"])?;
        answers("clear; stty size", "31 101")?;
        terminal.tmux(&["resize-window", "-x", "80", "-y", "24"])?;
    }
    Ok(())
}

fn kubectl_attach_connects_to_the_first_process_of_a_container(
    node: &Node,
    cluster: &Cluster,
    transport: Transport,
) -> Result {
    // The client's shell also opens the FIFO for writing. The client's input therefore never ends.
    let fifo = node.join(&format!("typed-{transport:?}"));
    let script = "mkfifo \"$0\"; exec 3<>\"$0\"; exec \"$@\" <\"$0\"";
    let mut client = command("env", environment(transport))
        .args(["sh", "-c", script])
        .arg(&fifo)
        .args(["kubectl", "attach", "-i", "pod", "-c", "pipe"])
        .start()?;
    wait_for("the client to create its FIFO", || {
        Ok(fifo.exists().then_some(()))
    })?;
    fs::write(&fifo, format!("hello over {transport:?}\n"))?;
    let answer = format!("got hello over {transport:?}");
    receives(&mut client, &answer)?;
    drop(client);
    // The container still works after the client was killed: its log also contains the answer.
    let log = ["logs", "pod", "-c", "pipe"];
    wait_for(
        "the container's log to contain the container's answer",
        || Ok(cluster.asks(&log)?.contains(&answer).then_some(())),
    )
}

fn receives(client: &mut Running, text: &str) -> Result {
    wait_within(
        cluster_timeout(),
        &format!("the kubectl client to receive the text {text:?}"),
        || {
            ensure!(
                client.lives(),
                "the kubectl client exited: {}",
                client.stderr()
            );
            Ok(client.stdout().contains(text).then_some(()))
        },
    )
}

fn kubectl_copies_files_in_both_directions(
    node: &Node,
    cluster: &Cluster,
    transport: Transport,
) -> Result {
    let source = node.join(&format!("source-{transport:?}"));
    let back = node.join(&format!("back-{transport:?}"));
    fs::create_dir_all(source.join("below"))?;
    fs::write(source.join("much"), long_text())?;
    fs::write(source.join("below/little"), format!("{transport:?}\n"))?;
    let inside = format!("pod:/tmp/{transport:?}");
    let copy = |from: &str, to: &str| {
        let copy = ["cp", from, to, "-c", "web"];
        cluster.kubectl_over(transport, &copy).ok()
    };
    copy(&source.to_string_lossy(), &inside)?;
    copy(&inside, &back.to_string_lossy())?;
    let sums = "find . -type f -exec sha256sum {} + | sort -k 2";
    let expected = command("sh", ["-c", sums]).dir(&source).ok()?.stdout;
    ensure_eq!(expected.lines().count(), 2, "number of files to copy");
    let cd = format!("cd /tmp/{transport:?} && {sums}");
    let exec = ["exec", "pod", "-c", "web", "--", "sh", "-c", &cd];
    let inside = cluster.kubectl_over(transport, &exec).ok()?.stdout;
    ensure_eq!(
        inside,
        expected,
        "checksums of the files that kubectl copied into the container over {transport:?}"
    );
    let back = command("sh", ["-c", sums]).dir(&back).ok()?.stdout;
    ensure_eq!(
        back,
        expected,
        "checksums of the files that kubectl copied back over {transport:?}"
    );
    Ok(())
}

fn ports_are_forwarded(cluster: &Cluster, transport: Transport) -> Result {
    let forward = ["port-forward", "pod/pod", ":5000"];
    let mut forward = cluster.kubectl_over(transport, &forward).start()?;
    let from = "Forwarding from 127.0.0.1:";
    receives(&mut forward, from)?;
    let output = forward.stdout();
    let port = output
        .split(from)
        .nth(1)
        .and_then(|rest| rest.split(' ').next());
    let url = format!(
        "http://127.0.0.1:{}/",
        port.ok_or("kubectl printed no port")?
    );
    // The test sends three requests one after the other, and then ten requests at the same time.
    // kubectl forwards all requests as streams of one connection.
    let fetch = || command("curl", ["-fsS", &url]).within(cluster_timeout());
    for _ in 0..3 {
        fetch().ok()?.says("hello from rrun")?;
    }
    let all: Vec<Running> = (0..10).map(|_| fetch().start()).collect::<Result<_>>()?;
    for one in all {
        let output = one.end_within(cluster_timeout())?;
        ensure_eq!(
            output.code,
            0,
            "exit code of a curl request through the forwarded port: {}",
            output.told()
        );
        output.says("hello from rrun")?;
    }
    ensure!(
        forward.lives(),
        "kubectl port-forward exited over {transport:?}: {}",
        forward.stderr()
    );
    Ok(())
}

/// Checks that an ephemeral container sees the processes of its target container.
fn a_debugger_sees_the_processes_of_its_target_container(cluster: &Cluster) -> Result {
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
    eventually("the debugger to exit", || {
        let pod = cluster.json(&["get", "pod", "pod"])?;
        let all = pod["status"]["ephemeralContainerStatuses"].as_array();
        let status = all.into_iter().flatten().find(|one| one["name"] == name);
        let status = status.ok_or("the pod has no ephemeral container")?;
        ensure!(
            status["state"]["terminated"]["exitCode"] == 0,
            "the exit code of the debugger is not 0; the debugger container's status: {status}"
        );
        Ok(Some(()))
    })?;
    let seen = cluster.asks(&["logs", "pod", "-c", name])?;
    ensure!(
        seen.contains("httpd"),
        "the debugger does not see the process httpd of the target container; the debugger's output:\n{seen}"
    );
    // The debugger must not affect the other containers.
    let pod = cluster.json(&["get", "pod", "pod"])?;
    for container in ["web", "pipe", "terminal"] {
        let status = container_status(&pod, container)?;
        ensure!(
            status["restartCount"] == 0 && status["state"]["running"].is_object(),
            "the container {container} was restarted or does not run; the container's status: {status}"
        );
    }
    Ok(())
}

/// Debugs the node itself from a pod in the node's namespaces, with the node's root directory at
/// /host.
fn kubectl_debug_shows_the_files_and_the_processes_of_the_node(cluster: &Cluster) -> Result {
    let node = cluster.asks(&["get", "nodes", "-o", "jsonpath={.items[0].metadata.name}"])?;
    let debug = ["debug", &format!("node/{node}"), "--image", BUSYBOX];
    let script = "cat /host/etc/debian_version && ps | grep -c kube-apiserver";
    let debug = cluster
        .kubectl(&debug)
        .args(["--", "sh", "-c", script])
        .ok()?;
    // kubectl prints "Creating debugging pod NAME with container debugger on node NODE."
    let words: Vec<&str> = debug.stdout.split_whitespace().collect();
    let name = words.iter().find(|word| word.starts_with("node-debugger-"));
    let name = *name.ok_or(format!("kubectl printed no pod name: {}", debug.told()))?;
    eventually("the debugger pod for the node to succeed", || {
        let pod = cluster.json(&["get", "pod", name])?;
        let log = cluster.kubectl(&["logs", name]).end()?.told();
        ensure!(
            pod["status"]["phase"] == "Succeeded",
            "the debugger pod for the node has not succeeded; the pod's log:\n{log}\nThe pod's status: {}",
            pod["status"]
        );
        Ok(Some(()))
    })?;
    let seen = cluster.asks(&["logs", name])?;
    let expected = fs::read_to_string("/etc/debian_version")?;
    ensure!(
        seen.starts_with(&expected),
        "the debugger pod for the node does not see the node's files; the pod's log:\n{seen}"
    );
    Ok(())
}

/// Checks the statistics that `kubectl top` needs. Unlike `kubectl top`, the check also works on a
/// node without the memory controller.
fn statistics_are_available_through_the_api_server(cluster: &Cluster) -> Result {
    let node = cluster.asks(&["get", "nodes", "-o", "jsonpath={.items[0].metadata.name}"])?;
    let path = |what: &str| format!("/api/v1/nodes/{node}/proxy{what}");
    eventually("the node's summary to contain the pod's statistics", || {
        let summary = cluster
            .kubectl(&["get", "--raw", &path("/stats/summary")])
            .ok()?;
        let summary = summary.json()?;
        let pods = summary["pods"].as_array().into_iter().flatten();
        let pod = pods.into_iter().find(|pod| pod["podRef"]["name"] == "pod");
        let pod = pod.ok_or("the pod is missing in the node's summary")?;
        let containers = pod["containers"].as_array().map_or(0, Vec::len);
        ensure!(
            containers >= 3,
            "the statistics contain fewer than three containers of the pod: {pod}"
        );
        let cpu = pod.pointer("/cpu/usageCoreNanoSeconds");
        ensure!(
            cpu.and_then(serde_json::Value::as_u64) > Some(0),
            "the pod has no CPU usage in the statistics {pod}"
        );
        Ok(Some(()))
    })?;
    let metrics = cluster.asks(&["get", "--raw", &path("/metrics/resource")])?;
    ensure!(
        metrics.contains("container_cpu_usage_seconds_total{container=\"web\""),
        "the CPU usage of the container web is missing in the metrics:\n{metrics}"
    );
    if Need::Controller("memory").lacking().is_some() {
        note(
            "the memory controller is missing, so the test did not run kubectl top, but checked the statistics behind kubectl top"
                .to_owned(),
        );
    }
    Ok(())
}

fn kubectl_top_shows_the_usage_of_nodes_and_pods() -> Result {
    on_a_node(|node| {
        let cluster = Cluster::start(node)?;
        cluster.serve_metrics()?;
        start_pod(&cluster)?;
        eventually("kubectl top to show the usage", || {
            let pods = cluster.asks(&["top", "pods", "--containers", "--no-headers"])?;
            ensure!(
                pods.lines().count() >= 4,
                "kubectl top lists too few containers: {pods}"
            );
            let nodes = cluster.asks(&["top", "nodes", "--no-headers"])?;
            ensure!(
                nodes.contains('%'),
                "kubectl top shows no percentage: {nodes}"
            );
            note(format!("kubectl top:\n{pods}\n{nodes}"));
            Ok(Some(()))
        })?;
        cluster.asks(&["delete", "pod", "--all", &timeout_flag()])?;
        Kubelet::has_stopped_everything(node)
    })
}
