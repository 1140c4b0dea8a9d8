//! Kills the remaining processes of CNI plugins. Processes can remain if a plugin exceeded its
//! deadline, or if an earlier server process started the plugin.
//!
//! A plugin runs other programs, such as IPAM plugins and iptables. If only the plugin were killed,
//! these programs would continue to run. This module finds these programs by their environment
//! variable CNI_CONTAINERID. The variable contains the pod's id, and a plugin's programs inherit
//! the variable.

use std::collections::HashSet;
use std::time::{Duration, Instant};

use rustix::process::{PidfdFlags, Signal, pidfd_open, pidfd_send_signal};

use rrun_calls::wait::blocking;
use rrun_kernel::own_cgroup;

/// The time for which this module waits for the exit of killed processes.
const KILL_TIMEOUT: Duration = Duration::from_secs(5);

/// The maximum number of bytes of a process's environment that are searched for CNI_CONTAINERID.
const ENVIRONMENT_BYTES: u64 = 256 << 10;

/// Kills the remaining processes of the CNI plugins of the pod `container`. Then waits until these
/// processes have exited.
pub(super) async fn end(container: &str) {
    let variable = format!("CNI_CONTAINERID={container}");
    let what = format!("pod {container}: kill the remaining processes of its CNI plugins");
    blocking(what, move || {
        let begin = Instant::now();
        // The search for processes is repeated, because a killed process may have started another
        // process just before the kill.
        let mut logged = HashSet::new();
        while let Some(pid) = kill_all(&variable) {
            if logged.insert(pid) {
                log::info!("the server killed the remaining process {pid} of a CNI plugin ({variable})");
            }
            if begin.elapsed() > KILL_TIMEOUT {
                log::warn!(
                    "the remaining process {pid} of a CNI plugin ({variable}) does not exit after SIGKILL"
                );
                return;
            }
            std::thread::sleep(Duration::from_millis(5));
        }
    })
    .await;
}

/// Kills all processes in the server's cgroup whose environment contains `variable`. Returns the id of one of the killed
/// processes, or `None` if no process was killed.
fn kill_all(variable: &str) -> Option<i32> {
    let mut found = None;
    for pid in own_cgroup::processes() {
        let Some(process) = rustix::process::Pid::from_raw(pid) else {
            continue;
        };
        // The pidfd is opened before the environment is read. The process may exit, and the kernel
        // may give its id to another process. The pidfd still refers to the exited process, so the
        // other process does not get the signal.
        let Ok(pidfd) = pidfd_open(process, PidfdFlags::empty()) else {
            continue;
        };
        if has(pid, variable) && pidfd_send_signal(&pidfd, Signal::KILL).is_ok() {
            found = Some(pid);
        }
    }
    found
}

/// Returns whether the environment of the process contains `variable`. Returns false for a zombie,
/// because a zombie's environment is empty.
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
