//! Tests of the streaming server itself. The tests cover valid and invalid requests, TLS,
//! misbehaving clients, and many clients at the same time.

use std::fs;
use std::io::{Read, Write};
use std::net::TcpStream;
use std::path::Path;
use std::time::Duration;

use nix::sys::socket::{setsockopt, sockopt};
use rrun_proto::v1::{AttachRequest, ExecRequest};

use crate::support::calls::Calls;
use crate::support::certificates::{OPENSSL, certificates};
use crate::support::machine::{Failed, Result, deadline, rounds, wait_for};
use crate::support::needs::{Need, Test};
use crate::support::node::{A_NODE, BUSYBOX, is_rrun, on_a_node};
use crate::support::spdy::SpdyClient;
use crate::support::streams::{TRANSPORTS, count_processes, exec_url, port_forward_url, waiting};
use crate::support::websocket::{message, reads, websocket};
use crate::{ensure, ensure_eq, test};

pub(crate) const TESTS: &[Test] = &[
    test!(the_server_checks_each_stream_request, A_NODE),
    test!(
        the_server_closes_connections_with_invalid_data_or_a_slow_request_head,
        A_NODE
    ),
    test!(two_hundred_exec_sessions_run_at_the_same_time, A_NODE),
    test!(
        a_client_that_never_reads_needs_only_a_fixed_amount_of_server_memory,
        A_NODE
    ),
    test!(streams_work_over_tls, A_NODE, OPENSSL, Need::RrunCri),
    test!(the_server_closes_an_idle_stream, A_NODE, Need::RrunCri),
    test!(
        the_server_refuses_a_websocket_message_that_is_too_long,
        A_NODE
    ),
    test!(
        clients_get_an_error_when_the_server_stops,
        A_NODE,
        Need::RrunCri
    ),
    test!(
        clients_that_disconnect_during_a_session_leave_no_process_and_no_descriptor,
        A_NODE,
        Need::RrunCri
    ),
];

fn streams_work_over_tls() -> Result {
    on_a_node(|node| {
        certificates(&node.join(""))?;
        let [cert, key] = ["server.pem", "server.key"].map(|name| node.join(name));
        let lines = format!("stream_tls_cert = {cert:?}\nstream_tls_key = {key:?}");
        node.restart_with(&lines)?;
        let id = waiting(node, "tls")?;
        let calls = Calls::new(node)?;
        let url = exec_url(&calls, &id, &["true"])?;
        ensure!(
            url.starts_with("https://127.0.0.1:"),
            "the server returned an exec URL that is not HTTPS on 127.0.0.1: {url}"
        );
        // crictl requires a client certificate, although the server does not request one.
        let [ca, cert, key] = ["ca.pem", "client.pem", "client.key"]
            .map(|name| node.join(name).display().to_string());
        for transport in TRANSPORTS {
            let exec = |name: &str| {
                node.crictl(&["exec", "--transport", transport, "--tls-ca", &ca])
                    .args(["--tls-cert", &cert, "--tls-key", &key, "--tls-sni", name])
                    .args(["-i", &id, "cat"])
                    .stdin("typed")
            };
            ensure_eq!(
                exec("127.0.0.1").ok()?.stdout,
                "typed",
                "output of cat over {transport}"
            );
            let other = exec("other.example").end()?;
            ensure!(
                other.code != 0 && other.told().contains("certificate"),
                "over {transport}, crictl accepted a server certificate for another host name: {}",
                other.told()
            );
        }
        // A client without TLS gets no answer.
        let host = url.trim_start_matches("https://");
        let mut plain = TcpStream::connect(host.split('/').next().unwrap_or_default())?;
        plain.set_read_timeout(Some(deadline()))?;
        write!(plain, "GET /exec/x HTTP/1.1\r\nHost: x\r\n\r\n")?;
        let mut answer = Vec::new();
        let _ = plain.read_to_end(&mut answer);
        ensure!(
            !answer.starts_with(b"HTTP"),
            "a client without TLS got the answer {answer:?}"
        );
        Ok(())
    })
}

