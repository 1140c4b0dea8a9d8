//! The monitor's own log, `monitor.log` in its directory: what no client gets as an answer.

use std::fs::OpenOptions;
use std::io::Write;
use std::os::unix::fs::OpenOptionsExt;

use super::timestamp::Timestamp;

/// Where it is, in the monitor's working directory.
const FILE_NAME: &str = "monitor.log";

/// At this many bytes it starts anew: it lies in memory (tmpfs).
const MAX_BYTES: u64 = 64 << 10;

/// Writes a line. A failure is ignored: there is no other log.
pub(crate) fn write(line: &str) {
    let opened = OpenOptions::new()
        .append(true)
        .create(true)
        .mode(0o600)
        .open(FILE_NAME);
    let Ok(mut file) = opened else {
        return;
    };
    if file.metadata().is_ok_and(|data| data.len() > MAX_BYTES) {
        let _ = file.set_len(0);
    }
    let mut text = Timestamp::now().text().to_vec();
    text.push(b' ');
    text.extend_from_slice(line.as_bytes());
    text.push(b'\n');
    let _ = file.write_all(&text);
}
