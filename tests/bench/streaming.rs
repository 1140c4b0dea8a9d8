//! Measures streams. The figures for an interactive exec are the time until its prompt and the
//! memory of an idle session. The figures for a forwarded port are its throughput and CPU time, and
//! its memory while it is idle.
//!
//! The benchmark has its own client, which needs little CPU time. The figures therefore mostly
//! depend on the servers. Like kubectl, the client uses a WebSocket for exec and SPDY for
//! port-forward.

use std::path::Path;
use std::time::{Duration, Instant};

use serde_json::Value;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpStream;

use crate::cri::{CriOptions, Network, Pod, Server, cpu_of_others};
use crate::report::{self, Comparison};
use crate::{Result, memory};

/// The amount of data for each transfer through a forwarded port or an exec, in MB.
const MEGABYTES: usize = 512;

/// The number of open sessions while memory is measured. The benchmark first opens this number of
/// exec sessions, and later this number of forwarded ports.
const SESSIONS: usize = 50;

/// The port on which the pod sends data and then closes the connection.
const SOURCE: u16 = 6000;

/// The port on which the pod reads data to the end and then closes the connection.
const SINK: u16 = 6001;

/// The port on which the pod neither sends nor reads data.
const SILENT: u16 = 6002;

/// The ids of the two SPDY streams of a forwarded connection.
const ERROR: u32 = 1;
const DATA: u32 = 3;

const ROUNDS: usize = 5;

/// The number of shells that are started in each round.
const PROMPTS: usize = 10;

/// The pause before memory is measured. During the pause, a server completes its work for earlier
/// requests.
const MEMORY_SETTLE: Duration = Duration::from_millis(300);

/// The amount of data that kubectl sends in one frame.
const FRAME: usize = 32 << 10;

const QUANTITIES: &[&str] = &[
    "exec -it until the prompt, ms",
    "port-forward from the pod, MB/s",
    "  CPU ms per GB, all processes",
    "  CPU ms per GB, the server",
    "port-forward to the pod, MB/s",
    "  CPU ms per GB, all processes",
    "  CPU ms per GB, the server",
    "exec's output, MB/s",
    "  CPU ms per GB, all processes",
    "  CPU ms per GB, the server",
    "an idle exec, kB of the server",
    "an idle exec, kB of its helper processes",
    "an idle forwarded port, kB of the server",
];

pub(crate) async fn run(
    options: &CriOptions,
    servers: &mut [Server],
    results: &Path,
) -> Result<(Value, Vec<String>)> {
    let names: Vec<String> = servers.iter().map(|server| server.name.clone()).collect();
    // Each quantity needs a unique key. The key of a quantity that is not indented is its name. But
    // indented quantities below different quantities have the same names. The key of an indented
    // quantity therefore consists of the name of the quantity above and its own name.
    let mut above = "";
    let keys: Vec<String> = QUANTITIES
        .iter()
        .map(|quantity| match quantity.strip_prefix("  ") {
            Some(part) => format!("{}: {part}", above.trim_end_matches(", MB/s")),
            None => {
                above = quantity;
                (*quantity).to_owned()
            }
        })
        .collect();
    let keys: Vec<&str> = keys.iter().map(String::as_str).collect();
    let mut comparison = Comparison::new("streams", &names, &keys);
    let mut skipped = Vec::new();
    for round in 0..ROUNDS {
        for server in servers.iter_mut() {
            match one_round(server, options).await {
                // The first round loads files into memory, so its figures are ignored.
                Ok(_) if round == 0 => {}
                Ok(figures) => {
                    for (key, values) in keys.iter().zip(figures) {
                        for value in values {
                            comparison.add_one(&server.name, key, value);
                        }
                    }
                }
                Err(error) => skipped.push(format!("{} streams: {error}", server.name)),
            }
        }
    }
    report::show(results, &comparison.table())?;
    Ok((comparison.raw(), skipped))
}

/// Returns the values of each quantity, in the order of [`QUANTITIES`].
async fn one_round(server: &mut Server, options: &CriOptions) -> Result<Vec<Vec<f64>>> {
    let script = format!(
        "nc -ll -p {SOURCE} -e dd if=/dev/zero bs=1M count={MEGABYTES} & \
         nc -ll -p {SINK} -e dd of=/dev/null bs=1M & \
         nc -ll -p {SILENT} -e sleep 86399 & wait"
    );
    let pod = server
        .start_pod(Network::Own, &options.image, &["sh", "-c", &script])
        .await?;
    let measured = measure(server, &pod).await;
    server.end_pod(&pod).await?;
    measured
}

