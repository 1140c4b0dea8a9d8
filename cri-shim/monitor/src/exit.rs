//! How processes end, and the record that a container's end leaves on the disk.

use std::fs::File;
use std::io::Write;
use std::path::Path;
use std::time::{SystemTime, UNIX_EPOCH};

use rustix::process::WaitStatus;

use rrun_protocol::ExitRecord;

/// The record's name in the bundle.
const RECORD: &str = "exit.json";
const TEMPORARY_RECORD: &str = "exit.json.tmp";

/// An exit status as a shell would give it.
pub(crate) fn code(status: WaitStatus) -> i32 {
    match (status.exit_status(), status.terminating_signal()) {
        (Some(code), _) => code,
        (None, Some(signal)) => 128 + signal,
        (None, None) => 255,
    }
}

/// Nanoseconds since the epoch.
pub(crate) fn now() -> i64 {
    SystemTime::now()
        .duration_since(UNIX_EPOCH)
        .ok()
        .and_then(|since| i64::try_from(since.as_nanos()).ok())
        .unwrap_or(0)
}

/// Puts the record on the disk whole or not at all.
pub(crate) fn record(bundle: &Path, exit: &ExitRecord) -> std::io::Result<()> {
    let temporary = bundle.join(TEMPORARY_RECORD);
    let mut file = File::create(&temporary)?;
    file.write_all(&serde_json::to_vec(exit)?)?;
    file.sync_all()?;
    std::fs::rename(&temporary, bundle.join(RECORD))?;
    // The name, too, must outlive a crash of the machine.
    File::open(bundle)?.sync_all()
}

/// Removes the record; it need not be there.
pub(crate) fn forget(bundle: &Path) {
    for name in [RECORD, TEMPORARY_RECORD] {
        let _ = std::fs::remove_file(bundle.join(name));
    }
}
