//! The streaming server itself: whom it serves, TLS, clients that behave badly, many of them.

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
use crate::support::node::{A_NODE, BUSYBOX, Node, is_rrun, on_a_node};
use crate::support::spdy::SpdyClient;
use crate::support::streams::{TRANSPORTS, count_processes, exec_url, port_forward_url, waiting};
use crate::support::websocket::{message, reads, websocket};
use crate::{ensure, ensure_eq, test};

pub(crate) const TESTS: &[Test] = &[
    test!(a_stream_s_request_is_checked, A_NODE),
    test!(garbage_and_slow_heads_are_closed, A_NODE),
    test!(two_hundred_sessions_at_once, A_NODE),
    test!(clients_that_never_read_cost_a_fixed_amount, A_NODE),
    test!(streams_over_tls, A_NODE, OPENSSL, Need::RrunCri),
    test!(an_idle_stream_is_closed, A_NODE, Need::RrunCri),
    test!(a_long_message_is_refused, A_NODE),
    test!(the_servers_end_is_told, A_NODE, Need::RrunCri),
    test!(sessions_that_break_off_leave_nothing, A_NODE, Need::RrunCri),
];

/// Starts the server again with these lines in its configuration.
fn configure(node: &mut Node, lines: &str) -> Result {
    node.kill_server()?;
    let file = node.join("config.toml");
    let text = fs::read_to_string(&file)?;
    fs::write(&file, format!("{lines}\n{text}"))?;
    node.start_server()
}

fn streams_over_tls() -> Result {
    on_a_node(|node| {
        certificates(&node.join(""))?;
        let [cert, key] = ["server.pem", "server.key"].map(|name| node.join(name));
        let lines = format!("stream_tls_cert = {cert:?}\nstream_tls_key = {key:?}");
        configure(node, &lines)?;
        let id = waiting(node, "tls")?;
        let calls = Calls::new(node)?;
        let url = exec_url(&calls, &id, &["true"])?;
        ensure!(url.starts_with("https://127.0.0.1:"), "URL {url}");
        // crictl wants a certificate of its own, and the server none.
        let [ca, cert, key] = ["ca.pem", "client.pem", "client.key"]
            .map(|name| node.join(name).display().to_string());
        for transport in TRANSPORTS {
            let exec = |name: &str| {
                node.crictl(&["exec", "--transport", transport, "--tls-ca", &ca])
                    .args(["--tls-cert", &cert, "--tls-key", &key, "--tls-sni", name])
                    .args(["-i", &id, "cat"])
                    .stdin("typed")
            };
            ensure_eq!(exec("127.0.0.1").ok()?.stdout, "typed", "over {transport}");
            let other = exec("other.example").end()?;
            ensure!(
                other.code != 0 && other.told().contains("certificate"),
                "another's certificate over {transport}: {}",
                other.told()
            );
        }
        // Who speaks no TLS gets nothing.
        let host = url.trim_start_matches("https://");
        let mut plain = TcpStream::connect(host.split('/').next().unwrap_or_default())?;
        plain.set_read_timeout(Some(deadline()))?;
        write!(plain, "GET /exec/x HTTP/1.1\r\nHost: x\r\n\r\n")?;
        let mut answer = Vec::new();
        let _ = plain.read_to_end(&mut answer);
        ensure!(!answer.starts_with(b"HTTP"), "answered {answer:?}");
        Ok(())
    })
}

fn an_idle_stream_is_closed() -> Result {
    on_a_node(|node| {
        configure(node, "stream_idle_timeout = 1")?;
        let id = waiting(node, "idle")?;
        let cgroup = node.cgroup(&id)?;
        let calls = Calls::new(node)?;
        let url = exec_url(&calls, &id, &["cat"])?;
        let mut stream = websocket(&url, "v5.channel.k8s.io")?;
        stream.write_all(&message(0, b"hello\n"))?;
        reads(&mut stream, b"\x01hello\n")?;
        // Nobody says anything any more.
        let mut rest = Vec::new();
        match stream.read_to_end(&mut rest) {
            Err(error) if error.kind() == std::io::ErrorKind::WouldBlock => {
                return Err(format!("not closed within {:?}", deadline()).into());
            }
            _ => {}
        }
        wait_for("its command to end", || {
            Ok((count_processes(&cgroup)? == 1).then_some(()))
        })?;
        wait_for("the log to tell", || {
            Ok(node.log().contains("nothing moved for 1 s").then_some(()))
        })?;
        Ok(())
    })
}

