//! Streams: how soon an interactive exec answers, what a forwarded port carries and costs, and
//! what a session that is open and silent takes of memory.
//!
//! The client is our own and does next to nothing, so that it is the servers that are measured:
//! a WebSocket for exec, SPDY for ports, as kubectl has it.

use std::path::Path;
use std::time::Instant;

use serde_json::Value;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpStream;

use crate::cri::{Network, Options, Server, cpu_of_others};
use crate::report::{self, Comparison};
use crate::{Result, memory};

/// What a forwarded port sends, in MB, each time.
const MEGABYTES: usize = 512;

/// Sessions that are open at once for the memory figure.
const SESSIONS: usize = 50;

const PORT: u16 = 6000;

pub async fn run(
    options: &Options,
    servers: &mut [Server],
    results: &Path,
) -> Result<(Value, Vec<String>)> {
    let names: Vec<String> = servers.iter().map(|server| server.name.clone()).collect();
    let title = "streams";
    let quantities = [
        "exec -it to the first byte, ms",
        "port-forward, MB/s",
        "port-forward, CPU ms a GB",
        "server's memory a silent exec, kB",
    ];
    let mut comparison = Comparison::new(title, &names, &quantities);
    let mut skipped = Vec::new();
    for round in 0..4 {
        for server in servers.iter_mut() {
            let outcome = one_round(server, options, round > 0, &quantities, &mut comparison);
            if let Err(error) = outcome.await {
                skipped.push(format!("{} streams: {error}", server.name));
            }
        }
    }
    report::show(results, &comparison.table())?;
    Ok((comparison.raw(), skipped))
}

async fn one_round(
    server: &mut Server,
    options: &Options,
    counts: bool,
    [first_byte, rate, cpu, held]: &[&str; 4],
    comparison: &mut Comparison,
) -> Result {
    let name = server.name.clone();
    let mut add = |quantity: &str, value: f64| {
        if counts {
            comparison.add_one(&name, quantity, value);
        }
    };
    let script = format!("while true; do nc -l -p {PORT} -e head -c {MEGABYTES}m /dev/zero; done");
    let command = ["sh", "-c", &script];
    let pod = server
        .start_pod(Network::Own, &options.image, &command)
        .await?;
    let measured = async {
        for _ in 0..10 {
            let begin = Instant::now();
            let url = server.exec_url(&pod.container, &["sh"]).await?;
            let mut stream = upgraded(&url, "websocket", "v4.channel.k8s.io").await?;
            prompt(&mut stream).await?;
            add(first_byte, begin.elapsed().as_secs_f64() * 1e3);
        }
        let url = server.port_forward_url(&pod.id).await?;
        let mut stream = upgraded(&url, "SPDY/3.1", "portforward.k8s.io").await?;
        let mut buffer = vec![0; 1 << 20];
        stream.write_all(&open_pair()).await?;
        let (used, begin) = (cpu_of_others()?, Instant::now());
        let mut left = MEGABYTES << 20;
        while left > 0 {
            match stream.read(&mut buffer).await? {
                0 => return Err("the forwarded port closed early".into()),
                count => left = left.saturating_sub(count),
            }
        }
        let (took, used) = (begin.elapsed().as_secs_f64(), cpu_of_others()? - used);
        add(rate, MEGABYTES as f64 / took);
        add(cpu, used * 1024.0 / MEGABYTES as f64);
        drop(stream);

        let before = memory::of_program(&server.name)?;
        let mut sessions = Vec::new();
        for _ in 0..SESSIONS {
            let url = server.exec_url(&pod.container, &["sh"]).await?;
            let mut stream = upgraded(&url, "websocket", "v4.channel.k8s.io").await?;
            prompt(&mut stream).await?;
            sessions.push(stream);
        }
        let grown = memory::of_program(&server.name)? - before;
        add(held, grown / SESSIONS as f64);
        Ok(())
    };
    let outcome = measured.await;
    server.end_pod(&pod).await?;
    outcome
}

/// Reads until the shell has written its prompt.
async fn prompt(stream: &mut TcpStream) -> Result {
    let mut buffer = [0; 4096];
    let mut all = Vec::new();
    while !all.contains(&b'#') && !all.contains(&b'$') {
        let count = stream.read(&mut buffer).await?;
        if count == 0 {
            return Err(format!("no prompt: {:?}", String::from_utf8_lossy(&all)).into());
        }
        all.extend_from_slice(buffer.get(..count).unwrap_or_default());
    }
    Ok(())
}

/// Connects, and asks for an upgrade.
async fn upgraded(url: &str, to: &str, protocol: &str) -> Result<TcpStream> {
    let (host, path) = url
        .strip_prefix("http://")
        .and_then(|rest| rest.split_once('/'))
        .ok_or_else(|| format!("not a URL: {url}"))?;
    let mut stream = TcpStream::connect(host).await?;
    let head = format!(
        "GET /{path} HTTP/1.1\r\nHost: {host}\r\nConnection: Upgrade\r\nUpgrade: {to}\r\n\
         Sec-WebSocket-Version: 13\r\nSec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ==\r\n\
         Sec-WebSocket-Protocol: {protocol}\r\nX-Stream-Protocol-Version: {protocol}\r\n\r\n"
    );
    stream.write_all(head.as_bytes()).await?;
    let mut answer = Vec::new();
    while !answer.ends_with(b"\r\n\r\n") {
        answer.push(stream.read_u8().await?);
    }
    if !answer.starts_with(b"HTTP/1.1 101") {
        let answer = String::from_utf8_lossy(&answer).into_owned();
        return Err(format!("no upgrade: {answer}").into());
    }
    Ok(stream)
}

/// The two streams of a forwarded connection: SYN_STREAM frames, their headers in stored blocks of
/// one zlib stream.
fn open_pair() -> Vec<u8> {
    let mut frames = Vec::new();
    for (number, kind) in [(1_u32, "error"), (3, "data")] {
        let port = PORT.to_string();
        let pairs = [("streamtype", kind), ("port", &port), ("requestid", "0")];
        let mut plain = (pairs.len() as u32).to_be_bytes().to_vec();
        for text in pairs.iter().flat_map(|(name, value)| [name, value]) {
            plain.extend_from_slice(&(text.len() as u32).to_be_bytes());
            plain.extend_from_slice(text.as_bytes());
        }
        let mut block = if number == 1 {
            vec![0x78, 0x01]
        } else {
            Vec::new()
        };
        let length = plain.len() as u16;
        block.push(0);
        block.extend_from_slice(&length.to_le_bytes());
        block.extend_from_slice(&(!length).to_le_bytes());
        block.extend_from_slice(&plain);
        block.extend_from_slice(&[0, 0, 0, 0xff, 0xff]);
        frames.extend_from_slice(&[0x80, 3, 0, 1]);
        frames.extend_from_slice(&(10 + block.len() as u32).to_be_bytes());
        frames.extend_from_slice(&number.to_be_bytes());
        frames.extend_from_slice(&[0; 6]);
        frames.extend_from_slice(&block);
    }
    frames
}
