//! The monitor's own log, which is the file `monitor.log` in the monitor's directory. The log
//! contains errors that the monitor does not send to a client.

use std::fs::OpenOptions;
use std::io::Write;
use std::os::unix::fs::OpenOptionsExt;

use super::timestamp::Timestamp;
use rrun_protocol::LOG_NAME;

/// The size in bytes above which the monitor empties the log. The size is limited, because the log
/// is on a tmpfs and occupies memory.
const MAX_BYTES: u64 = 64 << 10;

/// Appends a line to the log. A failure is ignored, because the monitor has no other log in which
/// to report it.
pub(crate) fn write(line: &str) {
    // Unit tests run in the source directory.
    if cfg!(test) {
        return;
    }
    let opened = OpenOptions::new()
        .append(true)
        .create(true)
        .mode(0o600)
        .open(LOG_NAME);
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
