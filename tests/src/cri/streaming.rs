//! What the streaming tests have in common: a container to exec in, a terminal, a client by hand; and
//! critest's streaming tests.

use std::fs;
use std::io::{Read, Write};
use std::net::TcpStream;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::Instant;

use rrun_proto::v1::ExecRequest;

use crate::cri::calls::Calls;
use crate::support::machine::{Result, command, deadline, wait_for};
use crate::support::needs::{Need, Test};
use crate::support::node::{A_NODE, BUSYBOX, Node, on_a_node};
use crate::{ensure, test};

pub const TMUX: Need = Need::Program("tmux");
const CRITEST: Need = Need::Program("critest");

pub const TESTS: &[Test] = &[test!(critest_s_streaming_tests_pass, A_NODE, CRITEST)];

/// critest's own tests, over SPDY and with each WebSocket flag.
fn critest_s_streaming_tests_pass() -> Result {
    on_a_node(|node| {
        let endpoint = format!("unix://{}", node.socket().display());
        for flag in [
            None,
            Some("-websocket-exec"),
            Some("-websocket-attach"),
            Some("-websocket-portforward"),
        ] {
            command("critest", ["-ginkgo.focus", "Streaming"])
                .args(["-runtime-endpoint", &endpoint])
                .args(flag)
                .within(deadline() * 4)
                .ok()?;
        }
        Ok(())
    })
}

pub const TRANSPORTS: [&str; 2] = ["spdy", "websocket"];

/// A container that waits, in a pod of its own.
pub fn waiting(node: &Node, name: &str) -> Result<String> {
    node.pull(BUSYBOX)?;
    let pod = node.pod(name);
    let pod_id = node.runp(&pod)?;
    node.run(&pod_id, &pod, &node.container("c", &["/inside", "wait"]))
}

/// A terminal that somebody could sit at.
pub struct Terminal(PathBuf);

impl Terminal {
    /// Its server listens on a socket next to this path: one that is on its way out takes no more
    /// sessions, and nothing tells when it has gone.
    pub fn open(socket: PathBuf, shell_command: &str) -> Result<Self> {
        static NUMBER: AtomicUsize = AtomicUsize::new(0);
        let number = NUMBER.fetch_add(1, Ordering::Relaxed);
        let terminal = Terminal(socket.with_extension(number.to_string()));
        terminal.tmux(&["new-session", "-d", "-x", "80", "-y", "24", shell_command])?;
        Ok(terminal)
    }

    pub fn tmux(&self, args: &[&str]) -> Result<String> {
        let run = command("tmux", ["-f", "/dev/null", "-S"])
            .arg(&self.0)
            .args(args);
        Ok(run.ok()?.stdout)
    }

    pub fn types(&self, line: &str) -> Result {
        self.tmux(&["send-keys", line, "Enter"]).map(|_| ())
    }

    pub fn shows(&self, what: &str) -> Result {
        wait_for(&format!("{what:?} on the terminal"), || {
            let screen = self.tmux(&["capture-pane", "-p"])?;
            ensure!(screen.lines().any(|line| line.trim() == what), "{screen}");
            Ok(Some(()))
        })
    }
}

impl Drop for Terminal {
    fn drop(&mut self) {
        let _ = self.tmux(&["kill-server"]);
    }
}

/// The processes in a cgroup and in those right below it, where execs are.
pub fn count_processes(cgroup: &Path) -> Result<usize> {
    let mut count = fs::read_to_string(cgroup.join("cgroup.procs"))?
        .lines()
        .count();
    for entry in fs::read_dir(cgroup)? {
        // One may go meanwhile, when it is empty.
        let inner = fs::read_to_string(entry?.path().join("cgroup.procs"));
        count += inner.map_or(0, |all| all.lines().count());
    }
    Ok(count)
}

/// A client by hand: a WebSocket whose handshake is done.
pub fn websocket(url: &str, protocol: &str) -> Result<TcpStream> {
    let (host, path) = url
        .strip_prefix("http://")
        .and_then(|rest| rest.split_once('/'))
        .ok_or(format!("not a URL: {url}"))?;
    let mut stream = TcpStream::connect(host)?;
    stream.set_read_timeout(Some(deadline()))?;
    write!(
        stream,
        "GET /{path} HTTP/1.1\r\nHost: {host}\r\nConnection: Upgrade\r\nUpgrade: websocket\r\n\
         Sec-WebSocket-Version: 13\r\nSec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ==\r\n\
         Sec-WebSocket-Protocol: {protocol}\r\n\r\n"
    )?;
    let mut head = Vec::new();
    while !head.ends_with(b"\r\n\r\n") {
        let mut byte = [0];
        stream.read_exact(&mut byte)?;
        head.extend_from_slice(&byte);
    }
    let head = String::from_utf8_lossy(&head).into_owned();
    ensure!(head.starts_with("HTTP/1.1 101"), "the handshake: {head}");
    ensure!(
        head.contains("s3pPLMBiTxaQ9kYGzzhZRbK+xOo="),
        "RFC 6455's example has another answer: {head}"
    );
    Ok(stream)
}

/// Reads messages until one has this in it; each is a channel's number and data.
pub fn reads(stream: &mut TcpStream, what: &[u8]) -> Result {
    let mut all = Vec::new();
    let mut buffer = [0; 4096];
    let mut from = 0;
    // Of everything; what comes now and then never lets a single read fail.
    let give_up = Instant::now() + 10 * deadline();
    while !all[from..].windows(what.len()).any(|window| window == what) {
        ensure!(
            Instant::now() < give_up,
            "it has come to {:?}",
            String::from_utf8_lossy(&all)
        );
        from = all.len().saturating_sub(what.len());
        let count = stream.read(&mut buffer)?;
        ensure!(
            count > 0,
            "closed after {:?}",
            String::from_utf8_lossy(&all)
        );
        all.extend_from_slice(&buffer[..count]);
    }
    Ok(())
}

/// A client's message, masked with zeros.
pub fn message(channel: u8, data: &[u8]) -> Vec<u8> {
    let length = u8::try_from(data.len() + 1).unwrap_or(0);
    let mut message = vec![0x82, 0x80 | length, 0, 0, 0, 0, channel];
    message.extend_from_slice(data);
    message
}

pub fn exec_url(calls: &Calls, id: &str, words: &[&str]) -> Result<String> {
    let mut runtime = calls.runtime();
    let request = ExecRequest {
        container_id: id.to_owned(),
        cmd: words.iter().map(ToString::to_string).collect(),
        stdin: true,
        stdout: true,
        ..ExecRequest::default()
    };
    let answer = calls.wait(async move { runtime.exec(request).await })??;
    Ok(answer.into_inner().url)
}
