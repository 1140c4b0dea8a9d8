//! Tests of port-forward through crictl, over SPDY and over WebSocket.

use std::collections::BTreeMap;
use std::io::{Read, Write};
use std::net::{TcpListener, TcpStream};

use nix::sys::signal::Signal;

use crate::support::calls::Calls;
use crate::support::machine::{Result, command, deadline, wait_for};
use crate::support::needs::{Need, Test};
use crate::support::node::{A_NODE, BUSYBOX, WEB, is_rrun, on_a_node};
use crate::support::spdy::SpdyClient;
use crate::support::streams::{TRANSPORTS, port_forward_url, waiting};
use crate::support::websocket::{reads, websocket};
use crate::{ensure, ensure_eq, test};

const SOCAT: Need = Need::Program("socat");

pub(crate) const TESTS: &[Test] = &[
    test!(crictl_forwards_the_ports_of_a_pod, A_NODE, SOCAT),
    test!(
        crictl_forwards_node_ports_for_a_pod_on_the_node_network,
        A_NODE
    ),
    test!(
        other_connections_work_while_one_program_does_not_read_its_data,
        A_NODE,
        Need::RrunCri
    ),
    test!(
        a_client_that_opens_many_invalid_streams_writes_few_lines_to_the_servers_log,
        A_NODE,
        Need::RrunCri
    ),
    test!(
        a_forwarded_connection_ends_when_the_program_in_the_pod_ends,
        A_NODE
    ),
];

fn crictl_forwards_the_ports_of_a_pod() -> Result {
    on_a_node(|node| {
        node.pull(WEB)?;
        node.pull(BUSYBOX)?;
        let pod = node.pod("ports");
        let pod_id = node.runp(&pod)?;
        let mut web = node.container("web", &[]);
        web["image"]["image"] = WEB.into();
        node.run(&pod_id, &pod, &web)?;
        // This checksum server listens only on IPv6, and answers only after its input ends. The
        // client ends its input by a shutdown of the write side of its connection. The CRI server
        // must pass this shutdown on to the checksum server.
        let script =
            "while true; do nc -l -p 6000 -s ::1 -e sh -c 'sum=$(sha256sum); echo $sum'; done";
        let sums = node.container("sums", &["sh", "-c", script]);
        node.run(&pod_id, &pod, &sums)?;
        let text = "x".repeat(3 << 20);
        let sum = command("sha256sum", ["-b"])
            .stdin(text.clone())
            .ok()?
            .stdout;
        let sum = sum.split(' ').next().unwrap_or_default().to_owned();
        for (number, transport) in TRANSPORTS.into_iter().enumerate() {
            let (first, second, third) = (18000 + number, 18010 + number, 18020 + number);
            let mut forward = node
                .crictl(&["port-forward", "--transport", transport, &pod_id])
                .args([format!("{first}:5000"), format!("{second}:6000")])
                .start()?;
            let url = format!("http://127.0.0.1:{first}/");
            let page = wait_for(
                "the web server's page to arrive through the forwarded port",
                || {
                    ensure!(
                        forward.lives(),
                        "crictl port-forward exited; its stderr: {}",
                        forward.stderr()
                    );
                    command("curl", ["-fsS", &url]).ok().map(Some)
                },
            )?;
            ensure_eq!(
                page.text(),
                "hello from rrun",
                "page that curl received over {transport}"
            );
            let many: Vec<_> = (0..20)
                .map(|_| command("curl", ["-fsS", &url]).start())
                .collect::<Result<_>>()?;
            for one in many {
                let page = one.end()?;
                ensure_eq!(
                    page.text(),
                    "hello from rrun",
                    "page that one of 20 clients received: {}",
                    page.told()
                );
            }
            forward.signal(Signal::SIGTERM);
            forward.end()?;
            // No program listens on port 81, so the client gets an error.
            let mut refused = node
                .crictl(&["port-forward", "--transport", transport, &pod_id])
                .arg(format!("{third}:81"))
                .start()?;
            wait_for("crictl to report the refused connection", || {
                let _ = command(
                    "curl",
                    ["-sS", "-m", "2", &format!("http://127.0.0.1:{third}/")],
                )
                .end()?;
                let received = refused.stderr() + &refused.stdout();
                Ok(received.contains("refused").then_some(()))
            })?;
            if is_rrun() {
                let line = format!("pod {pod_id}: error forwarding port 81");
                wait_for("the server to log the pod id and the port", || {
                    Ok(node.log().contains(&line).then_some(()))
                })?;
            }
            refused.signal(Signal::SIGKILL);
            let mut forward = node
                .crictl(&["port-forward", "--transport", transport, &pod_id])
                .arg(format!("{second}:6000"))
                .start()?;
            let address = format!("TCP:127.0.0.1:{second}");
            let answer = wait_for("the checksum to arrive through a forwarded port", || {
                ensure!(
                    forward.lives(),
                    "crictl port-forward exited; its stderr: {}",
                    forward.stderr()
                );
                let socat = command("socat", ["-t", "20", "-", &address]);
                let answer = socat.stdin(text.clone()).ok()?;
                Ok(answer.stdout.contains(&sum).then_some(()))
            });
            forward.signal(Signal::SIGKILL);
            answer?;
        }
        Ok(())
    })
}