fn the_server_closes_an_idle_stream() -> Result {
    on_a_node(|node| {
        node.restart_with("stream_idle_timeout = 1")?;
        let id = waiting(node, "idle")?;
        let cgroup = node.cgroup(&id)?;
        let calls = Calls::new(node)?;
        let url = exec_url(&calls, &id, &["cat"])?;
        let mut stream = websocket(&url, "v5.channel.k8s.io")?;
        stream.write_all(&message(0, b"hello\n"))?;
        reads(&mut stream, b"\x01hello\n")?;
        // From now on, neither the client nor the server sends data.
        let mut rest = Vec::new();
        match stream.read_to_end(&mut rest) {
            Err(error) if error.kind() == std::io::ErrorKind::WouldBlock => {
                return Err(format!(
                    "the server did not close the connection within {:?}",
                    deadline()
                )
                .into());
            }
            _ => {}
        }
        wait_for("the command of the idle exec session to end", || {
            Ok((count_processes(&cgroup)? == 1).then_some(()))
        })?;
        wait_for("the server to log that the stream is idle", || {
            Ok(node
                .log()
                .contains("no data was transferred for 1 s")
                .then_some(()))
        })?;
        Ok(())
    })
}

fn the_server_refuses_a_websocket_message_that_is_too_long() -> Result {
    on_a_node(|node| {
        let id = waiting(node, "long")?;
        let calls = Calls::new(node)?;
        let url = exec_url(&calls, &id, &["cat"])?;
        let mut stream = websocket(&url, "v5.channel.k8s.io")?;
        // The frame's head announces a message of 64 MiB. The server closes the connection without
        // waiting for the message and without allocating memory for it.
        let mut head = vec![0x82, 0x80 | 127];
        head.extend_from_slice(&(64_u64 << 20).to_be_bytes());
        head.extend_from_slice(&[0; 4]);
        stream.write_all(&head)?;
        let mut rest = Vec::new();
        match stream.read_to_end(&mut rest) {
            Err(error) if error.kind() == std::io::ErrorKind::WouldBlock => Err(format!(
                "the server did not close the connection within {:?}",
                deadline()
            )
            .into()),
            _ => Ok(()),
        }
    })
}

fn the_server_checks_each_stream_request() -> Result {
    on_a_node(|node| {
        let id = waiting(node, "checked")?;
        let calls = Calls::new(node)?;
        let url_of = |change: &dyn Fn(&mut ExecRequest)| {
            let mut request = ExecRequest {
                container_id: id.clone(),
                cmd: vec!["true".to_owned()],
                stdout: true,
                ..ExecRequest::default()
            };
            change(&mut request);
            let mut runtime = calls.runtime();
            let answer = calls.wait(async move { runtime.exec(request).await })?;
            Ok::<_, Failed>(match answer {
                Ok(answer) => answer.into_inner().url,
                Err(status) => format!("{:?}", status.code()),
            })
        };
        let url = url_of(&|_| {})?;
        ensure!(
            url.starts_with("http://127.0.0.1:"),
            "the server returned an exec URL that is not HTTP on 127.0.0.1: {url}"
        );
        ensure_eq!(
            url_of(&|request| request.stdout = false)?,
            "InvalidArgument",
            "answer to an exec request without a stream"
        );
        let both = |request: &mut ExecRequest| (request.tty, request.stderr) = (true, true);
        ensure_eq!(
            url_of(&both)?,
            "InvalidArgument",
            "answer to an exec request for a terminal and stderr"
        );
        if is_rrun() {
            ensure_eq!(
                url_of(&|request| request.container_id = "nosuch".to_owned())?,
                "NotFound",
                "answer to an exec request for a container that does not exist"
            );
        }
        // The token in a URL is valid only once.
        drop(websocket(&url, "v5.channel.k8s.io")?);
        ensure!(
            websocket(&url, "v5.channel.k8s.io").is_err(),
            "the server accepted the token in a URL twice"
        );
        node.asks(&["stop", "--timeout", "0", &id])?;
        if is_rrun() {
            ensure_eq!(
                url_of(&|_| {})?,
                "FailedPrecondition",
                "answer to an exec request for a container that has exited"
            );
        }
        Ok(())
    })
}