fn a_long_message_is_refused() -> Result {
    on_a_node(|node| {
        let id = waiting(node, "long")?;
        let calls = Calls::new(node)?;
        let url = exec_url(&calls, &id, &["cat"])?;
        let mut stream = websocket(&url, "v5.channel.k8s.io")?;
        // The head of a message of 64 MiB: nobody waits for the rest, or keeps room for it.
        let mut head = vec![0x82, 0x80 | 127];
        head.extend_from_slice(&(64_u64 << 20).to_be_bytes());
        head.extend_from_slice(&[0; 4]);
        stream.write_all(&head)?;
        let mut rest = Vec::new();
        match stream.read_to_end(&mut rest) {
            Err(error) if error.kind() == std::io::ErrorKind::WouldBlock => {
                Err(format!("not closed within {:?}", deadline()).into())
            }
            _ => Ok(()),
        }
    })
}

fn a_stream_s_request_is_checked() -> Result {
    on_a_node(|node| {
        let id = waiting(node, "checked")?;
        let calls = Calls::new(node)?;
        let ask = |change: &dyn Fn(&mut ExecRequest)| {
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
        let url = ask(&|_| {})?;
        ensure!(url.starts_with("http://127.0.0.1:"), "URL {url}");
        ensure_eq!(
            ask(&|request| request.stdout = false)?,
            "InvalidArgument",
            "no stream"
        );
        let both = |request: &mut ExecRequest| (request.tty, request.stderr) = (true, true);
        ensure_eq!(ask(&both)?, "InvalidArgument", "a terminal with stderr");
        if is_rrun() {
            ensure_eq!(
                ask(&|request| request.container_id = "nosuch".to_owned())?,
                "NotFound",
                "no such container"
            );
        }
        // A token is good once.
        drop(websocket(&url, "v5.channel.k8s.io")?);
        ensure!(
            websocket(&url, "v5.channel.k8s.io").is_err(),
            "a token was good twice"
        );
        node.asks(&["stop", "--timeout", "0", &id])?;
        if is_rrun() {
            ensure_eq!(
                ask(&|_| {})?,
                "FailedPrecondition",
                "exec in what has ended"
            );
        }
        Ok(())
    })
}

fn garbage_and_slow_heads_are_closed() -> Result {
    on_a_node(|node| {
        let id = waiting(node, "garbage")?;
        let calls = Calls::new(node)?;
        let url = exec_url(&calls, &id, &["cat"])?;
        let host = url
            .strip_prefix("http://")
            .and_then(|rest| rest.split('/').next());
        let host = host.ok_or(format!("not a URL: {url}"))?.to_owned();
        let closed = |mut stream: TcpStream| -> Result {
            stream.set_read_timeout(Some(deadline()))?;
            let mut rest = Vec::new();
            match stream.read_to_end(&mut rest) {
                Err(error) if error.kind() == std::io::ErrorKind::WouldBlock => {
                    Err(format!("not closed within {:?}", deadline()).into())
                }
                _ => Ok(()),
            }
        };
        let mut garbage = TcpStream::connect(&host)?;
        garbage
            .write_all(&[0x80; 100_000])
            .or(Ok::<_, std::io::Error>(()))?;
        closed(garbage)?;
        if is_rrun() {
            // Nothing, and half a head.
            let silent = TcpStream::connect(&host)?;
            let mut half = TcpStream::connect(&host)?;
            write!(half, "GET /exec/x HTTP/1.1\r\nHost: x\r\n")?;
            closed(silent)?;
            closed(half)?;
        }
        // Garbage after the upgrade.
        let mut stream = websocket(&url, "v5.channel.k8s.io")?;
        stream.write_all(&[0xff; 100])?;
        closed(stream)?;
        // The server is well.
        let url = exec_url(&calls, &id, &["cat"])?;
        let mut stream = websocket(&url, "v5.channel.k8s.io")?;
        stream.write_all(&message(0, b"hello\n"))?;
        reads(&mut stream, b"\x01hello\n")
    })
}

fn two_hundred_sessions_at_once() -> Result {
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
        // The clients go; so do the commands.
        drop(sessions);
        let cgroup = node.cgroup(&id)?;
        wait_for("all commands to end", || {
            Ok((count_processes(&cgroup)? == 1).then_some(()))
        })?;
        Ok(())
    })
}