fn crictl_forwards_node_ports_for_a_pod_on_the_node_network() -> Result {
    on_a_node(|node| {
        let mut pod = node.pod("host");
        pod["linux"]["security_context"]["namespace_options"]["network"] = 2.into();
        if let Some(pod) = pod.as_object_mut() {
            // A pod on the node's network has the node's host name, so its configuration must not
            // contain a host name.
            pod.remove("hostname");
        }
        let pod_id = node.runp(&pod)?;
        let listener = TcpListener::bind(("127.0.0.1", 0))?;
        let port = listener.local_addr()?.port();
        std::thread::spawn(move || {
            for stream in listener.incoming() {
                let _ = stream.and_then(|mut stream| stream.write_all(b"the node's"));
            }
        });
        for (local, transport) in (18100_u16..).zip(TRANSPORTS) {
            let mut forward = node
                .crictl(&["port-forward", "--transport", transport, &pod_id])
                .arg(format!("{local}:{port}"))
                .start()?;
            let received = wait_for("data to arrive through the forwarded port", || {
                ensure!(
                    forward.lives(),
                    "crictl port-forward exited; its stderr: {}",
                    forward.stderr()
                );
                let Ok(mut stream) = TcpStream::connect(("127.0.0.1", local)) else {
                    return Ok(None);
                };
                stream.set_read_timeout(Some(deadline()))?;
                let mut received = String::new();
                stream.read_to_string(&mut received)?;
                Ok(Some(received))
            });
            forward.signal(Signal::SIGKILL);
            ensure_eq!(
                received?,
                "the node's",
                "data received through the forwarded port over {transport}"
            );
        }
        Ok(())
    })
}

/// SPDY clients do not support flow-control windows. Neither the client nor the server can
/// therefore pause the program that sends data.
fn other_connections_work_while_one_program_does_not_read_its_data() -> Result {
    on_a_node(|node| {
        node.pull(BUSYBOX)?;
        let pod = node.pod("stuck");
        let pod_id = node.runp(&pod)?;
        let script = "nc -ll -p 6000 -e sleep 1000 & nc -ll -p 6001 -e cat & wait";
        node.run(&pod_id, &pod, &node.container("c", &["sh", "-c", script]))?;
        let echo = |port: u16| -> Result<Option<()>> {
            let Ok(mut stream) = TcpStream::connect(("127.0.0.1", port)) else {
                return Ok(None);
            };
            stream.set_read_timeout(Some(deadline() * 4))?;
            stream.write_all(b"hello")?;
            let mut received = [0; 5];
            Ok(stream.read_exact(&mut received).is_ok().then_some(()))
        };
        let mut clients = Vec::new();
        for (port, transport) in (18200_u16..).step_by(2).zip(TRANSPORTS) {
            let mut forward = node
                .crictl(&["port-forward", "--transport", transport, &pod_id])
                .args([format!("{port}:6000"), format!("{}:6001", port + 1)])
                .start()?;
            wait_for("data to arrive through the forwarded port", || {
                ensure!(
                    forward.lives(),
                    "crictl port-forward exited; its stderr: {}",
                    forward.stderr()
                );
                echo(port + 1)
            })?;
            // The thread sends much more data than all buffers between the thread and the program
            // in the pod can store. The thread ends when its connection is closed.
            let mut stuck = TcpStream::connect(("127.0.0.1", port))?;
            let sending = std::thread::spawn(move || {
                let piece = vec![0; 1 << 20];
                while stuck.write_all(&piece).is_ok() {}
            });
            clients.push((port, transport, forward, sending));
        }
        for (port, transport, mut forward, sending) in clients {
            let answered = echo(port + 1)?;
            ensure!(
                answered.is_some() && forward.lives(),
                "over {transport}, the connection to the program that echoes its input no longer works: {}",
                forward.stderr()
            );
            ensure!(
                sending.join().is_ok(),
                "the sending thread panicked over {transport}"
            );
            ensure!(
                echo(port + 1)?.is_some() && forward.lives(),
                "over {transport}, crictl port-forward exited when the stuck connection was closed: {}",
                forward.stderr()
            );
            forward.signal(Signal::SIGKILL);
        }
        Ok(())
    })
}

