//! Tests of many clients of the streaming server and of the metrics listener. A client that can
//! connect, or that can open streams for one pod, must not prevent the service for other clients.

use std::collections::VecDeque;
use std::fs;
use std::io::{Read, Write};
use std::net::TcpStream;
use std::os::unix::fs::OpenOptionsExt as _;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread::JoinHandle;
use std::time::Duration;

use nix::fcntl::{FcntlArg, OFlag, fcntl};

use crate::support::calls::Calls;
use crate::support::machine::{Result, deadline, wait_for};
use crate::support::needs::{Need, Test};
use crate::support::node::{A_NODE, METRICS, on_a_node};
use crate::support::streams::{TRANSPORTS, exec_url, port_forward_url, waiting};
use crate::support::websocket::{message, reads, websocket};
use crate::{ensure, ensure_eq, test};

pub(crate) const TESTS: &[Test] = &[
    test!(
        clients_that_send_no_request_prevent_no_stream,
        A_NODE,
        Need::RrunCri
    ),
    test!(
        clients_that_send_no_request_prevent_no_metrics,
        A_NODE,
        Need::RrunCri
    ),
    test!(
        unused_urls_for_one_pod_prevent_no_stream_for_another_pod,
        A_NODE,
        Need::RrunCri
    ),
    test!(
        streams_of_one_pod_prevent_no_stream_for_another_pod,
        A_NODE,
        Need::RrunCri
    ),
    test!(
        streams_have_small_buffers_if_the_limit_on_buffers_is_reached,
        A_NODE,
        Need::RrunCri
    ),
    test!(
        incomplete_messages_count_against_the_limit_on_buffers,
        A_NODE,
        Need::RrunCri
    ),
    test!(
        a_pod_with_very_many_exec_sessions_can_be_stopped,
        A_NODE,
        Need::RrunCri
    ),
];

/// A crowd of clients that send a request very slowly. A thread opens a new connection for each
/// connection that the server closes, and replaces some open connections twice a second.
struct SlowClients {
    stop: Arc<AtomicBool>,
    thread: Option<JoinHandle<()>>,
}

impl SlowClients {
    /// Connects `count` clients to `address`, and returns after all of them have connected.
    fn connect(address: &str, count: usize) -> Result<Self> {
        let connect = |address: &str| -> std::io::Result<TcpStream> {
            let mut stream = TcpStream::connect(address)?;
            stream.set_nonblocking(true)?;
            stream.write_all(b"GET /exec/")?;
            Ok(stream)
        };
        let first: std::io::Result<VecDeque<TcpStream>> =
            (0..count).map(|_| connect(address)).collect();
        let mut streams = first?;
        let stop = Arc::new(AtomicBool::new(false));
        let (stopped, address) = (Arc::clone(&stop), address.to_owned());
        let thread = std::thread::spawn(move || {
            for round in 1_u64.. {
                if stopped.load(Ordering::Relaxed) {
                    return;
                }
                streams.retain_mut(|stream| stream.write_all(b"x").is_ok());
                if round.is_multiple_of(25) {
                    streams.drain(..streams.len().min(count / 20));
                }
                while streams.len() < count {
                    match connect(&address) {
                        Ok(stream) => streams.push_back(stream),
                        Err(_) => break,
                    }
                }
                std::thread::sleep(Duration::from_millis(20));
            }
        });
        Ok(SlowClients {
            stop,
            thread: Some(thread),
        })
    }
}

impl Drop for SlowClients {
    fn drop(&mut self) {
        self.stop.store(true, Ordering::Relaxed);
        if let Some(thread) = self.thread.take() {
            let _ = thread.join();
        }
    }
}

/// Returns the address and the port in a URL.
fn host(url: &str) -> Result<String> {
    let rest = url.strip_prefix("http://");
    let host = rest.and_then(|rest| rest.split('/').next());
    Ok(host
        .ok_or(format!("the server returned an invalid URL: {url}"))?
        .to_owned())
}