async fn measure(server: &mut Server, pod: &Pod) -> Result<Vec<Vec<f64>>> {
    let listen = [SOURCE, SINK, SILENT]
        .map(|port| format!("until grep -q :{port:04X} /proc/net/tcp*; do sleep 0.05; done"));
    server
        .exec(&pod.container, &["sh", "-c", &listen.join("; ")])
        .await?;

    let mut prompts = Vec::new();
    for _ in 0..PROMPTS {
        let begin = Instant::now();
        let _stream = shell(server, pod).await?;
        prompts.push(begin.elapsed().as_secs_f64() * 1e3);
    }
    let mut figures = vec![prompts];

    let name = server.name.clone();
    let mut buffer = vec![0; 1 << 20];

    let mut stream = forward_port(server, pod, SOURCE).await?;
    figures.extend(transfer_figures(&name, read_all(&mut stream, &mut buffer)).await?);

    let mut stream = forward_port(server, pod, SINK).await?;
    figures.extend(transfer_figures(&name, write_all(&mut stream, &mut buffer)).await?);

    let count = format!("count={MEGABYTES}");
    let words = ["dd", "if=/dev/zero", "bs=1M", &count];
    let url = server.exec_url(&pod.container, &words, false).await?;
    let mut stream = upgrade(&url, "websocket", "v4.channel.k8s.io").await?;
    figures.extend(transfer_figures(&name, read_all(&mut stream, &mut buffer)).await?);

    let of_server = || memory::of_program(&name);
    let of_helpers = || -> Result<f64> {
        let helpers = ["containerd-shim", "rrun-monitor"].map(memory::of_program);
        helpers.into_iter().sum()
    };
    let (before, helpers) = (of_server()?, of_helpers()?);
    let mut sessions = Vec::new();
    for _ in 0..SESSIONS {
        sessions.push(shell(server, pod).await?);
    }
    figures.push(vec![(of_server()? - before) / SESSIONS as f64]);
    figures.push(vec![(of_helpers()? - helpers) / SESSIONS as f64]);
    drop(sessions);

    tokio::time::sleep(MEMORY_SETTLE).await;
    let before = of_server()?;
    let mut sessions = Vec::new();
    for _ in 0..SESSIONS {
        sessions.push(forward_port(server, pod, SILENT).await?);
    }
    tokio::time::sleep(MEMORY_SETTLE).await;
    figures.push(vec![(of_server()? - before) / SESSIONS as f64]);
    Ok(figures)
}

/// Measures a transfer of [`MEGABYTES`] MB. Returns the data rate, the CPU time of all processes
/// per gigabyte, and the CPU time of the server per gigabyte.
async fn transfer_figures(
    server: &str,
    transfer: impl Future<Output = Result>,
) -> Result<[Vec<f64>; 3]> {
    let (all, own, begin) = (cpu_of_others()?, cpu_of_program(server)?, Instant::now());
    transfer.await?;
    let took = begin.elapsed().as_secs_f64();
    let of_a_gigabyte = 1024.0 / MEGABYTES as f64;
    Ok([
        vec![MEGABYTES as f64 / took],
        vec![(cpu_of_others()? - all) * of_a_gigabyte],
        vec![(cpu_of_program(server)? - own) * of_a_gigabyte],
    ])
}

async fn read_all(stream: &mut TcpStream, buffer: &mut [u8]) -> Result {
    let mut left = MEGABYTES << 20;
    while left > 0 {
        match stream.read(buffer).await? {
            0 => {
                return Err(format!(
                    "the connection was closed, although {left} bytes had not yet arrived"
                )
                .into());
            }
            count => left = left.saturating_sub(count),
        }
    }
    Ok(())
}