fn a_client_that_opens_many_invalid_streams_writes_few_lines_to_the_servers_log() -> Result {
    on_a_node(|node| {
        let id = waiting(node, "flood")?;
        let pod_id = node.asks(&["pods", "--quiet"])?;
        let calls = Calls::new(node)?;
        let url = port_forward_url(&calls, &pod_id, &[])?;
        let mut client = SpdyClient::upgraded(&url, "portforward.k8s.io")?;
        for _ in 0..200 {
            client.open_with("data", &[("requestid", "1")])?;
        }
        for kind in ["error", "data"] {
            client.open_with(kind, &[("port", "81"), ("requestid", "0")])?;
        }
        // The server has handled the invalid streams before it reports the closed port.
        let refused = |streams: &BTreeMap<&str, String>| {
            let error = streams.get("error");
            error.is_some_and(|text| text.contains("refused"))
        };
        client.until(refused)?;
        let lines = node.log().matches("contain no valid port").count();
        ensure!(
            (1..=10).contains(&lines),
            "200 invalid streams wrote {lines} lines to the server's log"
        );
        node.asks(&["stop", "--timeout", "0", &id])?;
        Ok(())
    })
}

/// SPDY clients close their half of a connection only after the server has closed its half. So the
/// server must close its half when the program in the pod ends.
fn a_forwarded_connection_ends_when_the_program_in_the_pod_ends() -> Result {
    on_a_node(|node| {
        node.pull(BUSYBOX)?;
        let pod = node.pod("over");
        let pod_id = node.runp(&pod)?;
        let script = "exec nc -ll -p 6000 -e echo bye";
        let id = node.run(&pod_id, &pod, &node.container("c", &["sh", "-c", script]))?;
        let listens = "until grep -q :1770 /proc/net/tcp*; do sleep 0.1; done";
        node.asks(&["exec", &id, "sh", "-c", listens])?;
        let calls = Calls::new(node)?;
        let url = port_forward_url(&calls, &pod_id, &[])?;
        let mut client = SpdyClient::upgraded(&url, "portforward.k8s.io")?;
        for kind in ["error", "data"] {
            client.open_with(kind, &[("port", "6000"), ("requestid", "0")])?;
        }
        let streams = client.all()?;
        let of = |kind| streams.get(kind).map(String::as_str).unwrap_or_default();
        ensure_eq!(of("data"), "bye\n", "output of the program");
        ensure_eq!(of("error"), "", "content of the error stream");
        if is_rrun() {
            // A WebSocket channel cannot be closed in one direction, so the server closes the whole
            // session.
            let url = port_forward_url(&calls, &pod_id, &[6000])?;
            let mut stream = websocket(&url, "v4.channel.k8s.io")?;
            reads(&mut stream, b"\x00bye\n")?;
            // The server sends a close frame with the code 1000.
            reads(&mut stream, &[0x88, 2, 3, 232])?;
        }
        Ok(())
    })
}