fn the_server_closes_connections_with_invalid_data_or_a_slow_request_head() -> Result {
    on_a_node(|node| {
        let id = waiting(node, "garbage")?;
        let calls = Calls::new(node)?;
        let url = exec_url(&calls, &id, &["cat"])?;
        let host = url
            .strip_prefix("http://")
            .and_then(|rest| rest.split('/').next());
        let host = host
            .ok_or(format!("the server returned an invalid URL: {url}"))?
            .to_owned();
        let closed = |mut stream: TcpStream| -> Result {
            stream.set_read_timeout(Some(deadline()))?;
            let mut rest = Vec::new();
            match stream.read_to_end(&mut rest) {
                Err(error) if error.kind() == std::io::ErrorKind::WouldBlock => Err(format!(
                    "the server did not close the connection within {:?}",
                    deadline()
                )
                .into()),
                _ => Ok(()),
            }
        };
        let mut garbage = TcpStream::connect(&host)?;
        garbage
            .write_all(&[0x80; 100_000])
            .or(Ok::<_, std::io::Error>(()))?;
        closed(garbage)?;
        if is_rrun() {
            // One client sends nothing, and the other client sends half a request head.
            let silent = TcpStream::connect(&host)?;
            let mut half = TcpStream::connect(&host)?;
            write!(half, "GET /exec/x HTTP/1.1\r\nHost: x\r\n")?;
            closed(silent)?;
            closed(half)?;
        }
        // This client sends garbage after the upgrade to WebSocket.
        let mut stream = websocket(&url, "v5.channel.k8s.io")?;
        stream.write_all(&[0xff; 100])?;
        closed(stream)?;
        // The server still serves other clients.
        let url = exec_url(&calls, &id, &["cat"])?;
        let mut stream = websocket(&url, "v5.channel.k8s.io")?;
        stream.write_all(&message(0, b"hello\n"))?;
        reads(&mut stream, b"\x01hello\n")
    })
}

fn two_hundred_exec_sessions_run_at_the_same_time() -> Result {
    on_a_node(|node| {
        let id = waiting(node, "sessions")?;
        let calls = Calls::new(node)?;
        let mut sessions = Vec::new();
        for _ in 0..200 {
            let url = exec_url(&calls, &id, &["cat"])?;
            sessions.push(websocket(&url, "v5.channel.k8s.io")?);
        }
        for (number, session) in sessions.iter_mut().enumerate() {
            let line = format!("hello {number}\n");
            session.write_all(&message(0, line.as_bytes()))?;
        }
        for (number, session) in sessions.iter_mut().enumerate() {
            reads(session, format!("\x01hello {number}\n").as_bytes())?;
        }
        // The commands end when their clients disconnect.
        drop(sessions);
        let cgroup = node.cgroup(&id)?;
        wait_for("the commands of all sessions to end", || {
            Ok((count_processes(&cgroup)? == 1).then_some(()))
        })?;
        Ok(())
    })
}