/// Sends frames as kubectl does, and waits until the program in the pod has read all of them and
/// exits.
async fn write_all(stream: &mut TcpStream, buffer: &mut [u8]) -> Result {
    let mut frame = vec![0; 8 + FRAME];
    let header =
        |fin: u32, length: usize| (u64::from(DATA) << 32) | u64::from(fin << 24) | length as u64;
    frame.splice(..8, header(0, FRAME).to_be_bytes());
    let (mut reading, mut writing) = stream.split();
    let write = async {
        for _ in 0..(MEGABYTES << 20) / FRAME {
            writing.write_all(&frame).await?;
        }
        writing.write_all(&header(1, 0).to_be_bytes()).await?;
        Ok::<_, crate::Error>(())
    };
    // The server sends window updates, then the output of the program in the pod, then the end of
    // the stream.
    let read = async {
        let mut received = Vec::new();
        let end = header(1, 0).to_be_bytes();
        while !received.windows(end.len()).any(|window| window == end) {
            match reading.read(buffer).await? {
                0 => return Err("the connection was closed before the stream's end".into()),
                count => received.extend_from_slice(buffer.get(..count).unwrap_or_default()),
            }
        }
        Ok(())
    };
    tokio::try_join!(write, read).map(|_| ())
}

/// Returns the CPU time in milliseconds that a program's processes have used, from the scheduler's
/// statistics.
fn cpu_of_program(name: &str) -> Result<f64> {
    let mut nanoseconds = 0.0;
    for process in std::fs::read_dir("/proc")?.flatten() {
        let comm = std::fs::read_to_string(process.path().join("comm"));
        if comm.is_ok_and(|comm| comm.trim_end() == name) {
            for task in std::fs::read_dir(process.path().join("task"))?.flatten() {
                // If a thread exits during the measurement, its CPU time is not counted.
                let Ok(text) = std::fs::read_to_string(task.path().join("schedstat")) else {
                    continue;
                };
                let on_cpu = text.split(' ').next().unwrap_or_default();
                nanoseconds += on_cpu.parse::<f64>()?;
            }
        }
    }
    Ok(nanoseconds / 1e6)
}

/// Starts an interactive exec and waits for its prompt.
async fn shell(server: &mut Server, pod: &Pod) -> Result<TcpStream> {
    let url = server.exec_url(&pod.container, &["sh"], true).await?;
    let mut stream = upgrade(&url, "websocket", "v4.channel.k8s.io").await?;
    prompt(&mut stream).await?;
    Ok(stream)
}

/// Opens a connection to a port of the pod.
async fn forward_port(server: &mut Server, pod: &Pod, port: u16) -> Result<TcpStream> {
    let url = server.port_forward_url(&pod.id).await?;
    let mut stream = upgrade(&url, "SPDY/3.1", "portforward.k8s.io").await?;
    stream.write_all(&open_pair(port)).await?;
    Ok(stream)
}

/// Reads until the shell has written its prompt.
async fn prompt(stream: &mut TcpStream) -> Result {
    let mut buffer = [0; 4096];
    let mut all = Vec::new();
    while !all.contains(&b'#') && !all.contains(&b'$') {
        let count = stream.read(&mut buffer).await?;
        if count == 0 {
            return Err(format!(
                "the connection was closed before the shell wrote a prompt; the shell's output: {:?}",
                String::from_utf8_lossy(&all)
            )
            .into());
        }
        all.extend_from_slice(buffer.get(..count).unwrap_or_default());
    }
    Ok(())
}

/// Connects to a URL and upgrades the connection to a protocol.
async fn upgrade(url: &str, to: &str, protocol: &str) -> Result<TcpStream> {
    let (host, path) = url
        .strip_prefix("http://")
        .and_then(|rest| rest.split_once('/'))
        .ok_or_else(|| format!("{url} is not a URL of the form http://HOST/PATH"))?;
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
        return Err(format!(
            "the server refused the upgrade of the connection; its response: {answer}"
        )
        .into());
    }
    Ok(stream)
}

/// Returns the frames that open the two streams of a forwarded connection. The frames are
/// SYN_STREAM frames. The headers in the two frames are uncompressed blocks of one zlib stream.
fn open_pair(port: u16) -> Vec<u8> {
    let mut frames = Vec::new();
    let port = port.to_string();
    for (number, kind) in [(ERROR, "error"), (DATA, "data")] {
        let pairs = [("streamtype", kind), ("port", &port), ("requestid", "0")];
        let mut plain = (pairs.len() as u32).to_be_bytes().to_vec();
        for text in pairs.iter().flat_map(|(name, value)| [name, value]) {
            plain.extend_from_slice(&(text.len() as u32).to_be_bytes());
            plain.extend_from_slice(text.as_bytes());
        }
        let mut block = if number == ERROR {
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
