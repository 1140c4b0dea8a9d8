//! Fuzz targets for what a container prints and what a server sends to the monitor. `tests/fuzz`
//! runs them.

use rrun_protocol::wire::{decode, encode};
use rrun_protocol::{Event, ExitRecord, Pod, Reply, Request};
use serde::Serialize;
use serde::de::DeserializeOwned;

use crate::container_log::{MAX_LINE_BYTES, Rest, Stream, push_lines};
use crate::log_file::MAX_PENDING_BYTES;

/// The name and the function of a fuzz target.
pub type FuzzTarget = (&'static str, fn(&[u8]));

/// The fuzz targets in this crate.
pub const TARGETS: &[FuzzTarget] = &[
    ("container-log", container_log),
    ("monitor-message", message),
];

/// The length of a log line before the container's output:
/// `0000-00-00T00:00:00.000000000Z stdout F `.
const HEADER_BYTES: usize = 40;

/// Converts a container's output to log lines. The first byte of `input` is the length of the
/// pieces in which the output arrives. The log lines contain the output without a change.
fn container_log(input: &[u8]) {
    let Some((&size, output)) = input.split_first() else {
        return;
    };
    let (mut log, mut rest, mut lines) = (Vec::new(), Rest::default(), 0);
    for piece in output.chunks(usize::from(size).max(1) * 97) {
        let mut input = [&rest.bytes[..], piece].concat();
        loop {
            let mut pending = Vec::new();
            lines += push_lines(&mut pending, &mut rest, Stream::Stderr, &input);
            assert!(pending.len() < MAX_PENDING_BYTES + input.len() + 8 * HEADER_BYTES);
            log.append(&mut pending);
            if !rest.has_lines {
                break;
            }
            input.clone_from(&rest.bytes);
        }
        assert!(rest.bytes.len() <= MAX_LINE_BYTES);
    }
    let mut logged = Vec::new();
    let mut found = 0;
    for line in log.split_inclusive(|byte| *byte == b'\n') {
        let (header, text) = line.split_at(HEADER_BYTES);
        assert!(header.is_ascii() && text.len() <= MAX_LINE_BYTES + 1);
        let text = text.strip_suffix(b"\n").unwrap();
        logged.extend_from_slice(text);
        if header[38] == b'F' {
            logged.push(b'\n');
        }
        found += 1;
    }
    logged.extend_from_slice(&rest.bytes);
    assert!(logged == output && found == lines);
}

/// Decodes messages in both directions, and the files that a monitor reads and writes.
fn message(input: &[u8]) {
    fn check<T: DeserializeOwned + Serialize>(input: &[u8]) {
        let mut received = input.to_vec();
        while let Ok(Some(message)) = decode::<T>(&mut received) {
            let mut again = encode(&message).unwrap();
            assert!(decode::<T>(&mut again).unwrap().is_some() && again.is_empty());
        }
    }
    check::<Request>(input);
    check::<Reply>(input);
    check::<Event>(input);
    let _ = serde_json::from_slice::<Pod>(input);
    let _ = serde_json::from_slice::<ExitRecord>(input);
}