fn clients_that_send_no_request_prevent_no_stream() -> Result {
    on_a_node(|node| {
        let id = waiting(node, "crowd")?;
        let pod_id = node.asks(&["pods", "--quiet"])?;
        let calls = Calls::new(node)?;
        let address = host(&exec_url(&calls, &id, &["cat"])?)?;
        let before = node.server_resident()?;
        let clients = SlowClients::connect(&address, 1100)?;
        for transport in TRANSPORTS {
            for _ in 0..5 {
                let exec = ["exec", "--transport", transport, &id, "echo", "hi"];
                ensure_eq!(
                    node.asks(&exec)?,
                    "hi",
                    "output of an exec over {transport}"
                );
            }
        }
        drop(websocket(
            &port_forward_url(&calls, &pod_id, &[80])?,
            "v4.channel.k8s.io",
        )?);
        let grown = node.server_resident()?.saturating_sub(before);
        ensure!(
            grown < 64 << 10,
            "1,100 slow clients increased the server's memory by {grown} kB"
        );
        drop(clients);
        wait_for(
            "the server to close the connections of the slow clients",
            || Ok((node.server_holds()?.0 < 100).then_some(())),
        )?;
        ensure!(
            node.log()
                .contains("have connected without sending a request"),
            "the server did not log that it closed connections"
        );
        Ok(())
    })
}

fn clients_that_send_no_request_prevent_no_metrics() -> Result {
    on_a_node(|_node| {
        let _clients = SlowClients::connect(METRICS, 1100)?;
        for number in 0..20 {
            let mut stream = TcpStream::connect(METRICS)?;
            stream.set_read_timeout(Some(deadline()))?;
            write!(stream, "GET /metrics HTTP/1.1\r\nHost: x\r\n\r\n")?;
            let mut answer = String::new();
            let read = stream.read_to_string(&mut answer);
            ensure!(
                read.is_ok() && answer.contains("rrun_cri_"),
                "request {number} for metrics got the answer {answer:?} ({read:?})"
            );
        }
        Ok(())
    })
}

fn unused_urls_for_one_pod_prevent_no_stream_for_another_pod() -> Result {
    on_a_node(|node| {
        let [many, few] = ["many", "few"].map(|name| waiting(node, name));
        let (many, few) = (many?, few?);
        let calls = Calls::new(node)?;
        let kept = exec_url(&calls, &few, &["cat"])?;
        let mut refused = 0;
        for _ in 0..1200 {
            refused += u32::from(exec_url(&calls, &many, &["cat"]).is_err());
        }
        ensure!(
            refused > 0,
            "the server did not refuse any of 1,200 URLs for one container"
        );
        for _ in 0..3 {
            ensure_eq!(
                node.asks(&["exec", &few, "echo", "hi"])?,
                "hi",
                "output of an exec in another pod"
            );
        }
        drop(websocket(&kept, "v5.channel.k8s.io")?);
        Ok(())
    })
}

fn streams_of_one_pod_prevent_no_stream_for_another_pod() -> Result {
    on_a_node(|node| {
        node.restart_with("stream_sessions = 20")?;
        let [many, few] = ["many", "few"].map(|name| waiting(node, name));
        let (many, few) = (many?, few?);
        let calls = Calls::new(node)?;
        let mut sessions = Vec::new();
        for _ in 0..20 {
            let url = exec_url(&calls, &many, &["cat"])?;
            sessions.push(websocket(&url, "v5.channel.k8s.io")?);
        }
        let refused = websocket(&exec_url(&calls, &many, &["cat"])?, "v5.channel.k8s.io");
        let refused = refused
            .err()
            .ok_or("the server accepted too many streams")?;
        let sentence = refused.message().unwrap_or_default();
        ensure!(
            sentence.contains("503") && node.log().contains("stream_sessions"),
            "the 21st stream of a pod was not refused with the limit: {sentence}"
        );
        // Each stream of the other pod replaces the newest stream of the first pod.
        let mut others = Vec::new();
        for _ in 0..3 {
            let url = exec_url(&calls, &few, &["cat"])?;
            others.push(websocket(&url, "v5.channel.k8s.io")?);
        }
        for session in &mut others {
            session.write_all(&message(0, b"hello\n"))?;
            reads(session, b"\x01hello\n")?;
        }
        let newest = sessions.pop();
        let mut newest = newest.ok_or("the test opened no streams")?;
        reads(&mut newest, b"stream_sessions")?;
        let oldest = sessions.first_mut().ok_or("the test opened no streams")?;
        oldest.write_all(&message(0, b"hello\n"))?;
        reads(oldest, b"\x01hello\n")
    })
}

