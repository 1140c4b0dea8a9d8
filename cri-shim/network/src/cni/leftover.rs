//! Plugins that outlived the server that ran them, or their deadline.
//!
//! A plugin runs others (IPAM, iptables); a kill of one is not the end of all. What they have in
//! common is the environment: each has the pod's id in CNI_CONTAINERID.

use std::collections::HashSet;
use std::time::{Duration, Instant};

use rustix::process::{PidfdFlags, Signal, pidfd_open, pidfd_send_signal};

use rrun_calls::wait::blocking;

/// How long killed processes may take to be gone.
const KILL_TIMEOUT: Duration = Duration::from_secs(5);

/// The most of an environment that is looked at, in bytes.
const ENVIRONMENT_BYTES: u64 = 256 << 10;

/// Kills every process that a plugin for this pod has left, and waits until they are gone.
pub(super) async fn end(container: &str) {
    let variable = format!("CNI_CONTAINERID={container}");
    let what = format!("pod {container}: end what is left of its CNI plugins");
    blocking(what, move || {
        let begin = Instant::now();
        // Again and again: one that is killed may just have started another.
        let mut logged = HashSet::new();
        while let Some(pid) = kill_all(&variable) {
            if logged.insert(pid) {
                log::info!("killed the process {pid}, left of a CNI plugin ({variable})");
            }
            if begin.elapsed() > KILL_TIMEOUT {
                log::warn!("the process {pid} of a CNI plugin ({variable}) does not end");
                return;
            }
            std::thread::sleep(Duration::from_millis(5));
        }
    })
    .await;
}

/// One of those that were killed.
fn kill_all(variable: &str) -> Option<i32> {
    let mut found = None;
    let entries = std::fs::read_dir("/proc").into_iter().flatten().flatten();
    for pid in entries.filter_map(|entry| entry.file_name().to_str()?.parse::<i32>().ok()) {
        let Some(process) = rustix::process::Pid::from_raw(pid) else {
            continue;
        };
        // The pidfd first: what is read of the number after it is read of what it holds.
        let Ok(pidfd) = pidfd_open(process, PidfdFlags::empty()) else {
            continue;
        };
        if has(pid, variable) && pidfd_send_signal(&pidfd, Signal::KILL).is_ok() {
            found = Some(pid);
        }
    }
    found
}

/// A zombie's environment is empty.
fn has(pid: i32, variable: &str) -> bool {
    use std::io::Read;
    let Ok(file) = std::fs::File::open(format!("/proc/{pid}/environ")) else {
        return false;
    };
    let mut environment = Vec::new();
    let read = file.take(ENVIRONMENT_BYTES).read_to_end(&mut environment);
    read.is_ok()
        && environment
            .split(|byte| *byte == 0)
            .any(|one| one == variable.as_bytes())
}