fn clients_that_never_read_cost_a_fixed_amount() -> Result {
    on_a_node(|node| {
        let id = waiting(node, "unread")?;
        let calls = Calls::new(node)?;
        let cgroup = node.cgroup(&id)?;
        let mut sessions = Vec::new();
        let mut open = |count: usize| -> Result {
            for _ in 0..count {
                let url = exec_url(&calls, &id, &["yes", "0123456789abcdef"])?;
                let mut session = websocket(&url, "v5.channel.k8s.io")?;
                // It runs.
                reads(&mut session, b"0123456789abcdef")?;
                sessions.push(session);
            }
            // Until none of them can write any more, as far as one can see.
            let mut used = 0;
            wait_for("the commands to be held up", || {
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
                "50 clients that read nothing took {grown} kB of the server"
            );
        }
        // All others are served.
        let other = node.crictl(&["exec", &id, "echo", "hello"]).ok()?;
        ensure_eq!(other.stdout, "hello\n", "another client's output");
        Ok(())
    })
}

/// What the processes in this cgroup and those right below it have used of the CPU, in ticks (proc(5)).
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

/// Clients take a session that just breaks off for a success, and the command goes with the server.
fn the_servers_end_is_told() -> Result {
    on_a_node(|node| {
        let id = waiting(node, "told")?;
        let cgroup = node.cgroup(&id)?;
        let mut clients = Vec::new();
        for transport in TRANSPORTS {
            let words = ["sh", "-c", "echo runs; exec sleep 1000"];
            let exec = ["exec", "--transport", transport, &id];
            let mut client = node.crictl(&exec).args(words).start()?;
            wait_for("the command to run", || {
                Ok(client.stdout().contains("runs").then_some(()))
            })?;
            clients.push(client);
        }
        node.terminate_server()?;
        for client in clients {
            let ended = client.end()?;
            ensure!(
                ended.code != 0 && ended.told().contains("is being stopped"),
                "it ended with {}: {}",
                ended.code,
                ended.told()
            );
        }
        wait_for("the commands to end", || {
            Ok((count_processes(&cgroup)? == 1).then_some(()))
        })?;
        node.start_server()?;
        ensure_eq!(
            node.status(&id)?["state"],
            "CONTAINER_RUNNING",
            "state of the container"
        );
        Ok(())
    })
}

/// Whatever a client has said when it goes, and however it goes.
fn sessions_that_break_off_leave_nothing() -> Result {
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
        let held = || -> Result<_> {
            let monitors = fs::read_dir(format!("/proc/{monitor}/fd"))?.count();
            Ok((node.server_holds()?.0, monitors, count_processes(&cgroup)?))
        };
        for number in 0..3 {
            broken_off(&calls, &pod_id, &id, number)?;
        }
        let mut before = (0, 0, 0);
        wait_for("the first sessions to be gone", || {
            std::thread::sleep(Duration::from_millis(500));
            let last = std::mem::replace(&mut before, held()?);
            Ok((last == before).then_some(()))
        })?;
        for number in 0..3 * sessions {
            broken_off(&calls, &pod_id, &id, number)?;
        }
        wait_for("everything to be as before", || {
            let now = held()?;
            let left = now.0 <= before.0 && now.1 <= before.1 && now.2 <= before.2;
            ensure!(left, "{now:?} descriptors and processes, not {before:?}");
            Ok(Some(()))
        })?;
        let other = node.crictl(&["exec", &id, "echo", "hello"]).ok()?;
        ensure_eq!(other.stdout, "hello\n", "another client's output");
        Ok(())
    })
}

/// An exec, an attach or a forwarded port, by one of the protocols, that goes as far as the number
/// says.
fn broken_off(calls: &Calls, pod_id: &str, id: &str, number: usize) -> Result {
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
    let goes = |stream: &TcpStream| -> Result {
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
        return goes(&stream);
    }
    if !by_spdy {
        let mut stream = websocket(&url, "v4.channel.k8s.io")?;
        for _ in 1..steps {
            stream.write_all(&message(0, b"hello\n"))?;
        }
        if steps > 3 {
            reads(&mut stream, b"hello\n")?;
        }
        return goes(&stream);
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
        let (typed, said) = if kind == 2 {
            ("data", "data")
        } else {
            ("stdin", "stdout")
        };
        client.sends(typed, 0, b"hello\n")?;
        client.until(|came| came.contains_key(said))?;
    }
    goes(client.socket())
}
