//! A client of streams over WebSocket, by hand.

use std::io::{Read, Write};
use std::net::TcpStream;
use std::time::Instant;

use crate::ensure;
use crate::support::machine::{Result, deadline};

/// A client by hand: a WebSocket whose handshake is done.
pub(crate) fn websocket(url: &str, protocol: &str) -> Result<TcpStream> {
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
pub(crate) fn reads(stream: &mut TcpStream, what: &[u8]) -> Result {
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
pub(crate) fn message(channel: u8, data: &[u8]) -> Vec<u8> {
    let length = u8::try_from(data.len() + 1).unwrap_or(0);
    let mut message = vec![0x82, 0x80 | length, 0, 0, 0, 0, channel];
    message.extend_from_slice(data);
    message
}