fn a_client_that_never_reads_needs_only_a_fixed_amount_of_server_memory() -> Result {
    on_a_node(|node| {
        let id = waiting(node, "unread")?;
        let calls = Calls::new(node)?;
        let cgroup = node.cgroup(&id)?;
        let mut sessions = Vec::new();
        let mut open = |count: usize| -> Result {
            for _ in 0..count {
                let url = exec_url(&calls, &id, &["yes", "0123456789abcdef"])?;
                let mut session = websocket(&url, "v5.channel.k8s.io")?;
                // The first bytes of output show that the command of the session runs.
                reads(&mut session, b"0123456789abcdef")?;
                sessions.push(session);
            }
            // A command blocks when it can no longer write, and then uses no CPU time. The test
            // therefore waits until the CPU time no longer increases.
            let mut used = 0;
            wait_for("the commands of all sessions to block", || {
                std::thread::sleep(Duration::from_millis(100));
                let before = std::mem::replace(&mut used, ticks(&cgroup)?);
                Ok((used == before).then_some(()))
            })
        };
        open(1)?;
        let before = node.server_resident()?;
        open(50)?;
        let grown = node.server_resident()?.saturating_sub(before);
        if is_rrun() {
            ensure!(
                grown < 50 * 256,
                "50 clients that read nothing increased the server's memory by {grown} kB"
            );
        }
        // The server still serves other clients.
        let other = node.crictl(&["exec", &id, "echo", "hello"]).ok()?;
        ensure_eq!(
            other.stdout,
            "hello\n",
            "output of a command that exec ran for another client"
        );
        Ok(())
    })
}

/// Returns the CPU time in ticks (proc(5)) of the processes in `cgroup` and in its direct child
/// cgroups.
fn ticks(cgroup: &Path) -> Result<u64> {
    let mut sum = 0;
    let inner = fs::read_dir(cgroup)?.flatten().map(|entry| entry.path());
    for cgroup in inner.chain([cgroup.to_owned()]) {
        let all = fs::read_to_string(cgroup.join("cgroup.procs")).unwrap_or_default();
        for id in all.lines() {
            let stat = fs::read_to_string(format!("/proc/{id}/stat")).unwrap_or_default();
            let times = stat.rsplit(')').next().unwrap_or_default();
            let times = times.split(' ').skip(12).take(2);
            sum += times
                .filter_map(|time| time.parse::<u64>().ok())
                .sum::<u64>();
        }
    }
    Ok(sum)
}

/// If the server ends a session without an error, the client reports success. A server that stops
/// must therefore report an error to its clients. The commands of all sessions end when the server
/// stops.
fn clients_get_an_error_when_the_server_stops() -> Result {
    on_a_node(|node| {
        let id = waiting(node, "told")?;
        let cgroup = node.cgroup(&id)?;
        let mut clients = Vec::new();
        for transport in TRANSPORTS {
            let words = ["sh", "-c", "echo runs; exec sleep 1000"];
            let exec = ["exec", "--transport", transport, &id];
            let mut client = node.crictl(&exec).args(words).start()?;
            wait_for("the command of the exec session to start", || {
                Ok(client.stdout().contains("runs").then_some(()))
            })?;
            clients.push(client);
        }
        node.terminate_server()?;
        for client in clients {
            let ended = client.end()?;
            ensure!(
                ended.code != 0 && ended.told().contains("server is stopping"),
                "crictl exec exited with exit code {} and did not report that the server is stopping; its output: {}",
                ended.code,
                ended.told()
            );
        }
        wait_for("the commands of the exec sessions to end", || {
            Ok((count_processes(&cgroup)? == 1).then_some(()))
        })?;
        node.start_server()?;
        ensure_eq!(
            node.status(&id)?["state"],
            "CONTAINER_RUNNING",
            "the container's state after the restart"
        );
        Ok(())
    })
}