fn streams_have_small_buffers_if_the_limit_on_buffers_is_reached() -> Result {
    on_a_node(|node| {
        node.restart_with("stream_buffer_bytes = 1")?;
        let id = waiting(node, "buffers")?;
        let calls = Calls::new(node)?;
        let mut session = websocket(&exec_url(&calls, &id, &["cat"])?, "v5.channel.k8s.io")?;
        session.write_all(&message(0, b"hello\n"))?;
        reads(&mut session, b"\x01hello\n")?;
        let mut pipes = Vec::new();
        for entry in fs::read_dir(format!("/proc/{}/fd", node.server_pid()?))? {
            let path = entry?.path();
            let target = fs::read_link(&path).unwrap_or_default();
            if !target.to_string_lossy().starts_with("pipe:") {
                continue;
            }
            let mut options = fs::OpenOptions::new();
            let options = options.read(true).custom_flags(OFlag::O_NONBLOCK.bits());
            if let Ok(pipe) = options.open(&path) {
                pipes.push(fcntl(&pipe, FcntlArg::F_GETPIPE_SZ)?);
            }
        }
        ensure!(
            pipes.contains(&(32 << 10)) && pipes.iter().all(|size| *size <= 64 << 10),
            "the server's pipes have the capacities {pipes:?} in bytes"
        );
        Ok(())
    })
}

/// The server keeps a message in memory until the message is complete.
fn incomplete_messages_count_against_the_limit_on_buffers() -> Result {
    on_a_node(|node| {
        node.restart_with("stream_buffer_bytes = 1")?;
        let id = waiting(node, "incomplete")?;
        let calls = Calls::new(node)?;
        let header = |length: u64| {
            let mut header = vec![0x82, 0xff];
            header.extend(length.to_be_bytes());
            // The mask, and the channel.
            header.extend([0, 0, 0, 0, 0]);
            header
        };
        let open = || websocket(&exec_url(&calls, &id, &["wc", "-c"])?, "v5.channel.k8s.io");
        let mut short = open()?;
        short.write_all(&header(60_001))?;
        short.write_all(&[b'x'; 60_000])?;
        // This message closes the standard input.
        short.write_all(&[0x82, 0x82, 0, 0, 0, 0, 255, 0])?;
        reads(&mut short, b"60000")?;
        let mut long = open()?;
        long.write_all(&header(100_001))?;
        // The server can close the connection before it has received all bytes.
        let _ = long.write_all(&[b'x'; 90_000]);
        // A read fails if the server closed the connection with unread data.
        let _ = long.read_to_end(&mut Vec::new());
        wait_for("the refusal of the incomplete message", || {
            let log = node.log();
            Ok(log.contains("a message has more than").then_some(()))
        })?;
        Ok(())
    })
}

fn a_pod_with_very_many_exec_sessions_can_be_stopped() -> Result {
    on_a_node(|node| {
        let id = waiting(node, "crowded")?;
        let beside = node.container("beside", &["/inside", "wait"]);
        let pod = node.pod("crowded");
        let pod_id = node.asks(&["pods", "--quiet"])?;
        let calls = Calls::new(node)?;
        let mut sessions = Vec::new();
        for _ in 0..400 {
            let url = exec_url(&calls, &id, &["cat"])?;
            sessions.push(websocket(&url, "v5.channel.k8s.io")?);
        }
        let first = sessions.first_mut().ok_or("the test opened no streams")?;
        first.write_all(&message(0, b"hello\n"))?;
        reads(first, b"\x01hello\n")?;
        let last = sessions.last_mut().ok_or("the test opened no streams")?;
        reads(last, b"the container already has 224 execs and attachments")?;
        let beside = node.run(&pod_id, &pod, &beside)?;
        node.asks(&["exec", "--sync", &beside, "/inside", "exit", "0"])?;
        node.asks(&["stop", "--timeout", "0", &id])?;
        node.asks(&["stopp", &pod_id])?;
        Ok(())
    })
}
