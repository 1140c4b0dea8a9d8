//! A client for streams over WebSocket. The client builds the messages itself, without a library.

use std::io::{Read, Write};
use std::net::TcpStream;
use std::time::Instant;

use crate::ensure;
use crate::support::machine::{Result, deadline};

/// Connects to a URL, and returns a WebSocket connection after its handshake.
pub(crate) fn websocket(url: &str, protocol: &str) -> Result<TcpStream> {
    let (host, path) = url
        .strip_prefix("http://")
        .and_then(|rest| rest.split_once('/'))
        .ok_or(format!("{url} is not an http URL"))?;
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
    ensure!(
        head.starts_with("HTTP/1.1 101"),
        "the server refused the WebSocket handshake; the head of the server's response: {head}"
    );
    ensure!(
        head.contains("s3pPLMBiTxaQ9kYGzzhZRbK+xOo="),
        "the server's response does not contain the accept key of the example in RFC 6455: {head}"
    );
    Ok(stream)
}

/// Reads messages until the received data contains `what`. Each message consists of a channel
/// number and data.
pub(crate) fn reads(stream: &mut TcpStream, what: &[u8]) -> Result {
    let mut all = Vec::new();
    let mut buffer = [0; 4096];
    let mut from = 0;
    // This deadline applies to all reads together. If a server sends a little data from time to
    // time, no single read times out. Without the deadline, the test could then wait forever.
    let give_up = Instant::now() + 10 * deadline();
    while !all[from..].windows(what.len()).any(|window| window == what) {
        ensure!(
            Instant::now() < give_up,
            "the server did not send the expected data in time, but sent {:?}",
            String::from_utf8_lossy(&all)
        );
        from = all.len().saturating_sub(what.len());
        let count = stream.read(&mut buffer)?;
        ensure!(
            count > 0,
            "the server closed the connection after it sent {:?}",
            String::from_utf8_lossy(&all)
        );
        all.extend_from_slice(&buffer[..count]);
    }
    Ok(())
}

/// Returns a WebSocket message that a client sends on `channel`. A client must mask its messages. A
/// mask of zeros leaves the data unchanged.
pub(crate) fn message(channel: u8, data: &[u8]) -> Vec<u8> {
    let length = u8::try_from(data.len() + 1).unwrap_or(0);
    let mut message = vec![0x82, 0x80 | length, 0, 0, 0, 0, channel];
    message.extend_from_slice(data);
    message
}