/// Clients disconnect at every step of their sessions, with and without a TCP reset.
fn clients_that_disconnect_during_a_session_leave_no_process_and_no_descriptor() -> Result {
    let sessions = usize::try_from(rounds(60, 1000))?;
    on_a_node(|node| {
        node.pull(BUSYBOX)?;
        let pod = node.pod("broken");
        let pod_id = node.runp(&pod)?;
        let script = "nc -ll -p 6000 -e cat & while read line; do echo $line; done; wait";
        let mut container = node.container("c", &["sh", "-c", script]);
        container["stdin"] = true.into();
        let id = node.run(&pod_id, &pod, &container)?;
        let listens = "until grep -q :1770 /proc/net/tcp*; do sleep 0.1; done";
        node.asks(&["exec", &id, "sh", "-c", listens])?;
        let calls = Calls::new(node)?;
        let cgroup = node.cgroup(&id)?;
        let monitor = node.monitor(&pod_id)?;
        let count_resources = || -> Result<_> {
            let monitors = fs::read_dir(format!("/proc/{monitor}/fd"))?.count();
            Ok((node.server_holds()?.0, monitors, count_processes(&cgroup)?))
        };
        for number in 0..3 {
            start_and_disconnect(&calls, &pod_id, &id, number)?;
        }
        let mut before = (0, 0, 0);
        wait_for("the server to clean up the first sessions", || {
            std::thread::sleep(Duration::from_millis(500));
            let last = std::mem::replace(&mut before, count_resources()?);
            Ok((last == before).then_some(()))
        })?;
        for number in 0..3 * sessions {
            start_and_disconnect(&calls, &pod_id, &id, number)?;
        }
        wait_for(
            "the numbers of descriptors and processes to be as low as before the sessions",
            || {
                let now = count_resources()?;
                let left = now.0 <= before.0 && now.1 <= before.1 && now.2 <= before.2;
                ensure!(
                    left,
                    "the numbers of the server's descriptors, the monitor's descriptors and the processes are {now:?}, but before the sessions they were {before:?}"
                );
                Ok(Some(()))
            },
        )?;
        let other = node.crictl(&["exec", &id, "echo", "hello"]).ok()?;
        ensure_eq!(
            other.stdout,
            "hello\n",
            "output of a command that exec ran for another client"
        );
        Ok(())
    })
}

/// Starts an exec, attach or port-forward session, and then disconnects from the server. `number`
/// selects the kind of session, the protocol, the client's last step before it disconnects, and
/// whether the client resets the connection.
fn start_and_disconnect(calls: &Calls, pod_id: &str, id: &str, number: usize) -> Result {
    let (kind, rest) = (number % 3, number / 3);
    let (by_spdy, rest) = (rest % 2 == 0, rest / 2);
    let (reset, steps) = (rest % 2 == 0, rest / 2 % 5);
    let url = match kind {
        0 => exec_url(calls, id, &["cat"])?,
        1 => {
            let mut runtime = calls.runtime();
            let request = AttachRequest {
                container_id: id.to_owned(),
                stdin: true,
                stdout: true,
                ..AttachRequest::default()
            };
            let answer = calls.wait(async move { runtime.attach(request).await })??;
            answer.into_inner().url
        }
        _ => port_forward_url(calls, pod_id, &[6000])?,
    };
    let before_close = |stream: &TcpStream| -> Result {
        if reset {
            let linger = nix::libc::linger {
                l_onoff: 1,
                l_linger: 0,
            };
            setsockopt(stream, sockopt::Linger, &linger)?;
        }
        Ok(())
    };
    if steps == 0 {
        let host = url.trim_start_matches("http://").split('/').next();
        let mut stream = TcpStream::connect(host.unwrap_or_default())?;
        stream.write_all(b"GET /exec/")?;
        return before_close(&stream);
    }
    if !by_spdy {
        let mut stream = websocket(&url, "v4.channel.k8s.io")?;
        for _ in 1..steps {
            stream.write_all(&message(0, b"hello\n"))?;
        }
        if steps > 3 {
            reads(&mut stream, b"hello\n")?;
        }
        return before_close(&stream);
    }
    let (version, kinds): (_, &[_]) = match kind {
        2 => ("portforward.k8s.io", &["error", "data"]),
        _ => ("v4.channel.k8s.io", &["error", "stdin", "stdout"]),
    };
    let mut client = SpdyClient::upgraded(&url, version)?;
    for name in kinds.iter().take(steps - 1) {
        let ports = [("port", "6000"), ("requestid", "0")];
        client.open_with(name, if kind == 2 { &ports } else { &[] })?;
    }
    if steps > kinds.len() {
        let (input, output) = if kind == 2 {
            ("data", "data")
        } else {
            ("stdin", "stdout")
        };
        client.sends(input, 0, b"hello\n")?;
        client.until(|received| received.contains_key(output))?;
    }
    before_close(client.socket())
}
