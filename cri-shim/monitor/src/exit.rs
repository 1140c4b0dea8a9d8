//! Exit statuses of processes, and the exit record that is stored on disk for each container.

use std::fs::{File, OpenOptions};
use std::io::Write;
use std::os::unix::fs::OpenOptionsExt;
use std::path::Path;
use std::time::{SystemTime, UNIX_EPOCH};

use rustix::process::WaitStatus;

use rrun_protocol::ExitRecord;

/// The name of the exit record in the bundle.
const RECORD: &str = "exit.json";
const TEMPORARY_RECORD: &str = "exit.json.tmp";

/// Returns the exit status of a process as a shell reports it. If a signal killed the process, the
/// exit status is 128 plus the signal's number. Returns `None` if the process has only stopped. The
/// kernel reports a stop if a process of a container requests that its parent, the monitor, traces
/// it (PTRACE_TRACEME).
pub(crate) fn code(status: WaitStatus) -> Option<i32> {
    let killed_by = status.terminating_signal().map(|signal| 128 + signal);
    status.exit_status().or(killed_by)
}

/// Returns the exit status like [`code`], for a process that has exited with this status in the form
/// of wait(2).
pub(crate) fn code_of_raw(status: i32) -> i32 {
    if libc::WIFSIGNALED(status) {
        128 + libc::WTERMSIG(status)
    } else {
        libc::WEXITSTATUS(status)
    }
}

/// Returns the current time in nanoseconds since the epoch.
pub(crate) fn now() -> i64 {
    SystemTime::now()
        .duration_since(UNIX_EPOCH)
        .ok()
        .and_then(|since| i64::try_from(since.as_nanos()).ok())
        .unwrap_or(0)
}

/// Writes the exit record to disk, either completely or not at all. A failure can have a cause that
/// passes, such as a lack of memory, so the write is repeated once.
pub(crate) fn record(bundle: &Path, exit: &ExitRecord) -> std::io::Result<()> {
    let written = write(bundle, exit).or_else(|_| write(bundle, exit));
    if written.is_err() {
        let _ = std::fs::remove_file(bundle.join(TEMPORARY_RECORD));
    }
    written
}

fn write(bundle: &Path, exit: &ExitRecord) -> std::io::Result<()> {
    let temporary = bundle.join(TEMPORARY_RECORD);
    // Ours: only root can create an entry in the bundle.
    let mut file = OpenOptions::new()
        .write(true)
        .create(true)
        .truncate(true)
        .mode(0o600)
        .open(&temporary)?;
    file.write_all(&serde_json::to_vec(exit)?)?;
    file.sync_all()?;
    std::fs::rename(&temporary, bundle.join(RECORD))?;
    // Syncing the directory makes sure that the record's directory entry survives a crash of the
    // machine.
    File::open(bundle)?.sync_all()
}

/// Removes the container's exit record if it exists.
pub(crate) fn forget(bundle: &Path) {
    for name in [RECORD, TEMPORARY_RECORD] {
        let _ = std::fs::remove_file(bundle.join(name));
    }
}
